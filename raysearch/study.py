"""The state of a study: what its journal adds up to, event by event, with no clock, no file and no network.

What to do next is `plan`'s business, and what numbers mean is `judge`'s. Every event takes about constant time,
whatever the length of the study.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from raysearch import bandit, judge, yields
from raysearch.bandit import Arm, Tally
from raysearch.directions import Directions, in_force
from raysearch.futility import Futility
from raysearch.health import GAUGES, Health, Heat, Slow, slow
from raysearch.model import (
    Candidate,
    Directed,
    Direction,
    Dropped,
    Judged,
    Learned,
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
    SlotGauged,
    SlotRestored,
    SlotSetAside,
    Trial,
    TrialFinished,
    TrialStarted,
    Verdict,
)
from raysearch.yields import Author, Yield

MOVERS = ("tune", "additive")  # proposers that move knobs: never out of ideas, at once and for nothing
REFERENCE_SEEDS = 1_000  # the n-th reference run of a program has the seed 1000 + n
SCREEN_SEEDS = 100_000  # and the n-th candidate's first run 100000 + n, so that no race repeats it
HOPELESS = 0.02  # P(better) under which a first run is next to hopeless
COLD_LOOK = 64  # of a program's runs, its first ones, that are looked at for those that were the first on their slots
WARM_RUNS = 3  # of a program, after which those that were the first ones on their slots count no more
RECENT = 0.2  # of a new trial in the running mean of their seconds


class InvalidTransition(Exception):
    """An event that does not fit the state: the journal and this code disagree."""


@dataclass(frozen=True)
class Settings:
    """How a study searches and judges.

    Attributes:
        direction: Of the metric.
        baseline_runs: Runs of each profile's first program, for its noise; at least 2.
        rules: Of the judge.
        max_losses: A trial that the infrastructure lost this often is given up.
        max_trials: Screening runs of each profile after which no new proposal is asked for; None for no limit.
        proposers: Names of those who are asked; the first one has most of the line.
        frontier: Whether proposals are built on candidates that are still raced.
        futility: Whether trials far behind at half of the budget are stopped.
        noise_share: Share of the runs that repeat the champion, for the noise and the slots' health.
        seed: Of what is left to chance.
    """

    direction: Direction = Direction.MINIMIZE
    baseline_runs: int = 3
    rules: judge.Rules = field(default_factory=judge.Rules)
    max_losses: int = 3
    max_trials: int | None = None
    proposers: tuple[str, ...] = ("tune",)
    frontier: bool = True
    futility: bool = True
    noise_share: float = 0.05
    seed: int = 0


# ---- state ----


@dataclass(slots=True)
class TrialState:
    """A trial with its last attempt; `outcome` is None while it is queued again or in flight.

    Attributes:
        cold: Whether it was the first on its slot in a session: a machine that has just started may give other numbers.
    """

    trial: Trial
    attempt: int
    slot: str
    started_at: float
    running: bool = True
    losses: int = 0
    finished_at: float | None = None
    outcome: Outcome | None = None
    reason: str = ""
    log_tail: str = ""
    measurement: Measurement | None = None
    halfway: float | None = None
    cold: bool = False

    @property
    def value(self) -> float | None:
        """The metric, None unless measured."""
        return self.measurement.value if self.measurement else None


@dataclass(slots=True)
class CandidateState:
    """A candidate on its way. `verdict` is None before the screening run was judged.

    Attributes:
        base: Id of the candidate that it was built on; its own for a profile's first program.
        step: Its place in the lineage: how many programs it was built on, one upon the other.
        p_better, gain: See `model.Judged`; of a change that is carried, of what it carries.
        races: Ids of its own runs in pairs, in the order in which they were started.
        seconds: Of slots, that its own runs took.
        promising: Whether its first run, or that of what carried it, was promising.
    """

    candidate: Candidate
    created_at: float
    base: str
    step: int = 0
    verdict: Verdict | None = None
    reason: str = ""
    delta: float | None = None
    delta_se: float | None = None
    pairs: int = 0
    p_better: float | None = None
    gain: float | None = None
    judged_at: float = 0.0
    carried_by: str | None = None
    ratchet_commit: str | None = None
    races: list[str] = field(default_factory=list[str])
    seconds: float = 0.0
    promising: bool = False

    @property
    def id(self) -> str:
        """The candidate's id."""
        return self.candidate.proposal.id


@dataclass(frozen=True)
class Win:
    """One step of a ratchet."""

    candidate: str
    commit: str
    at: float


@dataclass
class Lane:
    """One profile within the study: its ratchet, its open work, its noise.

    Attributes:
        base: Id of the profile's first program, a candidate like the others.
        champion: Candidate whose tree is the ratchet's newest commit.
        champion_commit: That commit.
        open: Candidates that still need something, oldest first. Each is in at most one of the next four.
        line: Those that wait for their first run, with their proposers.
        racing: Those that passed it and are raced: the frontier, as far as what they are built on lives.
        confirmed: Those that won against what they were built on and are not on the ratchet yet.
        screened: Those whose first run has ended and is not judged.
        splits: Parts of unions that fell short, to be tried by themselves.
        due: Candidates of whom something new is known.
        again: Trials that were lost, and are still wanted.
        fresh: Values of runs that were not selected for being good (baselines, references, races), by candidate.
        fresh_runs: Their trials, likewise, in the order in which they were started.
        forgotten: Trials whose values were taken out of `fresh` again: they were the first on their slots.
        differences: Differences in the pairs of each race.
        rivals: Runs of candidates in pairs, by the trial of the other side.
        halves: Half-way values, by candidate.
        yields: What ideas cost and gave, by who had them.
        heat: How often each slot was throttled; runs that are no longer believed count too.
        gauges: What was measured on each slot as it joined, in earlier sessions too.
        screens: Proposals that were tried or are in line; a change that is carried onto a new champion is not counted.
        refusals: Proposals that were refused since anything new was known of the profile.
        unmerged: Wins that are in conflict with the champion.
        wall_s: About how long a trial takes; None before one was measured.
        started: Trials that were started.
        repeated_at: How many had been started when the champion's latest fresh run was.
        hopeless: First runs in a row that were judged next to hopeless.
        futile: Trials that were stopped at half of their budget, and the seconds that this saved.
        blocked: Why nothing can be run here, if so.
    """

    profile: Profile
    base: str
    champion: str
    champion_commit: str
    futility: Futility
    wins: list[Win] = field(default_factory=list[Win])
    open: dict[str, None] = field(default_factory=dict[str, None])
    line: dict[str, str] = field(default_factory=dict[str, str])
    racing: dict[str, None] = field(default_factory=dict[str, None])
    confirmed: dict[str, None] = field(default_factory=dict[str, None])
    screened: dict[str, None] = field(default_factory=dict[str, None])
    splits: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    due: dict[str, None] = field(default_factory=dict[str, None], compare=False)
    again: dict[str, None] = field(default_factory=dict[str, None])
    fingerprints: dict[str, str] = field(default_factory=dict[str, str])
    sources: set[str] = field(default_factory=set[str])
    fresh: judge.Replicates = field(default_factory=judge.Replicates)
    forgotten: set[str] = field(default_factory=set[str])
    fresh_runs: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    differences: judge.Replicates = field(default_factory=judge.Replicates)
    prior: judge.Prior = field(default_factory=judge.Prior)
    rivals: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    halves: judge.Replicates = field(default_factory=judge.Replicates)
    tallies: dict[Arm, Tally] = field(default_factory=dict[Arm, Tally])
    yields: dict[Author, Yield] = field(default_factory=dict[Author, Yield])
    health: Health = field(default_factory=Health)
    heat: dict[str, Heat] = field(default_factory=dict[str, Heat])
    gauges: dict[str, deque[SlotGauged]] = field(default_factory=dict[str, "deque[SlotGauged]"])
    screens: int = 0
    refusals: int = 0
    unmerged: list[str] = field(default_factory=list[str])
    wall_s: float | None = None
    started: int = 0
    repeated_at: int = 0
    hopeless: int = 0
    futile: int = 0
    saved_s: float = 0.0
    blocked: str = ""


class Study:
    """All that is known of a study: what its journal adds up to."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.seq: int = 0
        self.started_at: float | None = None
        self.last_at = 0.0
        self.sessions: list[Record] = []
        self.lanes: dict[str, Lane] = {}
        self.candidates: dict[str, CandidateState] = {}
        self.trials: dict[str, TrialState] = {}
        self.running: dict[str, TrialState] = {}
        self.busy: dict[str, str] = {}  # slot -> the trial on it
        self.warm: set[str] = set()  # slots that had a trial in this session
        self.waiting: dict[str, Proposal] = {}  # proposed, not yet a commit
        self.refused: list[tuple[Proposal, str]] = []
        self.gauged: set[str] = set()  # slots that were measured in this session, or in the last one
        self.aside: dict[str, SlotSetAside] = {}  # slots that get no trials
        self.aside_at: dict[str, float] = {}
        self.dropped: list[Dropped] = []  # answers that were no proposals
        self.spent_usd = 0.0  # on proposals, and on answers that were none
        self.directed: dict[str, str] = {}  # the human's directions: text by the file's name
        self.proposals = 0
        self.proposed_at: dict[str, float] = {}
        self.finished = 0
        self._by_commit: dict[str, str] = {}

    # ---- events in ----

    def apply(self, record: Record) -> None:  # noqa: PLR0912 - one branch an event
        """Folds one event into the state.

        Raises:
            InvalidTransition: The event does not fit; the message tells what was expected.
        """
        if record.seq != self.seq + 1:
            raise InvalidTransition(f"event {record.seq} follows event {self.seq}; the journal has a gap")
        match record.event:
            case TrialStarted() as event:
                self._start(event, record.at)
            case TrialFinished() as event:
                self._finish(event, record.at)
            case Proposed() as event:
                self._propose(event.proposal, record.at)
            case Dropped() as event:
                self._drop(event)
            case Directed() as event:
                self._direct(event)
            case Materialised() as event:
                self._materialise(event, record.at)
            case Judged() as event:
                self._judged(event, record.at)
            case Refused() as event:
                self._refuse(event)
            case RatchetMoved() as event:
                self._move(event, record.at)
            case ProfileAdded() as event:
                self._add_profile(event, record.at)
            case SessionStarted() | SessionEnded():
                self._session(record)
            case SlotSetAside() as event:
                self._set_aside(event, record.at)
            case SlotRestored() as event:
                self._restore(event)
            case SlotGauged() as event:
                self._gauge(event)
        self.seq, self.last_at = record.seq, record.at
        if self.started_at is None:
            self.started_at = record.at

    def _session(self, record: Record) -> None:
        self.sessions.append(record)
        for state in self.running.values():  # its coordinator is gone, and the slots with it
            state.running = False
            self.lane(state.trial.profile).again[state.trial.id] = None
        self.running.clear()
        self.busy.clear()
        self.warm.clear()
        if isinstance(record.event, SessionStarted):
            self.gauged.clear()
        self.aside.clear()  # a new session looks at the slots anew
        self.aside_at.clear()
        for lane in self.lanes.values():
            lane.refusals = 0
            lane.health = Health()

    def _direct(self, event: Directed) -> None:
        self.directed[event.file] = event.text
        for lane in self.lanes.values():
            lane.refusals = 0  # other proposals are wanted now

    def _add_profile(self, event: ProfileAdded, at: float) -> None:
        slug = event.profile.slug
        if slug in self.lanes:
            raise InvalidTransition(f"profile {slug} is in the study already")
        proposal = Proposal(
            id=f"{slug}-base",
            profile=slug,
            base=event.commit,
            patch="",
            operator=Operator.DRAFT,
            hypothesis=f"the {event.profile.preset or 'first'} program as it is",
            proposer="preset",
        )
        candidate = Candidate(proposal, event.commit, event.fingerprint, event.size)
        self.candidates[candidate.id] = CandidateState(
            candidate, at, candidate.id, verdict=Verdict.KEEP, ratchet_commit=event.commit
        )
        futility = Futility(self.settings.direction)
        lane = Lane(event.profile, candidate.id, candidate.id, event.commit, futility)
        self.lanes[slug] = lane
        lane.fingerprints[event.fingerprint] = candidate.id
        # Two presets may be one tree and so one commit: a commit means a candidate only within its profile.
        self._by_commit[f"{slug}:{event.commit}"] = candidate.id

    def _propose(self, proposal: Proposal, at: float) -> None:
        lane = self.lane(proposal.profile)
        if proposal.id in self.proposed_at:
            raise InvalidTransition(f"proposal {proposal.id} is in the study already")
        if not proposal.carries:
            lane.screens += 1
            counted = self._yield(proposal)
            counted.proposals += 1
            counted.spend(proposal)
        for carried in [self._open(name) for name in proposal.carries]:
            carried.carried_by = proposal.id
            self._close(lane, carried.id)
        # a part may have lost a member to a conflict before it is carried
        lane.splits = [part for part in lane.splits if not set(part) & set(proposal.carries)]
        if proposal.source:
            lane.sources.add(proposal.source)
        self.proposals += 1
        self.spent_usd += proposal.cost_usd
        self.waiting[proposal.id] = proposal
        self.proposed_at[proposal.id] = at

    def _drop(self, event: Dropped) -> None:
        self.dropped.append(event)
        self.spent_usd += event.cost_usd
        author = Author(event.proposer, event.model, None)
        counted = self.lane(event.profile).yields.setdefault(author, Yield())
        counted.dropped += 1
        counted.spend(event)

    def _yield(self, proposal: Proposal) -> Yield:
        """What is counted for whoever had an idea."""
        return self.lane(proposal.profile).yields.setdefault(yields.author_of(proposal), Yield())

    def _refuse(self, event: Refused) -> None:
        proposal = self._take_waiting(event.proposal_id)
        self.refused.append((proposal, event.reason))
        lane = self.lane(proposal.profile)
        if self._union(proposal):  # together they are no program: each part by itself may be
            self._split(lane, proposal)
        elif not proposal.carries or self.candidate(proposal.carries[0]).verdict is None:
            lane.screens -= 1
        if not proposal.carries:
            lane.refusals += 1
            self._yield(proposal).refused += 1

    def _materialise(self, event: Materialised, at: float) -> None:
        proposal = self._take_waiting(event.proposal_id)
        candidate = Candidate(proposal, event.commit, event.fingerprint, event.size)
        base = self._by_commit[f"{candidate.profile}:{proposal.base}"]
        state = CandidateState(candidate, at, base, self.candidates[base].step + 1)
        lane = self.lane(candidate.profile)
        self.candidates[candidate.id] = state
        lane.open[candidate.id] = None
        carried = [self.candidate(name) for name in proposal.carries]
        if carried and all(self.has_credit(one) for one in carried):
            # Each change was better than something on the ratchet; only their merge with the champion is unmeasured.
            state.verdict = Verdict.RETEST
            state.reason = f"better as {' and '.join(proposal.carries)} on what it was built on"
            state.gain = sum(one.gain or 0.0 for one in carried)
            state.p_better = min(one.p_better or 0.0 for one in carried)
            lane.racing[candidate.id] = None
        else:
            lane.line[candidate.id] = proposal.proposer
        lane.refusals = 0
        lane.fingerprints.setdefault(event.fingerprint, candidate.id)
        self._by_commit[f"{candidate.profile}:{event.commit}"] = candidate.id

    def directions(self, lane: Lane) -> Directions:
        """What the human wants of the proposals for a profile.

        Raises:
            UserError: A journalled text is not valid to this version.
        """
        return in_force(self.directed, lane.profile.preset)

    def max_trials(self, lane: Lane) -> int | None:
        """Proposals of a profile that may be tried, by the settings and by the directions; None for no limit."""
        limits = (self.settings.max_trials, self.directions(lane).budget.trials)
        return min((limit for limit in limits if limit is not None), default=None)

    def max_usd(self) -> float | None:
        """What proposals may cost in all, by the directions of whatever profile allows least; None for no limit."""
        presets = ("", *(lane.profile.preset for lane in self.lanes.values()))
        limits = (in_force(self.directed, preset).budget.usd for preset in presets)
        return min((limit for limit in limits if limit is not None), default=None)

    def has_credit(self, state: CandidateState) -> bool:
        """Whether a change need not be screened again when it is carried.

        What was measured against a program that was on the ratchet keeps its credit; what was measured against a
        frontier candidate that was refuted keeps it only when it was confirmed.
        """
        if self.settings.rules.greedy:
            return False
        if state.verdict is Verdict.KEEP:
            return True
        return state.verdict is Verdict.RETEST and self.built_on(state.candidate).ratchet_commit is not None

    def _take_waiting(self, proposal_id: str) -> Proposal:
        if proposal_id not in self.waiting:
            raise InvalidTransition(f"proposal {proposal_id} is not waiting; waiting: {', '.join(self.waiting) or '–'}")
        return self.waiting.pop(proposal_id)

    # ---- trials ----

    def _start(self, event: TrialStarted, at: float) -> None:
        trial = event.trial
        candidate = self.candidate(trial.candidate)
        lane = self.lane(trial.profile)
        before = self.trials.get(trial.id)
        if before is not None and (before.running or before.outcome is not None):
            raise InvalidTransition(f"trial {trial.id} is started again; its last attempt: {before}")
        losses, cold = before.losses if before else 0, event.slot not in self.warm
        state = TrialState(trial, event.attempt, event.slot, at, losses=losses, cold=cold)
        self.warm.add(event.slot)
        self.trials[trial.id] = self.running[trial.id] = state
        self.busy[event.slot] = trial.id
        lane.again.pop(trial.id, None)
        if before is not None:
            return
        lane.started += 1
        lane.line.pop(trial.candidate, None)
        if trial.purpose is Purpose.SCREEN:
            return
        lane.fresh_runs.setdefault(trial.candidate, []).append(trial.id)
        if trial.candidate == lane.champion:
            lane.repeated_at = lane.started
        if trial.purpose is Purpose.RACE:
            candidate.races.append(trial.id)
            if trial.rival is not None:
                lane.rivals.setdefault(trial.rival, []).append(trial.id)

    def _finish(self, event: TrialFinished, at: float) -> None:
        state = self.trials.get(event.trial_id)
        if state is None or not state.running or state.attempt != event.attempt:
            raise InvalidTransition(f"attempt {event.attempt} of {event.trial_id} is not in flight; state: {state}")
        if event.outcome is Outcome.MEASURED and event.measurement is None:
            raise InvalidTransition(f"{event.trial_id} was measured, but has no measurement")
        state.running = False
        del self.running[event.trial_id]
        self.busy.pop(state.slot, None)
        state.finished_at, state.reason, state.log_tail = at, event.reason, event.log_tail
        state.losses += event.outcome is Outcome.LOST
        lane = self.lane(state.trial.profile)
        stopped = event.outcome is Outcome.CANCELLED  # by us: queued again, and not held against it
        if stopped or (event.outcome is Outcome.LOST and state.losses < self.settings.max_losses):
            lane.again[event.trial_id] = None
            return
        state.outcome, state.halfway = event.outcome, event.halfway
        state.measurement = event.measurement if event.outcome is Outcome.MEASURED else None
        lane.refusals = 0
        self.finished += 1
        self._learn(lane, state, at)

    def _learn(self, lane: Lane, state: TrialState, at: float) -> None:
        """Takes in what an ended trial says."""
        trial, seconds = state.trial, at - state.started_at
        candidate = self.candidates[trial.candidate]
        if trial.purpose in (Purpose.SCREEN, Purpose.RACE):
            candidate.seconds += seconds
            roots = list(self.roots(candidate.candidate.proposal))
            for root in roots:
                self._yield(root).seconds += seconds / len(roots)
        if state.measurement is not None:
            lane.wall_s = seconds if lane.wall_s is None else (1 - RECENT) * lane.wall_s + RECENT * seconds
            lane.heat.setdefault(state.slot, Heat()).add(trial.id, state.measurement)
            lane.health.add(state.slot, trial.id, trial.candidate, state.measurement)
        elif state.outcome is Outcome.FUTILE:
            lane.futile += 1
            lane.saved_s += max(0.0, (lane.wall_s or 0.0) - seconds)
        if trial.purpose is Purpose.SCREEN:
            lane.screened[trial.candidate] = None
            lane.due[trial.candidate] = None
            self._learn_curve(lane, candidate.base, state)
            return
        if trial.purpose is Purpose.BASELINE and state.outcome is not Outcome.MEASURED:
            lane.blocked = f"its baseline {trial.id} {state.outcome.value if state.outcome else ''}: {state.reason}"
        if trial.purpose is Purpose.BASELINE:  # nothing was judged without it: neither at first nor when it ran again
            lane.due |= lane.screened | lane.racing
        if state.halfway is not None:
            lane.halves.add(trial.candidate, state.halfway)
        if state.value is not None:
            lane.fresh.add(trial.candidate, state.value, step=candidate.step)
            self._forget_cold(lane, trial.candidate)
        for race in (trial.id, *lane.rivals.get(trial.id, ())):
            self._learn_pair(lane, race)
        # whoever waits for a first fresh run of what it was built on
        lane.due |= {name: None for name in lane.screened if self.candidates[name].base == trial.candidate}

    def _forget_cold(self, lane: Lane, program: str) -> None:
        """Takes out what slots gave in their first runs, once a program has enough others."""
        runs = [self.trials[name] for name in lane.fresh_runs[program][:COLD_LOOK]]
        cold = [run for run in runs if run.cold and run.value is not None and run.trial.id not in lane.forgotten]
        if cold and len(lane.fresh.values(program)) - len(cold) >= WARM_RUNS:
            for run in cold:
                assert run.value is not None
                lane.fresh.remove(program, run.value)
                lane.forgotten.add(run.trial.id)

    def _learn_curve(self, lane: Lane, base: str, state: TrialState) -> None:
        half, final = lane.halves.mean(base), lane.fresh.mean(base)
        if half is not None and final is not None and state.halfway is not None and state.value is not None:
            lane.futility.add(state.halfway - half, state.value - final)

    def _learn_pair(self, lane: Lane, race: str) -> None:
        ours = self.trials.get(race)
        if ours is None or ours.trial.purpose is not Purpose.RACE:
            return
        lane.due[ours.trial.candidate] = None
        pair = self.pair_values(ours)
        if pair is not None:
            base = self.candidates[self.candidates[ours.trial.candidate].base]
            lane.differences.add(ours.trial.candidate, pair[0] - pair[1], step=base.step)

    def pair_values(self, ours: TrialState) -> tuple[float, float] | None:
        """Both sides of a pair, once both were measured."""
        theirs = self.trials.get(ours.trial.rival or "")
        if theirs is None or theirs.value is None or ours.value is None:
            return None
        return ours.value, theirs.value

    # ---- verdicts ----

    def _judged(self, event: Judged, at: float) -> None:
        state = self._open(event.candidate)
        lane = self.lane(state.candidate.profile)
        if event.candidate in lane.line:  # in conflict with a new champion before its turn came
            lane.screens -= 1
        won = state.verdict is Verdict.KEEP
        if event.candidate not in lane.line and not event.conflict and not won:
            self._learn_effect(lane, state, event)
        if event.candidate in lane.screened:
            lane.hopeless = lane.hopeless + 1 if (event.p_better or 0.0) < HOPELESS else 0
        state.judged_at = at
        state.verdict, state.reason = event.verdict, event.reason
        state.delta, state.delta_se, state.pairs = event.delta, event.delta_se, event.pairs
        state.p_better, state.gain = event.p_better, event.gain
        for group in (lane.line, lane.racing, lane.confirmed, lane.screened, lane.due):
            group.pop(event.candidate, None)
        if event.verdict is not Verdict.DISCARD:
            self._count_promising(state)
        if event.verdict is Verdict.RETEST:
            lane.racing[event.candidate] = None
        elif event.verdict is Verdict.KEEP:
            lane.confirmed[event.candidate] = None
        else:
            if won and event.conflict:
                lane.unmerged.append(event.candidate)
            self._close(lane, event.candidate)
            if self._union(state.candidate.proposal):
                self._split(lane, state.candidate.proposal)
            elif state.seconds > 0:
                self._count_try(lane, state, None)

    def _count_promising(self, state: CandidateState) -> None:
        """Counts the ideas that a candidate carries as promising, each once."""
        for root in self.roots(state.candidate.proposal):
            if not self.candidates[root.id].promising:
                self.candidates[root.id].promising = True
                self._yield(root).screened += 1

    def _learn_effect(self, lane: Lane, state: CandidateState, event: Judged) -> None:
        """What the candidate's effect says of changes in general: once, when it is decided."""
        learned = event.learned or self.learned(lane, state, event.verdict)
        if learned is not None:
            prior = lane.prior.at(learned.sigma)
            unit = prior.unit or learned.sigma
            lane.prior = prior.learned(
                *(judge.Evidence(gain / unit, se / unit, dof) for gain, se, dof in learned.effects)
            )

    def _split(self, lane: Lane, union: Proposal) -> None:
        """Opens the members of a union that fell short again, to be carried in two halves."""
        names = self._union(union)
        for name in names:
            member = self.candidates[name]
            member.carried_by = None
            lane.open[name] = None
            lane.confirmed[name] = None
        middle = (len(names) + 1) // 2
        lane.splits += [names[:middle], names[middle:]]

    def _union(self, proposal: Proposal) -> tuple[str, ...]:
        """The members of the union that a proposal is, or that it carries onto a newer champion; empty for others."""
        carries = proposal.carries
        while len(carries) == 1:
            carries = self.candidates[carries[0]].candidate.proposal.carries
        return carries

    def _move(self, event: RatchetMoved, at: float) -> None:
        lane = self.lane(event.profile)
        if event.previous != lane.champion_commit:
            raise InvalidTransition(f"the ratchet moved from {event.previous}, but stands at {lane.champion_commit}")
        state = self._open(event.candidate)
        if state.verdict is not Verdict.KEEP or state.candidate.profile != event.profile:
            raise InvalidTransition(f"the ratchet of {event.profile} moved to {event.candidate}, which is {state}")
        lane.champion, lane.champion_commit = event.candidate, event.commit
        lane.wins.append(Win(event.candidate, event.commit, at))
        self._by_commit[f"{event.profile}:{event.commit}"] = event.candidate
        state.ratchet_commit = event.commit
        self._close(lane, event.candidate)
        self._count_try(lane, state, state.gain or 0.0)

    def _count_try(self, lane: Lane, state: CandidateState, gain: float | None) -> None:
        """Counts for arm and author what a proposal cost and gained; a union's gain is its members', in equal parts."""
        roots = list(self.roots(state.candidate.proposal))
        for root in roots:
            arm = Arm(root.proposer, root.operator)
            share = None if gain is None else gain / len(roots)
            seconds = state.seconds / len(roots)
            hope = 0.0 if self.simplifies(state) else state.p_better or 0.0  # that it is no worse is no gain
            lane.tallies.update(bandit.tried(lane.tallies, arm, seconds=seconds, gain=share, p_better=hope))
            counted = self._yield(root)
            counted.tried += 1
            if share is not None:
                counted.win(share)

    def roots(self, proposal: Proposal) -> Iterator[Proposal]:
        """The proposals as they were first made, of what is carried."""
        if not proposal.carries:
            yield proposal
        for name in proposal.carries:
            yield from self.roots(self.candidates[name].candidate.proposal)

    # ---- slots ----

    def _set_aside(self, event: SlotSetAside, at: float) -> None:
        self.aside[event.slot], self.aside_at[event.slot] = event, at
        lane = self.lane(event.profile)
        lane.health.forget(event.slot)
        for name in event.repeat:
            self._disbelieve(lane, self.trials[name])

    def _disbelieve(self, lane: Lane, state: TrialState) -> None:
        """Takes back what a trial said: it is run again."""
        trial = state.trial
        if state.outcome is None:
            return
        if trial.purpose is not Purpose.SCREEN:
            if state.halfway is not None:
                lane.halves.remove(trial.candidate, state.halfway)
            for race in (trial.id, *lane.rivals.get(trial.id, ())):
                ours = self.trials[race]
                pair = self.pair_values(ours) if ours.trial.purpose is Purpose.RACE else None
                if pair is not None:
                    lane.differences.remove(ours.trial.candidate, pair[0] - pair[1])
            if state.value is not None and trial.id not in lane.forgotten:
                lane.fresh.remove(trial.candidate, state.value)
            lane.forgotten.discard(trial.id)
        lane.screened.pop(trial.candidate, None)
        lane.due.pop(trial.candidate, None)
        state.outcome = state.measurement = state.halfway = None
        self.finished -= 1
        lane.again[trial.id] = None

    def _restore(self, event: SlotRestored) -> None:
        self.aside.pop(event.slot, None)
        self.aside_at.pop(event.slot, None)

    def _gauge(self, event: SlotGauged) -> None:
        self.gauged.add(event.slot)
        self.lane(event.profile).gauges.setdefault(event.slot, deque(maxlen=GAUGES)).append(event)

    def _open(self, candidate_id: str) -> CandidateState:
        state = self.candidate(candidate_id)
        if candidate_id not in self.lane(state.candidate.profile).open:
            raise InvalidTransition(f"candidate {candidate_id} is done with: {state}")
        return state

    def _close(self, lane: Lane, candidate_id: str) -> None:
        for group in (lane.open, lane.line, lane.racing, lane.confirmed, lane.screened, lane.due):
            group.pop(candidate_id, None)

    # ---- questions ----

    def lane(self, profile: str) -> Lane:
        """The lane of a profile."""
        if profile not in self.lanes:
            raise InvalidTransition(f"profile {profile} is not in the study; known: {', '.join(self.lanes) or '–'}")
        return self.lanes[profile]

    def candidate(self, candidate_id: str) -> CandidateState:
        """The state of a candidate."""
        if candidate_id not in self.candidates:
            raise InvalidTransition(f"candidate {candidate_id} is not in the study")
        return self.candidates[candidate_id]

    def built_on(self, candidate: Candidate) -> CandidateState:
        """The candidate that `candidate`'s base commit is the tree of."""
        return self.candidates[self.candidates[candidate.id].base]

    def lives(self, lane: Lane, candidate_id: str) -> bool:
        """Whether it may be built upon: the champion, or a candidate on the way to it."""
        while candidate_id != lane.champion:
            if candidate_id not in lane.racing and candidate_id not in lane.confirmed:
                return False
            candidate_id = self.candidates[candidate_id].base
        return True

    def slow_slots(self, lane: Lane) -> list[Slow]:
        """Slots of this session whose card is slower than others of its kind; cores of a CPU vary too much to say."""
        if lane.profile.device != "cuda":
            return []
        return [one for one in slow({name: list(own) for name, own in lane.gauges.items()}) if one.slot in self.gauged]

    def head(self, lane: Lane) -> CandidateState:
        """What new proposals are built on: the champion, or the frontier candidate that promises most beyond it."""
        best, most = lane.champion, 0.0
        if self.settings.frontier and not self.settings.rules.greedy:
            for name in (*lane.racing, *lane.confirmed):
                promised = self._promised(lane, name)
                if promised > most:
                    best, most = name, promised
        return self.candidates[best]

    def next_step(self, lane: Lane) -> str:
        """The candidate on the champion that the head is or stands on; the champion itself if it is the head."""
        name = self.head(lane).id
        while name != lane.champion and self.candidates[name].base != lane.champion:
            name = self.candidates[name].base
        return name

    def _promised(self, lane: Lane, candidate_id: str) -> float:
        """What a frontier candidate is worth beyond the champion, 0 if it may not be built upon."""
        promised = 0.0
        while candidate_id != lane.champion:
            state = self.candidates[candidate_id]
            if candidate_id not in lane.racing and candidate_id not in lane.confirmed:
                return 0.0
            if (state.p_better or 0.0) < self.settings.rules.frontier_probability:
                return 0.0
            promised += state.gain or 0.0
            candidate_id = self.candidates[candidate_id].base
        return promised

    def noise(self, lane: Lane, base: str | None = None) -> judge.Noise | None:
        """Noise of a program and of those near to it in the lineage: of the champion, unless another one is named."""
        return lane.fresh.noise(self.candidates[base or lane.champion].step)

    def judge(self, lane: Lane, base: str) -> judge.Judge | None:
        """The judge of what is built on a program; None before the profile's baseline has shown its noise."""
        noise = self.noise(lane, base)
        if noise is None or not self.baseline_done(lane):
            return None
        paired = judge.pair_noise(noise, lane.differences.noise(self.candidates[base].step))
        return judge.Judge(noise, paired, lane.prior.at(noise.sigma), self.settings.direction, self.settings.rules)

    def simplifies(self, state: CandidateState) -> bool:
        """Whether a candidate only has to be no worse: it was made to be smaller, and is."""
        candidate = state.candidate
        if candidate.proposal.operator not in bandit.TIDYING:
            return False
        return 0 < candidate.size < self.built_on(candidate).candidate.size

    def screen_evidence(self, lane: Lane, state: CandidateState, known: judge.Judge) -> judge.Evidence | None:
        """What a candidate's first run said against what it was built on."""
        screened = self.trials.get(screen_id(state.id))
        if screened is None or screened.value is None or not lane.fresh.values(state.base):
            return None
        return known.screened(screened.value, self.base_values(lane, state))

    def learned(
        self, lane: Lane, state: CandidateState, verdict: Verdict, known: judge.Judge | None = None
    ) -> Learned | None:
        """What the runs of a candidate that is decided say of its effect, for the prior; None where they say nothing.

        Args:
            lane: Of the candidate's profile.
            state: The candidate's, before the verdict.
            verdict: On it.
            known: The judge of what it was built on, if it is at hand.
        """
        if verdict is Verdict.RETEST or state.candidate.proposal.carries or self.simplifies(state):
            return None
        known = known or self.judge(lane, state.base)
        if known is None:
            return None
        pairs = self.sound_pairs(lane, state)
        found = [self.screen_evidence(lane, state, known), known.raced(pairs) if pairs else None]
        effects = [known.in_metric(one) for one in found if one is not None]
        return Learned(known.noise.sigma, tuple(effects)) if effects else None

    def base_values(self, lane: Lane, state: CandidateState) -> Sequence[float]:
        """Fresh values of what a candidate was built on: those that others back, since the machine last changed."""
        return lane.fresh.sound(state.base, self.candidates[state.base].step)

    def race_pairs(self, state: CandidateState) -> list[tuple[float, float]]:
        """The pairs of a candidate's race that were measured on both sides."""
        found = [self.pair_values(self.trials[name]) for name in state.races]
        return [pair for pair in found if pair is not None]

    def sound_pairs(self, lane: Lane, state: CandidateState) -> list[tuple[float, float]]:
        """Those of them whose other side agrees with another run of its program."""
        pairs = self.race_pairs(state)
        noise = self.noise(lane, state.base) if pairs else None
        if noise is None:
            return pairs
        values = [*lane.fresh.values(state.base)]
        values += [theirs for _, theirs in pairs if theirs not in values]  # what was forgotten since
        known = dict(zip(values, judge.backed(values, noise.sigma), strict=True))
        return [pair for pair in pairs if known[pair[1]]]

    def baseline_done(self, lane: Lane) -> bool:
        """Whether all runs of the profile's first program were measured."""
        return all(
            (run := self.trials.get(baseline_id(lane.base, number))) is not None and run.outcome is Outcome.MEASURED
            for number in range(1, self.settings.baseline_runs + 1)
        )

    def value(self, candidate_id: str) -> float | None:
        """Best estimate of a candidate's metric: mean of its fresh runs, else of its screening run, else None."""
        lane = self.lane(self.candidate(candidate_id).candidate.profile)
        fresh = lane.fresh.mean(candidate_id)
        if fresh is not None:
            return fresh
        screened = self.trials.get(screen_id(candidate_id))
        return screened.value if screened else None

    def holdout(self, candidate_id: str) -> float | None:
        """A candidate's metric on the second held-out split, where one of its runs measured it."""
        return next((run.holdout for run in self._fresh(candidate_id) if run.holdout is not None), None)

    def whole(self, candidate_id: str) -> float | None:
        """A candidate's metric on the whole set, where one of its runs measured it."""
        return next((run.whole for run in self._fresh(candidate_id) if run.whole is not None), None)

    def _fresh(self, candidate_id: str) -> Iterator[Measurement]:
        """What the fresh runs of a candidate gave."""
        lane = self.lane(self.candidate(candidate_id).candidate.profile)
        measured = (self.trials[trial_id].measurement for trial_id in lane.fresh_runs.get(candidate_id, ()))
        return (one for one in measured if one is not None)


def screen_id(candidate_id: str) -> str:
    """Id of a candidate's screening trial."""
    return f"{candidate_id}-screen"


def race_id(candidate_id: str, pair: int) -> str:
    """Id of the candidate's trial in its n-th pair."""
    return f"{candidate_id}-pair{pair}"


def reference_id(candidate_id: str, number: int) -> str:
    """Id of the n-th run of a program that others are compared with."""
    return f"{candidate_id}-reference{number}"


def baseline_id(candidate_id: str, number: int) -> str:
    """Id of the n-th run of a profile's first program."""
    return f"{candidate_id}-{number}"


def candidate_id(number: int) -> str:
    """Id of the n-th proposal of a study, from 1."""
    return f"c{number:04d}"


def candidate_number(candidate_id: str) -> int:
    """Inverse of `candidate_id`."""
    return int(candidate_id.removeprefix("c"))
