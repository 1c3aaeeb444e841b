"""Runs one candidate program within a budget and scores it: owns the clock, the seed, the data order, the evaluation.

It does not know how the candidate trains, and does not guard against one that attacks the process it runs in.
"""
# ruff: noqa: E402  # some things have to happen before torch is imported

import time

_wall_clock, _clock = time.time, time.perf_counter  # taken now: a candidate may replace the module's functions later
_FIRST_LINE_AT = _wall_clock()

import argparse
import ctypes
import os
import sys


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line; a mistake in it is one line on stderr and exit code 2."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            raise SystemExit(_fail(f"{message}; see python -m trainer.harness --help"))

    parser = Parser(prog="python -m trainer.harness", description="Trains train.py within a budget and scores it.")
    parser.add_argument("--train-file", required=True, help="the candidate: a program that defines train(run)")
    parser.add_argument("--data", required=True, help="folder made by python -m trainer.prepare")
    parser.add_argument(
        "--out", required=True, help="folder for result.json, documents.npz, curve.jsonl, progress.json"
    )
    parser.add_argument("--seed", type=int, default=0)
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-s", type=_positive(float), help="seconds of training, from the end of the first step")
    budget.add_argument("--budget-tokens", type=_positive(int), help="tokens of training instead: reproducible")
    parser.add_argument("--eval-tokens", type=_positive(int), help="tokens to score (whole rows); default: all")
    parser.add_argument("--holdout", action="store_true", help="score the second held-out split too")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=_positive(int), help="CPU threads of this process")
    return parser.parse_args(arguments)


def _positive(kind: type):
    def convert(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    convert.__name__ = f"positive {kind.__name__}"
    return convert


def _fail(message: str) -> int:
    print(f"harness: {message}", file=sys.stderr)
    return 2


def _keep_freed_memory() -> None:
    """Lets glibc keep what is freed: page faults for each new activation cost 15% of a training step on a CPU."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not in musl
        m_trim_threshold, m_mmap_threshold, largest_mmap_threshold = -1, -3, 32 * 2**20
        libc.mallopt(m_mmap_threshold, largest_mmap_threshold)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


_ARGUMENTS = None
if __name__ == "__main__":
    _ARGUMENTS = parse(sys.argv[1:])  # before torch: a typing error should not cost two seconds
    if _ARGUMENTS.threads:
        # OpenMP reads these once, when torch is loaded; threads that spin while they wait steal from the other slots
        os.environ.update({name: str(_ARGUMENTS.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")})
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    sys.dont_write_bytecode = True  # the candidate's folder is somebody's git work tree

import gc
import hashlib
import importlib.machinery
import json
import math
import random
import re
import shlex
import signal
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

_IMPORTED_AT = _wall_clock()
_cross_entropy = torch.nn.functional.cross_entropy  # a private reference, like the clocks

EXIT_CODES = {"measured": 0, "crashed": 1, "invalid": 3, "out_of_memory": 4}

# Dense bf16 TFLOPS with float32 accumulation. What is often quoted for the GeForce cards is with sparsity, or with
# float16 accumulation.
PEAK_BF16_TFLOPS = {
    "RTX 3060": 25.5,
    "RTX 3070": 40.6,
    "RTX 3080": 59.5,
    "RTX 3090": 71.0,
    "RTX 4060 Ti": 44.1,
    "RTX 4070": 58.3,
    "RTX 4080": 97.5,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.5,
    "H200": 989.5,
    "L4": 121.0,
    "A10G": 70.0,
}

FIRST_STEP_TOLERANCE = 1.01  # first step's tokens over the later steps' average
OVERTIME_SHARE, OVERTIME_S = 0.25, 2.0  # what may pass after the budget's end: half of a long step, a stall
CPU_MICRO_BATCH_TOKENS = 2048
CPU_EVAL_TOKENS = 2048
CPU_CHECKED_ROWS = 8  # of the evaluation's rows; on CUDA a whole batch, so that nothing is compiled anew
CUDA_EVAL_TOKENS_PER_GB = 1024  # of the card's whole memory, so that every candidate is scored in the same batches
LEAK_AT_A_POSITION, LEAK_ON_AVERAGE = 0.05, 0.01  # of the logits' size; bfloat16 rounding stays below 0.01 and 0.004


class UsageError(Exception):
    """The call or the data is at fault, not the candidate."""


class ContractError(Exception):
    """The candidate broke the trainer's contract: its result is invalid."""


class TrainingFailure(Exception):
    """The candidate's training went wrong by itself, without an exception of its own."""


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------------------
# What is written while it runs
# ----------------------------------------------------------------------------------------------------------------------


class Reporter:
    """Writes progress.json, curve.jsonl and the log; keeps each to about two writes a second."""

    INTERVAL_S = 0.5
    LOG_INTERVAL_S = 2.0

    def __init__(self, out: Path):
        self._out = out
        self._phase, self._written_at, self._logged_at = "", -math.inf, -math.inf
        self._curve = (out / "curve.jsonl").open("w")
        self._curve_at, self._pending = -math.inf, None

    def phase(self, phase: str, progress: float = 0.0) -> None:
        """Says where the trial is; a new phase is written at once, progress within one at most twice a second."""
        now = _clock()
        if phase == self._phase and now - self._written_at < self.INTERVAL_S:
            return
        self._phase, self._written_at = phase, now
        write_json(self._out / "progress.json", {"phase": phase, "progress": round(progress, 4), "at": _wall_clock()})

    def step(self, *, step: int, tokens: int, seconds: float, loss: float, progress: float, note: str) -> None:
        """Adds a point to the curve, or keeps it until close() when the last point is too recent."""
        now = _clock()
        self._pending = {"step": step, "tokens": tokens, "seconds": round(seconds, 4), "loss": round(loss, 6)}
        self._pending["progress"] = round(progress, 5)
        if now - self._curve_at >= self.INTERVAL_S:
            self._curve_at = now
            self._write_point()
        if now - self._logged_at >= self.LOG_INTERVAL_S:
            self._logged_at = now
            print(f"step {step:5d} | {100 * progress:5.1f}% | loss {loss:.4f} | {note}", flush=True)
        self.phase("train", progress)

    def close_curve(self) -> None:
        """Writes the last point, if it is not in the curve yet."""
        if not self._curve.closed:
            self._write_point()
            self._curve.close()

    def _write_point(self) -> None:
        if self._pending is not None:
            self._curve.write(json.dumps(self._pending) + "\n")
            self._curve.flush()
            self._pending = None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces the file in one move, so that a reader never sees half of it."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(value))
    os.replace(draft, path)


# ----------------------------------------------------------------------------------------------------------------------
# What the candidate gets
# ----------------------------------------------------------------------------------------------------------------------


class Run:
    """The candidate's view of a trial: batches, time, a micro-batch that fits.

    Attributes:
        device: Where the model has to be.
        vocab_size: V; the last dimension of the logits.
        row_tokens: T of the evaluation's rows.
        seed: Already given to torch, numpy and random.
        budget_s: Seconds of training, or None when the budget is in tokens.
        budget_tokens: Tokens of training, or None when the budget is in seconds.
        progress: Share of the budget that was spent when the last step ended, 0 to 1. It stays 0 until the first step
            ends, because compilation is free.
        done: Whether the budget is spent.
    """

    def __init__(
        self,
        data: Data,
        *,
        device: torch.device,
        seed: int,
        budget_s: float | None,
        budget_tokens: int | None,
        reporter: Reporter,
        program_sha256: str,
    ):
        self.device, self.seed = device, seed
        self.vocab_size, self.row_tokens = data.vocab_size, data.row_tokens
        self.budget_s, self.budget_tokens = budget_s, budget_tokens
        self.progress, self.done = 0.0, False
        self._reporter, self._program_sha256 = reporter, program_sha256
        self._stream = TokenStream(data.splits["train"].rows, seed=seed)
        self._ahead: tuple[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] | None = None
        self._violation: Exception | None = None
        self.record = TrainingRecord()

    def batch(self, rows: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next rows * seq_len training tokens and their successors.

        Returns:
            x and y, int64 (rows, seq_len) each, on the device.

        Raises:
            ContractError: rows or seq_len is not a positive whole number.
        """
        for name, value in (("rows", rows), ("seq_len", seq_len)):
            if not isinstance(value, int) or value < 1:
                raise self._violated(
                    ContractError(f"run.batch: {name} is {value!r}, wanted a whole number of 1 or more")
                )
        record = self.record
        if record.first_batch_at is None:
            record.first_batch_at = _clock()
        key = (record.tokens, rows, seq_len)
        x, y = self._ahead[1] if self._ahead and self._ahead[0] == key else self._load(*key)
        self._ahead = None
        record.tokens += rows * seq_len
        record.batch_shape = (rows, seq_len)
        return x, y

    def micro_batch(
        self,
        model: torch.nn.Module,
        *,
        total_tokens: int,
        seq_len: int,
        at_most: int | None = None,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> int:
        """How many rows of seq_len tokens to run at once, so that total_tokens is a whole number of such batches.

        On CUDA it predicts the largest that fits and tries a forward and a backward pass, halving when memory runs
        out; what it finds is remembered under $RAYSEARCH_CACHE. On a CPU it takes what stays in the caches. Random
        numbers, gradients and buffers are afterwards as they were.

        Args:
            model: Its parameters get the trial gradients.
            total_tokens: Tokens of one optimizer step.
            seq_len: Tokens of one row.
            at_most: An upper limit in rows; has to be a valid answer itself.
            loss: What the training calls with a batch (x, y), compiled or not; default: cross-entropy of model(x).

        Raises:
            ContractError: No number of rows divides the total, or at_most is not one that does.
        """
        if self.record.first_batch_at is None:
            self.record.first_batch_at = _clock()
        try:
            choices = micro_batch_choices(total_tokens, seq_len, at_most)
        except ContractError as error:
            raise self._violated(error) from None
        if self.device.type != "cuda":
            return max((rows for rows in choices if rows * seq_len <= CPU_MICRO_BATCH_TOKENS), default=1)
        x, y = self._load(0, choices[-1], seq_len)
        finder = MicroBatchFinder(model, loss, x, y, self._program_sha256, vocab_size=self.vocab_size)
        self.record.micro_batch_finder = finder
        return finder.find(choices)

    def step(self, loss: torch.Tensor | float) -> None:
        """Ends an optimizer step: waits for the device, reads the clock, notes the loss.

        Raises:
            TrainingFailure: The loss is not finite.
            ContractError: There was no batch since the last step, or the budget was spent before.
        """
        record = self.record
        if self.device.type == "cuda" and not self.done and record.batch_shape:
            key = (record.tokens, *record.batch_shape)
            self._ahead = (key, self._load(*key))  # while the device still works
        value = float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if not record.steps:
            # Python's collector stalls a step for up to half a second when a large program has just been compiled
            gc.collect()
            gc.freeze()
            gc.disable()
        now = _clock()
        if self.done:
            raise self._violated(
                ContractError("run.step after run.done: the budget is spent; train while not run.done")
            )
        if record.tokens == record.tokens_at_steps:
            raise self._violated(
                ContractError("run.step without a run.batch since the last step; a step trains on data")
            )
        record.end_step(now)
        if not math.isfinite(value):
            raise self._violated(TrainingFailure(f"loss is not finite at step {record.steps}"))
        if self.budget_s is not None:
            # to the nearest whole step, so that long steps are neither favoured nor punished
            self.progress = record.training_s / self.budget_s
            self.done = record.training_s + record.step_s / 2 >= self.budget_s
        else:
            assert self.budget_tokens is not None
            self.progress = record.tokens / self.budget_tokens
            self.done = record.tokens >= self.budget_tokens
        self.progress = 1.0 if self.done else min(self.progress, 1.0)
        self._reporter.step(
            step=record.steps,
            tokens=record.tokens,
            seconds=record.training_s,
            loss=value,
            progress=self.progress,
            note=f"{record.tokens_per_s:,.0f} tokens/s | {record.training_s:.1f} s",
        )

    def _load(self, position: int, rows: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (torch.from_numpy(a).view(rows, seq_len) for a in self._stream.pairs(position, rows * seq_len))
        if self.device.type != "cuda":
            return x, y
        return (
            x.pin_memory().to(self.device, non_blocking=True),
            y.pin_memory().to(self.device, non_blocking=True),
        )

    def _violated(self, error: Exception) -> Exception:
        self._violation = self._violation or error  # so that a candidate that catches it gains nothing
        return error

    def check(self) -> None:
        """After training: raises what was broken.

        Raises:
            ContractError: No step, a heavier first step, or work after the budget's end.
        """
        record = self.record
        if self._violation:
            raise self._violation
        if not record.steps:
            raise ContractError("train(run) returned without one run.step(loss)")
        later = (record.tokens_at_steps - record.first_step_tokens) / max(1, record.steps - 1)
        if record.steps > 1 and record.first_step_tokens > FIRST_STEP_TOLERANCE * later:
            raise ContractError(
                f"the first step consumed {record.first_step_tokens} tokens, the later ones {later:.0f} on average; "
                "the first is not timed, so it may not do more"
            )
        assert record.first_step_at is not None
        spent_s = _clock() - record.first_step_at
        if self.budget_s is not None and spent_s > self.budget_s * (1 + OVERTIME_SHARE) + OVERTIME_S:
            raise ContractError(
                f"train(run) took {spent_s:.1f} s after its first step, the budget is {self.budget_s:g} s"
            )


@dataclass
class TrainingRecord:
    """What the harness itself saw of the training; seconds by its own clock."""

    tokens: int = 0
    tokens_at_steps: int = 0
    first_step_tokens: int = 0
    steps: int = 0
    first_batch_at: float | None = None
    first_step_at: float | None = None
    training_s: float = 0.0
    batch_shape: tuple[int, int] | None = None
    micro_batch_finder: "MicroBatchFinder | None" = None

    def end_step(self, now: float) -> None:
        """Counts a step that ended at that time."""
        self.steps += 1
        self.tokens_at_steps = self.tokens
        if self.first_step_at is None:
            self.first_step_at, self.first_step_tokens = now, self.tokens
        self.training_s = now - self.first_step_at

    @property
    def step_s(self) -> float:
        """Average length of the timed steps; 0 before there is one."""
        return self.training_s / (self.steps - 1) if self.steps > 1 else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the timed steps; 0 before there is one."""
        return (self.tokens_at_steps - self.first_step_tokens) / self.training_s if self.training_s > 0 else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Micro-batch
# ----------------------------------------------------------------------------------------------------------------------


def micro_batch_choices(total_tokens: int, seq_len: int, at_most: int | None = None) -> list[int]:
    """All numbers of rows that divide the total batch, ascending.

    Raises:
        ContractError: There is none, or at_most is not one of them.
    """
    rows, rest = divmod(total_tokens, seq_len)
    if rest or rows < 1:
        raise ContractError(
            f"total batch {total_tokens} must be a multiple of the row length {seq_len}; "
            f"nearest: {max(1, rows) * seq_len} or {(rows + 1) * seq_len}"
        )
    choices = [n for n in range(1, rows + 1) if rows % n == 0]
    if at_most is None:
        return choices
    if at_most not in choices:
        raise ContractError(
            f"device batch {at_most} rows x {seq_len} tokens must divide the total batch {total_tokens}; "
            f"valid rows: {', '.join(map(str, choices))}"
        )
    return [n for n in choices if n <= at_most]


def predicted_bytes(tokens: int, *, depth: int, dim: int, vocab_size: int, parameters: int) -> float:
    """Memory of a training step on `tokens` tokens at once, fitted on the baseline's shape."""
    return tokens * (39.8 * depth * dim + 2.07 * vocab_size) + 12 * parameters


class MicroBatchFinder:
    """Finds the most rows that fit on this CUDA card, and remembers them per program and card."""

    SPARE = 0.06  # of the card: fragments, and kernels that the first step loads

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        x: torch.Tensor,
        y: torch.Tensor,
        program_sha256: str,
        *,
        vocab_size: int,
    ):
        self._model, self._x, self._y = model, x, y
        self._loss = loss or (lambda x, y: _cross_entropy(model(x).float().flatten(0, 1), y.flatten()))
        self._vocab_size = vocab_size
        self._choices: list[int] = []
        self._found = 0
        card = torch.cuda.get_device_properties(0)
        key = json.dumps([program_sha256, card.name, card.total_memory, *x.shape])
        cache = os.environ.get("RAYSEARCH_CACHE")
        name = hashlib.sha256(key.encode()).hexdigest()[:24] + ".json"
        self._memo = Path(cache) / "micro_batch" / name if cache else None

    def find(self, choices: list[int]) -> int:
        """The most rows of the choices (ascending) whose forward and backward pass fit; the fewest if none does."""
        self._choices = choices
        remembered = self._recall()
        if remembered in choices:
            self._found = remembered
            return remembered
        fitting = [rows for rows in choices if self._fits_by_prediction(rows)] or choices[:1]
        while len(fitting) > 1 and not self._fits_in_trial(fitting[-1]):
            fitting = [rows for rows in fitting if rows <= fitting[-1] // 2] or fitting[:1]
        self._found = fitting[-1]
        self._remember(self._found)
        return self._found

    def halve(self) -> None:
        """Training ran out of memory all the same: the next run of this program begins with half as many rows."""
        smaller = [rows for rows in self._choices if rows <= self._found // 2]
        if smaller:
            self._remember(smaller[-1])

    def _fits_by_prediction(self, rows: int) -> bool:
        depth, dim = shape_of(self._model)
        need = predicted_bytes(
            rows * self._x.shape[1],
            depth=depth or 1,
            dim=dim,
            vocab_size=self._vocab_size,
            parameters=parameters_of(self._model),
        )
        free, total = torch.cuda.mem_get_info()
        return need + self.SPARE * total <= free + torch.cuda.memory_reserved()

    def _fits_in_trial(self, rows: int) -> bool:
        """One forward and backward pass that leaves no trace."""
        model = self._model
        gradients = [(p, p.grad) for p in model.parameters()]
        buffers = [(b, b.clone()) for b in model.buffers()]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
                for parameter, _ in gradients:
                    parameter.grad = None
                self._loss(self._x[:rows], self._y[:rows]).backward()
                torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            spare = free + torch.cuda.memory_reserved() - torch.cuda.max_memory_reserved()
            optimizer = 8 * parameters_of(model)  # two float32 moments; the gradients were there already
            return spare - optimizer >= self.SPARE * total / 2
        except torch.OutOfMemoryError:
            return False
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _recall(self) -> int:
        try:
            return int(json.loads(self._memo.read_text())["rows"]) if self._memo else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0  # never found, or a broken file: look again

    def _remember(self, rows: int) -> None:
        if self._memo:
            self._memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._memo, {"rows": rows})


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Cross-entropy of one split: per document nats (float64) and bytes (int64), and the rows that were scored."""

    doc: np.ndarray
    nats: np.ndarray
    bytes: np.ndarray
    tokens: int

    @property
    def bpb(self) -> float:
        """Bits per byte over all documents."""
        return float(self.nats.sum() / math.log(2) / self.bytes.sum())


def evaluate(
    model: Any, split: Split, data: Data, *, tokens: int | None, device: torch.device, reporter: Reporter, phase: str
) -> Score:
    """Scores the model on the split's first rows, and checks that it predicts from the past alone.

    Args:
        model: Maps tokens (B, T) to logits (B, T, V).
        split: With an index of its documents.
        data: For the sizes of tokens, rows and vocabulary.
        tokens: How many tokens to score, rounded down to whole rows; None for all.
        device: Where the model is.
        reporter: Is told the progress.
        phase: Under this name.

    Raises:
        ContractError: Logits of a wrong shape or type, not finite, or that depend on later tokens, on other rows of the
            batch, or on earlier calls.
    """
    wanted = len(split.rows) if tokens is None else max(1, tokens // data.row_tokens)
    rows = split.rows[: min(wanted, len(split.rows))]
    batch_rows = max(1, min(evaluation_batch_tokens(device) // data.row_tokens, len(rows)))
    while True:
        try:
            scorer = Scorer(model, device, data.vocab_size)
            nats = scorer.nats(rows, batch_rows, lambda share: reporter.phase(phase, share))
            checked = batch_rows if device.type == "cuda" else min(batch_rows, CPU_CHECKED_ROWS)
            scorer.check_honesty(rows[:checked], nats[:checked])
            break
        except torch.OutOfMemoryError:
            if batch_rows == 1:
                raise
            batch_rows //= 2
        torch.cuda.empty_cache()
    assert split.index is not None
    doc, doc_nats, doc_bytes = by_document(rows, nats, split.index, data.token_bytes)
    return Score(doc, doc_nats, doc_bytes, rows.shape[0] * data.row_tokens)


def evaluation_batch_tokens(device: torch.device) -> int:
    """Tokens of one batch of the evaluation: depends on the machine alone, never on the candidate."""
    if device.type != "cuda":
        return CPU_EVAL_TOKENS
    total_gb = torch.cuda.get_device_properties(device).total_memory / 2**30
    return 2 ** int(math.log2(total_gb * CUDA_EVAL_TOKENS_PER_GB))


def by_document(
    rows: np.ndarray, nats: np.ndarray, index: np.ndarray, token_bytes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums nats and bytes by document; special tokens (0 bytes) and the first token of a row count for nothing.

    Args:
        rows: Tokens (N, T + 1).
        nats: Of each row's tokens 1 … T, (N, T).
        index: Segments (S, 4): row, start, stop, doc; sorted, covering every row.
        token_bytes: (V,).

    Returns:
        Documents that have bytes (ascending), their nats (float64) and bytes (int64).
    """
    size = token_bytes[rows].astype(np.int64)
    size[:, 0] = 0  # no position predicts it
    cost = np.zeros(rows.shape, np.float64)
    cost[:, 1:] = nats
    cost[size == 0] = 0.0
    index = index[index[:, 0] < len(rows)]
    starts = index[:, 0].astype(np.int64) * rows.shape[1] + index[:, 1]
    doc = index[:, 3]
    doc_nats = np.bincount(doc, weights=np.add.reduceat(cost.reshape(-1), starts))
    doc_bytes = np.bincount(doc, weights=np.add.reduceat(size.reshape(-1), starts)).astype(np.int64)
    seen = np.flatnonzero(doc_bytes)
    return seen.astype(np.int32), doc_nats[seen], doc_bytes[seen]


class Scorer:
    """Calls the candidate's model on whole batches of one fixed shape and computes the cross-entropy itself."""

    def __init__(self, model: Any, device: torch.device, vocab_size: int):
        self._model, self._device, self._vocab_size = model, device, vocab_size

    def nats(self, rows: np.ndarray, batch_rows: int, progress: Callable[[float], None]) -> np.ndarray:
        """Cross-entropy of each row's tokens 1 … T, float64 (N, T).

        Raises:
            ContractError: The logits are not what the contract says.
        """
        result = np.empty((len(rows), rows.shape[1] - 1), np.float64)
        for first in range(0, len(rows), batch_rows):
            progress(first / len(rows))
            batch = self._tensor(rows[first : first + batch_rows], batch_rows)
            losses = self._losses(self.logits(batch[:, :-1]), batch[:, 1:])
            kept = min(batch_rows, len(rows) - first)
            result[first : first + kept] = losses[:kept].cpu().numpy()
        if not np.isfinite(result).all():
            raise ContractError("the model's logits are not finite on the validation rows")
        return result

    def check_honesty(self, rows: np.ndarray, nats: np.ndarray) -> None:
        """Looks again at rows already scored, then changes what a prediction must not depend on.

        Raises:
            ContractError: The model used later tokens, other rows of the batch, or memory of an earlier call.
        """
        batch = self._tensor(rows, len(rows))
        x, y = batch[:, :-1], batch[:, 1:]
        B, T = x.shape
        before = self.logits(x)
        again = self._losses(before, y).mean().item()
        if abs(again - nats.mean()) > 0.01 * abs(nats.mean()) + 1e-3:
            raise ContractError(
                f"equal rows scored {nats.mean():.4f} nats a token, then {again:.4f}: a model must not remember calls"
            )
        chance = np.random.default_rng(0)
        other = torch.from_numpy(chance.integers(0, self._vocab_size, (B, T))).to(self._device)
        if B > 1:
            mine = torch.arange(B, device=self._device)[:, None] % 2 == 0
            leak = self._difference(before, self.logits(torch.where(mine, x, other)), mine.expand(B, T))
            _refuse(leak, "a row's logits depend on other rows of the batch: rows must be independent")
        if T > 1:
            cuts = torch.from_numpy(chance.integers(1, T, (B, 1))).to(self._device)
            late = torch.arange(T, device=self._device)[None, :] >= cuts
            leak = self._difference(before, self.logits(torch.where(late, other, x)), ~late)
            _refuse(leak, "logits depend on later tokens: the model must be causal")

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Calls the model on tokens (B, T).

        Raises:
            ContractError: The answer is no floating-point tensor of shape (B, T, V).
        """
        with torch.no_grad():
            logits = self._model(x)
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
            what = str(logits.dtype) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ContractError(f"the model returned {what}; it must return floating-point logits (B, T, V)")
        if tuple(logits.shape) != (*x.shape, self._vocab_size):
            raise ContractError(
                f"logits have shape {tuple(logits.shape)}, must be {(*x.shape, self._vocab_size)} = (B, T, V)"
            )
        return logits

    def _losses(self, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # row by row: the float32 copy of a whole batch's logits would be the largest tensor of the trial
        with torch.no_grad():
            return torch.stack(
                [_cross_entropy(row.float(), t, reduction="none") for row, t in zip(logits, y, strict=True)]
            )

    def _difference(self, a: torch.Tensor, b: torch.Tensor, where: torch.Tensor) -> tuple[float, float]:
        """Largest and mean change of a position's logits, relative to their size (at least 0.1), where it counts."""
        changes = []
        for row_a, row_b, row_where in zip(a, b, where, strict=True):
            one, two = row_a[row_where].double(), row_b[row_where].double()
            size = (one - one.mean(-1, keepdim=True)).square().mean(-1).sqrt().clamp_min(0.1)
            changes.append((one - two).square().mean(-1).sqrt() / size)
        change = torch.cat(changes)
        return (change.max().item(), change.mean().item()) if change.numel() else (0.0, 0.0)

    def _tensor(self, rows: np.ndarray, batch_rows: int) -> torch.Tensor:
        full = np.resize(np.asarray(rows), (batch_rows, rows.shape[1]))  # repeats rows: one shape, one compilation
        return torch.from_numpy(full.astype(np.int64)).to(self._device)


def _refuse(leak: tuple[float, float], message: str) -> None:
    largest, mean = leak
    if not (largest <= LEAK_AT_A_POSITION and mean <= LEAK_ON_AVERAGE):
        raise ContractError(f"{message} (changed by up to {largest:.2g} of their size, {mean:.2g} on average)")


# ----------------------------------------------------------------------------------------------------------------------
# Telemetry
# ----------------------------------------------------------------------------------------------------------------------


def parameters_of(model: Any) -> int:
    """How many numbers the model has."""
    return sum(p.numel() for p in model.parameters())


def shape_of(model: Any) -> tuple[int | None, int]:
    """Layers (the model's own `depth`, else its longest ModuleList) and width (of its first embedding; 1 if none)."""
    modules = list(model.modules())
    lists = [len(m) for m in modules if isinstance(m, torch.nn.ModuleList)]
    widths = [m.embedding_dim for m in modules if isinstance(m, torch.nn.Embedding)]
    depth = getattr(model, "depth", None)
    return (depth if isinstance(depth, int) else max(lists, default=None)), (widths or [1])[0]


def flops_per_token(model: Any) -> float:
    """Of forward and backward: what the model says of itself, else six for each weight of a matrix product."""
    told = getattr(model, "flops_per_token", None)
    if isinstance(told, int | float):
        return float(told)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return 6.0 * sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in tables)


def peak_tflops(card: str) -> float | None:
    """Dense bf16 TFLOPS of a card by NVIDIA's name of it; None when it is not in the table."""
    for name, tflops in PEAK_BF16_TFLOPS.items():
        if re.search(rf"\b{name}\b(?! (Ti|SUPER|Laptop|D)\b)", card):
            return tflops
    return None


def memory_mb(device: torch.device) -> dict[str, float]:
    """Peak memory: reserved by torch, in use by this process as the driver sees it, and of the process on the host."""
    import resource  # noqa: PLC0415  # POSIX alone

    unit = 2**20 if sys.platform == "darwin" else 2**10
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if device.type != "cuda":
        return {"peak_vram_mb": 0.0, "reserved_mb": 0.0, "peak_rss_mb": round(host, 1)}
    reserved = torch.cuda.max_memory_reserved() / 2**20
    return {
        "peak_vram_mb": round(max(reserved, _driver_memory_mb(device)), 1),
        "reserved_mb": round(reserved, 1),
        "peak_rss_mb": round(host, 1),
    }


def _driver_memory_mb(device: torch.device) -> float:
    """What NVML says that this process holds; 0 when it cannot say (no library, another pid namespace)."""
    try:
        import pynvml  # noqa: PLC0415  # only on a machine with a GPU
    except ImportError:
        return 0.0
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        mine = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
        return sum(p.usedGpuMemory or 0 for p in mine) / 2**20
    except pynvml.NVMLError:
        return 0.0


def spawned_at() -> float:
    """Unix time at which this process was started: as its parent says, else as Linux does, else the first line's."""
    try:
        return float(os.environ["RAYSEARCH_SPAWNED_AT"])
    except (KeyError, ValueError):
        pass
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _FIRST_LINE_AT
    return _wall_clock() - uptime_s + ticks / os.sysconf("SC_CLK_TCK")


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def load_candidate(path: Path) -> Callable[[Run], Any]:
    """Executes the program and returns its train function.

    Raises:
        ContractError: It is not valid Python, or has no train(run).
    """
    try:
        compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise ContractError(f"{path.name}{f' line {line}' if line else ''}: {getattr(error, 'msg', error)}") from None
    loader = importlib.machinery.SourceFileLoader("candidate", str(path))
    module = types.ModuleType("candidate")
    module.__file__ = str(path)
    sys.modules["candidate"] = module
    sys.path.append(str(path.parent.absolute()))  # its other files; last, so that they hide nothing
    loader.exec_module(module)
    train = getattr(module, "train", None)
    if not callable(train):
        raise ContractError(f"{path.name} has no train(run); define one that returns the model")
    return train


class Trial:
    """One candidate from loading to its score; `result` fills as it goes."""

    def __init__(self, arguments: argparse.Namespace):
        created = _clock()
        self.arguments = arguments
        self.train_file, self.out = Path(arguments.train_file), Path(arguments.out)
        self.device = pick_device(arguments.device)
        self.data = load_data(Path(arguments.data), holdout=arguments.holdout)
        try:
            program = self.train_file.read_bytes()
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "result.json").unlink(missing_ok=True)
            self.reporter = Reporter(self.out)
            self.reporter.phase("start")
        except OSError as error:
            raise UsageError(
                f"{error.filename}: {error.strerror}; give a readable --train-file and a writable --out"
            ) from None
        self.run = Run(
            self.data,
            device=self.device,
            seed=arguments.seed,
            budget_s=arguments.budget_s,
            budget_tokens=arguments.budget_tokens,
            reporter=self.reporter,
            program_sha256=hashlib.sha256(program).hexdigest(),
        )
        self.seconds = {"start": _FIRST_LINE_AT - spawned_at(), "import": _IMPORTED_AT - _FIRST_LINE_AT}
        self.seconds["data"] = _clock() - created
        self.result: dict[str, Any] = {"outcome": "crashed", "reason": "", "val_bpb": None, "holdout_bpb": None}

    def perform(self) -> str:
        """Trains and scores; returns the outcome, with the reason in `result`."""
        try:
            model = self._train()
            self._score(model)
        except (ContractError, TrainingFailure) as error:
            return self._end("invalid" if isinstance(error, ContractError) else "crashed", str(error))
        except BaseException as error:  # noqa: BLE001  # the candidate may raise anything, SystemExit included
            if is_out_of_memory(error):
                return self._out_of_memory(error)
            traceback.print_exc()
            text = str(error).strip().partition("\n")[0]
            return self._end("crashed", f"{type(error).__name__}: {text}" if text else type(error).__name__)
        return self._end("measured", "")

    def _train(self) -> Any:
        self.reporter.phase("first_step")
        seed_everything(self.arguments.seed)
        started = _clock()
        try:
            model = load_candidate(self.train_file)(self.run)
        finally:
            record, now = self.run.record, _clock()
            first_batch_at = record.first_batch_at or now
            self.seconds["build"] = first_batch_at - started
            self.seconds["first_step"] = (record.first_step_at or now) - first_batch_at
            self.seconds["train"] = record.training_s
            self.reporter.close_curve()
        self.run.check()
        if not isinstance(model, torch.nn.Module):
            raise ContractError(f"train(run) returned {type(model).__name__}; it must return the model, an nn.Module")
        return model

    def _score(self, model: torch.nn.Module) -> None:
        record = self.run.record
        depth, _ = shape_of(model)
        flops = flops_per_token(model)
        peak = peak_tflops(torch.cuda.get_device_name()) if self.device.type == "cuda" else None
        self.result |= {
            "mfu_percent": round(record.tokens_per_s * flops / peak / 1e10, 2) if peak else None,
            "num_params": parameters_of(model),
            "depth": depth,
            "flops_per_token": flops,
        }
        model.eval()
        for parameter in model.parameters():
            parameter.grad = None
        scores = {}
        for phase, split in [("eval", "val"), ("holdout", "holdout")]:
            if split not in self.data.splits:
                continue
            self.reporter.phase(phase)
            started = _clock()
            scores[split] = evaluate(
                model,
                self.data.splits[split],
                self.data,
                tokens=self.arguments.eval_tokens,
                device=self.device,
                reporter=self.reporter,
                phase=phase,
            )
            self.seconds[phase] = _clock() - started
        val = scores["val"]
        np.savez(self.out / "documents.npz", doc=val.doc, nats=val.nats, bytes=val.bytes)
        self.result["val_bpb"] = val.bpb
        self.result["holdout_bpb"] = scores["holdout"].bpb if "holdout" in scores else None
        self.result["evaluation"] = f"{self.data.evaluation_version}-{val.tokens}"

    def _out_of_memory(self, error: BaseException) -> str:
        if self.run.record.micro_batch_finder:
            self.run.record.micro_batch_finder.halve()
        print(f"out of memory: {error}", flush=True)
        return self._end("out_of_memory", str(error).partition("\n")[0])

    def _end(self, outcome: str, reason: str) -> str:
        """Writes result.json, whatever happened before."""
        record = self.run.record
        seconds = {"build": 0.0, "first_step": 0.0, "train": 0.0, "eval": 0.0, "holdout": 0.0} | self.seconds
        absent = dict.fromkeys(("mfu_percent", "num_params", "depth", "flops_per_token", "evaluation"))
        if outcome != "measured":
            self.result |= {"val_bpb": None, "holdout_bpb": None}
        self.result = {
            **absent,
            **self.result,
            "outcome": outcome,
            "reason": reason,
            "training_seconds": round(record.training_s, 3),
            "total_seconds": round(_wall_clock() - spawned_at(), 3),
            **memory_mb(self.device),
            "total_tokens": record.tokens_at_steps,
            "num_steps": record.steps,
            "tokens_per_s": round(record.tokens_per_s, 1),
            "micro_batch_rows": record.batch_shape[0] if record.batch_shape else None,
            "seed": self.arguments.seed,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        self.reporter.phase("done", 1.0)
        write_json(self.out / "result.json", self.result)
        return outcome


OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",  # torch's allocator on the CPU
    "CUDA error: out of memory",  # the driver's, for what does not go through torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, also when a compiler or a candidate wrapped the error into one of its own."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def pick_device(name: str | None) -> torch.device:
    """The device by name, CUDA where there is one otherwise.

    Raises:
        UsageError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or install a CUDA build of torch")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def seed_everything(seed: int) -> None:
    """Seeds torch on every device, numpy and random."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def summary(result: dict[str, Any]) -> str:
    """The block that autoresearch users know."""
    mfu = result["mfu_percent"]
    lines = {
        "val_bpb": f"{result['val_bpb']:.6f}",
        "training_seconds": f"{result['training_seconds']:.1f}",
        "total_seconds": f"{result['total_seconds']:.1f}",
        "peak_vram_mb": f"{result['peak_vram_mb']:.1f}",
        "mfu_percent": f"{mfu or 0:.2f}",
        "total_tokens_M": f"{result['total_tokens'] / 1e6:.1f}",
        "num_steps": str(result["num_steps"]),
        "num_params_M": f"{result['num_params'] / 1e6:.1f}",
        "depth": str(result["depth"]),
    }
    return "\n".join(["---", *(f"{name + ':':<18}{value}" for name, value in lines.items())])


def main(arguments: argparse.Namespace) -> int:
    """Runs the trial; returns the exit code."""
    # a supervisor stops this process group with a signal: die at once and say nothing, even in the middle of a kernel
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        trial = Trial(arguments)
        outcome = trial.perform()
    except UsageError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or arguments.out}: {error.strerror or error}; the result could not be written")
    if outcome == "measured":
        print(summary(trial.result), flush=True)
    else:
        print(f"{outcome}: {trial.result['reason']}", flush=True)
    return EXIT_CODES[outcome]


if __name__ == "__main__":
    assert _ARGUMENTS is not None
    # without the interpreter's teardown, which takes a quarter of a second with torch loaded
    code = main(_ARGUMENTS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
