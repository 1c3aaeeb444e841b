"""Which trial goes where: the queue, races and what they share, what idle slots are given, who is first in line."""

from collections import Counter
from typing import Any

import pytest
from histories import gpu_profile
from told import CPU, TRIAL_S, Told, ready

from raysearch import judge
from raysearch.bandit import Arm, Tally
from raysearch.futility import FEWEST, spared
from raysearch.model import Operator, Outcome, Purpose, SessionStarted, SlotSetAside, Trial, TrialStarted, Verdict
from raysearch.schedule import FRESH_TRIALS, NEW_TRIALS, SPARE_PAIRS, Slot, queue_length, queued
from raysearch.study import candidate_id

GPU = gpu_profile()


def slots(count: int) -> list[Slot]:
    return [Slot(str(number), "cpu") for number in range(count)]


# ---- slots and the queue ----


def test_baselines_come_first_with_different_seeds_and_one_measures_the_second_split():
    told = Told()
    told.begin()
    assert told.ids() == ["cpu-base-1@a", "cpu-base-2@b"]
    trials = queued(told.study)["cpu"]
    assert [(trial.seed, trial.holdout, trial.purpose) for trial in trials] == [
        (1, True, Purpose.BASELINE),
        (2, False, Purpose.BASELINE),
        (3, False, Purpose.BASELINE),
    ]


def test_a_free_slot_is_filled_before_the_baselines_are_done():
    told = Told()
    told.begin()
    name = told.candidate()
    told.start("cpu-base-1", slot="a")
    told.start("cpu-base-2", slot="b")
    told.end("cpu-base-2")
    assert told.ids() == ["cpu-base-3@b"]
    told.start("cpu-base-3", slot="b")
    told.end("cpu-base-1")
    assert told.ids() == [f"{name}-screen@a"]
    told.run(f"{name}-screen", 0.5)
    assert told.conclude() == []  # nothing is judged before the noise is known
    told.end("cpu-base-3")
    assert [event.verdict for event in told.conclude()] == [Verdict.RETEST]


def test_pairs_go_before_first_runs():
    told = ready(slots=slots(2), noise_share=0.0)
    first, second = told.candidate(), told.candidate()
    told.promise(first)
    assert told.ids() == [f"{first}-pair1@0", f"{second}-screen@1"]  # a baseline is recent enough as the other side


def test_a_trial_goes_to_a_slot_of_its_profile_alone():
    told = Told(slots=(Slot("g", GPU.slug), Slot("a", "cpu")))
    told.begin(CPU, GPU)
    assert told.ids() == ["cpu-base-1@a", f"{GPU.slug}-base-1@g"]
    told.slots = (Slot("g", GPU.slug), Slot("h", GPU.slug))
    assert told.ids() == [f"{GPU.slug}-base-1@g", f"{GPU.slug}-base-2@h"]


def test_a_busy_slot_gets_nothing():
    told = ready()
    told.candidate()
    told.candidate()
    told.start("c0001-screen", slot="b")
    assert told.ids() == ["c0002-screen@a"]


def test_the_length_of_the_queue_counts_what_has_to_be_carried_first():
    told = ready()
    winner, one, other = (told.candidate() for _ in range(3))
    told.promise(winner)
    told.win(winner)
    assert {one, other} == set(told.lane.line)
    assert queue_length(told.study, told.lane) == 2
    assert queued(told.study)["cpu"] == []


# ---- races ----


def test_a_race_needs_both_sides_with_one_seed_and_leaves_the_first_run_out():
    told = ready()
    name = told.candidate()
    told.promise(name, value=0.1)
    ours = told.could()[f"{name}-pair1"]
    assert ours.rival is not None
    theirs = told.study.trials[ours.rival].trial
    assert (ours.candidate, theirs.candidate) == (name, "cpu-base")
    assert ours.seed == theirs.seed != told.study.trials[f"{name}-screen"].trial.seed
    assert told.conclude() == []
    event = told.pair(name)
    assert (event.verdict, event.pairs) == (Verdict.KEEP, 1)
    assert event.delta == pytest.approx(-0.3)


def test_races_share_the_other_side_and_each_pair_of_a_race_has_its_own_seed():
    told = ready(noise_share=0.0)
    names = [told.candidate() for _ in range(4)]
    told.promise(*names)
    races = [trial for trial in told.could().values() if trial.purpose is Purpose.RACE]
    assert len(races) == 4 * judge.Rules().max_pairs
    rivals = Counter(trial.rival for trial in races)
    assert len(rivals) == judge.Rules().max_pairs
    assert set(rivals.values()) == {4}
    for name in names:
        assert len({trial.seed for trial in races if trial.candidate == name}) == judge.Rules().max_pairs


def test_a_reference_that_is_too_old_is_replaced():
    told = ready(noise_share=0.0)
    one, other = told.candidate(), told.candidate()
    told.promise(one)
    assert told.could()[f"{one}-pair1"].rival == "cpu-base-3"
    told.wait(FRESH_TRIALS * TRIAL_S)
    told.promise(other)
    assert told.could()[f"{other}-pair1"].rival == "cpu-base-reference1"
    assert told.could()[f"{one}-pair1"].rival == "cpu-base-reference1"
    assert [trial.id for trial in queued(told.study)["cpu"]] == [
        "cpu-base-reference1",
        f"{one}-pair1",
        f"{other}-pair1",
    ]


def test_a_reference_in_flight_is_shared_as_well():
    told = ready(noise_share=0.0)
    one, other = told.candidate(), told.candidate()
    told.promise(one, other)
    told.wait(FRESH_TRIALS * TRIAL_S)
    told.run("cpu-base-reference1", outcome=Outcome.LOST)
    told.start("cpu-base-reference1")
    told.start(f"{one}-pair1", slot="b")
    assert told.could()[f"{other}-pair1"].rival == "cpu-base-reference1"


def test_a_champions_own_race_runs_are_the_other_side_for_what_is_built_on_it():
    told = ready()
    one = told.candidate()
    told.promise(one)
    told.win(one)
    other = told.candidate()
    told.promise(other, value=0.2)
    assert told.could()[f"{other}-pair1"].rival == f"{one}-pair1"


def test_no_program_runs_twice_with_one_seed_outside_of_its_first_run():
    """Where a seed decides everything, the second would be the first one again, and the noise nothing."""
    told = ready(noise_share=0.0)
    one = told.candidate()
    told.promise(one)
    told.wait(FRESH_TRIALS * TRIAL_S)
    told.win(one)  # one's own run has the seed of the first reference of the program before it
    told.wait(FRESH_TRIALS * TRIAL_S)
    other = told.candidate()
    told.promise(other, value=0.2)
    references = [trial for trial in told.could().values() if trial.purpose is Purpose.REFERENCE]
    seeds = [trial.seed for trial in references] + [told.study.trials[f"{one}-pair1"].trial.seed]
    assert len(set(seeds)) == len(seeds) == judge.Rules().max_pairs + 1


def test_a_race_is_spread_over_all_free_slots_when_they_would_idle():
    told = ready(slots=slots(6), max_trials=1)
    name = told.candidate()
    told.promise(name)
    assert [trial.id for trial in told.starts()] == [
        f"{name}-pair1",
        f"{name}-pair2",
        f"{name}-pair3",
        "cpu-base-reference1",
        f"{name}-pair4",
        "cpu-base-reference2",
    ]


def test_no_pair_is_run_ahead_while_a_first_run_waits():
    told = ready(slots=slots(6), noise_share=0.0)
    names = [told.candidate() for _ in range(9)]
    told.promise(names[0])
    started = [trial.id for trial in told.starts()]
    assert started == [f"{names[0]}-pair1", *(f"{name}-screen" for name in names[1:6])]


def test_a_race_that_is_decided_early_wants_nothing_more():
    told = ready(slots=slots(6), max_trials=1)
    name = told.candidate()
    told.promise(name)
    for number, trial in enumerate(told.starts()):
        told.start(trial.id, slot=str(number))
    told.end(f"{name}-pair2", 0.7)  # the pairs behind it are still in flight
    (event,) = told.conclude()
    assert (event.verdict, event.pairs) == (Verdict.KEEP, 1)
    told.add(SessionStarted("host", 2, "0"))
    told.move()
    assert [trial for trial in told.starts() if trial.purpose is Purpose.RACE] == []


def test_a_race_ends_at_the_cap_of_pairs():
    told = ready(rules=judge.Rules(max_pairs=3, drop_probability=0.0, keep_probability=1.0))
    name = told.candidate()
    told.promise(name)
    verdicts = [told.pair(name, gain=0.01).verdict for _ in range(3)]
    assert verdicts == [Verdict.RETEST, Verdict.RETEST, Verdict.DISCARD]
    assert told.state(name).reason.startswith("not beyond the noise")
    assert told.ids() == []


def test_an_own_run_that_failed_discards():
    told = ready()
    name = told.candidate()
    told.promise(name)
    told.run(f"{name}-pair1", outcome=Outcome.CRASHED)
    (event,) = told.conclude()
    assert (event.verdict, event.reason) == (Verdict.DISCARD, "its re-run crashed: why")
    assert told.starts() == []


def test_another_side_that_failed_is_replaced_and_finally_the_race_gives_up():
    told = ready(noise_share=0.0)
    name = told.candidate()
    told.promise(name)
    told.wait(FRESH_TRIALS * TRIAL_S)
    tries = judge.Rules().max_pairs + SPARE_PAIRS
    for number in range(1, tries + 1):
        assert told.conclude() == []
        told.start(f"cpu-base-reference{number}")
        told.start(f"{name}-pair{number}", slot="b")
        told.end(f"cpu-base-reference{number}", outcome=Outcome.CRASHED)
        told.end(f"{name}-pair{number}", 0.7)
    (event,) = told.conclude()
    assert (event.verdict, event.reason) == (
        Verdict.DISCARD,
        "the program that it was built on failed again and again",
    )
    assert told.lane.open == {}


def test_a_race_with_some_failing_other_sides_comes_to_its_end_as_well():
    rules = judge.Rules(max_pairs=2, drop_probability=0.0, keep_probability=1.0)
    told = ready(noise_share=0.0, rules=rules)
    name = told.candidate()
    told.promise(name)
    told.wait(FRESH_TRIALS * TRIAL_S)
    for number in range(1, rules.max_pairs + SPARE_PAIRS + 1):
        told.start(f"cpu-base-reference{number}")
        told.start(f"{name}-pair{number}", slot="b")
        told.end(f"cpu-base-reference{number}", outcome=Outcome.CRASHED if number != 2 else None)
        told.end(f"{name}-pair{number}", 0.99)
        told.conclude()
    assert told.state(name).verdict is Verdict.DISCARD
    assert told.state(name).reason.endswith("the program that it was built on failed again and again")


def test_a_lost_run_that_another_race_waits_for_is_run_again_though_its_own_race_is_over():
    told = ready(slots=slots(4), max_trials=9, noise_share=0.0)
    one = told.candidate()
    told.promise(one)
    for number in (1, 2):
        told.start(f"{one}-pair{number}", slot=str(number))
    told.end(f"{one}-pair1", 0.7)
    other = told.candidate(on=one)
    told.conclude()
    told.move()  # on the first pair; the second is in flight
    told.promise(other, value=0.2)
    assert told.could()[f"{other}-pair1"].rival == f"{one}-pair2"
    told.start(f"{other}-pair1", slot="3")
    told.end(f"{one}-pair2", outcome=Outcome.LOST)
    assert f"{one}-pair2" in told.could()


def test_a_lost_reference_that_nobody_waits_for_is_not_run_again():
    told = ready(noise_share=0.0, frontier=False)
    one, other = told.candidate(), told.candidate()
    told.promise(one, other)
    told.run_pair(one)
    told.start("cpu-base-reference1")
    told.start(f"{other}-pair1", slot="b")
    assert told.study.trials[f"{other}-pair1"].trial.rival == "cpu-base-reference1"
    told.conclude()
    told.move()
    told.end(f"{other}-pair1", outcome=Outcome.CRASHED)
    told.conclude()
    told.end("cpu-base-reference1", outcome=Outcome.LOST)
    assert "cpu-base-reference1" not in told.could()


# ---- repeats ----


def share_of_repeats(*values: float, trials: int = 200) -> float:
    """Of the champion's runs among all, when first runs give these values in turn."""
    told = ready(noise_share=0.05, slots=slots(1))
    repeats = 0
    for number in range(trials):
        if not told.lane.line:
            told.candidate()
        (trial,) = told.starts()
        repeats += trial.purpose is Purpose.REFERENCE
        again = 1.0 + 0.01 * (-1) ** repeats
        told.run(trial.id, again if trial.purpose is Purpose.REFERENCE else values[number % len(values)])
        told.conclude()
    assert len(told.study.candidates) > trials / 2
    return repeats / trials


def test_now_and_then_the_champion_runs_again_for_the_noise():
    assert 0.04 < share_of_repeats(1.03, 1.03, 1.03, 1.004) < 0.08


def test_the_less_is_known_of_the_noise_the_sooner_the_champion_runs_again():
    assert share_of_repeats(1.03, 1.03, 1.03, 1.004, trials=40) >= 0.1


def test_a_run_of_the_champion_that_no_other_agrees_with_is_repeated_at_once():
    told = ready(noise_share=0.05, slots=slots(1))
    for _ in range(2):
        told.candidate()
    told.add(TrialStarted(told_reference(told, 1), 1, "0"))
    told.end("cpu-base-reference1", 1.5)
    assert [trial.id for trial in told.starts()] == ["cpu-base-reference2"]
    told.run("cpu-base-reference2", 1.0)
    assert [trial.purpose for trial in told.starts()] == [Purpose.SCREEN]


def told_reference(told: Told, number: int) -> Trial:
    """A run of the champion beside all others."""
    name = f"cpu-base-reference{number}"
    return Trial(name, "cpu-base", "cpu", told.lane.champion_commit, Purpose.REFERENCE, 1000 + number)


def test_the_first_run_on_a_slot_is_no_other_side_of_a_pair():
    told = Told()
    told.begin()
    told.baselines()  # on slot a: the first one is its first run
    names = [told.candidate() for _ in range(1)]
    told.promise(*names)
    rivals = {trial.rival for trial in told.could().values() if trial.candidate == names[0]}
    assert "cpu-base-2" in rivals
    assert "cpu-base-1" not in rivals


def test_the_first_run_on_a_slot_counts_until_three_others_of_the_program_do():
    told = Told(noise_share=0.9, slots=slots(1))
    told.begin()
    told.baselines(values=(1.5, 1.0, 1.01))
    assert list(told.lane.fresh.values("cpu-base")) == [1.5, 1.0, 1.01]
    told.candidate()
    told.add(TrialStarted(told_reference(told, 1), 1, "a"))
    told.end("cpu-base-reference1", 0.99)
    assert list(told.lane.fresh.values("cpu-base")) == [1.0, 1.01, 0.99]
    told.add(SlotSetAside("a", "cpu", "it drifts", ("cpu-base-1",)))  # and it is not taken out twice
    assert list(told.lane.fresh.values("cpu-base")) == [1.0, 1.01, 0.99]


def test_the_champion_runs_again_sooner_when_nothing_looks_any_good():
    """Either all ideas are bad or the machine is not what it was; a run tells them apart."""
    assert 0.06 < share_of_repeats(2.0) < 0.2


# ---- the order of first runs ----


def test_a_persons_proposals_go_first():
    told = ready(slots=slots(9))
    for proposer in ("tune", "tune", "inbox", "tune", "inbox"):
        told.candidate(proposer=proposer)
    order = [trial.candidate for trial in told.starts() if trial.purpose is Purpose.SCREEN]
    assert order[:2] == ["c0003", "c0005"]
    assert set(order[2:]) == {"c0001", "c0002", "c0004"}


def test_a_new_kind_of_card_first_tries_what_won_on_the_others():
    told = ready(slots=slots(9), proposers=("tune", "transfer"))
    for operator in (Operator.TUNE, Operator.TUNE, Operator.TRANSFER, Operator.TUNE, Operator.TRANSFER):
        told.candidate(proposer=operator.value, operator=operator)
    order = [trial.candidate for trial in told.starts() if trial.purpose is Purpose.SCREEN]
    assert order[:2] == ["c0003", "c0005"]
    assert set(order[2:]) == {"c0001", "c0002", "c0004"}


def test_later_the_bandit_knows_better_than_to_put_transfers_first():
    told = ready(slots=slots(1), proposers=("tune", "transfer"))
    told.candidate()
    told.candidate(proposer="transfer", operator=Operator.TRANSFER)
    told.lane.tallies[Arm("tune", Operator.TUNE)] = Tally(tries=100, wins=50, gain=9.0, seconds=2000)
    told.lane.tallies[Arm("transfer", Operator.TRANSFER)] = Tally(tries=100, wins=0, gain=0.0, seconds=2000)
    (early,) = told.starts()
    led: Counter[str] = Counter()
    for started in range(NEW_TRIALS, NEW_TRIALS + 40):  # each with chances of its own
        told.lane.started = told.lane.repeated_at = started
        led.update(trial.candidate for trial in told.starts())
    assert early.candidate == "c0002"
    assert led["c0001"] > led["c0002"]


def test_an_arm_that_gained_much_is_first_more_often_than_one_that_gained_nothing():
    led: Counter[str] = Counter()
    for seed in range(40):
        told = ready(slots=slots(1), seed=seed, proposers=("tune", "agent"))
        told.candidate(proposer="tune")
        told.candidate(proposer="agent", operator=Operator.DRAFT)
        told.lane.tallies[Arm("tune", Operator.TUNE)] = Tally(tries=100, wins=1, gain=0.01, seconds=2000)
        told.lane.tallies[Arm("agent", Operator.DRAFT)] = Tally(tries=100, wins=30, gain=3.0, seconds=2000)
        (trial,) = told.starts()
        led[told.state(trial.candidate).candidate.proposal.proposer] += 1
    assert led["agent"] > 30
    assert led["tune"] > 0 or led["agent"] == 40


def test_within_an_arm_the_oldest_is_first_and_each_is_named_once():
    told = ready(slots=slots(9), proposers=("tune", "agent"), noise_share=0.0)
    for proposer in ("tune", "agent", "tune", "agent", "agent"):
        told.candidate(proposer=proposer)
    order = [trial.candidate for trial in told.starts()]
    assert sorted(order) == [candidate_id(number) for number in range(1, 6)]
    for proposer in ("tune", "agent"):
        mine = [name for name in order if told.state(name).candidate.proposal.proposer == proposer]
        assert mine == sorted(mine)


def test_equal_states_give_equal_orders():
    def order(seed: int) -> list[str]:
        told = ready(slots=slots(12), proposers=("tune", "agent"), seed=seed)
        for number in range(10):
            told.candidate(proposer=("tune", "agent")[number % 2], operator=(Operator.TUNE, Operator.DRAFT)[number % 2])
        return [trial.id for trial in told.starts()]

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(8)}) > 1


# ---- futility ----


def with_curves(count: int = FEWEST, **options: Any) -> Told:
    """A study in which so many runs ended near their parent: half-way all were 0.5 above their end."""
    told = Told(slots=slots(40), **options)
    told.begin()
    for number, value in ((1, 1.0), (2, 1.01), (3, 0.99)):
        told.start(f"cpu-base-{number}")
        told.end(f"cpu-base-{number}", value, halfway=value + 0.5)
    for _ in range(count):
        name = told.candidate()
        told.start(f"{name}-screen")
        told.end(f"{name}-screen", 1.03, halfway=1.53)
        told.conclude()
    return told


def test_a_first_run_is_stopped_at_half_time_when_it_is_hopeless_and_no_other_run_is():
    told = with_curves()
    for _ in range(20):
        told.candidate()
    trials = told.could().values()
    first = [trial for trial in trials if trial.purpose is Purpose.SCREEN]
    assert {trial.candidate for trial in first if trial.futile_above is None} == {
        trial.candidate for trial in first if spared(trial.candidate)
    }
    bounds = {trial.futile_above for trial in first if trial.futile_above is not None}
    assert len(bounds) == 1
    assert 1.53 < bounds.pop() < 1.6
    name = first[0].candidate
    told.promise(name)
    rest = [trial for trial in told.could().values() if trial.purpose is not Purpose.SCREEN]
    assert {trial.purpose for trial in rest} == {Purpose.RACE, Purpose.REFERENCE}
    assert all(trial.futile_above is None for trial in rest)


@pytest.mark.parametrize("options", [{"futility": False}, {"rules": judge.Rules(greedy=True)}], ids=["off", "greedy"])
def test_nothing_is_stopped_where_it_is_switched_off(options: dict[str, Any]):
    told = with_curves(**options)
    told.candidate()
    assert all(trial.futile_above is None for trial in told.could().values())


def test_nothing_is_stopped_before_enough_is_known():
    told = with_curves(FEWEST - 1)
    told.candidate()
    assert all(trial.futile_above is None for trial in told.could().values())


def test_a_futile_trial_is_a_discard_that_says_why_and_counts_what_it_saved():
    told = ready()
    name = told.candidate()
    told.start(f"{name}-screen")
    told.end(f"{name}-screen", outcome=Outcome.FUTILE, seconds=12.0, halfway=3.0)
    (event,) = told.conclude()
    assert (event.verdict, event.reason, event.delta) == (Verdict.DISCARD, "futile: why", None)
    assert told.lane.futile == 1
    assert told.lane.saved_s == pytest.approx(TRIAL_S - 12.0)
    assert told.lane.halves.noise() is None
