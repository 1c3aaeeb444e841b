"""Slots that drift or are throttled, in simulated fleets: the bad one is found, and a healthy one is left alone."""

import math
import random
from collections.abc import Callable

import pytest

from raysearch.health import LEAST, Health, Suspicion
from raysearch.model import Measurement

SIGMA = 0.01
Odd = Callable[[int, int], tuple[float, float]]  # (slot, run) -> drift of the metric in σ, speed as a share of others


def fleet(
    slots: int, runs: int, *, uneven: float, seed: int, odd: Odd = lambda slot, run: (0.0, 1.0), repeats: int = 6
) -> list[tuple[int, Suspicion]]:
    """Runs programs on random slots, each program a few times, as races do; what is suspected is set aside for good.

    Args:
        slots: How many there are.
        runs: How many runs in all.
        uneven: Standard deviation of log(speed) from run to run.
        seed: Of chance.
        odd: What is wrong with a slot.
        repeats: Runs of each program.

    Returns:
        Number of the run and what was suspected after it.
    """
    draw, health, found = random.Random(seed), Health(), list[tuple[int, Suspicion]]()
    healthy = list(range(slots))
    for run in range(runs):
        slot, program = draw.choice(healthy), run // repeats
        drift, speed = odd(slot, run)
        value = program * 0.1 + SIGMA * (draw.gauss(0.0, 1.0) + drift)
        facts = {"tokens_per_s": 1000.0 * (0.5 + program % 7) * speed * math.exp(draw.gauss(0.0, uneven))}
        health.add(f"slot{slot}", f"t{run}", f"p{program}", Measurement(value, wall_s=1.0, facts=facts))
        for suspicion in health.suspects(SIGMA):
            found.append((run, suspicion))
            health.forget(suspicion.slot)
            name = int(suspicion.slot.removeprefix("slot"))
            if name in healthy and len(healthy) > 1:
                healthy.remove(name)
    return found


@pytest.mark.parametrize("uneven", [0.0, 0.02, 0.15])
@pytest.mark.parametrize("slots", [2, 8])
def test_a_healthy_fleet_loses_no_slot(slots: int, uneven: float):
    for seed in range(4):
        assert fleet(slots, 2000, uneven=uneven, seed=seed) == []


@pytest.mark.parametrize("slots", [2, 3, 8])
def test_a_throttled_slot_is_found_soon_and_no_other(slots: int):
    for seed in range(5):
        found = fleet(slots, 600, uneven=0.02, seed=seed, odd=lambda slot, run: (0.0, 0.75 if slot == 1 else 1.0))
        assert [suspicion.slot for _, suspicion in found] == ["slot1"]
        assert "slower than the others; see to its cooling and power" in found[0][1].reason
        assert len(found[0][1].trials) >= LEAST


def test_a_slot_that_is_throttled_later_is_found_then():
    for seed in range(5):
        odd = lambda slot, run: (0.0, 0.7 if slot == 2 and run >= 300 else 1.0)  # noqa: E731
        found = fleet(8, 900, uneven=0.02, seed=seed, odd=odd)
        assert [suspicion.slot for _, suspicion in found] == ["slot2"]
        assert 300 < found[0][0] < 600


@pytest.mark.parametrize("drift", [-5.0, 5.0, 300.0])
@pytest.mark.parametrize("slots", [3, 8])
def test_a_slot_whose_numbers_differ_is_found_and_no_other(slots: int, drift: float):
    for seed in range(5):
        found = fleet(slots, 600, uneven=0.02, seed=seed, odd=lambda slot, run: (drift if slot == 1 else 0.0, 1.0))
        assert [suspicion.slot for _, suspicion in found] == ["slot1"]
        assert found[0][1].reason.startswith("it drifts: the same programs are ")


def test_of_two_slots_that_differ_neither_is_blamed_for_its_numbers():
    """Which of the two it is, nobody can say."""
    for seed in range(5):
        assert fleet(2, 400, uneven=0.02, seed=seed, odd=lambda slot, run: (20.0 * slot, 1.0)) == []


def test_a_faster_slot_makes_nobody_else_suspect():
    """One card of a newer kind among eight."""
    for seed in range(5):
        assert fleet(8, 1000, uneven=0.02, seed=seed, odd=lambda slot, run: (0.0, 1.2 if slot == 1 else 1.0)) == []


def test_a_program_that_says_no_speed_is_compared_by_its_numbers_alone():
    health = Health()
    for run in range(40):
        value = 1.0 + 0.2 * (run % 4 == 1)
        health.add(f"slot{run % 4}", f"t{run}", "p", Measurement(value, wall_s=1.0))
    (found,) = [one for one in health.suspects(SIGMA) if one.slot == "slot1"]
    assert found.reason == "it drifts: the same programs are +0.2000 apart from other slots"


def test_what_is_forgotten_starts_anew_and_nothing_is_said_twice():
    health = Health()
    speeds = (1000.0, 1000.0, 500.0)
    for run in range(60):
        facts = {"tokens_per_s": speeds[run % 3] * (1 + 0.01 * (run // 3 % 2))}
        health.add(f"slot{run % 3}", f"t{run}", "p", Measurement(1.0, wall_s=1.0, facts=facts))
    assert [one.slot for one in health.suspects(SIGMA)] == ["slot2"]
    assert health.suspects(SIGMA) == []
    health.forget("slot2")
    for run in range(60, 60 + LEAST - 1):
        health.add("slot2", f"t{run}", "p", Measurement(1.0, wall_s=1.0, facts={"tokens_per_s": 500.0}))
        assert health.suspects(SIGMA) == []


def heated(*rounds: str) -> Health:
    """Runs of slots a, b, c, … in turn, a word a round: `H` a throttled run, `.` a cool one, `?` a silent one."""
    health = Health()
    for number, marks in enumerate(rounds):
        for slot, mark in zip("abcdefgh", marks, strict=False):
            facts = {"H": {"throttled_share": 0.4, "throttled": 1.0}, ".": {"throttled_share": 0.02}, "?": {}}[mark]
            health.add(slot, f"{slot}{number}", f"p{slot}{number}", Measurement(1.0, wall_s=1.0, facts=facts))
    return health


def test_a_slot_that_is_throttled_three_times_in_a_row_is_suspected_with_its_trials():
    assert heated("H..", "H..").suspects(SIGMA) == []
    (found,) = heated("H..", "H..", "H..").suspects(SIGMA)
    assert found == Suspicion(
        "a",
        "its clock was throttled by heat or the power brake in 3 of its last 3 trials; see to its cooling and power",
        ("a0", "a1", "a2"),
    )


@pytest.mark.parametrize(
    "rounds",
    [
        ("H..", "H..", "...", "H.."),  # a cool one between
        ("H", "H", "H", "H"),  # nobody to compare it with
        ("H??", "H??", "H??"),  # nobody who says anything
        ("HHH.", "HHH.", "HHH."),  # most are: so it is here
        ("HH", "HH", "HH"),
    ],
)
def test_throttled_slots_are_left_alone_where_it_is_rare_or_how_all_of_them_run(rounds: tuple[str, ...]):
    assert heated(*rounds).suspects(SIGMA) == []


def test_of_two_hot_slots_beside_a_cool_one_both_are_suspected_and_one_that_is_forgotten_starts_anew():
    health = heated("HH..", "HH..", "HH..")
    assert [one.slot for one in health.suspects(SIGMA)] == ["a", "b"]
    health.forget("a")
    hot = Measurement(1.0, wall_s=1.0, facts={"throttled_share": 1.0, "throttled": 1.0})
    for number in range(3, 6):
        health.add("a", f"a{number}", "p", hot)
        assert [one.slot for one in health.suspects(SIGMA)] == (["a"] if number == 5 else [])


def test_without_any_noise_numbers_say_nothing_of_slots():
    health = Health()
    for run in range(60):
        health.add(f"slot{run % 3}", f"t{run}", "p", Measurement(float(run % 3), wall_s=1.0))
    assert health.suspects(0.0) == []
