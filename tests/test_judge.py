"""The judge: what is believed, and how often it is wrong."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysearch import judge
from raysearch.judge import (
    EFFECTS,
    MAGNITUDES,
    Evidence,
    Judge,
    Noise,
    Prior,
    Repeated,
    Replicates,
    Rules,
    backed,
    gain_of,
    greedy,
    local_noise,
    pair_noise,
)
from raysearch.model import Direction, Verdict

MIN, MAX = Direction.MINIMIZE, Direction.MAXIMIZE
KNOWN = Noise(0.01, 20)


def noise_of(groups: Sequence[tuple[float, Sequence[float]]]) -> Noise | None:
    return local_noise((weight, Repeated.of(values)) for weight, values in groups if values)


def a_judge(noise: Noise = KNOWN, *, direction: Direction = MIN, prior: Prior | None = None, **rules: float) -> Judge:
    return Judge(noise, pair_noise(noise, None), prior or Prior(), direction, replace(Rules(), **rules))


# ---- noise ----


def test_the_noise_of_one_program_is_its_standard_deviation():
    values = [1.0, 1.1, 0.9, 1.3]
    assert noise_of([(1.0, values)]) == Noise(pytest.approx(stdev(values)), 3)  # pyright: ignore[reportArgumentType]


def test_noise_does_not_see_differences_between_programs():
    noise = noise_of([(1.0, [1.0, 1.2]), (1.0, [5.0, 5.2]), (1.0, [9.0])])
    assert noise == Noise(pytest.approx(math.sqrt(0.02)), 2)  # pyright: ignore[reportArgumentType]


def test_no_replicates_no_noise():
    assert noise_of([(1.0, [1.0]), (1.0, [2.0])]) is None
    assert Replicates().noise() is None


def test_the_variances_of_programs_count_by_their_weights():
    noise = noise_of([(1.0, [0.0, 0.2]), (0.5, [0.0, 0.1])])
    assert noise == Noise(pytest.approx(math.sqrt((0.02 + 0.5 * 0.005) / 1.5)), 1.5)  # pyright: ignore[reportArgumentType]


def test_what_little_is_known_from_far_away_never_counts_less_than_one_degree_of_freedom():
    replicates = Replicates()
    for value in (1.0, 1.2):
        replicates.add("first", value)
    assert replicates.noise(9) == Noise(pytest.approx(math.sqrt(0.02)), 1.0)  # pyright: ignore[reportArgumentType]


def test_noise_follows_the_lineage_from_the_first_program_to_later_ones():
    draw, replicates = random.Random(1), Replicates()
    for step, sigma in enumerate((0.05, 0.03, 0.01, 0.01, 0.01)):
        for _ in range(5):
            replicates.add(f"step {step}", draw.gauss(0.0, sigma), step=step)
    first, last = replicates.noise(0), replicates.noise(4)
    assert first is not None
    assert last is not None
    assert 0.03 < first.sigma < 0.07
    assert 0.007 < last.sigma < 0.017
    assert last.dof < 4 * 4  # what is far away says less


def test_many_noisy_programs_long_ago_do_not_outvote_a_few_quiet_ones_at_hand():
    draw, replicates = random.Random(3), Replicates()
    for number in range(10):
        for _ in range(6):
            replicates.add(f"first {number}", draw.gauss(0.0, 1.0), step=0)
    for _ in range(9):
        replicates.add("now", draw.gauss(0.0, 0.05), step=2)
    noise = replicates.noise(2)
    assert noise is not None
    assert noise.sigma < 0.55  # without a bound 0.77
    assert noise.dof == pytest.approx(8 + judge.INHERITED_DOF)


@pytest.mark.parametrize(("others", "most"), [(4, 3.0), (7, 2.3), (19, 1.5)])
def test_a_single_slow_run_does_not_make_everything_look_noisy(others: int, most: float):
    draw = random.Random(2)
    found: list[float] = []
    for _ in range(200):
        noise = noise_of([(1.0, [20.0, *(draw.gauss(0.0, 1.0) for _ in range(others))])])
        assert noise is not None
        found.append(noise.sigma)
    assert median(found) < most


@pytest.mark.parametrize("count", [3, 4, 6, 12])
def test_what_keeps_slow_runs_from_counting_takes_next_to_nothing_from_plain_noise(count: int):
    draw = random.Random(3)
    found = [noise_of([(1.0, [draw.gauss(0.0, 1.0) for _ in range(count)])]) for _ in range(3000)]
    assert fmean(one.sigma**2 for one in found if one) == pytest.approx(1.0, abs=0.15)


def test_a_value_that_no_other_agrees_with_is_not_backed():
    assert backed([1.0], 0.01) == [True]
    assert backed([1.0, 1.02, 1.3], 0.01) == [True, True, False]
    assert backed([1.0, 1.3], 0.01) == [False, False]
    assert backed([1.3, 1.0, 1.3], 0.01) == [True, False, True]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(-100, 100)), max_size=30),
    st.lists(st.integers(0, 29), max_size=30),
)
def test_replicates_added_and_taken_out_again_are_those_that_are_left(
    added: list[tuple[str, float]], removed: list[int]
):
    replicates, left = Replicates(), list(added)
    for name, value in added:
        replicates.add(name, value)
    for place in removed:
        if place < len(left):
            replicates.remove(*left.pop(place))
    groups = {name: [value for other, value in left if other == name] for name in "abc"}
    scratch, found = noise_of([(1.0, values) for values in groups.values()]), replicates.noise()
    assert (found and found.dof) == (scratch and scratch.dof)
    if found and scratch:
        assert found.sigma == pytest.approx(scratch.sigma, abs=1e-5)
    for name, values in groups.items():
        assert sorted(replicates.values(name)) == sorted(values)
        assert replicates.mean(name) == (pytest.approx(math.fsum(values) / len(values), abs=1e-9) if values else None)


def test_the_noise_of_a_pair_starts_at_that_of_two_runs_and_ends_at_what_pairs_show():
    single = Noise(1.0, 10)
    assert pair_noise(single, None).sigma == pytest.approx(math.sqrt(2))
    few, many = (pair_noise(single, Noise(0.2, dof)) for dof in (1, 400))
    assert math.sqrt(2) > few.sigma > 1.2
    assert many.sigma == pytest.approx(0.2, abs=0.1)
    assert many.dof > few.dof >= single.dof


# ---- prior and posterior ----


def test_effects_are_as_many_on_either_side_in_order_and_without_nothing():
    assert list(EFFECTS) == sorted(EFFECTS)
    assert [-effect for effect in reversed(EFFECTS)] == pytest.approx(EFFECTS)
    assert 0.0 not in EFFECTS


def test_before_any_candidate_a_quarter_of_them_is_thought_better():
    assert Prior().better() == pytest.approx(0.25)
    assert sum(Prior().counts) == pytest.approx(6)


@pytest.mark.parametrize("gain", [-30.0, 3.0])
def test_the_prior_comes_to_expect_what_was_found(gain: float):
    prior = Prior()
    for _ in range(100):
        prior = prior.learned(Evidence(gain, 0.5, 30))
    assert (prior.better() > 0.8) if gain > 0 else (prior.better() < 0.05)
    share = sum(
        count
        for count, effect in zip(prior.counts, EFFECTS, strict=True)
        if gain / 2 < effect < 2 * gain or 2 * gain < effect < gain / 2
    )
    assert share / sum(prior.counts) > 0.8


def test_a_prior_that_found_little_wants_more_of_the_same_run():
    dry = Prior()
    for _ in range(150):
        dry = dry.learned(Evidence(-0.3, 1.0, 30))
    fresh, late = (a_judge(prior=prior).race([(0.975, 1.0)]) for prior in (Prior(), dry))
    assert late.p_better < fresh.p_better
    assert late.gain < fresh.gain < 0.025  # what looks good is shrunk, the more the fewer others were


def test_old_candidates_are_forgotten_by_and_by():
    prior = Prior()
    for _ in range(200):
        prior = prior.learned(Evidence(10.0, 0.5, 30))
    rich = prior.better()
    for _ in range(600):
        prior = prior.learned(Evidence(-10.0, 0.5, 30))
    assert rich > 0.9
    assert prior.better() < 0.05


@given(st.floats(-5000, 5000), st.floats(0.01, 10), st.integers(1, 500))
def test_a_posterior_is_a_distribution_whatever_was_measured(gain: float, se: float, dof: int):
    posterior = Prior().posterior(Evidence(gain, se, dof))
    assert sum(posterior) == pytest.approx(1)
    assert min(posterior) >= 0


@given(st.floats(-0.5, 0.5), st.floats(1e-6, 0.2), st.integers(1, 5), st.integers(2, 100))
def test_a_better_number_is_never_believed_less_within_what_noise_explains(
    delta: float, more: float, pairs: int, dof: int
):
    known = a_judge(Noise(0.1, dof))
    one, other = (known.race([(1 + value, 1.0)] * pairs) for value in (delta, delta - more))
    assert other.gain >= one.gain - 1e-9
    # a t far out is flat: the prior alone decides there, so that P may fall back a little
    assert other.p_better >= one.p_better - (1e-9 if abs(delta) + more < 0.2 else 0.05)


def test_what_was_learned_of_effects_stays_true_in_the_metric_when_the_noise_changes():
    prior = Prior().at(0.05)
    for _ in range(60):
        prior = prior.learned(Evidence(2.0, 0.1, 60))  # better by 0.1
    moved = prior.at(0.01)
    assert moved.unit == pytest.approx(0.01, rel=0.27)
    assert moved.better() == pytest.approx(prior.better())
    assert sum(moved.counts) == pytest.approx(sum(prior.counts))
    for one in (prior, moved):
        assert one.unit is not None
        likely = max(zip(one.counts, EFFECTS, strict=True))[1]
        assert likely * one.unit == pytest.approx(0.1, rel=0.3)
    assert moved.at(0.05).counts == pytest.approx(prior.counts)
    assert prior.at(0.05 * 1.1) is prior
    assert prior.at(0.0) is prior


def test_an_effect_beyond_the_grid_counts_at_its_end():
    prior = Prior().at(1.0)
    for _ in range(60):
        prior = prior.learned(Evidence(-1000.0, 1.0, 60))
    assert prior.at(1e-4).better() == pytest.approx(prior.better())


# ---- screening ----


def test_screening_never_keeps():
    found = a_judge().screen(0.5, [1.0, 1.0, 1.0])
    assert found.verdict is Verdict.RETEST
    assert (found.delta, found.delta_se) == (pytest.approx(-0.5), pytest.approx(0.01 * math.sqrt(4 / 3)))
    assert found.reason.startswith("promising: -0.5000 ± 0.0115, P(better) 1.00")


@pytest.mark.parametrize("value", [1.0, 1.02, 1.3, 80.0])
def test_screening_discards_what_is_within_the_noise_or_worse(value: float):
    found = a_judge().screen(value, [1.0, 1.01, 0.99])
    assert found.verdict is Verdict.DISCARD
    assert found.p_better < 0.3


def test_with_more_runs_of_the_base_its_own_noise_weighs_less():
    one, many = (a_judge().screen(0.98, [1.0] * count) for count in (1, 9))
    assert many.delta_se < one.delta_se
    assert many.p_better > one.p_better


# ---- races ----


def test_a_race_keeps_beyond_the_noise_and_says_why():
    found = a_judge().race([(0.8, 1.0)])
    assert found.verdict is Verdict.KEEP
    assert "-0.2000 ± 0.0141" in found.reason
    assert "over 1 fresh pair" in found.reason
    assert found.gain == pytest.approx(0.2, rel=0.2)


def test_a_race_asks_for_another_pair_while_undecided_and_gives_up_at_the_cap():
    known = a_judge(max_pairs=2)
    assert known.race([(0.985, 1.0)]).verdict is Verdict.RETEST
    assert known.race([(0.99, 1.0)] * 2).verdict is Verdict.DISCARD
    assert known.race([(1.02, 1.0)]).verdict is Verdict.DISCARD


def test_the_first_run_counts_for_what_is_believed_and_not_for_what_is_reported():
    known = a_judge()
    evidence = known.screened(0.97, [1.0, 1.0, 1.0])
    with_it, without = known.race([(0.98, 1.0)], screened=evidence), known.race([(0.98, 1.0)])
    assert with_it.delta == without.delta == pytest.approx(-0.02)
    assert with_it.p_better > without.p_better


def test_smaller_only_has_to_be_no_worse():
    known = a_judge()
    for value in (1.0, 1.002):
        pairs = [(value, 1.0)] * 5
        assert known.race(pairs, simplifies=True).verdict is Verdict.KEEP
        assert known.race(pairs).verdict is Verdict.DISCARD
    found = known.race([(1.04, 1.0)] * 5, simplifies=True)
    assert found.verdict is Verdict.DISCARD
    assert "P(no worse)" in found.reason


@given(st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=5), st.floats(1e-4, 1.0), st.integers(1, 50), st.booleans())
def test_maximising_is_minimising_the_negative(values: list[float], sigma: float, dof: int, simplifies: bool):
    one, other = (a_judge(Noise(sigma, dof), direction=direction) for direction in (MIN, MAX))
    found = one.race([(value, 0.0) for value in values], simplifies=simplifies)
    mirrored = other.race([(-value, 0.0) for value in values], simplifies=simplifies)
    assert (found.verdict, found.p_better, found.gain) == (mirrored.verdict, mirrored.p_better, mirrored.gain)
    assert found.delta == -mirrored.delta
    assert one.screen(0.1, [0.0]).p_better == other.screen(-0.1, [0.0]).p_better
    assert gain_of(-1.0, MIN) == gain_of(1.0, MAX) == 1.0


def test_a_program_without_noise_is_better_when_its_number_is():
    known = a_judge(Noise(0.0, 2))
    assert known.screen(1 - 1e-9, [1.0]).verdict is Verdict.RETEST
    assert known.screen(1.0, [1.0]).verdict is Verdict.DISCARD
    assert known.race([(1 - 1e-9, 1.0)]).verdict is Verdict.KEEP
    assert known.race([(1.0, 1.0)]).verdict is Verdict.DISCARD
    assert known.race([(1.0, 1.0)], simplifies=True).verdict is Verdict.KEEP
    assert known.race([(1 + 1e-9, 1.0)], simplifies=True).verdict is Verdict.DISCARD
    assert known.wanted_pairs(1e-9, 0) == 1


def test_more_pairs_are_wanted_for_a_smaller_gain_and_never_more_than_the_cap():
    known = a_judge(max_pairs=5)
    wanted = [known.wanted_pairs(gain, 0) for gain in (0.5, 0.014, 0.0101, 0.008, 0.001)]
    assert wanted == [1, 2, 2, 4, 5]
    assert known.wanted_pairs(None, 0) == known.wanted_pairs(-0.1, 0) == 1
    assert [known.wanted_pairs(0.5, done) for done in (1, 4, 5)] == [2, 5, 5]


def test_greedy_keeps_whatever_looks_better_once():
    assert greedy(0.9999, 1.0, KNOWN, MIN).verdict is Verdict.KEEP
    assert greedy(1.0, 1.0, KNOWN, MIN).verdict is Verdict.DISCARD
    assert greedy(1.0001, 1.0, KNOWN, MAX).verdict is Verdict.KEEP
    assert greedy(0.99, 1.0, KNOWN, MIN).delta_se == pytest.approx(0.01414, abs=1e-4)


# ---- how often it is wrong: streams of candidates with known effects ----


@dataclass
class Stream:
    """A search with the judge alone: one candidate after the other, in units of σ."""

    kept: int = 0
    false: int = 0
    wins: int = 0
    gain: float = 0.0
    runs: int = 0


def stream(effect: Callable[[random.Random], float], candidates: int, seed: int) -> Stream:
    draw, found = random.Random(seed), Stream()
    fresh, differences, prior = Replicates(), Replicates(), Prior()
    champion, truth = "base", 0.0
    for _ in range(3):
        fresh.add(champion, draw.gauss(0.0, 1.0))

    def known() -> Judge:
        noise = fresh.noise()
        assert noise is not None
        return Judge(noise, pair_noise(noise, differences.noise()), prior, MIN, Rules())

    for number in range(candidates):
        true = truth - effect(draw)
        found.wins += true < truth
        value, base_values = draw.gauss(true, 1.0), fresh.values(champion)
        evidence = known().screened(value, base_values)
        assert evidence is not None
        judged = known().screen(value, base_values)
        name, pairs = f"c{number}", list[tuple[float, float]]()
        while judged.verdict is Verdict.RETEST:
            for _ in range(known().wanted_pairs(judged.gain, len(pairs)) - len(pairs)):
                ours, theirs = draw.gauss(true, 1.0), draw.gauss(truth, 1.0)
                fresh.add(name, ours)
                fresh.add(champion, theirs)
                differences.add(name, ours - theirs)
                pairs.append((ours, theirs))
            judged = known().race(pairs, screened=evidence)
        raced = known().raced(pairs) if pairs else None
        prior = prior.learned(*(one for one in (evidence, raced) if one is not None))
        found.runs += 1 + 2 * len(pairs)
        if judged.verdict is Verdict.KEEP:
            found.kept += 1
            found.false += true >= truth
            found.gain += truth - true
            champion, truth = name, true
    return found


def effects(better: float, gain: float, loss: float) -> Callable[[random.Random], float]:
    """Some share is better by exponentially distributed amounts, the others are worse likewise."""
    return lambda draw: draw.expovariate(1 / gain) if draw.random() < better else -draw.expovariate(1 / loss)


def streams(effect: Callable[[random.Random], float], candidates: int, seeds: Sequence[int]) -> Stream:
    all_of_them = [stream(effect, candidates, seed) for seed in seeds]
    return Stream(
        kept=sum(one.kept for one in all_of_them),
        false=sum(one.false for one in all_of_them),
        wins=sum(one.wins for one in all_of_them),
        gain=sum(one.gain for one in all_of_them),
        runs=sum(one.runs for one in all_of_them),
    )


@pytest.mark.parametrize(
    ("shape", "candidates", "found_least"),
    [((0.2, 8.0, 15.0), 60, 0.7), ((0.15, 3.0, 8.0), 120, 0.5), ((0.1, 1.0, 4.0), 200, 0.1)],
    ids=["early", "mid", "late"],
)
def test_of_what_is_kept_at_most_three_in_a_hundred_are_false(
    shape: tuple[float, float, float], candidates: int, found_least: float
):
    found = streams(effects(*shape), candidates, range(100))
    assert found.false <= 0.03 * found.kept
    assert found.kept - found.false > found_least * found.wins  # and it is not so by keeping nothing


def test_when_there_is_nothing_left_to_find_next_to_nothing_is_kept():
    found = streams(effects(0.01, 0.1, 2.0), 400, range(50))
    assert found.false <= 20  # of 20,000 candidates


def test_programs_equal_to_the_champion_are_hardly_ever_kept():
    found = streams(lambda _: 0.0, 400, range(10))
    assert found.kept <= 0.01 * 4000


def test_a_gain_of_ten_sigma_is_nearly_always_kept_and_soon():
    found = streams(lambda draw: 10.0 if draw.random() < 0.3 else -10.0, 50, range(20))
    assert found.kept > 0.95 * found.wins
    assert found.false == 0
    assert found.runs < 1.8 * 50 * 20


def test_magnitudes_reach_from_next_to_nothing_to_beyond_all_that_is_raced():
    assert MAGNITUDES[0] <= 0.05
    assert MAGNITUDES[-1] > 2000
