"""The state machine alone: which events fit, and what they add up to. Then random worlds that drive it to its end."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from histories import START, Told, commit_of, cpu_profile, gpu_profile, told_ready
from hypothesis import given, settings
from hypothesis import strategies as st

from raysearch import judge, plan
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
    SlotSetAside,
    Trial,
    TrialFinished,
    TrialStarted,
    Verdict,
)
from raysearch.plan import Ask, Carry, Command, Conclude, Finish, Materialise, MoveRatchet, StartTrial, next_commands
from raysearch.schedule import Slot, is_spoilt
from raysearch.study import InvalidTransition, Lane, Settings, Study, baseline_id, candidate_id, screen_id

CPU, GPU = cpu_profile(), gpu_profile()
BASE = commit_of("base")


def refuses(told: Told, event: Event, match: str | None = None) -> None:
    with pytest.raises(InvalidTransition, match=match):
        told.study.apply(Record(told.study.seq + 1, told.at, event))


# ---- what is not a transition ----


def test_a_gap_or_a_repetition_in_the_numbers_is_no_transition():
    told = Told()
    for seq in (2, 4):
        with pytest.raises(InvalidTransition, match=f"event {seq} follows event 2; the journal has a gap"):
            told.study.apply(Record(seq, 0.0, SessionEnded("over")))
    assert told.study.seq == 2


def test_unknown_ids_are_no_transition():
    told = told_ready()
    stranger = Trial("c0009-screen", "c0009", "cpu", BASE, Purpose.SCREEN, 900)
    proposal = Proposal("c0001", "tpu", BASE, "", Operator.TUNE, "", "test")
    refuses(told, Refused("c0009", "why"), "proposal c0009 is not waiting; waiting: –")
    refuses(told, Materialised("c0009", BASE, "x"), "proposal c0009 is not waiting")
    refuses(told, TrialStarted(stranger, 1, "a"), "candidate c0009 is not in the study")
    refuses(told, TrialFinished("c0009-screen", 1, Outcome.CRASHED), "attempt 1 of c0009-screen is not in flight")
    refuses(told, Judged("c0009", Verdict.KEEP, ""), "candidate c0009 is not in the study")
    refuses(told, RatchetMoved("cpu", "c0009", commit_of("x"), BASE), "candidate c0009 is not in the study")
    refuses(told, Proposed(proposal), "profile tpu is not in the study; known: cpu")
    refuses(told, Proposed(replace(proposal, profile="cpu", carries=("c0009",))), "candidate c0009 is not in the study")


def test_an_invalid_event_changes_nothing():
    told = told_ready()
    name = told.candidate()
    before = repr(vars(told.study))
    test = Proposal("c0002", "cpu", BASE, "", Operator.TUNE, "", "test", carries=(name, "c0009"))
    for event in (Proposed(test), RatchetMoved("cpu", "c0009", "x", BASE), ProfileAdded(CPU, "x", "x")):
        refuses(told, event)
    assert repr(vars(told.study)) == before


def test_the_same_thing_twice_is_no_transition():
    told = told_ready()
    refuses(told, ProfileAdded(CPU, BASE, "x"), "profile cpu is in the study already")
    name = told.propose()
    refuses(told, Proposed(told.study.waiting[name]), "proposal c0001 is in the study already")
    told.add(Materialised(name, commit_of(name), "x"))
    refuses(told, Materialised(name, BASE, "x"), "proposal c0001 is not waiting")
    told.start_trial("c0001-screen")
    again = TrialStarted(told.study.trials["c0001-screen"].trial, 2, "b")
    refuses(told, again, "trial c0001-screen is started again")
    told.end("c0001-screen", 2.0)
    refuses(told, again, "trial c0001-screen is started again")
    refuses(told, TrialFinished("c0001-screen", 1, Outcome.CRASHED), "attempt 1 of c0001-screen is not in flight")
    told.conclude()
    refuses(told, Judged("c0001", Verdict.DISCARD, ""), "candidate c0001 is done with")


def test_a_late_result_of_an_earlier_attempt_is_no_transition():
    told = Told()
    told.run("cpu-base-1", outcome=Outcome.LOST)
    told.start_trial("cpu-base-1")
    refuses(told, TrialFinished("cpu-base-1", 1, Outcome.CRASHED), "attempt 1 of cpu-base-1 is not in flight")
    told.end("cpu-base-1")
    assert told.study.trials["cpu-base-1"].attempt == 2


def test_measured_without_a_measurement_is_no_transition():
    told = Told()
    told.start_trial("cpu-base-1")
    refuses(told, TrialFinished("cpu-base-1", 1, Outcome.MEASURED), "was measured, but has no measurement")


def test_the_ratchet_moves_from_where_it_stands_and_only_to_what_was_kept():
    told = told_ready()
    name = told.candidate()
    refuses(told, RatchetMoved("cpu", name, commit_of("x"), BASE), "the ratchet of cpu moved to c0001, which is")
    told.confirm(name)
    refuses(told, RatchetMoved("cpu", name, commit_of("x"), commit_of("y")), "but stands at")
    told.move()
    lane = told.study.lanes["cpu"]
    assert (lane.champion, lane.champion_commit) == (name, commit_of(f"step {name}"))
    assert [win.candidate for win in lane.wins] == [name]


# ---- machines that fail ----


def test_cancelled_is_run_again_and_not_held_against_the_candidate():
    told = told_ready(max_losses=2)
    name = told.candidate()
    for attempt in range(1, 6):
        told.run(f"{name}-screen", outcome=Outcome.CANCELLED)
        state = told.study.trials[f"{name}-screen"]
        assert (state.losses, state.outcome, state.attempt) == (0, None, attempt)
        assert told.ids() == [f"{name}-screen@a"]


def test_three_losses_give_a_trial_up():
    told = told_ready()
    name = told.candidate()
    for _ in range(2):
        told.run(f"{name}-screen", outcome=Outcome.LOST)
        assert told.ids() == [f"{name}-screen@a"]
    told.run(f"{name}-screen", outcome=Outcome.LOST)
    assert told.ids() == []
    (event,) = told.conclude()
    assert (event.verdict, event.reason) == (Verdict.DISCARD, "lost: why")
    assert told.study.lanes["cpu"].open == {}


def test_losses_are_counted_over_a_restart_and_a_restart_is_none():
    told = told_ready()
    name = told.candidate()
    told.run(f"{name}-screen", outcome=Outcome.LOST)
    told.start_trial(f"{name}-screen")
    told.add(SessionStarted("host", 2, "0"))
    told.run(f"{name}-screen", outcome=Outcome.LOST)
    assert told.study.trials[f"{name}-screen"].losses == 2
    told.run(f"{name}-screen", outcome=Outcome.LOST)
    assert told.study.trials[f"{name}-screen"].outcome is Outcome.LOST


@pytest.mark.parametrize("event", [SessionStarted("host", 2, "0"), SessionEnded("stopped at once")])
def test_what_was_in_flight_when_a_session_ended_is_run_again(event: Event):
    told = told_ready()
    name = told.candidate()
    told.start_trial(f"{name}-screen")
    told.add(event)
    assert told.study.running == {}
    refuses(told, TrialFinished(f"{name}-screen", 1, Outcome.CRASHED), "not in flight")
    (command,) = told.starts()
    assert (command.trial.id, command.attempt) == (f"{name}-screen", 2)


def test_a_number_that_came_with_a_failure_is_not_a_score():
    told = told_ready()
    name = told.candidate()
    told.start_trial(f"{name}-screen")
    told.add(TrialFinished(f"{name}-screen", 1, Outcome.INVALID, "cheated", Measurement(0.1, wall_s=1.0)))
    (event,) = told.conclude()
    assert event.verdict is Verdict.DISCARD
    assert told.study.value(name) is None


# ---- what is learned ----


def test_fresh_runs_make_the_noise_better_known_and_first_runs_do_not():
    told = told_ready()
    name = told.candidate()
    told.promise(name)
    lane = told.study.lanes["cpu"]
    before = lane.noise()
    told.pair(name)
    assert list(lane.fresh.values(name)) == [0.7]
    noise = lane.noise()
    assert before is not None
    assert noise is not None
    assert (before.dof, noise.dof) == (2, 2)  # a recent baseline was the other side, and a run alone tells nothing
    told.move()
    told.at += 1000.0
    other = told.candidate()
    told.promise(other, 0.4)
    told.pair(other, 0.4, than=0.72)  # its other side is a run of the champion that is not so old
    assert list(lane.fresh.values(name)) == [0.7, 0.72]
    noise = lane.noise()
    assert noise is not None
    assert noise.dof == 3


def test_the_prior_learns_from_what_is_decided_and_from_each_change_once():
    told = told_ready(frontier=False)
    lane = told.study.lanes["cpu"]
    lost, one, other = told.candidate(), told.candidate(), told.candidate()
    first = lane.prior
    told.run(f"{lost}-screen", 1.2)
    told.conclude()
    after_loss = lane.prior
    assert after_loss.better() < first.better()
    told.promise(one, 0.5)
    assert lane.prior == after_loss  # not decided
    told.promise(other, 0.8)
    told.pair(one, 0.5)
    after_win = lane.prior
    assert after_win.better() > after_loss.better()
    told.move()
    carried = told.carry()
    told.pair(carried, 0.3, than=0.5)
    assert lane.prior == after_win  # what is carried was counted, or will be, where it was first raced


def test_a_win_whose_change_is_in_the_champion_already_teaches_the_prior_nothing_more():
    told = told_ready()
    one, other = told.candidate(), told.candidate()
    told.promise(one)
    told.promise(other)
    for name in (one, other):
        told.start_trial(f"{name}-pair1")
    for name in (one, other):
        told.end(f"{name}-pair1", 0.7)
    told.conclude()
    told.move()
    prior = told.study.lanes["cpu"].prior
    told.add(Judged(other, Verdict.DISCARD, "its change is in c0001 already", -0.3, 0.01, pairs=1))
    assert told.study.lanes["cpu"].prior == prior


def test_a_win_and_a_loss_are_counted_for_those_who_had_the_ideas():
    told = told_ready()
    one = told.candidate(proposer="agent", operator=Operator.DRAFT)
    told.confirm(one)
    told.move()
    told.run(f"{told.candidate()}-screen", 1.5)
    told.conclude()
    arms = {arm.proposer: tally for arm, tally in told.study.lanes["cpu"].tallies.items()}
    assert arms["agent"].wins == pytest.approx(1, abs=0.01)
    assert arms["agent"].gain == pytest.approx(told.study.candidates[one].gain, rel=0.01)
    assert arms["agent"].seconds == pytest.approx(40, rel=0.01)
    assert (arms["tune"].tries, arms["tune"].wins, arms["tune"].seconds) == (1, 0, 20)


def test_the_value_of_a_candidate_is_of_its_fresh_runs_where_there_are_any():
    told = told_ready()
    name = told.candidate()
    assert told.study.value(name) is None
    told.promise(name, 0.5)
    assert told.study.value(name) == 0.5
    told.run(f"{name}-pair1", 0.7)
    assert told.study.value(name) == 0.7
    assert told.study.value("cpu-base") == pytest.approx(1.0)


# ---- random worlds ----


@dataclass(frozen=True)
class Shape:
    """How a random world is made: the study's settings, its slots, and how much goes wrong."""

    settings: Settings
    slots: tuple[Slot, ...]
    ideas: int
    gains: tuple[float, ...]
    sigma: float
    failures: float
    drifting: str


def random_shape(chance: random.Random) -> Shape:
    slugs = ("cpu", GPU.slug)[: chance.choice((1, 1, 2))]
    slots = tuple(Slot(f"{slug}{number}", slug) for slug in slugs for number in range(chance.randint(1, 6)))
    rules = judge.Rules(
        screen_probability=chance.choice((0.1, 0.3, 0.6)),
        max_pairs=chance.choice((1, 2, 3, 5)),
        greedy=chance.random() < 0.1,
    )
    return Shape(
        Settings(
            baseline_runs=chance.choice((2, 3)),
            rules=rules,
            max_losses=chance.choice((1, 3)),
            max_trials=chance.choice((None, None, 4, 15)),
            proposers=chance.choice((("tune",), ("tune", "agent"))),
            frontier=chance.random() < 0.8,
            noise_share=chance.choice((0.0, 0.05, 0.3)),
            seed=chance.randint(0, 99),
        ),
        slots,
        ideas=chance.randint(5, 30),
        gains=chance.choice(((-0.3, -0.1, 0.0, 0.1), (-0.1, 0.1, 0.2, 0.3))),
        sigma=chance.choice((0.0, 0.01, 0.05)),
        failures=chance.choice((0.0, 0.1, 0.4)),
        drifting=chance.choice(("", *(slot.id for slot in slots))),
    )


class World:
    """Performs whatever the study commands, with chance for a machine, a proposer and git."""

    def __init__(self, seed: int, shape: Shape | None = None, records: Sequence[Record] = ()) -> None:
        self.chance = random.Random(seed)
        self.shape = shape or random_shape(self.chance)
        self.study = Study(self.shape.settings)
        self.records: list[Record] = []
        self.at = START
        self.there = list(self.shape.slots)
        self.truth: dict[str, float] = {}
        self.asking: dict[tuple[str, str], tuple[int, str]] = {}
        self.fruitless: dict[tuple[str, str], int] = {}
        self.quiet = 0
        self.draining = False
        for record in records:
            self.study.apply(record)
            self.records.append(record)
            self.at = record.at
        self.ideas = max(0, self.shape.ideas - self.study.proposals)
        self.add(SessionStarted("host", 1, "0"))
        for profile in (CPU, GPU):
            here = any(slot.profile == profile.slug for slot in self.shape.slots)
            if here and profile.slug not in self.study.lanes:
                self.add(ProfileAdded(profile, BASE, f"{profile.slug} program"))

    def add(self, event: Event) -> None:
        record = Record(self.study.seq + 1, self.at, event)
        self.study.apply(record)
        self.records.append(record)
        self.quiet = 0

    def live(self) -> str:
        for _ in range(6000):
            asking = {key: count for key, (count, _) in self.asking.items()}
            commands = next_commands(self.study, self.there, asking=asking, draining=self.draining)
            self.check(commands)
            for command in commands:
                if isinstance(command, Finish):
                    return command.reason
                self.perform(command)
            if not commands and self.out_of_ideas():
                return "out of ideas"
            if not commands or self.chance.random() < 0.3:
                self.happen()
        raise AssertionError("it does not end")

    def out_of_ideas(self) -> bool:
        """What a coordinator is to go by: nothing is open, and nobody who can be asked has an idea."""
        served = {slot.profile for slot in self.there}
        lanes = [self.study.lanes[slug] for slug in served if not self.study.lanes[slug].blocked]
        if self.study.running or not lanes or any(lane.open for lane in lanes):
            return False
        limit, names = self.shape.settings.max_trials, self.shape.settings.proposers
        asked = max if limit else min  # what is left of a limit may all be the first one's
        return all(
            lane.refusals >= plan.MOST_REFUSALS
            or (limit is not None and lane.screens >= limit)
            or asked(self.fruitless.get((lane.profile.slug, name), 0) for name in names) > 1
            for lane in lanes
        )

    # ---- what must hold of every batch of commands and of the state that it comes from ----

    def check(self, commands: Sequence[Command]) -> None:
        study, busy = self.study, {state.slot for state in self.study.running.values()}
        starts = [command for command in commands if isinstance(command, StartTrial)]
        assert len({command.trial.id for command in starts}) == len(starts)
        assert len({command.slot for command in starts} | busy) == len(starts) + len(busy)
        for command in starts:
            assert Slot(command.slot, command.trial.profile) in self.there
            assert command.slot not in study.aside
            assert command.trial.id not in study.running
            known = study.trials.get(command.trial.id)
            assert command.attempt == (known.attempt + 1 if known else 1)
            assert known is None or known.outcome is None
        asks = [command for command in commands if isinstance(command, Ask)]
        assert not {(command.profile, command.proposer) for command in asks} & set(self.asking)
        for command in asks:
            assert 0 < command.count <= 2 * sum(slot.profile == command.profile for slot in self.there)
        for lane in study.lanes.values():
            self.check_lane(lane)
        decisions = [command for command in commands if isinstance(command, (Conclude, Materialise, MoveRatchet))]
        if not decisions and not self.draining:
            for lane in study.lanes.values():
                self.check_idle(lane, starts, busy)
        for command in commands:
            if isinstance(command, MoveRatchet):
                self.check_step(command)

    def check_lane(self, lane: Lane) -> None:
        study = self.study
        limit = self.shape.settings.max_trials
        assert lane.screens >= 0
        assert limit is None or lane.screens <= limit
        greedy = self.shape.settings.rules.greedy
        assert lane.champion == lane.base or lane.fresh.values(lane.champion) or greedy
        groups = [set(group) for group in (lane.line, lane.racing, lane.confirmed, lane.screened)]
        assert sum(map(len, groups)) == len(set[str]().union(*groups))
        assert set[str]().union(*groups) <= set(lane.open)
        runs = [
            (state.trial.candidate, state.trial.seed)
            for state in study.trials.values()
            if state.trial.profile == lane.profile.slug
        ]
        assert len(set(runs)) == len(runs), "a program is run twice with one seed"
        for state in study.trials.values():
            rival = study.trials.get(state.trial.rival or "")
            if rival is not None:
                assert rival.trial.seed == state.trial.seed
                assert rival.trial.candidate == base_of(study, state.trial.candidate)

    def check_idle(self, lane: Lane, starts: Sequence[StartTrial], busy: set[str]) -> None:
        """While a slot idles, nothing waits that could be started."""
        study, rules = self.study, self.shape.settings.rules
        slug = lane.profile.slug
        free = [s for s in self.there if s.profile == slug and s.id not in busy and s.id not in study.aside]
        started = {command.trial.id for command in starts if command.trial.profile == slug}
        if lane.blocked or len(started) == len(free):
            return
        assert all(screen_id(name) in started for name in lane.line if study.lives(lane, base_of(study, name)))
        assert all(
            trial in started
            for trial in lane.again
            if study.trials[trial].trial.purpose is Purpose.SCREEN and study.trials[trial].trial.candidate in lane.open
        )
        first = {baseline_id(lane.base, number) for number in range(1, self.shape.settings.baseline_runs + 1)}
        waiting = {name for name in first if name not in study.trials or study.trials[name].outcome is None}
        assert waiting <= started | set(study.running)
        for name in lane.racing if not waiting else ():
            state = study.candidates[name]
            if state.races or study.lives(lane, base_of(study, name)):
                good = sum(not is_spoilt(study, study.trials[run]) for run in state.races)
                new = sum(command.trial.candidate == name and command.attempt == 1 for command in starts)
                assert good + new >= rules.max_pairs or len(state.races) + new >= rules.max_pairs + 2

    def check_step(self, command: MoveRatchet) -> None:
        """The tree was measured against exactly what it goes onto, and won."""
        state = self.study.candidates[command.candidate.id]
        lane = self.study.lanes[command.profile]
        assert state.verdict is Verdict.KEEP
        assert command.expected == lane.champion_commit
        assert base_of(self.study, state.id) == lane.champion
        if not self.shape.settings.rules.greedy:
            assert self.study.race_pairs(state)

    # ---- effects ----

    def perform(self, command: Command) -> None:
        match command:
            case StartTrial(trial, attempt, slot):
                self.add(TrialStarted(trial, attempt, slot))
                if self.chance.random() < 0.02:
                    self.add(TrialFinished(trial.id, attempt, Outcome.LOST, "the slot left a moment ago"))
            case Materialise(proposal):
                self.materialise(proposal)
            case Conclude(event):
                self.add(event)
            case MoveRatchet(slug, candidate, expected):
                step = commit_of(f"step {candidate.id}")
                self.truth[step] = self.truth.get(candidate.commit, 1.0)
                self.add(RatchetMoved(slug, candidate.id, step, expected))
            case Carry():
                self.carry(command)
            case Ask(slug, proposer, count, base):
                self.asking[slug, proposer] = (count, base)
            case Finish():
                raise AssertionError

    def materialise(self, proposal: Proposal) -> None:
        if self.chance.random() < 0.1:
            self.add(Refused(proposal.id, "no"))
            return
        commit = commit_of(proposal.id)
        carried = [self.study.candidates[name].candidate for name in proposal.carries]
        gains = [self.true(one.proposal.base) - self.true(one.commit) for one in carried]
        gain = self.chance.choice((-0.3, 0.7, 1.0)) * sum(gains) if gains else self.chance.choice(self.shape.gains)
        self.truth[commit] = self.true(proposal.base) - gain
        self.add(Materialised(proposal.id, commit, f"{proposal.id} program", self.chance.choice((0, 50, 100))))

    def true(self, commit: str) -> float:
        return self.truth.get(commit, 1.0)

    def carry(self, command: Carry) -> None:
        merged: list[str] = []
        for candidate in command.candidates:
            if self.chance.random() < 0.2:
                conflict = self.chance.random() < 0.7
                self.add(Judged(candidate.id, Verdict.DISCARD, "it cannot be merged", conflict=conflict))
            else:
                merged.append(candidate.id)
        if merged:
            self.propose(command.candidates[0].profile, command.onto, "tune", carries=tuple(merged))

    def propose(self, slug: str, base: str, proposer: str, carries: tuple[str, ...] = ()) -> None:
        name = candidate_id(self.study.proposals + 1)
        operator = self.chance.choice((Operator.TUNE, Operator.DRAFT, Operator.SIMPLIFY))
        self.add(Proposed(Proposal(name, slug, base, "a patch", operator, "an idea", proposer, carries=carries)))

    # ---- what happens ----

    def happen(self) -> None:
        """Something ends, comes, goes or dies."""
        self.at += 5.0
        self.quiet += 1
        assert self.quiet < 200, f"it waits for nothing: {self.study.lanes}"
        everybody = len(self.there) == len(self.shape.slots)
        what = ["end"] * (6 * bool(self.study.running)) + ["answer"] * (3 * bool(self.asking))
        what += ["end_together"] * bool(self.study.running)
        what += ["leave"] * (len(self.there) > 1) * (self.chance.random() < 0.3) + ["join"] * (1 + 2 * (not everybody))
        what += ["die"] if self.chance.random() < 0.05 else []
        what += ["drain"] if self.chance.random() < 0.003 else []
        what += ["person"] if self.chance.random() < 0.03 and self.ideas > 0 else []
        getattr(self, f"_{self.chance.choice(what)}")()

    def _end(self) -> None:
        state = self.chance.choice(list(self.study.running.values()))
        trial = state.trial
        good = trial.purpose is Purpose.BASELINE or self.chance.random() >= self.shape.failures
        outcome = Outcome.MEASURED if good else self.chance.choice(list(Outcome))
        measured = None
        if outcome is Outcome.MEASURED:
            noise = random.Random(f"{trial.commit} {trial.seed}").gauss(0.0, self.shape.sigma)
            drifts = state.slot == self.shape.drifting
            value = self.true(trial.commit) + noise + 0.3 * drifts
            speed = self.chance.gauss(1000.0, 20.0) * (0.8 if drifts else 1.0)
            measured = Measurement(value, wall_s=5.0, facts={"tokens_per_s": speed})
        half = self.chance.gauss(2.0, 0.1) if self.chance.random() < 0.5 else None
        self.add(TrialFinished(trial.id, state.attempt, outcome, "chance", measured, halfway=half))

    def _end_together(self) -> None:
        for _ in range(len(self.study.running)):
            self._end()

    def _answer(self) -> None:
        slug, proposer = self.chance.choice(list(self.asking))
        count, base = self.asking.pop((slug, proposer))
        ideas = min(self.chance.randint(0, count), self.ideas)
        for _ in range(ideas):
            self.ideas -= 1
            self.propose(slug, base, proposer)
        self.fruitless[slug, proposer] = 0 if ideas else self.fruitless.get((slug, proposer), 0) + 1

    def _person(self) -> None:
        slug = self.chance.choice(list(self.study.lanes))
        limit = self.shape.settings.max_trials
        wanted = sum(count for (asked, _), (count, _) in self.asking.items() if asked == slug)
        if limit is None or self.study.lanes[slug].screens + wanted < limit:
            self.ideas -= 1
            self.propose(slug, self.study.lanes[slug].champion_commit, "a person")

    def _leave(self) -> None:
        slot = self.there.pop(self.chance.randrange(len(self.there)))
        for state in list(self.study.running.values()):
            if state.slot == slot.id:
                self.add(TrialFinished(state.trial.id, state.attempt, Outcome.LOST, "its slot died"))

    def _join(self) -> None:
        self.there = list(self.shape.slots)

    def _die(self) -> None:
        self.asking.clear()
        self.there = list(self.shape.slots)
        before = results(self.study)
        self.add(SessionStarted("host", 2, "0"))
        assert results(self.study) == before

    def _drain(self) -> None:
        self.draining = True


def results(study: Study) -> dict[str, float | None]:
    """What all finished trials gave."""
    return {name: state.value for name, state in study.trials.items() if state.outcome is not None}


def base_of(study: Study, name: str) -> str:
    return study.built_on(study.candidates[name].candidate).id


def lane_candidates(study: Study, slug: str) -> list[str]:
    return [name for name, state in study.candidates.items() if state.candidate.profile == slug]


def is_lost(study: Study, name: str) -> bool:
    """Whether a confirmed win ended without a step of the ratchet, or a word on this change by itself."""
    state = study.candidates[name]
    if state.carried_by is None:
        return state.ratchet_commit is None and (state.verdict is not Verdict.DISCARD or is_union(study, name))
    if state.carried_by in study.candidates:
        return is_lost(study, state.carried_by)
    refused = next(proposal for proposal, _ in study.refused if proposal.id == state.carried_by)
    return len(list(study.roots(refused))) > 1


def is_union(study: Study, name: str) -> bool:
    return len(list(study.roots(study.candidates[name].candidate.proposal))) > 1


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_in_a_random_world_a_study_keeps_its_promises_and_ends(seed: int):
    world = World(seed)
    reason = world.live()
    study = world.study
    assert not study.running
    assert not study.waiting
    steps = [record.event for record in world.records if isinstance(record.event, RatchetMoved)]
    for slug, lane in study.lanes.items():
        tips = [BASE, *(step.commit for step in steps if step.profile == slug)]
        assert [step.previous for step in steps if step.profile == slug] == tips[:-1]  # it only moves forward
        assert lane.champion_commit == tips[-1]
        assert len(set(tips)) == len(tips)
        served = slug in {slot.profile for slot in world.there}
        if not served or lane.blocked or world.draining:
            continue
        assert not lane.open, reason
        kept = {e.candidate for r in world.records if isinstance(e := r.event, Judged) and e.verdict is Verdict.KEEP}
        for name in kept & set(lane_candidates(study, slug)):
            assert is_union(study, name) or not is_lost(study, name), name


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_replaying_the_events_of_a_random_world_gives_the_same_state_and_commands(seed: int):
    world = World(seed)
    world.live()
    cut = world.chance.randint(1 + len(world.study.lanes), len(world.records))
    replayed, half = Study(world.shape.settings), Study(world.shape.settings)
    for record in world.records[:cut]:
        half.apply(record)
    next_commands(half, world.there, asking={})  # asking what to do changes nothing that is known
    for record in world.records:
        replayed.apply(record)
    for record in world.records[cut:]:
        half.apply(record)
    again = Record(replayed.seq + 1, world.at, SessionStarted("host", 2, "0"))
    for study in (replayed, half, world.study):
        study.apply(again)
    assert vars(replayed) == vars(world.study) == vars(half)
    commands = next_commands(world.study, world.shape.slots, asking={})
    for study in (replayed, half):
        assert next_commands(study, world.shape.slots, asking={}) == commands


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_study_killed_at_any_event_goes_on_and_repeats_no_finished_trial(seed: int):
    world = World(seed)
    world.live()
    cut = world.chance.randint(1, len(world.records))
    after = World(seed + 1, world.shape, world.records[:cut])
    after.truth = dict(world.truth)
    before = results(after.study)
    after.live()
    repeated = {event.trial.id for r in after.records[cut:] if isinstance(event := r.event, TrialStarted)}
    doubted = {name for r in after.records[cut:] if isinstance(event := r.event, SlotSetAside) for name in event.repeat}
    assert not repeated & set(before) - doubted
    assert not after.study.running
