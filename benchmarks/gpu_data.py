"""Makes a data folder whose validation split is long enough to time an evaluation, by repeating another folder's rows.

It adds no text: a score on the new folder's first rows is the old one's, and one on all of them says no more. For
machines that cannot get the corpus of their preset.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # beside this file lies one that is named as the package is
    here = Path(__file__).resolve().parent
    sys.path = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]

import argparse
import shutil
from dataclasses import replace

import numpy as np

from trainer.common import DataError
from trainer.manifest import MANIFEST_FILE, FileFacts, Manifest, load_manifest, sha256_of


def tile_val(data: Path, out: Path, *, tokens: int) -> Manifest:
    """Copies a prepared folder, with the rows of its `val` split repeated until they hold so many tokens.

    Args:
        data: The folder.
        out: The new one; must not exist yet.
        tokens: As an evaluation counts them, the first token of each row left out.

    Raises:
        DataError: `data` is not prepared, or `out` is there already.
    """
    manifest = load_manifest(data)
    if out.exists():
        raise DataError(f"{out} exists; a data folder is never changed: remove it, or give another --out")
    facts = manifest.splits["val"]
    times = max(1, -(-tokens // (facts.rows * manifest.row_tokens)))
    draft = out.with_name(f"{out.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name in manifest.files:
        if not name.startswith("val."):
            shutil.copyfile(manifest.path(name), draft / name)
    rows, index = np.load(manifest.path("val.rows.npy")), np.load(manifest.path("val.index.npy"))
    np.save(draft / "val.rows.npy", np.tile(rows, (times, 1)))
    np.save(draft / "val.index.npy", repeated(index, times, rows=facts.rows))
    written = {name: FileFacts(sha256_of(draft / name), (draft / name).stat().st_size) for name in manifest.files}
    tiled = replace(
        facts,
        rows=times * facts.rows,
        tokens=times * facts.tokens,
        documents=times * facts.documents,
        bytes=times * facts.bytes,
    )
    made = replace(
        manifest,
        splits={**manifest.splits, "val": tiled},
        files=written,
        source=f"{manifest.source}; val is tiled: the same rows {times} times over",
    )
    (draft / MANIFEST_FILE).write_bytes(made.to_json())
    os.replace(draft, out)
    return load_manifest(out)


def repeated(index: np.ndarray, times: int, *, rows: int) -> np.ndarray:
    """The index (S, 4: row, start, stop, document) of rows that are repeated; each copy of a document is one more."""
    documents = int(index[:, 3].max()) + 1
    shifts = np.arange(times, dtype=index.dtype)[:, None, None] * np.array([rows, 0, 0, documents], index.dtype)
    return (index[None] + shifts).reshape(-1, 4)


def main() -> int:
    """Makes the folder and says what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="Folder made by python -m trainer.prepare.")
    parser.add_argument("--tile-val", type=int, required=True, metavar="N", help="Tokens that val shall hold at least.")
    parser.add_argument("--out", type=Path, required=True, help="The new folder.")
    arguments = parser.parse_args()
    try:
        made = tile_val(arguments.data, arguments.out, tokens=arguments.tile_val)
    except DataError as error:
        print(f"gpu_data: {error}", file=sys.stderr)
        return 2
    facts = made.splits["val"]
    print(f"{arguments.out}: val has {facts.rows:,} rows, {facts.rows * made.row_tokens:,} tokens; {made.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
