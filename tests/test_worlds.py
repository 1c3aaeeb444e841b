"""Random worlds drive a study to its end, with losses, conflicts, refusals and deaths: what must hold of every one."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from histories import START, commit_of, cpu_profile, gpu_profile
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
    SessionStarted,
    SlotSetAside,
    TrialFinished,
    TrialStarted,
    Verdict,
)
from raysearch.pace import Pace
from raysearch.plan import Ask, Carry, Command, Conclude, Finish, Materialise, MoveRatchet, StartTrial, next_commands
from raysearch.schedule import Slot, is_spoilt
from raysearch.study import Lane, Settings, Study, baseline_id, candidate_id, screen_id

CPU, GPU = cpu_profile(), gpu_profile()
BASE = commit_of("base")


@dataclass(frozen=True)
class Shape:
    """How a random world is made.

    Attributes:
        settings: Of the study.
        slots: All that there ever are.
        ideas: How many proposals there are in all.
        gains: What they may be worth.
        sigma: Of the noise.
        failures: Share of runs that fail, baselines excepted.
        drifting: The slot that is slower and gives worse numbers, or none.
        lockstep: Whether most runs end together, as those of one budget do.
        slow: The proposer that takes longer than a trial for a proposal, or none.
        parallel: Asks that it works on at once.
        one_by_one: Whether each of them is for one proposal.
    """

    settings: Settings
    slots: tuple[Slot, ...]
    ideas: int
    gains: tuple[float, ...]
    sigma: float
    failures: float
    drifting: str
    lockstep: bool
    slow: str = ""
    parallel: int = 1
    one_by_one: bool = False


def random_shape(chance: random.Random) -> Shape:
    slugs = ("cpu", GPU.slug)[: chance.choice((1, 1, 2))]
    parallel = chance.choice((1, 2, 8))
    slots = tuple(Slot(f"{slug}{number}", slug) for slug in slugs for number in range(chance.randint(1, 8)))
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
        slow=chance.choice(("", "tune", "agent")),
        parallel=parallel,
        one_by_one=parallel > 1 or chance.random() < 0.5,
        lockstep=chance.random() < 0.4,
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
        self.asking: dict[tuple[str, str], list[tuple[int, str]]] = {}  # counts and bases of the asks in flight
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
            commands = next_commands(self.study, self.there, asking=self.paces(), draining=self.draining)
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

    def paces(self) -> dict[tuple[str, str], Pace]:
        """How the proposers stand; one may be slow."""
        slow = self.shape.slow
        return {
            (slug, name): Pace(
                asked=sum(count for count, _ in self.asking.get((slug, name), ())),
                parallel=self.shape.parallel if name == slow else 1,
                one_by_one=self.shape.one_by_one and name == slow,
                places=self.shape.parallel if name == slow else 1,
                proposal_s=7.0 if name == slow else 0.0,
            )
            for slug in self.study.lanes
            for name in self.shape.settings.proposers
        }

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
        for command in asks:
            assert command.count > 0
            here = sum(slot.profile == command.profile for slot in self.there)
            before = self.asking.get((command.profile, command.proposer), [])
            if command.proposer == self.shape.slow and self.shape.one_by_one:
                most = max(1, round(self.shape.parallel * here / len(self.there)))
                assert command.count + sum(count for count, _ in before) <= most
            else:
                assert not before
                assert command.count <= 2 * here or command.proposer == self.shape.slow
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
                parts = [1] * count if proposer == self.shape.slow and self.shape.one_by_one else [count]
                self.asking.setdefault((slug, proposer), []).extend((part, base) for part in parts)
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
        what = ["end_together" if self.shape.lockstep else "end"] * (6 * bool(self.study.running)) + ["answer"] * (
            3 * bool(self.asking)
        )
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
        asks = self.asking[slug, proposer]
        count, base = asks.pop(self.chance.randrange(len(asks)))
        if not asks:
            del self.asking[slug, proposer]
        ideas = min(self.chance.randint(0, count), self.ideas)
        for _ in range(ideas):
            self.ideas -= 1
            self.propose(slug, base, proposer)
        self.fruitless[slug, proposer] = 0 if ideas else self.fruitless.get((slug, proposer), 0) + 1

    def _person(self) -> None:
        slug = self.chance.choice(list(self.study.lanes))
        limit = self.shape.settings.max_trials
        wanted = sum(count for (asked, _), asks in self.asking.items() if asked == slug for count, _ in asks)
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
def test_a_journal_without_what_verdicts_teach_teaches_the_same(seed: int):
    world = World(seed)
    world.live()
    older = Study(world.shape.settings)
    for record in world.records:
        event = record.event
        if isinstance(event, Judged):
            event = replace(event, learned=None)
        older.apply(replace(record, event=event))
    for slug, lane in world.study.lanes.items():
        assert older.lanes[slug].prior.counts == pytest.approx(lane.prior.counts)


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
