"""What failed programs failed by."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from raysearch.knobs import Value, read_knobs, rewrite
from raysearch.proposers.failures import Failures
from raysearch.proposers.reach import places_of

SOURCE = """\
RATE = 5  # in [1, 9]: a number of a range
DECAY = 5  # in [1, 9]: another one
WIDTH = 512  # in {384, 448, 512, 576, 640}: a choice
HEAD = 128  # in {64, 128}: another one
"""


def failures(*runs: tuple[Mapping[str, Value], bool], champion: Mapping[str, Value] | None = None) -> Failures:
    """Explanations of runs, each said by what differs from the source and whether it ended well."""
    knobs = read_knobs(rewrite(SOURCE, champion or {}))
    first = {name: knob.value for name, knob in read_knobs(SOURCE).items()}
    where = [places_of(knobs, {**first, **run}) for run, _ in runs]
    return Failures(knobs, where, [not is_good for _, is_good in runs])


def odds(found: Failures, **moved: Value) -> float:
    return found.odds({"RATE": 5, "DECAY": 5, "WIDTH": 512, "HEAD": 128, **moved})


def test_without_failures_everything_runs():
    assert odds(failures(({}, True), ({"RATE": 6}, True)), RATE=9, WIDTH=384) == 1.0


def test_what_failed_twice_and_never_ran_is_unlikely_to_run():
    found = failures(({}, True), ({"WIDTH": 448}, False), ({"WIDTH": 448, "RATE": 6}, False), ({"RATE": 6}, True))
    assert odds(found, WIDTH=448) < 0.3
    assert odds(found, WIDTH=448, DECAY=7) < 0.3
    assert odds(found, WIDTH=384) == 1.0
    assert odds(found, RATE=6) > 0.8


def test_numbers_beyond_one_that_failed_fail_and_numbers_before_it_do_not():
    found = failures(({}, True), ({"RATE": 7}, False), ({"RATE": 8}, False))
    assert odds(found, RATE=9) < 0.3
    assert odds(found, RATE=6) == 1.0
    assert odds(found, RATE=2) == 1.0


def test_what_ran_elsewhere_is_not_blamed_for_what_it_was_moved_with():
    others = [({"DECAY": 7}, True)] * 3
    found = failures(*others, *[({"DECAY": 7, "WIDTH": 448}, False)] * 3)
    assert odds(found, DECAY=7) > 0.8
    assert odds(found, DECAY=8) > odds(found, WIDTH=448)
    assert odds(found, WIDTH=448) < 0.2


def test_a_program_that_failed_by_chance_is_forgiven_when_others_like_it_ran():
    found = failures(({"RATE": 7}, False), *[({"RATE": 8}, True)] * 5)
    assert odds(found, RATE=7) > 0.8


@pytest.mark.parametrize("failed", [3, 12])
def test_what_one_choice_allows_another_does_not(failed: int):
    """A width of 576 is no multiple of 128: it ran with heads of 64, and many widths ran with heads of 128."""
    good = [({"WIDTH": 640, "RATE": 3 + number % 5}, True) for number in range(30)]
    good += [({"WIDTH": 576, "HEAD": 64, "RATE": 3 + number % 5}, True) for number in range(6)]
    bad = [({"WIDTH": 576, "RATE": 3 + number % 5}, False) for number in range(failed)]
    found = failures(*good, *bad, champion={"WIDTH": 576, "HEAD": 64})
    assert odds(found, WIDTH=576, HEAD=128) < 0.5
    assert odds(found, WIDTH=640, HEAD=128) > 0.9
    assert odds(found, WIDTH=576, HEAD=64, RATE=7) > 0.8


def test_a_knob_that_a_run_did_not_have_says_nothing():
    knobs = read_knobs(SOURCE)
    found = Failures(knobs, [[float("nan"), 0.5, 0.5, 1.0], [0.9, 0.5, 0.5, 1.0]], [True, False])
    assert odds(found, RATE=8) == 1.0
