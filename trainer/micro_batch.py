"""How many rows a card can train on at once: predicted, tried, and from there up or down by what the trial showed.

It does not train, and a program that names its own number of rows is not corrected.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.common import cache_dir
from trainer.errors import ContractError
from trainer.memory import GB, is_out_of_memory, room
from trainer.reporter import write_json
from trainer.telemetry import parameters_of, shape_of

_cross_entropy = torch.nn.functional.cross_entropy  # taken now: a candidate may replace the module's function later

# Unless a program asks for more. On an H100 2^18 tokens at once are 3% faster than 2^17, 2^19 another 1% (docs/LOG.md):
# fewer launches, fewer additions of gradients. Smaller cards are full earlier.
MOST_TOKENS = 2**19
MOST_PROBES = 5  # each compiles the model for one more shape, which takes as long as a short trial
UNSURE = 1.05  # a measured need is a little too high for more rows: what would pass the limit by less is tried


def micro_batch_choices(total_tokens: int, seq_len: int, at_most: int | None = None) -> list[int]:
    """The numbers of rows that divide the total batch, ascending, up to at_most, else up to MOST_TOKENS.

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
        return [n for n in choices if n * seq_len <= MOST_TOKENS] or choices[:1]
    if at_most not in choices:
        raise ContractError(
            f"device batch {at_most} rows x {seq_len} tokens must divide the total batch {total_tokens}; "
            f"valid rows: {', '.join(map(str, choices))}"
        )
    return [n for n in choices if n <= at_most]


def bytes_per_token(*, depth: int, dim: int, vocab_size: int) -> float:
    """Activations of a training step, fitted on the baseline's shape: where to begin, not what to believe."""
    return 39.8 * depth * dim + 2.07 * vocab_size


def predicted_bytes(tokens: int, *, depth: int, dim: int, vocab_size: int, parameters: int) -> float:
    """Memory of a training step on `tokens` tokens at once, by the same fit."""
    return tokens * bytes_per_token(depth=depth, dim=dim, vocab_size=vocab_size) + 12 * parameters


@dataclass(frozen=True)
class Probe:
    """What a pass at some number of rows showed.

    Attributes:
        fits: Whether it went through with enough to spare.
        most_rows: How many would fit by what it needed, which grows in proportion to the rows; None if memory ran out.
    """

    fits: bool
    most_rows: float | None = None


def largest(choices: Sequence[int], *, begin: float, probe: Callable[[int], Probe], probes: int = MOST_PROBES) -> int:
    """The most rows that fit: tries the largest choice up to `begin`, then goes where the measured need points.

    Args:
        choices: Ascending.
        begin: Rows that should fit.
        probe: Tries a number of rows.
        probes: How many numbers may be tried. After the last one the answer may be one that was not: half of the fewest
            that do not fit.
    """
    fits, too_many = 0, choices[-1] + 1
    rows = max((n for n in choices if n <= begin), default=choices[0])
    for _ in range(probes):
        tried = probe(rows)
        if tried.fits:
            fits = rows
        else:
            too_many = rows
        left = [n for n in choices if fits < n < too_many]
        if not left:
            break
        pointed = tried.most_rows if tried.most_rows is not None else too_many / 2
        fitting = [n for n in left if n <= pointed]
        if tried.fits and not fitting:
            break
        rows = (fitting or left)[-1 if fitting else 0]
    return fits or max((n for n in choices if n <= too_many / 2), default=choices[0])


class MicroBatchFinder:
    """Finds the most rows that fit into what this process may use of its CUDA card; remembers them by program and card.

    It also remembers by card how far the last measured need was from the fitted one, so that the next program begins
    nearer to where it ends: a program differs from its parent by an edit.

    Attributes:
        probes: How many numbers of rows were tried.
    """

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
        depth, dim = shape_of(model)
        self._fitted = bytes_per_token(depth=depth or 1, dim=dim, vocab_size=vocab_size)
        self._choices: list[int] = []
        self._found = self.probes = 0
        card = (torch.cuda.get_device_properties(0).name, *torch.cuda.get_device_capability())
        self._memo = _memo(program_sha256, *card, room().total_bytes, *x.shape)
        self._memo_of_card = _memo(torch.__version__, *card)

    def find(self, choices: list[int]) -> int:
        """The most rows of the choices (ascending) whose forward and backward pass fit; the fewest if none does."""
        self._choices = choices
        remembered = _recall(self._memo, "rows")
        if remembered in choices:
            self._found = int(remembered)
            return self._found
        if choices[1:]:
            self._found = largest(choices, begin=self._begin(), probe=self._probe)
        else:
            self._found = choices[0]
        _remember(self._memo, rows=self._found)
        return self._found

    def halve(self) -> None:
        """Training ran out of memory all the same: the next run of this program begins with half as many rows."""
        smaller = [rows for rows in self._choices if rows <= self._found // 2]
        if smaller:
            _remember(self._memo, rows=smaller[-1])

    def _begin(self) -> float:
        """Rows that fit by the fitted need, corrected by what the last program measured here."""
        here = room()
        states = 12 * parameters_of(self._model)  # gradients, two moments; some of it may be there already
        free = here.free_bytes + torch.cuda.memory_reserved() - states - self.SPARE * here.total_bytes
        correction = _recall(self._memo_of_card, "of_fitted")
        per_row = self._fitted * (correction or 1.0) * self._x.shape[1]
        return free / per_row

    def _probe(self, rows: int) -> Probe:
        """One forward and backward pass that leaves no trace, measured at the second time: the first one compiles."""
        self.probes += 1
        torch.cuda.empty_cache()
        here, before = room(), torch.cuda.memory_reserved()
        whole = here.free_bytes + before - self.SPARE / 2 * here.total_bytes - self._moments_to_come()
        tokens = rows * self._x.shape[1]
        name = f"micro-batch: {rows} rows x {self._x.shape[1]} tokens"
        needed = self._pass_bytes(rows)
        if needed is None:
            print(f"{name}: out of memory, {here.free_bytes / GB:.2f} GB were free", flush=True)
            return Probe(False)
        fixed = sum(p.numel() * p.element_size() for p in self._model.parameters()) + before
        per_token = max(1.0, needed - fixed) / tokens
        _remember(self._memo_of_card, of_fitted=per_token / self._fitted)
        fits = needed <= whole
        print(f"{name}: {needed / GB:.2f} of {whole / GB:.2f} GB{'' if fits else ', too much'}", flush=True)
        return Probe(fits, (UNSURE if fits else 1.0) * (whole - fixed) / per_token / self._x.shape[1])

    def _moments_to_come(self) -> int:
        """Two float32 moments a weight, as far as no optimizer has them: 4 bytes a weight are the weights alone."""
        parameters = parameters_of(self._model)
        return max(0, min(8 * parameters, 12 * parameters - torch.cuda.memory_allocated()))

    def _pass_bytes(self, rows: int) -> int | None:
        """The most that torch holds during the pass; None if memory runs out."""
        gradients = [(p, p.grad) for p in self._model.parameters()]
        buffers = [(b, b.clone()) for b in self._model.buffers()]
        try:
            with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
                for _ in range(2):
                    for parameter, _ in gradients:
                        parameter.grad = None
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    self._loss(self._x[:rows], self._y[:rows]).backward()
                    torch.cuda.synchronize()
            return torch.cuda.max_memory_reserved()
        except Exception as error:  # a compiler may wrap it
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _memo(*key: object) -> Path:
    text = json.dumps(key)
    return cache_dir() / "micro_batch" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _recall(memo: Path, name: str) -> float:
    try:
        found = float(json.loads(memo.read_text())[name])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0  # never found, or a broken file: look again
    return found if 0 < found < float("inf") else 0.0


def _remember(memo: Path, **found: float) -> None:
    with contextlib.suppress(OSError):  # a full disk, no home: then it is looked for again
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_json(memo, found)
