"""The state of a study and what to do next: events in, commands out, with no clock, no file and no network.

`Study.apply` folds the journal's events into the state; `Study.next_commands` reads the state and the free slots and
says what to do. It performs nothing: the coordinator does, and journals what came of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from raysearch import judge, schedule
from raysearch.model import (
    Candidate,
    Direction,
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
from raysearch.schedule import Slot

SEEDS_A_CANDIDATE = 100  # pairs of different candidates never share a seed
MOST_REFUSALS = 10  # in a row, after which the proposers are not asked again before something new is known


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
    """

    direction: Direction = Direction.MINIMIZE
    baseline_runs: int = 3
    rules: judge.Rules = field(default_factory=judge.Rules)
    max_losses: int = 3
    max_trials: int | None = None


# ---- commands: what the coordinator is to do ----


@dataclass(frozen=True)
class StartTrial:
    """Run this attempt on this slot."""

    trial: Trial
    attempt: int
    slot: str


@dataclass(frozen=True)
class Materialise:
    """Make the proposal a commit, or refuse it."""

    proposal: Proposal


@dataclass(frozen=True)
class Conclude:
    """Journal this verdict."""

    event: Judged


@dataclass(frozen=True)
class MoveRatchet:
    """Move the branch from `expected` to a commit with the candidate's tree."""

    profile: str
    candidate: Candidate
    expected: str


@dataclass(frozen=True)
class Carry:
    """The candidate was built on a champion that has been replaced: merge its change onto `onto`."""

    candidate: Candidate
    onto: str


@dataclass(frozen=True)
class Ask:
    """Ask the proposers for `count` proposals for a profile."""

    profile: str
    count: int


@dataclass(frozen=True)
class Finish:
    """Nothing is left to do."""

    reason: str


Command = StartTrial | Materialise | Conclude | MoveRatchet | Carry | Ask | Finish


# ---- state ----


@dataclass
class TrialState:
    """A trial with its last attempt; `outcome` is None while it is queued again or in flight."""

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


@dataclass
class CandidateState:
    """A candidate on its way. `verdict` is None before the screening run was judged."""

    candidate: Candidate
    created_at: float
    verdict: Verdict | None = None
    reason: str = ""
    delta: float | None = None
    delta_se: float | None = None
    pairs: int = 0
    judged_at: float = 0.0
    carried_by: str | None = None
    ratchet_commit: str | None = None


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
        open: Candidates that still need something, oldest first.
        fresh: Values of runs that were not selected for being good (baselines, pairs), by candidate.
        screens: Proposals that were tried or are in line; a change that is carried onto a new champion is not counted.
        refusals: Proposals that were refused since anything new was known of the profile.
        blocked: Why nothing can be run here, if so.
    """

    profile: Profile
    base: str
    champion: str
    champion_commit: str
    wins: list[Win] = field(default_factory=list[Win])
    open: dict[str, None] = field(default_factory=dict[str, None])
    fingerprints: dict[str, str] = field(default_factory=dict[str, str])
    fresh: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    screens: int = 0
    refusals: int = 0
    blocked: str = ""

    def noise(self) -> judge.Noise | None:
        """σ of the profile from all its replicates."""
        return judge.pooled_noise(self.fresh.values())


class Study:
    """All that is known of a study: what its journal adds up to."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.seq = 0
        self.started_at: float | None = None
        self.last_at = 0.0
        self.sessions: list[Record] = []
        self.lanes: dict[str, Lane] = {}
        self.candidates: dict[str, CandidateState] = {}
        self.trials: dict[str, TrialState] = {}
        self.running: dict[str, TrialState] = {}
        self.waiting: dict[str, Proposal] = {}  # proposed, not yet a commit
        self.refused: list[tuple[Proposal, str]] = []
        self.proposals = 0
        self.proposed_at: dict[str, float] = {}
        self._by_commit: dict[str, str] = {}

    # ---- events in ----

    def apply(self, record: Record) -> None:
        """Folds one event into the state.

        Raises:
            InvalidTransition: The event does not fit; the message tells what was expected.
        """
        if record.seq != self.seq + 1:
            raise InvalidTransition(f"event {record.seq} follows event {self.seq}; the journal has a gap")
        match record.event:
            case SessionStarted() | SessionEnded():
                self._session(record)
            case ProfileAdded() as event:
                self._add_profile(event, record.at)
            case Proposed() as event:
                self._propose(event.proposal, record.at)
            case Refused() as event:
                self._refuse(event)
            case Materialised() as event:
                self._materialise(event, record.at)
            case TrialStarted() as event:
                self._start(event, record.at)
            case TrialFinished() as event:
                self._finish(event, record.at)
            case Judged() as event:
                self._judged(event, record.at)
            case RatchetMoved() as event:
                self._move(event, record.at)
        self.seq, self.last_at = record.seq, record.at
        if self.started_at is None:
            self.started_at = record.at

    def _session(self, record: Record) -> None:
        self.sessions.append(record)
        for state in self.running.values():  # its coordinator is gone, and the slots with it
            state.running = False
        self.running.clear()
        for lane in self.lanes.values():
            lane.refusals = 0

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
        candidate = Candidate(proposal=proposal, commit=event.commit, fingerprint=event.fingerprint)
        self.candidates[candidate.id] = CandidateState(candidate, at, verdict=Verdict.KEEP, ratchet_commit=event.commit)
        self.lanes[slug] = Lane(event.profile, candidate.id, candidate.id, event.commit)
        self.lanes[slug].fingerprints[event.fingerprint] = candidate.id
        # Two presets may be one tree and so one commit: a commit means a candidate only within its profile.
        self._by_commit[f"{slug}:{event.commit}"] = candidate.id

    def _propose(self, proposal: Proposal, at: float) -> None:
        lane = self.lane(proposal.profile)
        if proposal.id in self.proposed_at:
            raise InvalidTransition(f"proposal {proposal.id} is in the study already")
        if proposal.carries is None:
            lane.screens += 1
        else:
            carried = self._open(proposal.carries)
            carried.carried_by = proposal.id
            self._close(carried.candidate)
        self.proposals += 1
        self.waiting[proposal.id] = proposal
        self.proposed_at[proposal.id] = at

    def _refuse(self, event: Refused) -> None:
        proposal = self._take_waiting(event.proposal_id)
        self.refused.append((proposal, event.reason))
        lane = self.lane(proposal.profile)
        if proposal.carries is None or self.candidate(proposal.carries).verdict is None:
            lane.screens -= 1
        if proposal.carries is None:
            lane.refusals += 1

    def _materialise(self, event: Materialised, at: float) -> None:
        proposal = self._take_waiting(event.proposal_id)
        candidate = Candidate(proposal, event.commit, event.fingerprint)
        state = CandidateState(candidate, at)
        if proposal.carries and self.candidate(proposal.carries).verdict is not None:
            # The change has won already, if not there then before; only its merge with the new champion is unmeasured.
            state.verdict, state.reason = Verdict.RETEST, f"confirmed as {proposal.carries} on an earlier champion"
        self.candidates[candidate.id] = state
        lane = self.lane(candidate.profile)
        lane.open[candidate.id] = None
        lane.refusals = 0
        lane.fingerprints.setdefault(event.fingerprint, candidate.id)
        self._by_commit[f"{candidate.profile}:{event.commit}"] = candidate.id

    def _take_waiting(self, proposal_id: str) -> Proposal:
        if proposal_id not in self.waiting:
            raise InvalidTransition(f"proposal {proposal_id} is not waiting; waiting: {', '.join(self.waiting) or '–'}")
        return self.waiting.pop(proposal_id)

    def _start(self, event: TrialStarted, at: float) -> None:
        trial = event.trial
        self.candidate(trial.candidate)
        state = self.trials.get(trial.id)
        if state is not None and (state.running or state.outcome is not None):
            raise InvalidTransition(f"trial {trial.id} is started again; its last attempt: {state}")
        losses = state.losses if state else 0
        self.trials[trial.id] = TrialState(trial, event.attempt, event.slot, at, losses=losses)
        self.running[trial.id] = self.trials[trial.id]

    def _finish(self, event: TrialFinished, at: float) -> None:
        state = self.trials.get(event.trial_id)
        if state is None or not state.running or state.attempt != event.attempt:
            raise InvalidTransition(f"attempt {event.attempt} of {event.trial_id} is not in flight; state: {state}")
        if event.outcome is Outcome.MEASURED and event.measurement is None:
            raise InvalidTransition(f"{event.trial_id} was measured, but has no measurement")
        state.running = False
        del self.running[event.trial_id]
        state.finished_at, state.reason, state.log_tail = at, event.reason, event.log_tail
        if event.outcome is Outcome.CANCELLED:
            return  # stopped by us: queued again, and not held against it
        if event.outcome is Outcome.LOST:
            state.losses += 1
            if state.losses < self.settings.max_losses:
                return
        state.outcome = event.outcome
        state.measurement = event.measurement if event.outcome is Outcome.MEASURED else None
        lane = self.lane(state.trial.profile)
        lane.refusals = 0
        if state.trial.purpose is Purpose.BASELINE and state.outcome is not Outcome.MEASURED:
            lane.blocked = f"its baseline {state.trial.id} {state.outcome.value}: {event.reason}"
        if state.measurement is not None and state.trial.purpose is not Purpose.SCREEN:
            lane.fresh.setdefault(state.trial.candidate, []).append(state.measurement.value)

    def _judged(self, event: Judged, at: float) -> None:
        state = self._open(event.candidate)
        if state.verdict is None and not self._begun(state):  # in conflict with a new champion before its turn came
            self.lane(state.candidate.profile).screens -= 1
        state.judged_at = at
        state.verdict, state.reason = event.verdict, event.reason
        state.delta, state.delta_se, state.pairs = event.delta, event.delta_se, event.pairs
        if event.verdict is Verdict.DISCARD:
            self._close(state.candidate)

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
        self._close(state.candidate)

    def _open(self, candidate_id: str) -> CandidateState:
        state = self.candidate(candidate_id)
        if candidate_id not in self.lane(state.candidate.profile).open:
            raise InvalidTransition(f"candidate {candidate_id} is done with: {state}")
        return state

    def _close(self, candidate: Candidate) -> None:
        self.lane(candidate.profile).open.pop(candidate.id, None)

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
        return self.candidate(self._by_commit[f"{candidate.profile}:{candidate.proposal.base}"])

    def value(self, candidate_id: str) -> float | None:
        """Best estimate of a candidate's metric: mean of its fresh runs, else of its screening run, else None."""
        lane = self.lane(self.candidate(candidate_id).candidate.profile)
        fresh = lane.fresh.get(candidate_id)
        if fresh:
            return sum(fresh) / len(fresh)
        screened = self.trials.get(screen_id(candidate_id))
        return screened.measurement.value if screened and screened.measurement else None

    def queued(self) -> dict[str, list[Trial]]:
        """Trials that wait for a slot, by profile, in the order in which they get one."""
        return {slug: list(self._queued(lane)) for slug, lane in self.lanes.items()}

    def holdout(self, candidate_id: str) -> float | None:
        """A candidate's metric on the second held-out split, where one of its runs measured it."""
        own = [race_id(candidate_id, pair) for pair in range(1, self.candidate(candidate_id).pairs + 1)]
        for trial_id in (*own, f"{candidate_id}-1"):
            run = self.trials.get(trial_id)
            if run and run.measurement and run.measurement.holdout is not None:
                return run.measurement.holdout
        return None

    # ---- commands out ----

    def next_commands(
        self, slots: Sequence[Slot], *, asking: Mapping[str, int], accepting: bool = True, draining: bool = False
    ) -> list[Command]:
        """What to do now.

        Args:
            slots: All slots that are there, busy ones included.
            asking: Proposals that were asked for and have not come, by profile; such a profile is not asked for again.
            accepting: False when no further proposal is wanted (a time limit has passed).
            draining: Start nothing; finish when the runs in flight have.

        Returns:
            Commands in the order in which to perform them. Decisions on the state come first and alone, since each
            of them changes what follows. Carrying is one at a time, behind what can be started without it: it takes
            a tenth of a second, and no slot should wait for the second change when the first is ready.
        """
        decisions = self._decisions()
        if decisions:
            return decisions
        if draining:
            return [] if self.running else [Finish("stopped: the runs in flight have ended")]
        busy = {state.slot for state in self.running.values()}
        free = [slot for slot in slots if slot.id not in busy]
        queued = self.queued()
        commands: list[Command] = []
        for trial, slot in schedule.assign((trial for trials in queued.values() for trial in trials), free):
            previous = self.trials.get(trial.id)
            commands.append(StartTrial(trial, previous.attempt + 1 if previous else 1, slot.id))
        carry = self._carry()
        if carry is not None:
            return [*commands, carry]
        if accepting:
            commands += self._asks(slots, free, queued, asking)
        served = [self.lanes[slug] for slug in dict.fromkeys(slot.profile for slot in slots)]
        waiting = any(queued[lane.profile.slug] or asking.get(lane.profile.slug) for lane in served)
        if not commands and not self.running and served and not waiting:
            commands += self._ending(served, accepting)
        return commands

    def _decisions(self) -> list[Command]:
        commands: list[Command] = [Materialise(proposal) for proposal in self.waiting.values()]
        for lane in self.lanes.values():
            states = [self.candidates[candidate_id] for candidate_id in lane.open]
            winner = next((s for s in states if s.verdict is Verdict.KEEP and not self._stale(lane, s)), None)
            if winner is not None:  # alone: whatever else was confirmed here is carried onto it afterwards
                commands.append(MoveRatchet(lane.profile.slug, winner.candidate, lane.champion_commit))
                continue
            for state in states:
                if self._outdated(lane, state):
                    continue
                event = self._verdict(lane, state)
                if event is not None:
                    commands.append(Conclude(event))
        return commands

    def _carry(self) -> Carry | None:
        """The oldest change that has to be put onto a newer champion before anything else is done with it."""
        for lane in self.lanes.values():
            for candidate_id in lane.open:
                state = self.candidates[candidate_id]
                if self._outdated(lane, state):
                    return Carry(state.candidate, lane.champion_commit)
        return None

    def _outdated(self, lane: Lane, state: CandidateState) -> bool:
        return self._stale(lane, state) and (state.verdict is Verdict.KEEP or not self._begun(state))

    def _stale(self, lane: Lane, state: CandidateState) -> bool:
        return state.candidate.proposal.base != lane.champion_commit

    def _begun(self, state: CandidateState) -> bool:
        """Whether anything of the candidate was run: then it is judged against what it was built on."""
        own = state.candidate.id
        return any(trial in self.trials for trial in (screen_id(own), race_id(own, 1), reference_id(own, 1)))

    def _verdict(self, lane: Lane, state: CandidateState) -> Judged | None:
        noise = lane.noise()
        if not self._baseline_done(lane) or noise is None:
            return None
        if state.verdict is None:
            return self._screen_verdict(lane, state, noise)
        return self._race_verdict(state, noise)

    def _screen_verdict(self, lane: Lane, state: CandidateState, noise: judge.Noise) -> Judged | None:
        trial = self.trials.get(screen_id(state.candidate.id))
        if trial is None or trial.outcome is None:
            return None
        if trial.measurement is None:
            return Judged(state.candidate.id, Verdict.DISCARD, f"{trial.outcome.value}: {trial.reason}")
        base_values = lane.fresh[self.built_on(state.candidate).candidate.id]
        found = judge.screen(trial.measurement.value, base_values, noise, self.settings.direction, self.settings.rules)
        return Judged(state.candidate.id, found.verdict, found.reason, found.delta, found.delta_se)

    def _race_verdict(self, state: CandidateState, noise: judge.Noise) -> Judged | None:
        pairs: list[tuple[float, float]] = []
        for pair in self._pairs(state.candidate):
            for trial in pair:
                run = self.trials.get(trial.id)
                if run is None or run.outcome is None:
                    return None
                if run.measurement is None:
                    who = "its re-run" if trial.purpose is Purpose.RACE else "the re-run of the program it was built on"
                    reason = f"{who} {run.outcome.value}: {run.reason}"
                    return Judged(state.candidate.id, Verdict.DISCARD, reason)
            ours, theirs = (self.trials[trial.id].measurement for trial in pair)
            assert ours is not None
            assert theirs is not None
            pairs.append((ours.value, theirs.value))
        found = judge.race(pairs, noise, self.settings.direction, self.settings.rules)
        return Judged(state.candidate.id, found.verdict, found.reason, found.delta, found.delta_se, pairs=len(pairs))

    def _pairs(self, candidate: Candidate) -> list[tuple[Trial, Trial]]:
        """The pairs that the race has or needs now: one more than were judged."""
        base = self.built_on(candidate)
        number = candidate_number(candidate.id)
        pairs: list[tuple[Trial, Trial]] = []
        for pair in range(1, self.candidates[candidate.id].pairs + 2):
            seed = number * SEEDS_A_CANDIDATE + pair
            ours = Trial(
                id=race_id(candidate.id, pair),
                candidate=candidate.id,
                profile=candidate.profile,
                commit=candidate.commit,
                purpose=Purpose.RACE,
                seed=seed,
                rival=candidate.id,
                pair=pair,
                holdout=True,
            )
            theirs = Trial(
                id=reference_id(candidate.id, pair),
                candidate=base.candidate.id,
                profile=candidate.profile,
                commit=base.candidate.commit,
                purpose=Purpose.REFERENCE,
                seed=seed,
                rival=candidate.id,
                pair=pair,
            )
            pairs.append((ours, theirs))
        return pairs

    def _baseline(self, lane: Lane) -> list[Trial]:
        commit = self.candidates[lane.base].candidate.commit
        return [
            Trial(
                id=f"{lane.base}-{run}",
                candidate=lane.base,
                profile=lane.profile.slug,
                commit=commit,
                purpose=Purpose.BASELINE,
                seed=run,
                holdout=run == 1,
            )
            for run in range(1, self.settings.baseline_runs + 1)
        ]

    def _baseline_done(self, lane: Lane) -> bool:
        return all(
            (run := self.trials.get(trial.id)) is not None and run.outcome is Outcome.MEASURED
            for trial in self._baseline(lane)
        )

    def _queued(self, lane: Lane) -> Iterable[Trial]:
        """Trials that wait for a slot: baselines, then pairs, then first runs."""
        if lane.blocked:
            return
        wanted = [] if self._baseline_done(lane) else self._baseline(lane)
        states = [state for name in lane.open if not self._outdated(lane, state := self.candidates[name])]
        for state in states:
            if state.verdict is Verdict.RETEST:
                wanted += [trial for pair in self._pairs(state.candidate) for trial in pair]
        wanted += [self._screen(state.candidate) for state in states if state.verdict is None]
        for trial in wanted:
            run = self.trials.get(trial.id)
            if run is None or (not run.running and run.outcome is None):
                yield trial

    def _screen(self, candidate: Candidate) -> Trial:
        return Trial(
            id=screen_id(candidate.id),
            candidate=candidate.id,
            profile=candidate.profile,
            commit=candidate.commit,
            purpose=Purpose.SCREEN,
            seed=candidate_number(candidate.id) * SEEDS_A_CANDIDATE,
        )

    def _asks(
        self,
        slots: Sequence[Slot],
        free: Sequence[Slot],
        queued: Mapping[str, Sequence[Trial]],
        asking: Mapping[str, int],
    ) -> list[Command]:
        """One proposal in line for every slot: trials of one budget end nearly together, and each finds its next."""
        commands: list[Command] = []
        for slug, lane in self.lanes.items():
            present = sum(slot.profile == slug for slot in slots)
            if asking.get(slug) or not present:
                continue
            if lane.blocked or lane.refusals >= MOST_REFUSALS:
                continue
            idle = sum(slot.profile == slug for slot in free)
            count = idle + present - len(queued[slug])
            if self.settings.max_trials is not None:
                count = min(count, self.settings.max_trials - lane.screens)
            if count > 0:
                commands.append(Ask(slug, count))
        return commands

    def _ending(self, served: Sequence[Lane], accepting: bool) -> list[Command]:
        """Whether the search is over, as far as the profiles that have slots go."""
        if all(lane.blocked for lane in served):
            return [Finish("; ".join(f"{lane.profile.slug} is blocked, {lane.blocked}" for lane in served))]
        if not accepting:
            return [Finish("the time limit has passed")]
        limit = self.settings.max_trials
        if limit is not None and all(lane.screens >= limit or lane.blocked for lane in served):
            return [Finish(f"all {limit} trials are done")]
        stuck = [lane for lane in served if lane.refusals >= MOST_REFUSALS]
        if stuck and all(lane in stuck or lane.blocked or (limit and lane.screens >= limit) for lane in served):
            slug = stuck[0].profile.slug
            reason = next(reason for proposal, reason in reversed(self.refused) if proposal.profile == slug)
            return [Finish(f"the last {MOST_REFUSALS} proposals for {slug} were all refused; the last one: {reason}")]
        return []


def screen_id(candidate_id: str) -> str:
    """Id of a candidate's screening trial."""
    return f"{candidate_id}-screen"


def race_id(candidate_id: str, pair: int) -> str:
    """Id of the candidate's trial in its n-th pair."""
    return f"{candidate_id}-pair{pair}"


def reference_id(candidate_id: str, pair: int) -> str:
    """Id of the other trial in the n-th pair."""
    return f"{candidate_id}-pair{pair}-reference"


def candidate_id(number: int) -> str:
    """Id of the n-th proposal of a study, from 1."""
    return f"c{number:04d}"


def candidate_number(candidate_id: str) -> int:
    """Inverse of `candidate_id`."""
    return int(candidate_id.removeprefix("c"))
