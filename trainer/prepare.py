"""Prepares a data folder, once: trains the tokenizer, packs every split into rows, and writes a manifest of it all.

It does not train the model, nor deal out batches, nor measure: that is `trainer.harness`, which reads what this wrote.

    python -m trainer.prepare --preset cpu

The formats, and why they are as they are: docs/adr/0003-data-formats.md.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
import time
import tomllib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from trainer import datasets, packing
from trainer.common import MB, PRESETS, DataError, Ticker, cache_dir, preset_names, reason, require_space, say
from trainer.datasets import SPLITS, Corpus
from trainer.hub import Hub
from trainer.manifest import (
    EVALUATION_VERSION,
    INDEXED_SPLITS,
    MANIFEST_FILE,
    FileFacts,
    Manifest,
    SplitFacts,
    file_names,
    load_manifest,
    sha256_of,
    verify,
)
from trainer.tokenizer import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE, TOKENIZER_FILE, Tokenizer

# `trainer.harness` takes from here what it needs to read a folder
__all__ = ["EVALUATION_VERSION", "DataError", "Manifest", "Tokenizer", "load_manifest", "prepare", "verify"]

MAX_ROW_TOKENS = 65_535
SHUFFLE_SEED = 1
BATCH_CHARS = 4_000_000
BATCH_ROWS = 4_096


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def prepare(
    open_corpus: Callable[[], Corpus],
    directory: Path,
    *,
    vocab_size: int,
    row_tokens: int,
    shards: int = 0,
    force: bool = False,
) -> Manifest:
    """Prepares a folder, unless it is prepared already. Safe to call from several processes at once.

    Everything is built beside the folder and moved into it when it is whole, so that a program which still reads the
    old files keeps them; the manifest comes last.

    Args:
        open_corpus: opens the text; called only if there is something to do.
        directory: the folder.
        vocab_size: tokens of the vocabulary, BOS included.
        row_tokens: T; a row has one more.
        shards: noted in the manifest.
        force: prepare anew, whatever is there.

    Raises:
        DataError: one line with the remedy: broken text, too little of it, no space, no network.
    """

    def build(building: Path) -> Manifest:
        return _build(open_corpus(), building, vocab_size=vocab_size, row_tokens=row_tokens, shards=shards)

    return _made_once(directory, build, force=force)


def take(arrived: Path, request: "Request") -> Manifest:
    """Takes in a folder that was prepared elsewhere, unless the one that is asked for is prepared already.

    Every file is read and compared with the manifest first. The folder that it came in stays as it is.

    Args:
        arrived: where the files lie.
        request: what they must be, and where they go.

    Raises:
        DataError: a file is missing or damaged, or these are other data than was asked for; nothing is taken in.
    """

    def copy(building: Path) -> Manifest:
        found = load_manifest(arrived)
        _check_same(found, request, shards_named=False, remedy="take another folder")
        require_space(building, sum(facts.bytes for facts in found.files.values()), f"a copy of {arrived}")
        for name in (*found.files, MANIFEST_FILE):
            try:
                os.link(arrived / name, building / name)
            except OSError:  # another disk, or one without links
                shutil.copyfile(arrived / name, building / name)
        return verify(building)

    return _made_once(request.directory, copy)


def _is_prepared(directory: Path) -> bool:
    return (directory / MANIFEST_FILE).exists()


def _made_once(directory: Path, make: Callable[[Path], Manifest], *, force: bool = False) -> Manifest:
    """Has a data folder made in one beside it and moved in, by one process at a time, unless it is prepared already."""
    if not force and _is_prepared(directory):
        return load_manifest(directory)
    import filelock  # noqa: PLC0415

    directory.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lock = filelock.FileLock(f"{directory}.lock")
        try:
            stack.enter_context(lock.acquire(timeout=0.1))
        except filelock.Timeout:
            say(f"another process prepares {directory}: waiting for it")
            stack.enter_context(lock.acquire())
        if not force and _is_prepared(directory):
            return load_manifest(directory)  # that process has done it
        building = directory.with_name(f"{directory.name}.building")
        shutil.rmtree(building, ignore_errors=True)  # of a call that was killed
        building.mkdir()
        stack.callback(shutil.rmtree, building, ignore_errors=True)
        return _move_in(make(building), directory)


def _build(corpus: Corpus, building: Path, *, vocab_size: int, row_tokens: int, shards: int) -> Manifest:
    # a token takes 2 bytes, once loose and once in a row, and stands for 2 bytes of text or more, if it may be so long
    text_bytes_per_token = 2 if vocab_size >= 512 else 1
    require_space(building, 4 * corpus.text_bytes // text_bytes_per_token, f"the preparation of {corpus.dataset}")
    started_s = time.monotonic()
    tokenizer = Tokenizer.train((text for split, text in corpus.documents() if split == "train"), vocab_size=vocab_size)
    say(f"tokenizer of {vocab_size} tokens learned in {time.monotonic() - started_s:.1f} s")
    _write(building / TOKENIZER_FILE, lambda file: file.write(tokenizer.to_json()))
    _write(building / "token_bytes.npy", lambda file: np.save(file, tokenizer.token_bytes()))

    started_s = time.monotonic()
    tokens = _tokenise(corpus, tokenizer, building)
    say(f"{sum(len(t.lengths) for t in tokens.values()):,} documents tokenised in {time.monotonic() - started_s:.1f} s")
    started_s = time.monotonic()
    splits = {split: _write_split(tokens[split], split, tokenizer, building, row_tokens=row_tokens) for split in SPLITS}
    say(f"packed in {time.monotonic() - started_s:.1f} s: {_summary(splits)}")
    files = {name: FileFacts(sha256_of(building / name), (building / name).stat().st_size) for name in file_names()}
    return Manifest(
        evaluation_version=EVALUATION_VERSION,
        dataset=corpus.dataset,
        vocab_size=vocab_size,
        row_tokens=row_tokens,
        bos_id=tokenizer.bos_id,
        tokenizer_sha256=files[TOKENIZER_FILE].sha256,
        splits=splits,
        files=files,
        source=corpus.source,
        shards=shards,
        directory=building,
        sha256="",
    )


def _summary(splits: Mapping[str, SplitFacts]) -> str:
    return "; ".join(
        f"{split} {f.rows:,} rows, {f.tokens:,} tokens, {f.documents:,} documents, {f.bytes / MB:.2f} MB"
        for split, f in splits.items()
    )


def _move_in(built: Manifest, directory: Path) -> Manifest:
    """Moves the built files into the folder; while it lacks its manifest, the folder counts as not prepared."""
    directory.mkdir(exist_ok=True)
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    content = built.to_json()
    _write(built.directory / MANIFEST_FILE, lambda file: file.write(content))
    for name in (*built.files, MANIFEST_FILE):
        os.replace(built.directory / name, directory / name)
    return load_manifest(directory)


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that it is on the disk, and not on its way there, when this returns."""
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a split's documents, one after the other in a file, without BOS."""

    path: Path
    lengths: array

    def read(self) -> np.ndarray:
        if not self.path.stat().st_size:
            return np.zeros(0, np.uint16)
        return np.asarray(np.memmap(self.path, np.uint16, mode="r"))  # a plain array: slicing a memmap is slow


def _tokenise(corpus: Corpus, tokenizer: Tokenizer, building: Path) -> dict[str, _Tokens]:
    tokens = {split: _Tokens(building / f"{split}.tokens", array("q")) for split in SPLITS}
    token_bytes = tokenizer.token_bytes()
    ticker = Ticker()
    done_bytes = 0

    def encode(document: tuple[str, str]) -> tuple[str, np.ndarray, int]:
        split, text = document
        ids = tokenizer.encode(text)
        text_bytes = len(text.encode())
        if int(token_bytes[ids].sum()) != text_bytes:
            raise AssertionError(f"the tokens of a document of {text_bytes} bytes stand for another number of bytes")
        return split, ids.astype(np.uint16), text_bytes

    threads = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(tokens[split].path.open("wb")) for split in SPLITS}
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        waiting: deque[Iterator[tuple[str, np.ndarray, int]]] = deque()
        for batch in itertools.chain(_batches(corpus.documents()), [[]]):
            waiting.append(pool.map(encode, batch))  # the next batch is read while the threads work on this one
            for split, ids, text_bytes in waiting.popleft() if len(waiting) > 1 else ():
                files[split].write(ids.tobytes())
                tokens[split].lengths.append(len(ids))
                done_bytes += text_bytes
            ticker.say(f"  tokenising: {done_bytes / MB:,.0f} of about {corpus.text_bytes / MB:,.0f} MB")
    return tokens


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document[1])
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _write_split(tokens: _Tokens, split: str, tokenizer: Tokenizer, building: Path, *, row_tokens: int) -> SplitFacts:
    """Packs a split's documents, writes its rows (and index), and removes the file of loose tokens."""
    capacity = row_tokens + 1
    plan = packing.shuffle_rows(packing.pack(tokens.lengths, capacity=capacity), seed=SHUFFLE_SEED)
    if not len(plan):
        raise DataError(
            f"split {split}: its {len(tokens.lengths)} documents have {sum(tokens.lengths)} tokens, which fill no row "
            f"of {row_tokens}; give more (or more and shorter) documents, or a smaller --row-tokens"
        )
    rows = int(plan[-1, packing.ROW]) + 1
    text_bytes = _write_rows(tokens, plan, building / f"{split}.rows.npy", tokenizer, shape=(rows, capacity))
    if split in INDEXED_SPLITS:
        index = np.ascontiguousarray(plan[:, [packing.ROW, packing.START, packing.STOP, packing.DOC]])
        _write(building / f"{split}.index.npy", lambda file: np.save(file, index))
    tokens.path.unlink()
    return SplitFacts(rows, rows * capacity, len(np.unique(plan[:, packing.DOC])), text_bytes)


def _write_rows(tokens: _Tokens, plan: np.ndarray, path: Path, tokenizer: Tokenizer, *, shape: tuple[int, int]) -> int:
    """Writes the rows that a plan describes, some thousands at a time. Returns the bytes of text in them."""
    loose = tokens.read()
    begins = np.concatenate([[0], np.cumsum(tokens.lengths)])
    token_bytes = tokenizer.token_bytes()
    rows, capacity = shape
    text_bytes = 0

    def write(file: BinaryIO) -> None:
        nonlocal text_bytes
        # not np.memmap(mode="w+"): a full disk would then kill the process instead of raising an error
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": shape})
        for first in range(0, rows, BATCH_ROWS):
            batch = np.full((min(BATCH_ROWS, rows - first), capacity), tokenizer.bos_id, np.uint16)
            low, high = np.searchsorted(plan[:, packing.ROW], [first, first + len(batch)])
            sources = begins[plan[low:high, packing.DOC]] + plan[low:high, packing.OFFSET]
            places = plan[low:high, : packing.DOC].tolist()
            for (row, start, stop), source in zip(places, sources.tolist(), strict=True):
                batch[row - first, start + 1 : stop] = loose[source : source + stop - start - 1]
            text_bytes += int(token_bytes[batch].sum())
            file.write(batch.tobytes())

    _write(path, write)
    return text_bytes


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What is asked for, presets and defaults filled in. `why` is one sentence: why this dataset."""

    dataset: str
    why: str
    vocab_size: int
    row_tokens: int
    shards: int
    directory: Path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 2 with one line on stderr."""
    place: object = "the arguments"
    try:
        args = parse(argv)
        request = resolve(args)
        place = request.directory
        manifest = _run(request, args)
    except DataError as error:
        say(f"error: {error}")
        return 2
    except OSError as error:
        say(
            f"error: {error.filename or place}: {reason(error)}; correct that, or choose another folder with --data DIR"
        )
        return 2
    except ModuleNotFoundError as error:
        say(
            f"error: {error.name} is not installed; pip install {error.name}, "
            "or copy a folder that is prepared elsewhere"
        )
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it can")
        return 130
    fields = {
        "data": str(request.directory),
        "dataset": request.dataset,
        "why": request.why,
        "manifest_sha256": manifest.sha256 if manifest else "",
        "evaluation_version": EVALUATION_VERSION,
        "vocab_size": request.vocab_size,
        "row_tokens": request.row_tokens,
    }
    print(json.dumps(fields), flush=True)
    return 0


def _run(request: Request, args: argparse.Namespace) -> Manifest | None:
    """Does what was asked for; None if it was only asked whether the data are there, and they are not."""
    directory, shards_named = request.directory, args.shards is not None
    if args.find and not _is_prepared(directory):
        return None
    if args.take:
        manifest = take(args.take.expanduser().absolute(), request)
    elif args.find or (args.verify and not args.force):
        manifest = load_manifest(directory)
    else:
        manifest = prepare(
            lambda: datasets.open_corpus(request.dataset, shards=request.shards, downloads=cache_dir() / "downloads"),
            directory,
            vocab_size=request.vocab_size,
            row_tokens=request.row_tokens,
            shards=request.shards,
            force=args.force,
        )
    _check_same(manifest, request, shards_named=shards_named)
    if args.verify:
        manifest = verify(directory)
        say(f"{directory}: {len(manifest.files)} files verified")
    return manifest


def _check_same(
    manifest: Manifest,
    request: Request,
    *,
    shards_named: bool,
    remedy: str = "name another folder with --data, or add --force to replace what is there",
) -> None:
    """Refuses a folder that holds other data than was asked for."""
    for name in ("dataset", "vocab_size", "row_tokens", *(("shards",) if shards_named else ())):
        holds, asked = getattr(manifest, name), getattr(request, name)
        if holds != asked:
            raise DataError(
                f"{manifest.directory}: prepared with {name.replace('_', ' ')} {holds}, but {asked} is asked for; "
                f"{remedy}"
            )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}; see python -m trainer.prepare --help")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; raises DataError where argparse would print a usage and exit."""
    parser = _Parser(prog="python -m trainer.prepare", description="Prepares the data that the trainer reads, once.")
    parser.add_argument("--preset", help=f"take what is not named from a preset: {', '.join(preset_names())}")
    parser.add_argument("--dataset", help=f"{', '.join(datasets.DATASETS)} (default: the preset's, if it can be had)")
    parser.add_argument("--vocab-size", type=int, metavar="V", help="tokens of the vocabulary, BOS included")
    parser.add_argument("--row-tokens", type=int, metavar="T", help="tokens of a row that a model reads at once")
    parser.add_argument("--shards", type=int, metavar="N", help="climbmix: how many shards to train on")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="the folder (default: one in the cache, by its content)"
    )
    parser.add_argument("--verify", action="store_true", help="read every file of the folder again and compare")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--force", action="store_true", help="prepare anew, whatever is there")
    how.add_argument("--find", action="store_true", help="prepare nothing: say where it lies and whether it is there")
    how.add_argument("--take", type=Path, metavar="DIR", help="take in a folder that was prepared elsewhere, checked")
    return parser.parse_args(argv)


def resolve(args: argparse.Namespace) -> Request:
    """Fills in what the command line left out.

    Raises:
        DataError: a value is out of range, or neither the command line nor a preset gives it.
    """
    preset = load_preset(args.preset) if args.preset else {}
    sizes = {
        "vocab_size": (args.vocab_size, MIN_VOCAB_SIZE, MAX_VOCAB_SIZE),
        "row_tokens": (args.row_tokens, 1, MAX_ROW_TOKENS),
    }
    chosen: dict[str, int] = {}
    for name, (named, low, high) in sizes.items():
        flag = f"--{name.replace('_', '-')}"
        value = preset.get(name) if named is None else named
        if value is None:
            raise DataError(f"{flag} is not given; give it, or --preset with one of {', '.join(preset_names())}")
        if not low <= value <= high:
            raise DataError(f"{flag} {value}: not between {low} and {high}; take e.g. {min(max(value, low), high)}")
        chosen[name] = value

    def directory(dataset: str) -> Path:
        name = f"{datasets.slug(dataset)}-v{chosen['vocab_size']}-t{chosen['row_tokens']}"
        return (args.data or cache_dir() / "data" / name).expanduser().absolute()

    if args.dataset:
        dataset, why = args.dataset, "it was named with --dataset"
    elif "dataset" in preset and (args.find or args.take):
        dataset, why = preset["dataset"], f"it is the dataset of the preset {args.preset}"
    elif "dataset" in preset:
        prepared = _is_prepared(directory(preset["dataset"]))
        dataset, why = choose_dataset(args.preset, preset["dataset"], prepared=prepared, gpu=gpu_seen, online=_online)
    else:
        raise DataError(f"--dataset is not given; give it, or --preset with one of {', '.join(preset_names())}")
    datasets.slug(dataset)
    if dataset.startswith("files:"):
        dataset = f"files:{Path(dataset.removeprefix('files:')).expanduser().resolve()}"
    shards = (args.shards if args.shards is not None else preset.get("shards") or 1) if dataset == "climbmix" else 0
    return Request(dataset, why, **chosen, shards=shards, directory=directory(dataset))


def choose_dataset(
    preset: str, wanted: str, *, prepared: bool, gpu: Callable[[], bool], online: Callable[[str], bool]
) -> tuple[str, str]:
    """Which dataset to take when none is named, and why, in one sentence.

    Args:
        preset: name of the preset.
        wanted: the preset's dataset.
        prepared: whether that is there already.
        gpu: whether this machine has an NVIDIA GPU.
        online: whether the network has this dataset.
    """
    if wanted not in datasets.HUB_DATASETS:
        return wanted, f"it is the dataset of the preset {preset}, and needs no network"
    if prepared:
        return wanted, f"it is the dataset of the preset {preset}, and was prepared before"
    if not gpu():
        return "sotu", f"no NVIDIA GPU was seen, so the embedded corpus is taken instead of {wanted}"
    if not online(wanted):
        return "sotu", f"{Hub().base_url} did not answer, so the embedded corpus is taken instead of {wanted}"
    return wanted, f"it is the dataset of the preset {preset}, and the network has it"


def gpu_seen() -> bool:
    """Whether this machine has an NVIDIA GPU that this process may use; asks neither torch nor CUDA."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    if Path("/dev/nvidia0").exists():
        return True
    if importlib.util.find_spec("pynvml") is None:
        return False
    import pynvml  # noqa: PLC0415

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount() > 0
    except pynvml.NVMLError:
        return False


def _online(dataset: str) -> bool:
    repo, name = {
        "climbmix": (datasets.CLIMBMIX_REPO, "shard_00000.parquet"),
        "tinystories": (datasets.TINYSTORIES_REPO, datasets.TINYSTORIES_FILE),
    }[dataset]
    return Hub().answers(repo, name)


def load_preset(name: str) -> dict[str, Any]:
    """The [data] section of a preset.

    Raises:
        DataError: there is no such preset, or it cannot be read.
    """
    if name not in preset_names():
        raise DataError(f"preset '{name}' is not known; known: {', '.join(preset_names())}")
    path = PRESETS / f"{name}.toml"
    try:
        return tomllib.loads(path.read_text())["data"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: {reason(error)}; correct it, it needs a section [data]") from None


if __name__ == "__main__":
    sys.exit(main())
