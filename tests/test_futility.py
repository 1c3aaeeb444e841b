"""Futility: what its margin costs in true wins and saves in slot time, by Monte Carlo over families of curves."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from raysearch.futility import FEWEST, LOST_WINS, REMEMBERED, SIGMAS, Futility, spared
from raysearch.model import Direction

SIGMA = 6e-4  # between seeds, of final values; of half-way values on a small slice it is more
HALF_SIGMA = 1e-3
FAMILIES = ("normal", "heavy-tailed", "late in 10%", "late in 2%", "late in 0.5%", "late from the middle on")


@dataclass(frozen=True)
class Cost:
    """What a rule came to over some studies."""

    wins: int
    lost: int
    stopped_share: float

    @property
    def saved_share(self) -> float:
        """Of the slot time: a trial that is stopped at half of its budget costs half of it."""
        return self.stopped_share / 2


def curves(family: str, chance: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """True differences to the parent, half-way and final, of candidates: few wins, many a bit worse, some hopeless."""
    kind = chance.random(count)
    worse = np.where(kind < 0.75, chance.exponential(0.01, count), 0.03 + chance.exponential(0.1, count))
    near = np.where(kind < 0.05, -chance.exponential(0.002, count), np.abs(chance.normal(0.0005, 0.0015, count)))
    final = np.where(kind < 0.35, near, worse)
    second_half = 0.002 * chance.standard_t(2.5, count) if family == "heavy-tailed" else chance.normal(0, 0.003, count)
    share = {"late in 10%": 0.1, "late in 2%": 0.02, "late in 0.5%": 0.005, "late from the middle on": 0.1}
    late = chance.random(count) < share.get(family, 0.0)  # schedules whose gain comes in the second half
    if family == "late from the middle on":
        late &= np.arange(count) >= count // 2
    second_half = np.where(late, np.abs(chance.normal(0.03, 0.01, count)), second_half)
    gain = np.where(chance.random(count) < 0.35, -chance.exponential(0.004, count), chance.exponential(0.004, count))
    final = np.where(late, gain, final)
    return 1.2 * final + second_half, final


def cost(family: str, *, studies: int = 60, count: int = 600) -> Cost:
    """Runs whole studies: what is stopped teaches nothing."""
    wins = lost = stopped = 0
    for seed in range(studies):
        chance = np.random.default_rng(seed)
        half, final = curves(family, chance, count)
        scale = math.sqrt(1.5)  # the parent's mean is of two runs
        seen_half = half + chance.normal(0, HALF_SIGMA * scale, count)
        seen_final = final + chance.normal(0, SIGMA * scale, count)
        futility = Futility(Direction.MINIMIZE)
        for number in range(count):
            bound = futility.bound(0.0, SIGMA)
            wins += int(final[number] < 0)
            if bound is not None and seen_half[number] > bound and not spared(f"c{number:04d}"):
                stopped += 1
                lost += int(final[number] < 0)
            else:
                futility.add(float(seen_half[number]), float(seen_final[number]))
    return Cost(wins, lost, stopped / (studies * count))


@pytest.mark.parametrize("family", FAMILIES)
def test_at_most_one_true_win_in_200_is_lost_and_time_is_saved(family: str):
    found = cost(family)
    assert found.wins > 1500
    assert found.lost <= LOST_WINS * found.wins
    assert found.saved_share > 0.04


def fed(direction: Direction = Direction.MINIMIZE, runs: int = 100) -> Futility:
    chance = np.random.default_rng(1)
    sign = 1 if direction is Direction.MINIMIZE else -1
    futility = Futility(direction)
    for half in chance.normal(0.0, 0.003, runs):
        futility.add(sign * float(half), -sign * 0.001)
    return futility


def test_nothing_is_stopped_before_enough_is_known():
    assert fed(runs=FEWEST - 1).bound(1.0, SIGMA) is None
    assert fed(runs=FEWEST).bound(1.0, SIGMA) is not None
    assert fed().bound(None, SIGMA) is None


def test_runs_that_ended_far_behind_say_nothing_of_wins():
    known, more = fed(), fed()
    for _ in range(200):
        more.add(0.5, 0.3)
    assert more.bound(1.0, SIGMA) == known.bound(1.0, SIGMA)


def test_a_late_win_among_the_hopeful_runs_widens_the_bound_beyond_it():
    futility = fed()
    before = futility.bound(1.0, SIGMA)
    futility.add(0.3, -0.01)
    after = futility.bound(1.0, SIGMA)
    assert before is not None
    assert after is not None
    assert before < 1.1
    assert 1.3 < after < 1.3 + 0.1  # and no farther than others reach


def test_the_margin_is_never_within_the_noise():
    futility = Futility(Direction.MINIMIZE)
    for _ in range(100):
        futility.add(0.0, 0.0)
    assert futility.bound(1.0, 0.01) == pytest.approx(1.0 + SIGMAS * math.sqrt(2) * 0.01)


def test_a_metric_that_is_maximised_is_the_mirror_image():
    down, up = fed().bound(1.0, SIGMA), fed(Direction.MAXIMIZE).bound(-1.0, SIGMA)
    assert down is not None
    assert up == -down


def test_a_bound_follows_the_noise_and_each_new_run_and_is_no_part_of_what_is_compared():
    asked, not_asked = fed(), fed()
    asked.bound(1.0, SIGMA)
    assert asked == not_asked
    assert asked.bound(1.0, 0.1) == not_asked.bound(1.0, 0.1) == pytest.approx(1.0 + SIGMAS * math.sqrt(2) * 0.1)
    for futility in (asked, not_asked):
        futility.add(0.2, 0.0)
    assert asked.bound(1.0, SIGMA) == not_asked.bound(1.0, SIGMA)


def test_what_is_no_number_teaches_nothing():
    futility = fed()
    futility.add(math.nan, -0.1)
    futility.add(0.0, math.inf)
    assert futility == fed()


def test_old_runs_are_forgotten():
    futility = Futility(Direction.MINIMIZE)
    futility.add(5.0, -0.01)
    for _ in range(REMEMBERED):
        futility.add(0.0, 0.0)
    assert futility.bound(0.0, SIGMA) == pytest.approx(SIGMAS * math.sqrt(2) * SIGMA)


def test_one_candidate_in_ten_is_spared_and_always_the_same_ones():
    ids = [f"c{number:04d}" for number in range(1, 10_000)]
    chosen = [name for name in ids if spared(name)]
    assert 0.08 < len(chosen) / len(ids) < 0.12
    assert [name for name in ids if spared(name)] == chosen
    for period in (2, 5, 10):  # proposers that take turns are spared alike
        assert all(
            0.05 < sum(map(spared, ids[start::period])) / len(ids[start::period]) < 0.15 for start in range(period)
        )
