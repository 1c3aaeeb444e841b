"""Reads prepared data: packed rows, memory-mapped, and the order in which a training sees them. It writes nothing."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.errors import UsageError


@dataclass(frozen=True)
class Split:
    """Packed rows of one split: rows (N, T + 1) uint16, and for val and holdout the index (S, 4) of their documents."""

    rows: np.ndarray
    index: np.ndarray | None = None


@dataclass(frozen=True)
class Data:
    """A prepared data directory, memory-mapped. token_bytes is (V,), 0 for special tokens."""

    splits: dict[str, Split]
    token_bytes: np.ndarray
    vocab_size: int
    row_tokens: int
    evaluation_version: str


def load_data(folder: Path, *, holdout: bool) -> Data:
    """Maps what `python -m trainer.prepare` wrote.

    Raises:
        UsageError: A file is missing, has another size than the manifest says, or another shape than the contract says.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        raise UsageError(f"{folder} has no manifest.json: not prepared; {_repair(folder)}") from None
    except ValueError:
        raise UsageError(f"{folder}/manifest.json is not JSON; {_repair(folder)} --force") from None
    if manifest.get("format") != 1:
        raise UsageError(f"{folder}: data format {manifest.get('format')!r}, this harness reads 1; {_repair(folder)}")
    repair = f"{_repair(folder)} --force"
    for name, facts in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes, its manifest says {facts['bytes']}"
            raise UsageError(f"{path} {found}; {repair}")
    try:
        splits = {"train": Split(np.load(folder / "train.rows.npy", mmap_mode="r"))}
        for name in ("val", "holdout") if holdout else ("val",):
            rows = np.load(folder / f"{name}.rows.npy", mmap_mode="r")
            splits[name] = Split(rows, np.load(folder / f"{name}.index.npy"))
        token_bytes = np.load(folder / "token_bytes.npy")
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: {error}; {repair}") from None
    width = manifest["row_tokens"] + 1
    for name, split in splits.items():
        if split.rows.ndim != 2 or split.rows.shape[1] != width or not len(split.rows):
            raise UsageError(
                f"{folder}/{name}.rows.npy has shape {split.rows.shape}, wanted (1 or more, {width}); {repair}"
            )
    return Data(splits, token_bytes, manifest["vocab_size"], manifest["row_tokens"], manifest["evaluation_version"])


def _repair(folder: Path) -> str:
    return f"run: python -m trainer.prepare --data {shlex.quote(str(folder))}"


class TokenStream:
    """The training tokens in an order that depends on the seed and on how many were consumed, on nothing else.

    Every epoch goes through the rows in a new permutation; a batch is the next rows * seq_len pairs of token and
    successor, cut into sequences. A sequence longer than a packed row continues into the next one.
    """

    def __init__(self, rows: np.ndarray, *, seed: int):
        self._rows, self._seed = rows, seed
        self._row_tokens = rows.shape[1] - 1
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def pairs(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start … start + count - 1 of the stream and their successors, int64 (count,) each."""
        first, last = start // self._row_tokens, (start + count - 1) // self._row_tokens
        packed = self._rows[self._row_numbers(first, last + 1)].astype(np.int64)
        begin = start - first * self._row_tokens
        return (
            packed[:, :-1].reshape(-1)[begin : begin + count],
            packed[:, 1:].reshape(-1)[begin : begin + count],
        )

    def _row_numbers(self, first: int, stop: int) -> np.ndarray:
        numbers = []
        while first < stop:
            epoch, place = divmod(first, len(self._rows))
            if epoch != self._epoch:
                self._epoch, self._order = (
                    epoch,
                    np.random.default_rng([self._seed, epoch]).permutation(len(self._rows)),
                )
            numbers.append(self._order[place : place + stop - first])
            first += len(numbers[-1])
        return np.concatenate(numbers)
