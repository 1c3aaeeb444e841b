"""Copies a study, but for its repository, to a place that fsspec knows: `python -m raysearch.copying FOLDER URL`.

One pass, which can be cut off anywhere and repeated: a file that is there is whole, and files of a trial that are there
are not sent again. It reads a copy of the journal, so that the study may go on meanwhile. It never deletes.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false
# (fsspec has no types)

from __future__ import annotations

import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec.core

from raysearch import folder, report
from raysearch.errors import UserError
from raysearch.folder import Folder
from raysearch.journal import Journal
from raysearch.study import Study

MOST_BYTES = 2**20  # of a trial's file: logs, curves and results, but no weights that a program of one's own may leave
BATCH = 100  # files that are sent at once


def copy(place: Folder, url: str) -> None:
    """Copies what has changed.

    Args:
        place: The study.
        url: Of a folder, as fsspec has it: `s3://bucket/studies/mine`.

    Raises:
        UserError: The study cannot be read.
        Exception: Whatever the file system of the URL raises.
    """
    found: tuple[Any, str] = fsspec.core.url_to_fs(url)
    files, root = found
    root = root.rstrip("/")
    with tempfile.TemporaryDirectory(prefix="raysearch-") as scratch:
        here = Path(scratch)
        copied = here / place.journal.name
        copy_journal(place.journal, copied)
        config = folder.load_config(place.config)
        study = _read(place, copied)
        _send_trials(files, f"{root}/{place.trials.name}", place, study)
        written = report.write_all(study, here, name=config.name, metric=config.objective.metric)
        notes = [path for path in sorted(place.path.glob("*.md")) if path.name != report.SUMMARY]
        files.makedirs(root, exist_ok=True)
        for path in (*written, *notes, place.token, copied, place.config):  # a folder without the last is no study
            if path.exists():
                files.put_file(str(path), f"{root}/{path.name}.partial")
                files.mv(f"{root}/{path.name}.partial", f"{root}/{path.name}")


def copy_journal(source: Path, target: Path) -> None:
    """Writes a consistent copy of a journal that may be written to meanwhile, as a single file."""
    journal = sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)
    with closing(journal), closing(sqlite3.connect(target)) as copied:
        journal.backup(copied)
        copied.execute("PRAGMA journal_mode=DELETE")  # nothing of it lies in a second file


def _read(place: Folder, journal: Path) -> Study:
    opened = Journal(journal, writer=False)
    try:
        return folder.replay(folder.load_config(place.config), opened)
    finally:
        opened.close()


def _send_trials(files: Any, root: str, place: Folder, study: Study) -> None:
    there: dict[str, Any] = files.find(root, detail=True) if files.exists(root) else {}
    sizes = {name: info["size"] for name, info in there.items()}
    missing = [
        (str(path), target)
        for path in _results(place, study)
        if sizes.get(target := f"{root}/{path.parent.name}/{path.name}") != path.stat().st_size
    ]
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        for parent in sorted({target.rsplit("/", 1)[0] for _, target in batch}):
            files.makedirs(parent, exist_ok=True)
        files.put([path for path, _ in batch], [target for _, target in batch])


def _results(place: Folder, study: Study) -> Iterator[Path]:
    """The small files of the trials that are over for good."""
    for name, state in study.trials.items():
        if state.outcome is None or state.outcome.is_infrastructure:
            continue
        folder_of = place.trials / name
        for path in sorted(folder_of.iterdir()) if folder_of.is_dir() else ():
            if path.is_file() and not path.is_symlink() and path.stat().st_size <= MOST_BYTES:
                yield path


def main(arguments: list[str]) -> int:
    """Makes one pass; a reason for failure goes to stderr."""
    try:
        copy(Folder(Path(arguments[0])), arguments[1])
    except UserError as error:
        print(error, file=sys.stderr)  # noqa: T201
    except Exception as error:  # noqa: BLE001 - of any file system: whoever started this says it in a line
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
