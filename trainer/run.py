"""What a candidate gets: batches, time, a micro-batch that fits, and `step`. It scores nothing."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer.errors import ContractError, Futile, TrainingFailure
from trainer.micro_batch import MicroBatchFinder, micro_batch_choices
from trainer.reporter import Reporter
from trainer.rows import Data, TokenStream

_clock = time.perf_counter  # taken now: a candidate may replace the module's function later

FIRST_STEP_TOLERANCE = 1.01  # first step's tokens over the later steps' average
OVERTIME_SHARE, OVERTIME_S = 0.25, 2.0  # what may pass after the budget's end: half of a long step, a stall
CPU_MICRO_BATCH_TOKENS = 2048


class Run:
    """The candidate's view of a trial: batches, time, a micro-batch that fits.

    Attributes:
        device: Where the model has to be.
        vocab_size: V; the last dimension of the logits.
        row_tokens: T of the evaluation's rows.
        seed: Already given to torch, numpy and random.
        budget_s: Seconds of training, or None when the budget is in tokens.
        budget_tokens: Tokens of training, or None when the budget is in seconds.
        progress: Share of the budget that is spent when the last step ends, 0 to 1: on CUDA that step is still in
            flight, and its length that of the steps before it. It stays 0 until the first step ends, because
            compilation is free.
        done: Whether the budget is spent.
        model: What may be scored on a small slice at half of the budget, in eval mode, so that a hopeless trial can end
            there: what `micro_batch` was called with. A program that returns another model (an average of the weights)
            sets it to that one, or to None; then the trial always runs to its end.
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
        at_half: Callable[[torch.nn.Module], None] | None = None,
        most_tokens: int | None = None,
    ):
        self.device, self.seed = device, seed
        self.vocab_size, self.row_tokens = data.vocab_size, data.row_tokens
        self.budget_s, self.budget_tokens = budget_s, budget_tokens
        self.progress, self.done = 0.0, False
        self.model: torch.nn.Module | None = None
        self._reporter, self._program_sha256, self._at_half = reporter, program_sha256, at_half
        self._most_tokens = most_tokens  # at once, whatever the card has: more ran out of memory
        self._stream = TokenStream(data.splits["train"].rows, seed=seed)
        self._ahead: tuple[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] | None = None
        self._violation: Exception | None = None
        self._flight: _Flight | None = None
        self._lags = device.type == "cuda"  # waits for the step before the last one
        self._tokens_at_call = 0
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

        On CUDA it predicts the largest that fits, tries a forward and a backward pass, and goes up or down by what
        that needed; what it finds is remembered in the cache folder. On a CPU it takes what stays in the caches. Random
        numbers, gradients and buffers are afterwards as they were.

        Args:
            model: Its parameters get the trial gradients.
            total_tokens: Tokens of one optimizer step.
            seq_len: Tokens of one row.
            at_most: An upper limit in rows; has to be a valid answer itself. Default: as many as make 2^19 tokens.
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
        if self._most_tokens is not None:
            choices = [rows for rows in choices if rows * seq_len <= self._most_tokens] or choices[:1]
        self.model = model
        if self.device.type != "cuda":
            rows = max((rows for rows in choices if rows * seq_len <= CPU_MICRO_BATCH_TOKENS), default=1)
        else:
            x, y = self._load(0, choices[-1], seq_len)
            finder = MicroBatchFinder(model, loss, x, y, self._program_sha256, vocab_size=self.vocab_size)
            self.record.micro_batch_finder = finder
            rows = finder.find(choices)
        self.record.micro_batch = (rows, choices, seq_len)
        return rows

    def smaller_micro_batch(self) -> int | None:
        """Tokens at once that are half of what was found, or less; None if that is no choice, or none was asked for."""
        if self.record.micro_batch is None:
            return None
        found, choices, seq_len = self.record.micro_batch
        return max((rows * seq_len for rows in choices if rows <= found // 2), default=None)

    def step(self, loss: torch.Tensor | float) -> None:
        """Ends an optimizer step: reads the clock, notes the loss.

        On CUDA it waits for the device to end the step before, so that the device never waits for the next launch;
        the last step and the first two are waited for themselves.

        Raises:
            TrainingFailure: The loss is not finite.
            Futile: Half of the budget is spent, and the model is too far behind.
            ContractError: There was no batch since the last step, or the budget was spent before.
        """
        record = self.record
        if self.done:
            raise self._violated(
                ContractError("run.step after run.done: the budget is spent; train while not run.done")
            )
        if record.tokens == self._tokens_at_call:
            raise self._violated(
                ContractError("run.step without a run.batch since the last step; a step trains on data")
            )
        self._tokens_at_call = record.tokens
        before, self._flight = self._flight, _Flight(loss, record.tokens)
        if self.device.type == "cuda" and record.batch_shape:
            key = (record.tokens, *record.batch_shape)
            self._ahead = (key, self._load(*key))  # while the device still works
        self._land(before)
        if not self._lags or record.steps < 2:
            self._settle()
        self._spend()
        if self.done:
            self._settle()
        if self.progress >= 0.5 and self._at_half is not None:
            if self.model is not None and not self.done:
                self._settle()
                self._look(self.model, self._at_half)
            self._at_half = None

    def _spend(self) -> None:
        """Reckons what will have been spent when the step in flight ends."""
        record = self.record
        if self.budget_s is not None:
            spent_s = record.training_s + (record.step_s if self._flight else 0.0)
            self.progress = spent_s / self.budget_s
            # to the nearest whole step, so that long steps are neither favoured nor punished
            self.done = spent_s + record.step_s / 2 >= self.budget_s
        else:
            assert self.budget_tokens is not None
            self.progress = record.tokens / self.budget_tokens
            self.done = record.tokens >= self.budget_tokens
        self.progress = 1.0 if self.done else min(self.progress, 1.0)

    def _settle(self) -> None:
        """Waits for the step in flight, and for whatever else the device was given."""
        flight, self._flight = self._flight, None
        if flight is not None and self.device.type == "cuda":
            torch.cuda.synchronize()
        self._land(flight)

    def _land(self, flight: "_Flight | None") -> None:
        """Waits for the end of a step, and counts it."""
        if flight is None:
            return
        record, value = self.record, flight.wait()
        if not record.steps:
            # Python's collector stalls a step for up to half a second when a large program has just been compiled
            gc.collect()
            gc.freeze()
            gc.disable()
        record.end_step(_clock(), flight.tokens)
        if not math.isfinite(value):
            raise self._violated(TrainingFailure(f"loss is not finite at step {record.steps}"))
        spent = record.training_s / self.budget_s if self.budget_s else flight.tokens / (self.budget_tokens or 1)
        self._reporter.step(
            step=record.steps,
            tokens=flight.tokens,
            seconds=record.training_s,
            loss=value,
            progress=min(spent, 1.0),
            note=f"{record.tokens_per_s:,.0f} tokens/s | {record.training_s:.1f} s",
        )

    def _look(self, model: torch.nn.Module, at_half: Callable[[torch.nn.Module], None]) -> None:
        """Has the model scored while the budget's clock stands still."""
        started = _clock()
        try:
            at_half(model)
        except Futile as error:
            raise self._violated(error) from None
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.record.paused_s += _clock() - started

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
        self._settle()  # of a program that stops before its time
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
        spent_s = _clock() - record.first_step_at - record.paused_s
        if self.budget_s is not None and spent_s > self.budget_s * (1 + OVERTIME_SHARE) + OVERTIME_S:
            raise ContractError(
                f"train(run) took {spent_s:.1f} s after its first step, the budget is {self.budget_s:g} s"
            )


class _Flight:
    """A step that the device has been given: its loss is on the way to the host, behind all of its work."""

    def __init__(self, loss: torch.Tensor | float, tokens: int):
        self.tokens, self._ended = tokens, None
        self._loss = loss.detach() if isinstance(loss, torch.Tensor) else loss
        if isinstance(self._loss, torch.Tensor) and self._loss.is_cuda:
            self._loss = torch.empty((), dtype=self._loss.dtype, pin_memory=True).copy_(
                self._loss.reshape(()), non_blocking=True
            )
        if torch.cuda.is_initialized():
            self._ended = torch.cuda.Event(blocking=False)
            self._ended.record()

    def wait(self) -> float:
        """Waits for the end; returns the loss."""
        if self._ended is not None:
            self._ended.synchronize()
        return float(self._loss)


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
    paused_s: float = 0.0
    batch_shape: tuple[int, int] | None = None
    micro_batch: tuple[int, list[int], int] | None = None  # rows, what else they could have been, tokens of a row
    micro_batch_finder: "MicroBatchFinder | None" = None

    def end_step(self, now: float, tokens: int) -> None:
        """Counts a step that ended at that time, after so many tokens in all."""
        self.steps += 1
        self.tokens_at_steps = tokens
        if self.first_step_at is None:
            self.first_step_at, self.first_step_tokens = now, tokens
        self.training_s = now - self.first_step_at - self.paused_s

    @property
    def step_s(self) -> float:
        """Average length of the timed steps; 0 before there is one."""
        return self.training_s / (self.steps - 1) if self.steps > 1 else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Throughput of the timed steps; 0 before there is one."""
        return (self.tokens_at_steps - self.first_step_tokens) / self.training_s if self.training_s > 0 else 0.0
