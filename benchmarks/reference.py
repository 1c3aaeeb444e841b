"""Runs an autoresearch-style train.py as it is, fed with our rows, and writes its result in our names.

It changes nothing in the program, and believes its clock and its counts: those are what it is known for. Such a program
(karpathy/autoresearch) imports `kernels` and `prepare`, trains while it is imported, and prints a summary. Here both
modules are stand-ins: attention is torch's, rows and score are the trainer's. So its val_bpb compares with ours, its
seconds of evaluation do not hold the tokenizing that its own prepare.py does meanwhile, and --seed is the order of the
rows alone, for the program seeds torch itself.
"""
# ruff: noqa: E402  # some things have to happen before torch is imported

import time

_FIRST_LINE_AT = time.time()

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # beside this file lies one that is named as the package is
    here = Path(__file__).resolve().parent
    sys.path = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the program does, too late for us

import argparse
import io
import itertools
import json
import math
import re
import runpy
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import torch

from benchmarks import flash_attention
from trainer.errors import UsageError
from trainer.evaluation import Score, by_document
from trainer.harness import EXIT_CODES
from trainer.memory import is_out_of_memory
from trainer.reporter import write_json
from trainer.rows import Data, TokenStream, load_data
from trainer.telemetry import memory_mb, peak_tflops, spawned_at
from trainer.tokenizer import Tokenizer

_IMPORTED_AT = time.time()

UNTIMED_STEPS = 11  # the program's clock leaves them out: `if step > 10`
STEP = re.compile(r"step (\d+) \(([\d.]+)%\) \| loss: ([\d.]+)")
STEPS_BETWEEN_POINTS = 10  # of the curve


class Feed:
    """Rows and score for the program: what its module `prepare` gives, and when it was asked.

    Attributes:
        first_batch_at: When the program asked for its first batch, by perf_counter.
        eval_at: When it asked for its score.
        eval_s: How long that took.
        score: The score; None until it is asked for.
        batch_rows: Rows of its training batches.
    """

    def __init__(self, data: Data, *, seed: int, eval_tokens: int | None, device: torch.device):
        self.data, self.device = data, device
        self.first_batch_at: float | None = None
        self.eval_at: float | None = None
        self.eval_s = 0.0
        self.score: Score | None = None
        self.batch_rows: int | None = None
        self._seed, self._eval_tokens = seed, eval_tokens

    def batches(self, tokenizer: Any, B: int, T: int, split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """Endless training batches: inputs and targets, int64 (B, T) each, and the epoch from 1.

        Two pinned buffers in turn: the next rows are read while the device still works on the last ones.

        Raises:
            ValueError: Another split than `train`.
        """
        del tokenizer
        if split != "train":
            raise ValueError(f"split {split!r}: only 'train' is served here; score with evaluate_bpb")
        rows = self.data.splits["train"].rows
        return self._batches(TokenStream(rows, seed=self._seed), B, T, rows.shape[0] * self.data.row_tokens)

    def _batches(
        self, stream: TokenStream, B: int, T: int, epoch_tokens: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        if self.first_batch_at is None:
            self.first_batch_at, self.batch_rows = time.perf_counter(), B
        sender = Sender((2, B, T), self.device)
        for position in itertools.count(0, B * T):
            pairs = np.stack(stream.pairs(position, B * T)).reshape(2, B, T)
            inputs, targets = sender.send(pairs).unbind()
            yield inputs, targets, position // epoch_tokens + 1

    @torch.no_grad()
    def evaluate_bpb(self, model: Any, tokenizer: Any, batch_size: int) -> float:
        """Bits per byte of the rows that the trainer's evaluation scores, each token as it is counted there.

        The program's model computes the cross-entropy itself, which is its manner: model(x, y, reduction="none").
        """
        del tokenizer
        self._wait()
        self.eval_at = time.perf_counter()
        split, row_tokens = self.data.splits["val"], self.data.row_tokens
        wanted = len(split.rows) if self._eval_tokens is None else max(1, self._eval_tokens // row_tokens)
        rows = np.asarray(split.rows[:wanted])
        nats = self._nats(model, rows, batch_size)
        assert split.index is not None
        self.score = Score(*by_document(rows, nats, split.index, self.data.token_bytes), rows.shape[0] * row_tokens)
        self.eval_s = time.perf_counter() - self.eval_at
        return self.score.bpb

    def _nats(self, model: Any, rows: np.ndarray, batch_size: int) -> np.ndarray:
        nats = np.empty((len(rows), rows.shape[1] - 1), np.float64)
        sender = Sender((batch_size, rows.shape[1]), self.device)

        def batch(first: int) -> torch.Tensor:  # repeats rows: one shape, one compilation
            return sender.send(np.resize(rows[first : first + batch_size], (batch_size, rows.shape[1])))

        following = batch(0)
        for first in range(0, len(rows), batch_size):
            tokens = following
            losses = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), reduction="none")
            if first + batch_size < len(rows):
                following = batch(first + batch_size)  # while the device works
            kept = min(batch_size, len(rows) - first)
            nats[first : first + kept] = losses.view(batch_size, -1)[:kept].float().cpu().numpy()
        return nats

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Sender:
    """Copies arrays of one shape to the device, int64, without waiting for it; on a CPU it only converts them."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self._device, self._turn = device, 0
        self._pinned = [torch.empty(shape, dtype=torch.int64).pin_memory() for _ in range(2 * (device.type == "cuda"))]
        self._sent = [torch.cuda.Event() for _ in self._pinned]

    def send(self, array: np.ndarray) -> torch.Tensor:
        """The array as a tensor of its own, which nothing overwrites."""
        if not self._pinned:
            return torch.from_numpy(array.astype(np.int64))
        turn = self._turn = 1 - self._turn
        self._sent[turn].synchronize()  # of the copy before the last one: the device has work left
        self._pinned[turn].numpy()[...] = array
        sent = self._pinned[turn].to(self._device, non_blocking=True)
        self._sent[turn].record()
        return sent


# ---- the modules that the program imports ----


class PrepareTokenizer:
    """The tokenizer by the program's names for it."""

    folder = Path()

    def __init__(self, tokenizer: Tokenizer):
        self.enc = tokenizer

    @classmethod
    def from_directory(cls, tokenizer_dir: Path | str | None = None) -> "PrepareTokenizer":
        """Reads the tokenizer of the data folder, unless another folder is named."""
        return cls(Tokenizer.from_dir(tokenizer_dir or cls.folder))

    def get_vocab_size(self) -> int:
        """Tokens in the vocabulary."""
        return self.enc.vocab_size

    def get_bos_token_id(self) -> int:
        """The token that begins a document."""
        return self.enc.bos_id

    def encode(self, text: str, prepend: int | None = None) -> list[int]:
        """Tokens of a text."""
        return [*([] if prepend is None else [prepend]), *map(int, self.enc.encode(text))]

    def decode(self, ids: list[int]) -> str:
        """The text of tokens."""
        return self.enc.decode(ids)


def stand_in(feed: Feed, folder: Path, *, budget_s: float) -> None:
    """Puts `kernels` and `prepare` where the program's imports find them."""
    kernels, prepare = types.ModuleType("kernels"), types.ModuleType("prepare")

    def get_kernel(*names: Any, **options: Any) -> Any:
        if feed.device.type == "cuda":
            flash_attention.make_block_masks(feed.data.row_tokens, feed.device)
        return flash_attention.get_kernel(*names, **options)

    vars(kernels).update(get_kernel=get_kernel)
    PrepareTokenizer.folder = folder
    vars(prepare).update(
        MAX_SEQ_LEN=feed.data.row_tokens,
        TIME_BUDGET=int(budget_s) if float(budget_s).is_integer() else budget_s,
        Tokenizer=PrepareTokenizer,
        make_dataloader=feed.batches,
        evaluate_bpb=feed.evaluate_bpb,
        get_token_bytes=lambda device="cpu": torch.from_numpy(feed.data.token_bytes).to(device),
    )
    sys.modules.update(kernels=kernels, prepare=prepare)


# ---- one run ----


@dataclass(frozen=True)
class Ended:
    """How the program came to its end: the names in it, what it printed, and why it failed ("" if it did not)."""

    names: dict[str, Any]
    printed: str
    outcome: str
    reason: str


class Tee(io.TextIOBase):
    """Writes on, and remembers."""

    def __init__(self, stream: TextIO):
        self._stream, self.text = stream, io.StringIO()

    def write(self, text: str, /) -> int:
        """Writes on, and remembers."""
        self.text.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        """Flushes the stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """As the stream."""
        return self._stream.isatty()


def execute(program: Path) -> Ended:
    """Runs the program as its own `__main__`."""
    real, tee, arguments = sys.stdout, Tee(sys.stdout), sys.argv
    sys.stdout, sys.argv = tee, [str(program)]
    sys.path.append(str(program.parent.resolve()))  # its other files; last, so that they hide nothing
    names: dict[str, Any] = {}
    outcome, reason = "measured", ""
    try:
        names = runpy.run_path(str(program), run_name="__main__")
    except SystemExit as error:
        if error.code:
            outcome, reason = (
                "crashed",
                f"it ended itself with exit code {error.code}: {last_line(tee.text.getvalue())}",
            )
    except BaseException as error:  # noqa: BLE001  # the program may raise anything
        traceback.print_exc()
        outcome = "out_of_memory" if is_out_of_memory(error) else "crashed"
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    finally:
        sys.stdout, sys.argv = real, arguments
        sys.path.pop()
    return Ended(names, tee.text.getvalue(), outcome, reason)


def last_line(text: str) -> str:
    """The last line that says something; a progress line that overwrites itself counts as several."""
    return next((line.strip() for line in reversed(re.split(r"[\r\n]", text)) if line.strip()), "")


def summary(printed: str) -> dict[str, float]:
    """The numbers of the block after the last `---`, by name."""
    block = printed.rpartition("\n---\n")[2] if "\n---\n" in f"\n{printed}" else ""
    return {name: float(value) for name, value in re.findall(r"(?m)^(\w+): +(-?[\d.]+(?:e[+-]?\d+)?)\s*$", block)}


def curve(printed: str) -> list[dict[str, float]]:
    """Points of the training curve, as the program printed them."""
    points = [
        {"step": int(step), "loss": float(loss), "progress": float(percent) / 100}
        for step, percent, loss in STEP.findall(printed)
    ]
    return [*points[:-1:STEPS_BETWEEN_POINTS], *points[-1:]]


def counts(ended: Ended) -> dict[str, Any]:
    """What the program counted, in our names: exact from its own variables, else as it printed it.

    Its training seconds hold all steps but the first UNTIMED_STEPS, and so does the throughput here.
    """
    names, told = ended.names, summary(ended.printed)

    def number(name: str, printed: str, unit: float = 1.0) -> float:
        value = names.get(name)
        return float(value) if isinstance(value, int | float) else told.get(printed, math.nan) * unit

    steps, tokens = number("step", "num_steps"), number("total_tokens", "total_tokens_M", 1e6)
    training_s = number("total_training_time", "training_seconds")
    flops, depth = number("num_flops_per_token", ""), number("DEPTH", "depth")
    timed_tokens = tokens * (steps - UNTIMED_STEPS) / steps if steps > UNTIMED_STEPS else 0.0
    tokens_per_s = timed_tokens / training_s if training_s > 0 else 0.0
    peak = peak_tflops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return {
        "training_seconds": round(training_s, 3),
        "num_steps": whole(steps),
        "total_tokens": whole(tokens),
        "num_params": whole(number("num_params", "num_params_M", 1e6)),
        "depth": whole(depth),
        "flops_per_token": None if math.isnan(flops) else flops,
        "tokens_per_s": round(tokens_per_s, 1),
        "mfu_percent": round(tokens_per_s * flops / peak / 1e10, 2) if peak and not math.isnan(flops) else None,
    }


def whole(value: float) -> int | None:
    """The number, or None if there is none."""
    return round(value) if math.isfinite(value) else None


def perform(arguments: argparse.Namespace) -> str:
    """Runs the program, writes result.json and curve.jsonl; returns the outcome."""
    program, data_folder, out = find_program(arguments.reference), Path(arguments.data), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").unlink(missing_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    created = time.perf_counter()
    data = load_data(data_folder, holdout=False)
    feed = Feed(data, seed=arguments.seed, eval_tokens=arguments.eval_tokens, device=device)
    stand_in(feed, data_folder, budget_s=arguments.budget_s)
    started = time.perf_counter()
    ended = execute(program)
    counted = counts(ended) if ended.outcome == "measured" else {}
    outcome, reason = verdict(ended, feed, counted)
    if outcome != "measured":
        counted = {}
    seconds = {
        "start": _FIRST_LINE_AT - spawned_at(_FIRST_LINE_AT),
        "import": _IMPORTED_AT - _FIRST_LINE_AT,
        "data": started - created,
        **parts(feed, started, counted.get("training_seconds", 0.0)),
    }
    result = {
        "outcome": outcome,
        "reason": reason,
        "val_bpb": feed.score.bpb if feed.score and outcome == "measured" else None,
        "evaluation": f"{data.evaluation_version}-{feed.score.tokens}" if feed.score else None,
        **counted,
        "total_seconds": round(time.time() - spawned_at(_FIRST_LINE_AT), 3),
        **memory_mb(device),
        "micro_batch_rows": feed.batch_rows,
        "seed": arguments.seed,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "printed": summary(ended.printed),
    }
    (out / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve(ended.printed)))
    write_json(out / "result.json", result)
    print(f"{outcome}: {reason}" if reason else outcome, flush=True)
    return outcome


def verdict(ended: Ended, feed: Feed, counted: dict[str, Any]) -> tuple[str, str]:
    """The outcome and its reason; a run without a score or without counts is none."""
    if ended.outcome != "measured":
        return ended.outcome, ended.reason
    if feed.score is None:
        return "invalid", "it never called prepare.evaluate_bpb, so it has no score"
    if not math.isfinite(feed.score.bpb):
        return "crashed", "its losses on the validation rows are not finite"
    if not counted["total_tokens"] or not counted["num_steps"] or not counted["training_seconds"] > 0:
        return "invalid", "it neither has nor prints total_tokens, step and total_training_time"
    return "measured", ""


def parts(feed: Feed, started: float, training_s: float) -> dict[str, float]:
    """Seconds of build, first step, train and evaluation.

    The first step is what lies between the first batch and the evaluation without being on the program's clock:
    compilation, the steps that it does not time, and its own work between steps.
    """
    now = time.perf_counter()
    first_batch_at = feed.first_batch_at or now
    loop_s = (feed.eval_at or now) - first_batch_at
    return {
        "build": first_batch_at - started,
        "first_step": max(0.0, loop_s - training_s),
        "train": training_s,
        "eval": feed.eval_s,
    }


def find_program(path: Path) -> Path:
    """The train.py of a folder, or the file itself.

    Raises:
        UsageError: There is none.
    """
    program = path / "train.py" if path.is_dir() else path
    if not program.is_file():
        raise UsageError(f"{program} does not exist; give a folder that holds an autoresearch-style train.py")
    return program


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR", help="Folder with a train.py.")
    parser.add_argument("--data", required=True, help="Folder made by python -m trainer.prepare.")
    parser.add_argument("--out", required=True, help="Folder for result.json and curve.jsonl.")
    parser.add_argument("--budget-s", type=float, default=300.0, help="Its TIME_BUDGET.")
    parser.add_argument("--eval-tokens", type=int, help="Tokens to score (whole rows); default: all.")
    parser.add_argument("--seed", type=int, default=0, help="Of the order of the rows.")
    return parser.parse_args(arguments)


def main() -> int:
    """Runs one reference; returns the harness's exit code for its outcome."""
    try:
        return EXIT_CODES[perform(parse())]
    except UsageError as error:
        print(f"reference: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
