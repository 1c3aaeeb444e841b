"""The state machine alone: what its events add up to, and which of them are no transition."""

from dataclasses import replace

import pytest
from histories import commit_of, gpu_profile
from told import BASE, CPU, Told, ready

from raysearch.bandit import Arm
from raysearch.model import (
    Event,
    Judged,
    Materialised,
    Measurement,
    Operator,
    Outcome,
    ProfileAdded,
    Proposal,
    Proposed,
    Purpose,
    RatchetMoved,
    Record,
    Refused,
    SessionEnded,
    SessionStarted,
    Trial,
    TrialFinished,
    TrialStarted,
    Verdict,
)
from raysearch.study import InvalidTransition

GPU = gpu_profile()


# ---- what is not a transition ----


def test_a_gap_or_a_repetition_in_the_numbers_is_no_transition():
    told = Told()
    told.begin()
    for seq in (2, 4):
        with pytest.raises(InvalidTransition, match=f"event {seq} follows event 2; the journal has a gap"):
            told.study.apply(Record(seq, 0.0, SessionEnded("over")))
    assert told.study.seq == 2


def test_unknown_ids_are_no_transition():
    told = ready()
    stranger = Trial("c0009-screen", "c0009", "cpu", BASE, Purpose.SCREEN, 900)
    proposal = Proposal("c0001", "tpu", BASE, "", Operator.TUNE, "", "test")
    told.refuses(Refused("c0009", "why"), "proposal c0009 is not waiting; waiting: –")
    told.refuses(Materialised("c0009", BASE, "x"), "proposal c0009 is not waiting")
    told.refuses(TrialStarted(stranger, 1, "a"), "candidate c0009 is not in the study")
    told.refuses(TrialFinished("c0009-screen", 1, Outcome.CRASHED), "attempt 1 of c0009-screen is not in flight")
    told.refuses(Judged("c0009", Verdict.KEEP, ""), "candidate c0009 is not in the study")
    told.refuses(RatchetMoved("cpu", "c0009", commit_of("x"), BASE), "candidate c0009 is not in the study")
    told.refuses(Proposed(proposal), "profile tpu is not in the study; known: cpu")
    told.refuses(Proposed(replace(proposal, profile="cpu", carries=("c0009",))), "candidate c0009 is not in the study")


def test_an_invalid_event_changes_nothing():
    told = ready()
    told.candidate()
    before = repr(vars(told.study))
    union = Proposal("c0002", "cpu", BASE, "", Operator.TUNE, "", "test", carries=("c0001", "c0009"))
    for event in (Proposed(union), RatchetMoved("cpu", "c0009", "x", BASE), ProfileAdded(CPU, "x", "x")):
        told.refuses(event)
    assert repr(vars(told.study)) == before


def test_the_same_thing_twice_is_no_transition():
    told = ready()
    told.refuses(ProfileAdded(CPU, BASE, "x"), "profile cpu is in the study already")
    name = told.propose()
    told.refuses(Proposed(told.study.waiting[name]), "proposal c0001 is in the study already")
    told.materialise(name)
    told.refuses(Materialised(name, BASE, "x"), "proposal c0001 is not waiting")
    told.start("c0001-screen")
    told.refuses(TrialStarted(told.study.trials["c0001-screen"].trial, 2, "b"), "trial c0001-screen is started again")
    told.end("c0001-screen", 2.0)
    told.refuses(TrialStarted(told.study.trials["c0001-screen"].trial, 2, "b"), "trial c0001-screen is started again")
    told.refuses(TrialFinished("c0001-screen", 1, Outcome.CRASHED), "attempt 1 of c0001-screen is not in flight")
    told.conclude()
    told.refuses(Judged("c0001", Verdict.DISCARD, ""), "candidate c0001 is done with")


def test_what_was_carried_once_is_not_carried_again():
    told = ready()
    one, other = told.candidate(), told.candidate()
    told.promise(one)
    told.win(one)
    told.candidate(carries=(other,))
    proposal = Proposal("c0009", "cpu", BASE, "", Operator.TUNE, "", "test", carries=(other,))
    told.refuses(Proposed(proposal), "candidate c0002 is done with")


def test_a_late_result_of_an_earlier_attempt_is_no_transition():
    told = Told()
    told.begin()
    told.run("cpu-base-1", outcome=Outcome.LOST)
    told.start("cpu-base-1")
    told.refuses(TrialFinished("cpu-base-1", 1, Outcome.CRASHED), "attempt 1 of cpu-base-1 is not in flight")
    told.end("cpu-base-1")
    assert told.study.trials["cpu-base-1"].attempt == 2


def test_measured_without_a_measurement_is_no_transition():
    told = Told()
    told.begin()
    told.start("cpu-base-1")
    told.refuses(TrialFinished("cpu-base-1", 1, Outcome.MEASURED), "was measured, but has no measurement")


def test_the_ratchet_moves_from_where_it_stands_and_only_to_what_was_kept():
    told = ready()
    name = told.candidate()
    told.refuses(RatchetMoved("cpu", name, commit_of("x"), BASE), "the ratchet of cpu moved to c0001, which is")
    told.promise(name)
    told.confirm(name)
    told.refuses(RatchetMoved("cpu", name, commit_of("x"), commit_of("y")), "but stands at")
    told.move()
    assert told.lane.champion == name
    assert [win.candidate for win in told.lane.wins] == [name]


# ---- machines that fail ----


def test_cancelled_is_run_again_and_not_held_against_the_candidate():
    told = ready(max_losses=2)
    name = told.candidate()
    for attempt in range(1, 6):
        told.run(f"{name}-screen", outcome=Outcome.CANCELLED)
        state = told.study.trials[f"{name}-screen"]
        assert (state.losses, state.outcome, state.attempt) == (0, None, attempt)
        assert told.ids() == [f"{name}-screen@a"]


def test_three_losses_give_a_trial_up():
    told = ready()
    name = told.candidate()
    for _ in range(2):
        told.run(f"{name}-screen", outcome=Outcome.LOST)
        assert told.ids() == [f"{name}-screen@a"]
    told.run(f"{name}-screen", outcome=Outcome.LOST)
    (event,) = told.conclude()
    assert (event.verdict, event.reason) == (Verdict.DISCARD, "lost: why")
    assert told.lane.open == {}


def test_losses_are_counted_over_a_restart():
    told = ready()
    name = told.candidate()
    told.run(f"{name}-screen", outcome=Outcome.LOST)
    told.start(f"{name}-screen")
    told.add(SessionStarted("host", 2, "0"))  # killed: that is no loss of the trial's
    told.run(f"{name}-screen", outcome=Outcome.LOST)
    assert told.study.trials[f"{name}-screen"].losses == 2
    told.run(f"{name}-screen", outcome=Outcome.LOST)
    assert told.study.trials[f"{name}-screen"].outcome is Outcome.LOST


@pytest.mark.parametrize("event", [SessionStarted("host", 2, "0"), SessionEnded("stopped at once")])
def test_what_was_in_flight_when_a_session_ended_is_run_again(event: Event):
    told = ready()
    name = told.candidate()
    told.start(f"{name}-screen")
    told.add(event)
    assert told.study.running == {}
    told.refuses(TrialFinished(f"{name}-screen", 1, Outcome.CRASHED), "not in flight")
    assert told.ids() == [f"{name}-screen@a"]
    told.start(f"{name}-screen")
    assert told.study.trials[f"{name}-screen"].attempt == 2


def test_a_number_that_came_with_a_failure_is_not_a_score():
    told = ready()
    name = told.candidate()
    told.start(f"{name}-screen")
    told.add(TrialFinished(f"{name}-screen", 1, Outcome.INVALID, "cheated", Measurement(0.1, wall_s=1.0)))
    (event,) = told.conclude()
    assert event.verdict is Verdict.DISCARD
    assert told.study.value(name) is None


# ---- what is learned ----


def test_fresh_runs_make_the_noise_better_known_and_the_first_run_does_not():
    told = ready()
    name = told.candidate()
    told.promise(name, value=0.1)
    noise = told.study.noise(told.lane)
    assert noise is not None
    assert noise.dof == 2
    told.pair(name)
    assert list(told.lane.fresh.values(name)) == [pytest.approx(0.69)]
    assert told.study.value(name) == pytest.approx(0.69)


def test_a_decided_candidate_teaches_the_prior_once_and_a_carried_one_never():
    told = ready()
    first = told.lane.prior.counts
    bad, one, other = (told.candidate() for _ in range(3))
    told.run(f"{bad}-screen", 2.0)
    told.conclude()
    after_bad = told.lane.prior
    assert after_bad.better() < 0.25
    verdict = next(event for record in reversed(told.records) if isinstance(event := record.event, Judged))
    assert verdict.learned is not None
    ((gain, _, dof),) = verdict.learned.effects
    assert gain < 0 < verdict.learned.sigma
    assert dof == 2
    told.promise(one, other)
    assert told.lane.prior == after_bad
    told.confirm(one, other)
    after_good = told.lane.prior
    assert after_good.counts not in (first, after_bad.counts)
    told.move()
    before = told.lane.prior
    told.add(Judged(next(iter(told.lane.confirmed)), Verdict.DISCARD, "its change is in c0002 already"))
    assert told.lane.prior == before


def test_an_arm_is_counted_what_its_candidates_cost_and_gained():
    told = ready()
    bad, good = told.candidate(), told.candidate(proposer="agent", operator=Operator.DRAFT)
    told.run(f"{bad}-screen", 2.0)
    told.conclude()
    told.promise(good)
    told.win(good)
    tally = told.lane.tallies[Arm("tune", Operator.TUNE)]
    assert (tally.tries, tally.wins, tally.gain) == (pytest.approx(1, rel=0.01), 0, 0)
    assert tally.seconds == pytest.approx(20.0, rel=0.01)
    tally = told.lane.tallies[Arm("agent", Operator.DRAFT)]
    assert (tally.tries, tally.wins) == (1, 1)
    assert tally.gain == pytest.approx(0.3, rel=0.25)
    assert tally.seconds == pytest.approx(40.0)  # the other side of its pair served the profile, not the arm


def test_what_was_not_kept_counts_for_its_arm_as_far_as_it_may_be_better_and_a_smaller_program_does_not():
    told = ready()
    value = told.crown(size=100)
    name = told.candidate(size=100)
    told.run(f"{name}-screen", value - 0.001)
    (event,) = told.conclude()
    assert event.verdict is Verdict.DISCARD
    assert event.p_better
    tune = told.lane.tallies[Arm("tune", Operator.TUNE)]
    assert tune.hopes == pytest.approx(event.p_better)
    name = told.candidate(operator=Operator.SIMPLIFY, size=90)
    told.run(f"{name}-screen", value + 0.08)
    (event,) = told.conclude()
    assert event.verdict is Verdict.DISCARD
    assert (event.p_better or 0.0) > 0.01  # of being no worse
    assert told.lane.tallies[Arm("tune", Operator.SIMPLIFY)].hopes == 0.0


def test_the_value_of_a_candidate_is_of_its_fresh_runs_where_there_are_any():
    told = ready()
    name = told.candidate()
    assert told.study.value(name) is None
    told.promise(name)
    assert told.study.value(name) == 0.5
    told.start(f"{name}-pair1")
    told.end(f"{name}-pair1", 0.7)
    assert told.study.value(name) == 0.7
    assert told.study.value("cpu-base") == pytest.approx(1.0)


def test_the_second_split_is_measured_once_of_what_may_become_a_step():
    told = ready()
    name = told.candidate()
    told.promise(name)
    assert [trial.id for trial in told.could().values() if trial.holdout] == [f"{name}-pair1"]
    told.start(f"{name}-pair1")
    told.add(
        TrialFinished(f"{name}-pair1", 1, Outcome.MEASURED, "", Measurement(0.7, wall_s=20.0, holdout=0.9, whole=0.8))
    )
    assert (told.study.holdout(name), told.study.whole(name)) == (0.9, 0.8)


def test_equal_trees_of_two_profiles_are_two_programs():
    told = Told()
    told.begin(CPU, GPU)  # both ratchets start at one commit
    told.baselines("cpu")
    told.baselines(GPU.slug)
    name = told.candidate(slug=GPU.slug)
    assert told.study.built_on(told.state(name).candidate).id == f"{GPU.slug}-base"
