"""How many rows a card can train on at once: by prediction, then a short probe, halving when memory runs out."""

import contextlib
import hashlib
import json
from collections.abc import Callable

import torch

from trainer.common import cache_dir
from trainer.errors import ContractError
from trainer.reporter import write_json
from trainer.telemetry import parameters_of, shape_of

_cross_entropy = torch.nn.functional.cross_entropy  # taken now: a candidate may replace the module's function later


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
        self._memo = cache_dir() / "micro_batch" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

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
            return int(json.loads(self._memo.read_text())["rows"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0  # never found, or a broken file: look again

    def _remember(self, rows: int) -> None:
        with contextlib.suppress(OSError):  # a full disk, no home: then it is looked for again
            self._memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._memo, {"rows": rows})
