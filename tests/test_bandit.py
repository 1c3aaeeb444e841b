"""The bandit: what its choices come to, by Monte Carlo with fixed seeds."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysearch.bandit import EXPLORE, HALF_LIFE_TRIES, Arm, Tally, discounted, order, tried
from raysearch.model import Operator

TUNE, AGENT, COMBINE, TRANSFER = (
    Arm("tune", Operator.TUNE),
    Arm("agent", Operator.DRAFT),
    Arm("combine", Operator.COMBINE),
    Arm("transfer", Operator.TRANSFER),
)
ARMS = (TUNE, AGENT, COMBINE, TRANSFER)
ABLATE, SIMPLIFY = Arm("ablate", Operator.ABLATE), Arm("simplify", Operator.SIMPLIFY)
RATES = {TUNE: 0.04, AGENT: 0.12, COMBINE: 0.02, TRANSFER: 0.03}


def play(
    seed: int,
    tries: int,
    rates: Callable[[int], Mapping[Arm, float]],
    *,
    seconds: Mapping[Arm, float] | None = None,
    gains: Mapping[Arm, float] | None = None,
) -> list[Arm]:
    """The arms that led, one try after another; a win's gain is exponential, as those of real ratchets nearly are."""
    chance = random.Random(seed)
    tallies: dict[Arm, Tally] = {}
    led: list[Arm] = []
    for number in range(tries):
        arm = order(tallies, ARMS, chance.random)[0]
        led.append(arm)
        won = chance.random() < rates(number)[arm]
        gain = chance.expovariate(1) * (gains or {}).get(arm, 0.003) if won else None
        tallies = tried(tallies, arm, seconds=(seconds or {}).get(arm, 300.0), gain=gain)
    return led


def share(led: Sequence[Arm], arm: Arm) -> float:
    return led.count(arm) / len(led)


def test_the_best_of_four_arms_gets_most_slots():
    shares = [share(play(seed, 1000, lambda _: RATES)[500:], AGENT) for seed in range(12)]
    assert mean(shares) > 0.6
    assert min(shares) > 0.4


def test_regret_is_well_below_that_of_an_even_choice():
    even = max(RATES.values()) - mean(RATES.values())
    regrets = [mean(max(RATES.values()) - RATES[arm] for arm in play(seed, 600, lambda _: RATES)) for seed in range(12)]
    assert mean(regrets) < 0.6 * even


def test_an_arm_that_dries_up_loses_its_slots_to_the_next_best():
    dry = RATES | {AGENT: 0.0}
    after = [play(seed, 2000, lambda number: RATES if number < 800 else dry)[1500:] for seed in range(12)]
    assert mean(share(led, AGENT) for led in after) < 0.25
    assert mean(share(led, TUNE) for led in after) > 0.25


def test_an_arm_that_gets_good_late_is_found():
    late = RATES | {COMBINE: 0.25}
    after = [play(seed, 2000, lambda number: RATES if number < 800 else late)[1500:] for seed in range(12)]
    assert mean(share(led, COMBINE) for led in after) > 0.5


def test_a_cheap_try_and_a_large_gain_count_as_much_as_a_high_rate():
    equal = dict.fromkeys(ARMS, 0.08)
    cheap = [play(seed, 1000, lambda _: equal, seconds={COMBINE: 60.0}) for seed in range(12)]
    large = [play(seed, 1000, lambda _: equal, gains={TRANSFER: 0.015}) for seed in range(12)]
    assert mean(share(led[500:], COMBINE) for led in cheap) > 0.6
    assert mean(share(led[500:], TRANSFER) for led in large) > 0.6


def test_a_new_arm_is_tried_soon_and_a_useless_one_keeps_a_small_share():
    chance = random.Random(3)
    tallies = {arm: Tally(tries=100, wins=5, gain=0.02, seconds=30_000) for arm in (TUNE, AGENT)}
    tallies[COMBINE] = Tally(tries=300, seconds=90_000)
    led = Counter(order(tallies, ARMS, chance.random)[0] for _ in range(4000))
    assert led[TRANSFER] > 0.1 * 4000
    assert 0.6 * EXPLORE / 4 < led[COMBINE] / 4000 < 2.5 * EXPLORE / 4


def test_what_others_gain_says_nothing_of_those_that_tidy():
    """Half an hour on one slot went to numbers with fewer digits, each raced to be no worse (docs/LOG.md)."""
    chance = random.Random(8)
    arms = (TUNE, AGENT, ABLATE, SIMPLIFY)
    tallies = {arm: Tally(tries=10, wins=2, gain=0.1, seconds=4000) for arm in (TUNE, AGENT)}
    tallies[SIMPLIFY] = Tally(tries=3, wins=3, gain=0.0, seconds=4000)
    led = Counter(order(tallies, arms, chance.random)[0] for _ in range(4000))
    assert 0 < led[SIMPLIFY] + led[ABLATE] < EXPLORE * 4000
    tallies[ABLATE] = Tally(tries=10, wins=4, gain=0.4, seconds=4000)
    led = Counter(order(tallies, arms, chance.random)[0] for _ in range(4000))
    assert led[ABLATE] > 0.5 * 4000


def test_arms_lead_for_no_merit_as_rarely_as_their_tries_are_long():
    chance = random.Random(9)
    tallies = {TUNE: Tally(tries=300, wins=200, gain=20.0, seconds=90_000)}
    tallies |= {arm: Tally(tries=300, seconds=each * 300) for arm, each in ((COMBINE, 300.0), (TRANSFER, 1500.0))}
    led = Counter(order(tallies, (TUNE, COMBINE, TRANSFER), chance.random, explore=1.0)[0] for _ in range(4000))
    assert 4 * led[TRANSFER] < led[COMBINE] < 6.5 * led[TRANSFER]


def test_before_anything_was_tried_every_arm_leads_as_often():
    chance = random.Random(4)
    led = Counter(order({}, ARMS, chance.random)[0] for _ in range(2000))
    assert min(led[arm] for arm in ARMS) > 400


def test_without_a_single_win_the_arms_are_still_told_apart_by_their_tries():
    chance = random.Random(5)
    tallies = {TUNE: Tally(tries=200, seconds=60_000), AGENT: Tally(tries=5, seconds=1500)}
    led = Counter(order(tallies, (TUNE, AGENT), chance.random)[0] for _ in range(1000))
    assert led[AGENT] > 2 * led[TUNE]


def test_where_wins_are_rare_arms_are_told_apart_by_how_promising_their_tries_were():
    """Two wins in 200 tries say nothing of an arm; that its tries look like improvements again and again does."""
    chance = random.Random(7)
    tallies: dict[Arm, Tally] = {}
    for _ in range(60):
        tallies = tried(tallies, AGENT, seconds=300, p_better=0.2)
        tallies = tried(tallies, TUNE, seconds=300, p_better=0.02)
    led = Counter(order(tallies, (TUNE, AGENT), chance.random)[0] for _ in range(1000))
    assert led[AGENT] > 4 * led[TUNE]


def test_a_kept_candidate_counts_as_a_win_and_not_as_a_hope_as_well():
    found = tried({}, TUNE, seconds=300, gain=0.01, p_better=0.99)[TUNE]
    assert found == Tally(1, 1, 0.01, 300, 0.0)
    assert tried({}, TUNE, seconds=300, p_better=0.25)[TUNE] == Tally(1, 0, 0.0, 300, 0.25)


amounts = st.floats(0, 1e6)
sums = st.builds(Tally, tries=amounts, wins=amounts, gain=st.floats(-1e3, 1e6), seconds=amounts, hopes=amounts)


@given(tallies=st.dictionaries(st.sampled_from(ARMS), sums), available=st.permutations(ARMS), seed=st.integers(0, 99))
def test_an_order_has_every_available_arm_once(tallies: dict[Arm, Tally], available: list[Arm], seed: int):
    for count in range(5):
        some = available[:count]
        found = order(tallies, some, random.Random(seed).random)
        assert sorted(found, key=ARMS.index) == sorted(some, key=ARMS.index)
        assert found == order(tallies, some, random.Random(seed).random)


@pytest.mark.parametrize("end", [0.0, 1 - 2**-53])
def test_the_ends_of_what_chance_may_give_do_no_harm(end: float):
    given_first = iter([end] * 3)
    chance = random.Random(6)
    assert len(order({}, ARMS, lambda: next(given_first, chance.random()))) == 4


def test_old_tries_count_less():
    tallies = tried({}, TUNE, seconds=300, gain=0.01)
    tallies = tried(tallies, AGENT, seconds=200, half_life_tries=1)
    assert tallies == {TUNE: Tally(0.5, 0.5, 0.005, 150), AGENT: Tally(1, 0, 0.0, 200)}
    assert tried(tallies, AGENT, seconds=0, gain=0.0, half_life_tries=1)[AGENT] == Tally(1.5, 1, 0.0, 100)
    assert discounted(Tally(8, 4, 2, 400), tries=2 * HALF_LIFE_TRIES) == Tally(2, 1, 0.5, 100)
