"""Scores a model on held-out rows, document by document, and checks that it predicts from the past alone.

It calls the model and computes everything else itself; it does not know how the model was trained.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.errors import ContractError
from trainer.memory import GB, is_out_of_memory, release, room
from trainer.reporter import Reporter
from trainer.rows import Data, Split

_cross_entropy = torch.nn.functional.cross_entropy  # taken now: a candidate may replace the module's function later

CPU_EVAL_TOKENS = 2048
CPU_CHECKED_ROWS = 8  # of the evaluation's rows; on CUDA a whole batch, so that nothing is compiled anew
CUDA_EVAL_TOKENS_PER_GB = (
    1024  # of all memory that the process may use, so that every candidate is scored in the same batches
)
LEAK_AT_A_POSITION, LEAK_ON_AVERAGE = 0.05, 0.01  # of the logits' size; bfloat16 rounding stays below 0.01 and 0.004


@dataclass(frozen=True)
class Score:
    """Cross-entropy of one split: per document nats (float64) and bytes (int64), and the rows that were scored.

    Attributes:
        whole_bpb: Bits per byte of the whole set, of which these are the first rows; None if it was not asked for.
    """

    doc: np.ndarray
    nats: np.ndarray
    bytes: np.ndarray
    tokens: int
    whole_bpb: float | None = None

    @property
    def bpb(self) -> float:
        """Bits per byte over all documents."""
        return bits_per_byte(self.nats, self.bytes)


def evaluate(
    model: Any,
    split: Split,
    data: Data,
    *,
    tokens: int | None,
    whole_tokens: int | None = None,
    device: torch.device,
    reporter: Reporter,
    phase: str,
) -> Score:
    """Scores the model on the split's first rows, and checks that it predicts from the past alone.

    Args:
        model: Maps tokens (B, T) to logits (B, T, V).
        split: With an index of its documents.
        data: For the sizes of tokens, rows and vocabulary.
        tokens: How many tokens to score, rounded down to whole rows; None for all.
        whole_tokens: How many tokens are the whole set: the rows beyond `tokens` are scored on top of them, for
            `whole_bpb`. None, or no more than `tokens`: there is no other set.
        device: Where the model is.
        reporter: Is told the progress.
        phase: Under this name.

    Raises:
        ContractError: Logits of a wrong shape or type, not finite, or that depend on later tokens, on other rows of the
            batch, or on earlier calls.
    """
    rows, batch_rows = _scored(split, data, tokens, device)
    whole = split.rows[: max(len(rows), _row_count(split, data, whole_tokens) if whole_tokens else 0)]
    while True:
        try:
            scorer = Scorer(model, device, data.vocab_size)
            nats = scorer.nats(rows, batch_rows, lambda share: reporter.phase(phase, share * len(rows) / len(whole)))
            checked = batch_rows if device.type == "cuda" else min(batch_rows, CPU_CHECKED_ROWS)
            scorer.check_honesty(rows[:checked], nats[:checked])
            break
        except Exception as error:  # the candidate may wrap it
            if batch_rows == 1 or not is_out_of_memory(error):
                raise
            batch_rows //= 2
        release(device)
    assert split.index is not None
    doc, doc_nats, doc_bytes = by_document(rows, nats, split.index, data.token_bytes)
    whole_bpb = None
    if len(whole) > len(rows):
        rest = whole[len(rows) :]
        done = len(rows) / len(whole)
        more = scorer.nats(rest, batch_rows, lambda share: reporter.phase(phase, done + (1 - done) * share))
        _, all_nats, all_bytes = by_document(whole, np.concatenate([nats, more]), split.index, data.token_bytes)
        whole_bpb = bits_per_byte(all_nats, all_bytes)
    return Score(doc, doc_nats, doc_bytes, rows.shape[0] * data.row_tokens, whole_bpb)


def bits_per_byte(nats: np.ndarray, size: np.ndarray) -> float:
    """Bits per byte over all documents, from their nats and bytes."""
    return float(nats.sum() / math.log(2) / size.sum())


def evaluation_id(split: Split, data: Data, tokens: int | None, whole_tokens: int | None) -> str:
    """Names an evaluation: its version, the tokens that decide, and those of the whole set where that is larger."""
    rows = _row_count(split, data, tokens)
    whole = _row_count(split, data, whole_tokens) if whole_tokens else 0
    name = f"{data.evaluation_version}-{rows * data.row_tokens}"
    return f"{name}-{whole * data.row_tokens}" if whole > rows else name


def predicted_s(tokens: int, *, flops_per_token: float, peak_tflops: float, share_of_peak: float) -> float:
    """Seconds that scoring takes if the forward pass reaches that share of the card's peak; compilation comes on top.

    Args:
        tokens: How many are scored.
        flops_per_token: Of forward and backward pass, as a model says of itself; the forward pass is a third of it.
        peak_tflops: Of the card, dense, in 10^12 operations a second.
        share_of_peak: By the same count of operations.
    """
    return tokens * flops_per_token / 3 / (peak_tflops * 1e12 * share_of_peak)


def evaluate_slice(
    model: Any,
    split: Split,
    data: Data,
    *,
    tokens: int,
    of_tokens: int | None,
    device: torch.device,
    reporter: Reporter,
    phase: str,
) -> float:
    """Scores a model in the middle of its training on the first of the rows that `evaluate` scores; checks nothing.

    The batches have the shape of those of `evaluate`, so that a compiled model is compiled for both at once. The
    training goes on as if nothing had happened: modes, buffers and random numbers are afterwards as they were.

    Args:
        model: Maps tokens (B, T) to logits (B, T, V).
        split: With an index of its documents.
        data: For the sizes of tokens, rows and vocabulary.
        tokens: How many tokens to score, rounded down to whole rows.
        of_tokens: The `tokens` of the later `evaluate`.
        device: Where the model is.
        reporter: Is told the progress.
        phase: Under this name.

    Returns:
        Bits per byte; not finite if the logits are not.

    Raises:
        ContractError: Logits of a wrong shape or type.
    """
    rows, batch_rows = _scored(split, data, of_tokens, device)
    rows = rows[: max(1, tokens // data.row_tokens)]
    with _untouched(model, device):
        model.eval()
        scorer = Scorer(model, device, data.vocab_size)
        nats = scorer.costs(rows, batch_rows, lambda share: reporter.phase(phase, share))
    assert split.index is not None
    _, doc_nats, doc_bytes = by_document(rows, nats, split.index, data.token_bytes)
    return bits_per_byte(doc_nats, doc_bytes)


def _scored(split: Split, data: Data, tokens: int | None, device: torch.device) -> tuple[np.ndarray, int]:
    """The rows that count, and how many of them make a batch."""
    rows = split.rows[: _row_count(split, data, tokens)]
    return rows, max(1, min(evaluation_batch_tokens(device) // data.row_tokens, len(rows)))


def _row_count(split: Split, data: Data, tokens: int | None) -> int:
    """How many whole rows that many tokens are, of those that are there; None for all."""
    return len(split.rows) if tokens is None else min(max(1, tokens // data.row_tokens), len(split.rows))


@contextlib.contextmanager
def _untouched(model: Any, device: torch.device) -> Iterator[None]:
    """Puts back what calling a model may change."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    chance, numpy_chance = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(chance)
        np.random.set_state(numpy_chance)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def evaluation_batch_tokens(device: torch.device) -> int:
    """Tokens of one batch of the evaluation: depends on the machine alone, never on the candidate."""
    if device.type != "cuda":
        return CPU_EVAL_TOKENS
    return cuda_batch_tokens(room().total_bytes)


def cuda_batch_tokens(total_bytes: int) -> int:
    """A power of two by the card's memory; a card sold as 8 GB reports a little less, so a tenth is forgiven."""
    return 2 ** int(math.log2(1.1 * total_bytes / GB * CUDA_EVAL_TOKENS_PER_GB))


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
            ContractError: The logits are not what the contract says, or not finite.
        """
        result = self.costs(rows, batch_rows, progress)
        if not np.isfinite(result).all():
            raise ContractError("the model's logits are not finite on the validation rows")
        return result

    def costs(self, rows: np.ndarray, batch_rows: int, progress: Callable[[float], None]) -> np.ndarray:
        """As `nats`, but what is not finite is for the caller to judge."""
        result = np.empty((len(rows), rows.shape[1] - 1), np.float64)
        for first in range(0, len(rows), batch_rows):
            progress(first / len(rows))
            batch = self._tensor(rows[first : first + batch_rows], batch_rows)
            losses = self._losses(self.logits(batch[:, :-1]), batch[:, 1:])
            kept = min(batch_rows, len(rows) - first)
            result[first : first + kept] = losses[:kept].cpu().numpy()
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
