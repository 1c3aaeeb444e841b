"""How the most rows that fit are found: the search on cards by arithmetic; on a GPU, the real thing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainer_kit import ROW_TOKENS, VOCAB

from trainer import memory, micro_batch
from trainer.micro_batch import MOST_PROBES, MOST_TOKENS, Probe, largest, micro_batch_choices

POWERS = [2**n for n in range(9)]


class StandIn:
    """A card by arithmetic: a pass needs so much for each row, and so much once, which it does not tell apart."""

    def __init__(self, limit: float, *, per_row: float, once: float = 0.0):
        self.limit, self.per_row, self.once, self.tried = limit, per_row, once, list[int]()

    def __call__(self, rows: int) -> Probe:
        self.tried.append(rows)
        need = self.once + rows * self.per_row
        if need > 1.06 * self.limit:
            return Probe(False)  # out of memory
        return Probe(need <= self.limit, (1.05 if need <= self.limit else 1.0) * self.limit / (need / rows))

    def most(self, choices: list[int]) -> int:
        return max((rows for rows in choices if self.once + rows * self.per_row <= self.limit), default=choices[0])


# 2048 tokens a row of the rtx3060 preset's model need 0.16 GB by the fitted formula; the rest of the card is context,
# weights and what is spared
@pytest.mark.parametrize(("card_gb", "rows"), [(8, 32), (12, 64), (24, 128), (80, 256)])
@pytest.mark.parametrize("wrong_by", [1 / 16, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 16.0])
def test_the_most_rows_that_fit_are_found_however_wrong_the_prediction_is(card_gb: float, rows: int, wrong_by: float):
    card = StandIn(0.92 * card_gb - 0.5, per_row=0.16)
    found = largest(POWERS, begin=wrong_by * card.limit / card.per_row, probe=card)
    assert found == card.most(POWERS) == rows
    assert len(card.tried) <= MOST_PROBES


@given(
    limit=st.floats(1, 100),
    per_row=st.floats(0.01, 10),
    once=st.floats(0, 0.04),
    wrong_by=st.floats(0.2, 5),
    total=st.sampled_from([1, 6, 12, 96, 128, 360]),
)
def test_what_is_found_fits_and_the_next_does_not(
    limit: float, per_row: float, once: float, wrong_by: float, total: int
):
    choices = micro_batch_choices(total * 8, 8)
    card = StandIn(limit, per_row=per_row, once=once * limit)
    found = largest(choices, begin=wrong_by * limit / per_row, probe=card, probes=20)
    assert found == card.most(choices)
    assert len(card.tried) == len(set(card.tried))


def test_a_right_prediction_costs_one_pass():
    card = StandIn(7.0, per_row=0.16)
    largest(POWERS, begin=43, probe=card)
    assert card.tried == [32]


def test_after_the_last_probe_the_answer_is_half_of_what_did_not_fit():
    card = StandIn(7.0, per_row=6.0)
    assert largest(POWERS, begin=256, probe=card, probes=3) == 32
    assert card.tried == [256, 128, 64]


def test_more_than_2_to_the_19_tokens_at_once_are_tried_when_a_program_asks_for_them_alone():
    assert micro_batch_choices(2**21, 2048)[-1] * 2048 == MOST_TOKENS == 2**19
    assert micro_batch_choices(2**21, 2048, 1024)[-1] == 1024
    assert micro_batch_choices(2**21, 2**20) == [1]


# ---- on a GPU ----


class Ballast(torch.autograd.Function):
    """Passes its input on, and holds a quarter of a GB for each row until the backward pass is over."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.ballast = torch.empty(len(x), 2**28, dtype=torch.uint8, device=x.device)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        return grad_outputs[0]


class Quarter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCAB, VOCAB, device="cuda")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return Ballast.apply(self.table(tokens))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # of what torch's compiler imports
@pytest.mark.parametrize(("memory_gb", "rows"), [(8.0, 16), (12.0, 32), (24.0, 64)])
def test_a_card_held_to_less_gets_the_most_rows_that_fit(
    memory_gb: float, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path))
    x = torch.zeros((128, ROW_TOKENS), dtype=torch.long, device="cuda")
    torch.cuda.empty_cache()
    memory.hold(torch.device("cuda"), memory_gb=memory_gb)
    try:
        first = micro_batch.MicroBatchFinder(Quarter(), None, x, x, "first", vocab_size=VOCAB)
        assert first.find(POWERS[:8]) == rows
        next_one = micro_batch.MicroBatchFinder(Quarter(), None, x, x, "next", vocab_size=VOCAB)
        assert next_one.find(POWERS[:8]) == rows
        assert next_one.probes <= 2 <= first.probes  # it begins where the first one ended
        assert torch.cuda.max_memory_reserved() < memory_gb * memory.GB
    finally:
        memory.hold(torch.device("cuda"))
