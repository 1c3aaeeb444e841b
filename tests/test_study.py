"""The state machine alone: events in, commands out; no clock, no file, no process. Then random worlds that drive it."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from histories import commit_of, cpu_profile, gpu_profile
from hypothesis import given, settings
from hypothesis import strategies as st

from raysearch import judge
from raysearch.model import (
    Event,
    Judged,
    Materialised,
    Measurement,
    Operator,
    Outcome,
    Profile,
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
from raysearch.schedule import Slot, assign
from raysearch.study import (
    MOST_REFUSALS,
    Ask,
    Carry,
    Command,
    Conclude,
    Finish,
    InvalidTransition,
    Materialise,
    MoveRatchet,
    Settings,
    StartTrial,
    Study,
    candidate_id,
)

CPU, GPU = cpu_profile(), gpu_profile()
BASE = commit_of("base")
TWO = (Slot("a", "cpu"), Slot("b", "cpu"))


class Told:
    """A study with a pen: writes the events that a test is about, in as few words as may be."""

    def __init__(self, slots: Sequence[Slot] = TWO, **options: Any) -> None:
        self.study = Study(Settings(**options))
        self.records: list[Record] = []
        self.slots = slots
        self.asking: dict[str, int] = {}

    def add(self, *events: Event) -> None:
        for event in events:
            record = Record(self.study.seq + 1, 100.0 + self.study.seq, event)
            self.study.apply(record)
            self.records.append(record)

    def refuses(self, event: Event, match: str | None = None) -> None:
        with pytest.raises(InvalidTransition, match=match):
            self.study.apply(Record(self.study.seq + 1, 0.0, event))

    def begin(self, *profiles: Profile) -> None:
        self.add(SessionStarted("host", 1, "0"))
        for profile in profiles or (CPU,):
            self.add(ProfileAdded(profile, BASE, f"{profile.slug} program"))

    def commands(self, **options: Any) -> list[Command]:
        return self.study.next_commands(self.slots, asking=self.asking, **options)

    def ids(self, **options: Any) -> list[str]:
        """What would be started now, as `trial@slot`."""
        started = [command for command in self.commands(**options) if isinstance(command, StartTrial)]
        return [f"{command.trial.id}@{command.slot}" for command in started]

    def run(self, trial_id: str, value: float | None = 1.0, *, outcome: Outcome | None = None, slot: str = "a") -> None:
        """Starts a queued trial and ends it."""
        self.start(trial_id, slot=slot)
        self.end(trial_id, value, outcome=outcome)

    def start(self, trial_id: str, *, slot: str = "a") -> None:
        (trial,) = (one for trials in self.study.queued().values() for one in trials if one.id == trial_id)
        before = self.study.trials.get(trial_id)
        self.add(TrialStarted(trial, before.attempt + 1 if before else 1, slot))

    def end(self, trial_id: str, value: float | None = 1.0, *, outcome: Outcome | None = None) -> None:
        attempt = self.study.trials[trial_id].attempt
        measurement = None if value is None or outcome else Measurement(value, wall_s=20.0)
        outcome = outcome or (Outcome.MEASURED if measurement else Outcome.CRASHED)
        self.add(TrialFinished(trial_id, attempt, outcome, "" if measurement else "why", measurement))

    def baselines(self, slug: str = "cpu", values: Sequence[float] = (1.0, 1.01, 0.99)) -> None:
        for number, value in enumerate(values, start=1):
            self.run(f"{slug}-base-{number}", value)

    def propose(self, *, base: str | None = None, slug: str = "cpu", carries: str | None = None) -> str:
        name = candidate_id(self.study.proposals + 1)
        base = base or self.study.lane(slug).champion_commit
        self.add(Proposed(Proposal(name, slug, base, "a patch", Operator.TUNE, "an idea", "test", carries=carries)))
        return name

    def candidate(self, **options: Any) -> str:
        name = self.propose(**options)
        self.materialise(name)
        return name

    def materialise(self, name: str) -> None:
        self.add(Materialised(name, commit_of(name), f"{name} program"))

    def conclude(self) -> list[Judged]:
        """Writes down all verdicts that are due."""
        events = [command.event for command in self.commands() if isinstance(command, Conclude)]
        self.add(*events)
        return events

    def confirm(self, name: str, *, gain: float = 0.3) -> None:
        """Runs a candidate to its verdict: better by `gain`."""
        self.run(f"{name}-screen", 1.0 - gain)
        self.conclude()
        self.pair(name, gain=gain)

    def pair(self, name: str, *, gain: float = 0.3, number: int = 1, than: float = 1.0) -> Judged:
        self.run(f"{name}-pair{number}", than - gain)
        self.run(f"{name}-pair{number}-reference", than)
        (event,) = self.conclude()
        return event

    def move(self) -> None:
        (command,) = self.commands()
        assert isinstance(command, MoveRatchet)
        stepped = RatchetMoved(
            command.profile, command.candidate.id, commit_of(f"step {command.candidate.id}"), command.expected
        )
        self.add(stepped)


def ready(**options: Any) -> Told:
    told = Told(**options)
    told.begin()
    told.baselines()
    return told


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
    told.refuses(Proposed(replace(proposal, profile="cpu", carries="c0009")), "candidate c0009 is not in the study")


def test_an_invalid_event_changes_nothing():
    told = ready()
    before = repr(vars(told.study))
    test = Proposal("c0001", "cpu", BASE, "", Operator.TUNE, "", "test", carries="c0009")
    for event in (Proposed(test), RatchetMoved("cpu", "c0009", "x", BASE), ProfileAdded(CPU, "x", "x")):
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


def test_a_late_result_of_an_earlier_attempt_is_no_transition():
    told = Told()
    told.begin()
    told.start("cpu-base-1")
    told.add(TrialFinished("cpu-base-1", 1, Outcome.LOST, "its slot died"))
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
    told.confirm(name)
    told.refuses(RatchetMoved("cpu", name, commit_of("x"), commit_of("y")), "but stands at")
    told.move()
    assert told.study.lanes["cpu"].champion == name


# ---- slots and the queue ----


def test_baselines_come_first_with_different_seeds_and_one_measures_the_second_split():
    told = Told()
    told.begin()
    assert told.ids() == ["cpu-base-1@a", "cpu-base-2@b"]
    trials = told.study.queued()["cpu"]
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
    told = ready()
    first, second = told.candidate(), told.candidate()
    told.run(f"{first}-screen", 0.5)
    told.conclude()
    assert told.ids() == [f"{first}-pair1@a", f"{first}-pair1-reference@b"]
    told.slots = (*TWO, Slot("c", "cpu"))
    assert told.ids()[2:] == [f"{second}-screen@c"]


def test_a_trial_goes_to_a_slot_of_its_profile_alone():
    told = Told(slots=(Slot("g", GPU.slug), Slot("a", "cpu")))
    told.begin(CPU, GPU)
    assert told.ids() == ["cpu-base-1@a", f"{GPU.slug}-base-1@g"]
    told.slots = (Slot("g", GPU.slug), Slot("h", GPU.slug))
    assert told.ids() == [f"{GPU.slug}-base-1@g", f"{GPU.slug}-base-2@h"]


def test_the_schedule_keeps_the_order_of_the_queue_and_of_the_slots():
    trials = [Trial(str(n), "c", slug, BASE, Purpose.SCREEN, n) for n, slug in enumerate(("x", "y", "x", "x", "z"))]
    slots = [Slot("1", "x"), Slot("2", "y"), Slot("3", "x")]
    assert [(trial.id, slot.id) for trial, slot in assign(trials, slots)] == [("0", "1"), ("1", "2"), ("2", "3")]


def test_a_busy_slot_gets_nothing():
    told = ready()
    told.candidate()
    told.candidate()
    told.start("c0001-screen", slot="b")
    assert told.ids() == ["c0002-screen@a"]


# ---- machines that fail ----


def test_cancelled_is_run_again_and_not_held_against_the_candidate():
    told = ready(max_losses=2)
    name = told.candidate()
    for attempt in range(1, 6):
        told.start(f"{name}-screen")
        told.end(f"{name}-screen", outcome=Outcome.CANCELLED)
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
    assert told.ids() == []
    (event,) = told.conclude()
    assert (event.verdict, event.reason) == (Verdict.DISCARD, "lost: why")
    assert told.study.lanes["cpu"].open == {}


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
    (command,) = (command for command in told.commands() if isinstance(command, StartTrial))
    assert (command.trial.id, command.attempt) == (f"{name}-screen", 2)


@pytest.mark.parametrize(
    "outcome", [one for one in Outcome if one is not Outcome.MEASURED and not one.is_infrastructure]
)
def test_a_first_run_that_failed_is_discarded_without_another(outcome: Outcome):
    told = ready()
    name = told.candidate()
    told.run(f"{name}-screen", outcome=outcome)
    (event,) = told.conclude()
    assert (event.verdict, event.reason, event.delta) == (Verdict.DISCARD, f"{outcome.value}: why", None)


def test_a_number_that_came_with_a_failure_is_not_a_score():
    told = ready()
    name = told.candidate()
    told.start(f"{name}-screen")
    told.add(TrialFinished(f"{name}-screen", 1, Outcome.INVALID, "cheated", Measurement(0.1, wall_s=1.0)))
    (event,) = told.conclude()
    assert event.verdict is Verdict.DISCARD
    assert told.study.value(name) is None


def test_a_baseline_that_failed_blocks_its_profile_and_no_other():
    told = Told(slots=(Slot("a", "cpu"), Slot("g", GPU.slug)))
    told.begin(CPU, GPU)
    told.run("cpu-base-1", outcome=Outcome.CRASHED)
    assert told.study.lanes["cpu"].blocked == "its baseline cpu-base-1 crashed: why"
    assert told.ids() == [f"{GPU.slug}-base-1@g"]
    for number in (2, 3):
        told.run(f"{GPU.slug}-base-{number}", 1.0, slot="g")
    assert [command.profile for command in told.commands() if isinstance(command, Ask)] == [GPU.slug]
    told.run(f"{GPU.slug}-base-1", outcome=Outcome.OUT_OF_MEMORY, slot="g")
    assert told.commands() == [
        Finish(
            "cpu is blocked, its baseline cpu-base-1 crashed: why; "
            f"{GPU.slug} is blocked, its baseline {GPU.slug}-base-1 out_of_memory: why"
        )
    ]


def test_a_candidate_of_a_blocked_profile_waits_and_does_not_keep_the_study_from_ending():
    told = Told()
    told.begin()
    told.candidate()
    told.run("cpu-base-1", outcome=Outcome.CRASHED)
    (command,) = told.commands()
    assert isinstance(command, Finish)


# ---- judging ----


def test_what_is_not_promising_is_discarded_after_one_run():
    told = ready()
    name = told.candidate()
    told.run(f"{name}-screen", 1.2)
    (event,) = told.conclude()
    assert event.verdict is Verdict.DISCARD
    assert event.delta == pytest.approx(0.2)
    assert event.pairs == 0
    assert told.study.lanes["cpu"].open == {}


def test_a_race_needs_both_sides_and_leaves_the_first_run_out():
    told = ready()
    name = told.candidate()
    told.run(f"{name}-screen", 0.1)
    assert [event.verdict for event in told.conclude()] == [Verdict.RETEST]
    ours, theirs = (f"{name}-pair1", f"{name}-pair1-reference")
    told.start(ours)
    told.start(theirs, slot="b")
    told.end(ours, 0.7)
    assert told.conclude() == []
    told.end(theirs, 1.0)
    (event,) = told.conclude()
    assert (event.verdict, event.pairs) == (Verdict.KEEP, 1)
    assert event.delta == pytest.approx(-0.3)
    one, other = (told.study.trials[trial].trial for trial in (ours, theirs))
    assert one.seed == other.seed != told.study.trials[f"{name}-screen"].trial.seed
    assert (one.candidate, other.candidate, other.rival) == (name, "cpu-base", name)
    assert (one.holdout, other.holdout) == (True, False)


def test_the_runs_of_a_pair_make_the_noise_better_known_and_the_first_run_does_not():
    told = ready()
    name = told.candidate()
    told.run(f"{name}-screen", 0.1)
    told.conclude()
    told.pair(name)
    assert told.study.lanes["cpu"].fresh == {"cpu-base": [1.0, 1.01, 0.99, 1.0], name: [0.7]}
    noise = told.study.lanes["cpu"].noise()
    assert noise is not None
    assert noise.dof == 3


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        (Outcome.CRASHED, None, "its re-run crashed: why"),
        (None, Outcome.TIMED_OUT, "the re-run of the program it was built on timed_out: why"),
    ],
)
def test_a_pair_of_which_one_side_failed_is_lost(ours: Outcome | None, theirs: Outcome | None, reason: str):
    told = ready()
    name = told.candidate()
    told.run(f"{name}-screen", 0.5)
    told.conclude()
    told.run(f"{name}-pair1", 0.5, outcome=ours)
    if theirs:
        assert told.conclude() == []
        told.run(f"{name}-pair1-reference", outcome=theirs)
    (event,) = told.conclude()
    assert (event.verdict, event.reason) == (Verdict.DISCARD, reason)
    assert told.ids() == []


def test_the_other_side_of_a_lost_pair_may_still_be_in_flight():
    told = ready()
    name = told.candidate()
    told.run(f"{name}-screen", 0.5)
    told.conclude()
    told.start(f"{name}-pair1", slot="a")
    told.start(f"{name}-pair1-reference", slot="b")
    told.end(f"{name}-pair1", outcome=Outcome.CRASHED)
    told.conclude()
    told.end(f"{name}-pair1-reference", 1.02)
    assert told.study.lanes["cpu"].fresh["cpu-base"][-1] == 1.02
    assert told.conclude() == []


def test_an_undecided_race_asks_for_another_pair_while_pairs_are_left():
    told = ready(rules=judge.Rules(max_pairs=2, screen_probability=0.5))
    name = told.candidate()
    told.run(f"{name}-screen", 0.98)
    told.conclude()
    event = told.pair(name, gain=0.01)
    assert (event.verdict, event.pairs) == (Verdict.RETEST, 1)
    assert told.ids() == [f"{name}-pair2@a", f"{name}-pair2-reference@b"]
    event = told.pair(name, gain=0.01, number=2)
    assert (event.verdict, event.pairs) == (Verdict.DISCARD, 2)
    assert event.reason.startswith("not beyond the noise")
    seeds = {state.trial.seed for state in told.study.trials.values() if state.trial.pair == 2}
    assert seeds == {102}


def test_a_second_pair_may_decide_for_the_candidate():
    told = ready(rules=judge.Rules(max_pairs=2, screen_probability=0.5))
    name = told.candidate()
    told.run(f"{name}-screen", 0.98)
    told.conclude()
    told.pair(name, gain=0.01)
    event = told.pair(name, gain=0.04, number=2)
    assert (event.verdict, event.pairs) == (Verdict.KEEP, 2)
    assert event.delta == pytest.approx(-0.025)


def test_pairs_of_different_candidates_never_share_a_seed():
    told = ready(rules=judge.Rules(max_pairs=3))
    for _ in range(3):
        told.run(f"{told.candidate()}-screen", 0.5)
    told.conclude()
    seeds = [trial.seed for trial in told.study.queued()["cpu"] if trial.purpose is Purpose.RACE]
    assert len(set(seeds)) == len(seeds) == 3


# ---- the ratchet, and what was built on an earlier champion ----


def test_a_win_moves_the_ratchet_before_anything_else_is_decided():
    told = ready()
    one, other = told.candidate(), told.candidate()
    told.run(f"{other}-screen", 0.5)
    told.conclude()
    told.confirm(one)
    (command,) = told.commands()
    assert isinstance(command, MoveRatchet)
    assert (command.profile, command.candidate.id, command.expected) == ("cpu", one, BASE)
    told.move()
    lane = told.study.lanes["cpu"]
    assert (lane.champion, lane.champion_commit) == (one, commit_of(f"step {one}"))
    assert [win.candidate for win in lane.wins] == [one]


def test_a_candidate_on_an_old_champion_is_judged_against_what_it_was_built_on_and_then_carried():
    told = ready()
    one, other = told.candidate(), told.candidate()
    told.run(f"{other}-screen", 0.8)
    told.conclude()
    told.confirm(one, gain=0.5)
    told.move()
    reference = next(trial for trial in told.study.queued()["cpu"] if trial.id == f"{other}-pair1-reference")
    assert reference.candidate == "cpu-base"
    event = told.pair(other, gain=0.2)
    assert event.verdict is Verdict.KEEP  # though it is worse than the champion
    assert told.commands() == [Carry(told.study.candidates[other].candidate, commit_of(f"step {one}"))]
    carried = told.candidate(carries=other)
    state = told.study.candidates[carried]
    assert (state.verdict, state.reason) == (Verdict.RETEST, f"confirmed as {other} on an earlier champion")
    assert told.study.candidates[other].carried_by == carried
    assert told.ids() == [f"{carried}-pair1@a", f"{carried}-pair1-reference@b"]  # no first run
    reference = told.study.queued()["cpu"][1]
    assert (reference.candidate, reference.commit) == (one, commit_of(one))
    told.pair(carried, gain=0.1, than=0.5)
    told.move()
    assert told.study.lanes["cpu"].champion == carried


def test_of_two_wins_at_once_the_older_moves_the_ratchet_and_the_other_is_carried():
    told = ready()
    names = [told.candidate(), told.candidate()]
    for name in names:
        told.run(f"{name}-screen", 0.5)
    told.conclude()
    for name in names:
        told.run(f"{name}-pair1", 0.5)
        told.run(f"{name}-pair1-reference", 1.0)
    assert [event.verdict for event in told.conclude()] == [Verdict.KEEP, Verdict.KEEP]
    told.move()
    (command,) = told.commands()
    assert isinstance(command, Carry)
    assert (command.candidate.id, command.onto) == (names[1], commit_of(f"step {names[0]}"))


def test_a_candidate_that_was_not_started_is_carried_at_once():
    told = ready(max_trials=9)
    one, other = told.candidate(), told.candidate()
    told.confirm(one)
    told.move()
    (command,) = told.commands()
    assert isinstance(command, Carry)
    carried = told.candidate(carries=other)
    assert told.study.candidates[carried].verdict is None
    assert told.study.lanes["cpu"].screens == 2
    assert [trial.id for trial in told.study.queued()["cpu"]] == [f"{carried}-screen"]


def test_the_first_change_that_is_carried_starts_before_the_second_is_carried():
    told = ready(max_trials=9)
    winner, one, other = (told.candidate() for _ in range(3))
    told.confirm(winner)
    told.move()
    (command,) = told.commands()
    assert isinstance(command, Carry)
    assert command.candidate.id == one
    carried = told.candidate(carries=one)
    start, carry = told.commands()
    assert isinstance(start, StartTrial)
    assert start.trial.id == f"{carried}-screen"
    assert isinstance(carry, Carry)
    assert carry.candidate.id == other


def test_a_candidate_whose_only_attempt_was_lost_stays_with_what_it_was_built_on():
    told = ready()
    one, other = told.candidate(), told.candidate()
    told.run(f"{other}-screen", outcome=Outcome.LOST)
    told.confirm(one)
    told.move()
    assert told.ids() == [f"{other}-screen@a"]


def test_a_confirmed_change_that_is_carried_twice_stays_confirmed():
    told = ready()
    first, second = told.candidate(), told.candidate()
    for name in (first, second):
        told.run(f"{name}-screen", 0.5)
    told.conclude()
    told.pair(first)
    told.move()
    third = told.candidate()
    told.run(f"{third}-screen", 0.2)
    told.conclude()
    told.pair(second)
    carried = told.candidate(carries=second)
    told.pair(third, gain=0.5)
    told.move()  # before the carried one had its turn
    (command,) = told.commands()
    assert isinstance(command, Carry)
    again = told.candidate(carries=carried)
    assert told.study.candidates[again].verdict is Verdict.RETEST
    assert told.ids() == [f"{again}-pair1@a", f"{again}-pair1-reference@b"]


def test_a_confirmed_change_whose_merge_is_refused_is_over_and_the_study_goes_on():
    told = ready(max_trials=2)
    one, other = told.candidate(), told.candidate()
    for name in (one, other):
        told.run(f"{name}-screen", 0.5)
    told.conclude()
    told.pair(one)
    told.move()
    told.pair(other)
    name = told.propose(carries=other)
    assert told.commands() == [Materialise(told.study.waiting[name])]
    told.add(Refused(name, "the same program as c0001"))
    assert told.study.lanes["cpu"].open == {}
    assert told.study.lanes["cpu"].screens == 2
    assert told.commands() == [Finish("all 2 trials are done")]


def test_a_change_in_conflict_with_the_champion_is_discarded_with_the_reason():
    told = ready(max_trials=2)
    one, other = told.candidate(), told.candidate()
    for name in (one, other):
        told.run(f"{name}-screen", 0.5)
    told.conclude()
    told.pair(one)
    told.move()
    told.pair(other)
    told.add(Judged(other, Verdict.DISCARD, "it conflicts with the champion", -0.3, 0.01, pairs=1))
    assert told.commands() == [Finish("all 2 trials are done")]


@pytest.mark.parametrize("refused", [False, True], ids=["in conflict", "refused"])
def test_what_never_came_to_its_first_run_is_not_counted_as_a_trial(refused: bool):
    told = ready(max_trials=2)
    one, other = told.candidate(), told.candidate()
    told.confirm(one)
    told.move()
    if refused:
        told.add(Refused(told.propose(carries=other), "the same program as c0001"))
    else:
        told.add(Judged(other, Verdict.DISCARD, "it conflicts with the champion"))
    assert told.study.lanes["cpu"].screens == 1
    assert told.commands() == [Ask("cpu", 1)]


# ---- asking ----


def test_as_many_are_asked_for_as_slots_are_free_and_one_in_line_for_every_slot():
    told = ready()
    assert told.commands() == [Ask("cpu", 4)]
    told.candidate()
    commands = told.commands()
    assert commands[-1] == Ask("cpu", 3)
    told.start("c0001-screen")
    assert told.commands() == [Ask("cpu", 3)]
    told.candidate()
    told.start("c0002-screen", slot="b")
    assert told.commands() == [Ask("cpu", 2)]  # both may get free at once
    told.candidate()
    told.candidate()
    assert told.commands() == []


def test_nobody_is_asked_again_while_an_answer_is_due():
    told = ready()
    told.asking = {"cpu": 3}
    assert told.commands() == []
    told.asking = {"cpu": 1}  # even when fewer were asked for than are wanted now
    assert told.commands() == []
    told.asking = {"cpu": 0, GPU.slug: 5}
    assert told.commands() == [Ask("cpu", 4)]


def test_a_profile_without_slots_is_not_asked_for():
    told = Told(slots=TWO)
    told.begin(CPU, GPU)
    told.baselines("cpu")
    told.baselines(GPU.slug)
    assert told.commands() == [Ask("cpu", 4)]


def test_the_limit_of_trials_is_one_of_each_profile_and_refusals_do_not_count():
    told = ready(max_trials=2)
    assert told.commands() == [Ask("cpu", 2)]
    told.add(Refused(told.propose(), "does not apply"))
    told.candidate()
    assert told.commands()[-1] == Ask("cpu", 1)
    told.run("c0002-screen", 2.0)
    told.conclude()
    told.run(f"{told.candidate()}-screen", 2.0)
    told.conclude()
    assert told.commands() == [Finish("all 2 trials are done")]


def test_proposals_are_made_commits_before_anything_else():
    told = ready()
    name = told.propose()
    assert told.commands() == [Materialise(told.study.waiting[name])]
    assert told.study.waiting[name].id == name


def test_after_ten_refusals_in_a_row_nobody_is_asked_until_something_new_is_known():
    told = ready()
    waiting = told.candidate()
    told.start(f"{waiting}-screen")
    for _ in range(MOST_REFUSALS):
        told.add(Refused(told.propose(), "the patch is empty"))
    assert told.commands() == []  # a run is in flight: it may teach the proposer
    told.end(f"{waiting}-screen", 2.0)
    told.conclude()
    assert told.commands() == [Ask("cpu", 4)]
    for _ in range(MOST_REFUSALS):
        told.add(Refused(told.propose(), "the patch is empty"))
    (command,) = told.commands()
    assert command == Finish("the last 10 proposals for cpu were all refused; the last one: the patch is empty")
    told.add(SessionStarted("host", 2, "0"))
    assert told.commands() == [Ask("cpu", 4)]


# ---- the end ----


def test_a_profile_without_slots_does_not_keep_a_study_from_ending():
    told = ready(max_trials=1)
    told.add(ProfileAdded(GPU, BASE, "gpu program"))
    told.run(f"{told.candidate()}-screen", 2.0)
    told.conclude()
    assert told.commands() == [Finish("all 1 trials are done")]
    told.slots = (*TWO, Slot("g", GPU.slug))
    assert told.ids() == [f"{GPU.slug}-base-1@g"]


def test_without_any_slot_the_study_waits():
    told = Told(slots=())
    told.begin()
    assert told.commands() == []
    assert told.commands(accepting=False) == []


def test_after_the_time_limit_what_is_in_line_is_run_and_nothing_is_asked_for():
    told = ready()
    name = told.candidate()
    assert told.ids(accepting=False) == [f"{name}-screen@a"]
    told.run(f"{name}-screen", 0.5)
    told.conclude()
    assert told.ids(accepting=False) == [f"{name}-pair1@a", f"{name}-pair1-reference@b"]
    told.pair(name, gain=0.0)
    assert told.commands(accepting=False) == [Finish("the time limit has passed")]


def test_draining_waits_for_the_runs_in_flight_and_still_decides():
    told = ready()
    name = told.candidate()
    told.start(f"{name}-screen")
    assert told.commands(draining=True) == []
    told.end(f"{name}-screen", 0.5)
    (command,) = told.commands(draining=True)
    assert isinstance(command, Conclude)
    told.conclude()
    assert told.commands(draining=True) == [Finish("stopped: the runs in flight have ended")]
    assert len(told.ids()) == 2  # they wait for the next session


def test_the_answer_to_an_ask_is_waited_for():
    told = ready(max_trials=1)
    told.asking = {"cpu": 1}
    assert told.commands(accepting=False) == []
    told.asking = {}
    assert told.commands(accepting=False) == [Finish("the time limit has passed")]


# ---- questions ----


def test_the_value_of_a_candidate_is_of_its_fresh_runs_where_there_are_any():
    told = ready()
    name = told.candidate()
    assert told.study.value(name) is None
    told.run(f"{name}-screen", 0.5)
    assert told.study.value(name) == 0.5
    told.conclude()
    told.run(f"{name}-pair1", 0.7)
    assert told.study.value(name) == 0.7
    assert told.study.value("cpu-base") == pytest.approx(1.0)


# ---- random worlds ----


class World:
    """Performs whatever the study commands, with chance for a machine, a proposer and git."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        slugs = ("cpu", GPU.slug)[: self.chance.choice((1, 2))]
        self.all_slots = [
            Slot(f"{slug}{number}", slug) for slug in slugs for number in range(self.chance.randint(1, 3))
        ]
        self.there = list(self.all_slots)
        rules = judge.Rules(screen_probability=0.6, max_pairs=self.chance.choice((1, 2)))
        losses = self.chance.choice((1, 3))
        self.settings = Settings(baseline_runs=2, rules=rules, max_losses=losses, max_trials=self.chance.randint(3, 10))
        self.told = Told(max_trials=None)
        self.told.study = Study(self.settings)
        self.asking: dict[str, tuple[int, str]] = {}
        self.truth = {slug: 1.0 for slug in slugs}
        self.told.begin(*(profile for profile in (CPU, GPU) if profile.slug in slugs))
        self.draining = False

    def live(self) -> str:
        for _ in range(4000):
            commands = self.study.next_commands(
                self.there, asking={slug: count for slug, (count, _) in self.asking.items()}, draining=self.draining
            )
            self.check(commands)
            for command in commands:
                if isinstance(command, Finish):
                    return command.reason
                self.perform(command)
            if not commands or self.chance.random() < 0.3:
                self.happen(idle=not commands)
        raise AssertionError("it does not end")

    @property
    def study(self) -> Study:
        return self.told.study

    def check(self, commands: Sequence[Command]) -> None:
        """What must hold of every batch of commands and of the state that it comes from."""
        study, busy = self.study, {state.slot for state in self.study.running.values()}
        starts = [command for command in commands if isinstance(command, StartTrial)]
        assert len({command.trial.id for command in starts}) == len(starts)
        assert len({command.slot for command in starts} | busy) == len(starts) + len(busy)
        for command in starts:
            assert Slot(command.slot, command.trial.profile) in self.there
            assert command.trial.id not in study.running
        asks = [command for command in commands if isinstance(command, Ask)]
        assert not {command.profile for command in asks} & set(self.asking)
        assert len({command.profile for command in asks}) == len(asks)
        for command in asks:
            assert 0 < command.count <= 2 * sum(slot.profile == command.profile for slot in self.there)
        for lane in study.lanes.values():
            assert self.settings.max_trials is not None
            assert 0 <= lane.screens <= self.settings.max_trials
            assert lane.champion == lane.base or lane.fresh[lane.champion]
            ids = [state.trial.seed for state in study.trials.values() if state.trial.purpose is Purpose.RACE]
            assert len(set(ids)) == len(ids)
        for command in commands:
            if isinstance(command, MoveRatchet):  # the tree was measured against exactly what it goes onto
                assert command.candidate.proposal.base == command.expected
                assert command.expected == study.lanes[command.profile].champion_commit

    def perform(self, command: Command) -> None:
        match command:
            case StartTrial(trial, attempt, slot):
                self.told.add(TrialStarted(trial, attempt, slot))
            case Materialise(proposal):
                if self.chance.random() < 0.1:
                    self.told.add(Refused(proposal.id, "no"))
                else:
                    self.told.materialise(proposal.id)
                    gain = self.chance.choice((-0.1, 0.0, 0.05, 0.2))
                    base = self.truth.get(proposal.base, self.truth[proposal.profile])
                    self.truth[commit_of(proposal.id)] = base - gain
            case Conclude(event):
                self.told.add(event)
            case MoveRatchet(slug, candidate, expected):
                step = commit_of(f"step {candidate.id}")
                self.truth[step] = self.truth[candidate.commit]
                self.told.add(RatchetMoved(slug, candidate.id, step, expected))
            case Carry(candidate):
                if self.chance.random() < 0.3:
                    self.told.add(Judged(candidate.id, Verdict.DISCARD, "it conflicts"))
                else:
                    self.told.propose(slug=candidate.profile, carries=candidate.id)
            case Ask(slug, count):
                self.asking[slug] = (count, self.study.lanes[slug].champion_commit)
            case Finish():
                raise AssertionError

    def happen(self, *, idle: bool) -> None:
        """Something ends, comes, goes or dies."""
        what = ["end"] * (6 * bool(self.study.running)) + ["answer"] * (3 * bool(self.asking))
        what += ["leave"] * (len(self.there) > 1) + ["join"] * (1 + len(self.all_slots) - len(self.there))
        what += ["die"] if self.chance.random() < 0.1 else []
        what += ["drain"] if self.chance.random() < 0.01 else []
        if idle and not self.study.running and not self.asking and len(self.there) == len(self.all_slots):
            raise AssertionError("it waits for nothing")
        getattr(self, f"_{self.chance.choice(what)}")()

    def _end(self) -> None:
        state = self.chance.choice(list(self.study.running.values()))
        good = state.trial.purpose is Purpose.BASELINE or self.chance.random() < 0.8
        outcome = Outcome.MEASURED if good else self.chance.choice(list(Outcome))
        truth = self.truth.get(state.trial.commit, self.truth[state.trial.profile])
        measurement = Measurement(self.chance.gauss(truth, 0.02), wall_s=1.0) if outcome is Outcome.MEASURED else None
        self.told.add(TrialFinished(state.trial.id, state.attempt, outcome, "chance", measurement))

    def _answer(self) -> None:
        slug = self.chance.choice(list(self.asking))
        count, base = self.asking.pop(slug)
        for _ in range(self.chance.randint(0, count)):
            self.told.propose(slug=slug, base=base)

    def _leave(self) -> None:
        slot = self.there.pop(self.chance.randrange(len(self.there)))
        for state in list(self.study.running.values()):
            if state.slot == slot.id:
                self.told.add(TrialFinished(state.trial.id, state.attempt, Outcome.LOST, "its slot died"))

    def _join(self) -> None:
        self.there = list(self.all_slots)

    def _die(self) -> None:
        self.asking.clear()
        self.there = list(self.all_slots)
        self.told.add(SessionStarted("host", 2, "0"))

    def _drain(self) -> None:
        self.draining = True


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_in_a_random_world_a_study_keeps_its_promises_and_ends(seed: int):
    world = World(seed)
    reason = world.live()
    study = world.study
    assert not study.running
    assert not study.waiting
    if not world.draining:
        served = {slot.profile for slot in world.there}
        assert not any(study.queued()[slug] for slug in served)
        for state in study.candidates.values():
            lane = study.lanes[state.candidate.profile]
            if state.candidate.profile in served and not lane.blocked:
                assert state.candidate.id not in lane.open, reason
                assert state.verdict is not Verdict.RETEST or state.carried_by
            if state.verdict is Verdict.KEEP:
                assert state.ratchet_commit or state.carried_by
    for lane in study.lanes.values():
        assert len({win.commit for win in lane.wins}) == len(lane.wins)
        if lane.wins:  # what is kept is better more often than not, and never much worse
            slug = lane.profile.slug
            assert world.truth[lane.champion_commit] < world.truth[slug] + 0.15


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_replaying_the_events_of_a_random_world_gives_the_same_state(seed: int):
    world = World(seed)
    world.live()
    replayed = Study(world.settings)
    for record in world.told.records:
        replayed.apply(record)
    assert vars(replayed) == vars(world.study)
