"""The judge: what is believed, and how often it is wrong."""

import math
import random
from statistics import stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysearch.judge import Noise, Rules, pooled_noise, probability_better, race, screen
from raysearch.model import Direction, Verdict

MIN, MAX = Direction.MINIMIZE, Direction.MAXIMIZE
RULES = Rules()


def test_pooled_noise_of_one_group_is_its_standard_deviation():
    values = [1.0, 1.1, 0.9, 1.3]
    noise = pooled_noise([values])
    assert noise is not None
    assert noise.sigma == pytest.approx(stdev(values))
    assert noise.dof == 3


def test_pooled_noise_does_not_see_differences_between_programs():
    noise = pooled_noise([[1.0, 1.2], [5.0, 5.2], [9.0]])
    assert noise == Noise(pytest.approx(math.sqrt(0.02)), 2)  # pyright: ignore[reportArgumentType]


def test_no_replicates_no_noise():
    assert pooled_noise([[1.0], [2.0]]) is None


def test_probability_is_students_t():
    # t = 2.92 with 2 degrees of freedom is the 95th percentile in every table
    assert probability_better(-2.92, 1.0, 2, MIN) == pytest.approx(0.95, abs=1e-3)
    assert probability_better(-1.645, 1.0, 10_000, MIN) == pytest.approx(0.95, abs=1e-3)


def test_direction_turns_the_sign():
    assert probability_better(-1.0, 0.5, 5, MIN) == pytest.approx(probability_better(1.0, 0.5, 5, MAX))


def test_a_program_without_noise_is_better_when_its_number_is():
    assert probability_better(-1e-9, 0.0, 2, MIN) == 1.0
    assert probability_better(0.0, 0.0, 2, MIN) == 0.5
    assert probability_better(1e-9, 0.0, 2, MIN) == 0.0


def test_screening_never_keeps():
    found = screen(0.5, [1.0, 1.0, 1.0], Noise(0.001, 2), MIN, RULES)
    assert found.verdict is Verdict.RETEST
    assert found.delta == pytest.approx(-0.5)


def test_screening_discards_what_is_within_the_noise():
    assert screen(0.995, [1.0, 1.01, 0.99], Noise(0.01, 2), MIN, RULES).verdict is Verdict.DISCARD


def test_race_keeps_beyond_the_noise_and_says_why():
    found = race([(0.8, 1.0)], Noise(0.01, 2), MIN, RULES)
    assert found.verdict is Verdict.KEEP
    assert "-0.2000 ± 0.0141" in found.reason


def test_race_asks_for_another_pair_while_undecided_and_gives_up_at_the_cap():
    rules = Rules(max_pairs=2)
    undecided = [(0.99, 1.0)]
    assert race(undecided, Noise(0.01, 20), MIN, rules).verdict is Verdict.RETEST
    assert race(undecided * 2, Noise(0.01, 20), MIN, rules).verdict is Verdict.DISCARD
    assert race([(1.01, 1.0)], Noise(0.01, 20), MIN, rules).verdict is Verdict.DISCARD


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=5), st.floats(1e-6, 1.0), st.integers(1, 50))
def test_maximising_is_minimising_the_negative(values: list[float], sigma: float, dof: int):
    pairs = [(value, 0.0) for value in values]
    mirrored = [(-value, 0.0) for value in values]
    rules = Rules(max_pairs=3)
    assert race(pairs, Noise(sigma, dof), MIN, rules).verdict is race(mirrored, Noise(sigma, dof), MAX, rules).verdict


def test_luck_alone_is_kept_in_less_than_three_of_a_hundred_candidates():
    """Programs equal to the champion, the whole way: three baselines, a screening run, one pair."""
    draw = random.Random(0)
    kept, candidates = 0, 4000
    for _ in range(candidates):
        base = [draw.gauss(1.0, 0.02) for _ in range(3)]
        noise = pooled_noise([base])
        assert noise is not None
        if screen(draw.gauss(1.0, 0.02), base, noise, MIN, RULES).verdict is Verdict.RETEST:
            pair = (draw.gauss(1.0, 0.02), draw.gauss(1.0, 0.02))
            kept += race([pair], noise, MIN, RULES).verdict is Verdict.KEEP
    assert kept / candidates < 0.03


def test_a_gain_of_ten_sigma_is_nearly_always_kept():
    draw = random.Random(1)
    kept = 0
    for _ in range(1000):
        base = [draw.gauss(1.0, 0.02) for _ in range(3)]
        noise = pooled_noise([base])
        assert noise is not None
        promising = screen(draw.gauss(0.8, 0.02), base, noise, MIN, RULES).verdict is Verdict.RETEST
        kept += (
            promising
            and race([(draw.gauss(0.8, 0.02), draw.gauss(1.0, 0.02))], noise, MIN, RULES).verdict is Verdict.KEEP
        )
    assert kept > 850
