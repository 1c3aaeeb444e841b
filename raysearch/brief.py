"""What a mind is told of a study, as facts read from its state. Pure; `proposers.context` puts them into words.

It is made in the coordinator's loop, for one ask: whatever the length of the study, it looks at bounded parts of it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from statistics import median

from raysearch import tally
from raysearch.health import SPEED
from raysearch.model import Direction, Measurement, Operator, Outcome, Profile, Proposal, Purpose
from raysearch.study import CandidateState, Lane, Study, TrialState, screen_id
from raysearch.yields import Author, Yield

RUNS = 20  # of the champion, the latest ones, that figures of its runs are from
WINS = 60  # of the ratchet, the latest ones
TRIES = 40  # that were discarded, the latest ones
FAILURES = 12
LOOKED_AT = (
    500  # candidates of the profile that are done with, the latest ones, among which tries and failures are looked for
)
REFUSALS = 200  # refused proposals and dropped answers, the latest ones of the study, whose reasons are counted
REASONS = 12
FLIGHT = 20  # of each stage
STEPS = 10  # of other ratchets
AUTHORS = 30
TEXT = 300  # characters of a hypothesis or a reason
TAIL_LINES = 12
TAIL = 2000  # characters of a log's last lines
WITHOUT = ("holdout",)  # parts of a trial that few trials have

_NAME = re.compile(r"\bc\d{4,}\b")


class Stage(Enum):
    """Where something is that is in flight."""

    RUNNING = "running"  # for the first time
    RACED = "raced"  # its first run was promising
    IN_LINE = "in line"


class Fate(Enum):
    """What became here of a step of another ratchet."""

    KEPT = "kept here"
    NOT_KEPT = "tried here, not kept"
    OPEN = "being tried here"
    NOT_TRIED = "not tried here"


@dataclass(frozen=True)
class Use:
    """How a profile's champion uses its card and its seconds: medians of its runs; None for what they do not tell.

    Attributes:
        peak_mb: Memory held on the GPU, the most of all runs.
        trial_s: Of a whole trial, without what few trials measure.
        training, evaluation, start: Shares of that, 0 to 1; start is everything up to the end of the first step.
    """

    runs: int
    peak_mb: float | None
    tokens_per_s: float | None
    steps: float | None
    tokens: float | None
    parameters: float | None
    mfu_percent: float | None
    mfu_measured_percent: float | None
    matmul_tflops: float | None
    trial_s: float | None
    training: float | None
    evaluation: float | None
    start: float | None


@dataclass(frozen=True)
class Step:
    """A confirmed win of the profile."""

    candidate: str
    hypothesis: str
    operator: Operator
    proposer: str
    delta: float | None
    delta_se: float | None
    pairs: int


@dataclass(frozen=True)
class Try:
    """A change that was measured, or stopped half-way, and discarded."""

    candidate: str
    hypothesis: str
    operator: Operator
    proposer: str
    delta: float | None
    delta_se: float | None
    why: str


@dataclass(frozen=True)
class Failure:
    """A change whose run gave no number.

    Attributes:
        log_tail: The last lines of what it printed: text of a program that anybody may have written.
    """

    candidate: str
    hypothesis: str
    proposer: str
    outcome: Outcome
    reason: str
    log_tail: str


@dataclass(frozen=True)
class Flight:
    """A change whose fate is open."""

    candidate: str
    stage: Stage
    hypothesis: str
    proposer: str
    delta: float | None
    delta_se: float | None


@dataclass(frozen=True)
class Travel:
    """A win of another profile's ratchet, and what became of it here."""

    candidate: str
    profile: str
    hypothesis: str
    delta: float | None
    fate: Fate


@dataclass(frozen=True)
class Brief:
    """What is known of one profile of a study.

    Attributes:
        value: The champion's metric; `value_se` its standard error, `runs` the runs behind it.
        sigma: Noise of the champion, from run to run.
        champion: Its id.
        champion_commit: The ratchet's newest commit.
        head, head_commit: What new proposals are built on: the champion, or a candidate of the frontier.
        wins: The ratchet's latest steps, oldest first; `earlier_wins` are left out.
        tries, failures: The latest, oldest first.
        refusals: Reasons for which proposals were refused lately, and how often; other candidates' names left out.
        dropped: Likewise, why answers were no proposals.
        flight: What is in flight, the latest of each stage; `in_flight` are all of them.
        yields: What ideas cost and gave here, by who had them, the busiest first.
        travelled: The latest steps of other ratchets.
    """

    profile: Profile
    direction: Direction
    baseline: float | None
    value: float | None
    value_se: float | None
    runs: int
    sigma: float | None
    champion: str
    champion_commit: str
    head: str
    head_commit: str
    use: Use | None
    wins: tuple[Step, ...] = ()
    earlier_wins: int = 0
    tries: tuple[Try, ...] = ()
    failures: tuple[Failure, ...] = ()
    refusals: tuple[tuple[str, int], ...] = ()
    dropped: tuple[tuple[str, int], ...] = ()
    flight: tuple[Flight, ...] = ()
    in_flight: int = 0
    yields: tuple[tuple[Author, Yield], ...] = ()
    travelled: tuple[Travel, ...] = ()

    @property
    def headroom_mb(self) -> float | None:
        """Memory of the GPU that no run of the champion has used; None on a CPU, and before there was a run."""
        peak_mb = self.use.peak_mb if self.use is not None else None
        return self.profile.memory_mb - peak_mb if self.profile.memory_mb and peak_mb is not None else None


def brief(study: Study, profile: str) -> Brief:
    """Reads off what is known of a profile."""
    lane = study.lane(profile)
    noise, head = study.noise(lane), study.head(lane)
    runs = len(lane.fresh.values(lane.champion))
    tries, failures = _past(study, lane)
    flight, in_flight = _flight(study, lane)
    return Brief(
        profile=lane.profile,
        direction=study.settings.direction,
        baseline=study.value(lane.base),
        value=study.value(lane.champion),
        value_se=noise.sigma / math.sqrt(runs) if noise is not None and runs else None,
        runs=runs,
        sigma=noise.sigma if noise is not None else None,
        champion=lane.champion,
        champion_commit=lane.champion_commit,
        head=head.id,
        head_commit=lane.champion_commit if head.id == lane.champion else head.candidate.commit,
        use=_use(study, lane),
        wins=tuple(_step(study.candidates[win.candidate]) for win in lane.wins[-WINS:]),
        earlier_wins=max(0, len(lane.wins) - WINS),
        tries=tries,
        failures=failures,
        refusals=_counted(reason for one, reason in study.refused[-REFUSALS:] if one.profile == profile),
        dropped=_counted(one.reason for one in study.dropped[-REFUSALS:] if one.profile == profile),
        flight=flight,
        in_flight=in_flight,
        yields=_yields(lane),
        travelled=_travelled(study, lane),
    )


# ---- the champion ----


def _use(study: Study, lane: Lane) -> Use | None:
    names = [*lane.fresh_runs.get(lane.champion, ())[-RUNS:], screen_id(lane.champion)]
    found = [study.trials[name].measurement for name in names if name in study.trials]
    runs = [one for one in found if one is not None]
    if not runs:
        return None

    def fact(name: str) -> float | None:
        values = [run.facts[name] for run in runs if name in run.facts]
        return median(values) if values else None

    spent_s = sum(_seconds(run) for run in runs)
    parts = {
        "training": sum(run.training_s for run in runs),
        "evaluation": sum(_part(run, name) for run in runs for name in tally.EVALUATION_PARTS if name not in WITHOUT),
        "start": sum(_part(run, name) for run in runs for name in tally.START_PARTS),
    }
    return Use(
        runs=len(runs),
        peak_mb=max(run.peak_vram_mb for run in runs) or None,
        tokens_per_s=fact(SPEED),
        steps=fact("num_steps"),
        tokens=fact("total_tokens"),
        parameters=fact("num_params"),
        mfu_percent=fact("mfu_percent"),
        mfu_measured_percent=fact("mfu_measured_percent"),
        matmul_tflops=fact("matmul_tflops"),
        trial_s=median(_seconds(run) for run in runs),
        **{name: seconds / spent_s if spent_s > 0 and seconds > 0 else None for name, seconds in parts.items()},
    )


def _part(run: Measurement, name: str) -> float:
    return run.parts_s.get(name, 0.0)


def _seconds(run: Measurement) -> float:
    return run.wall_s - sum(_part(run, name) for name in WITHOUT)


def _step(state: CandidateState) -> Step:
    proposal = state.candidate.proposal
    return Step(
        candidate=proposal.id,
        hypothesis=proposal.hypothesis[:TEXT],
        operator=proposal.operator,
        proposer=_by(proposal),
        delta=state.delta,
        delta_se=state.delta_se,
        pairs=state.pairs,
    )


def _by(proposal: Proposal) -> str:
    return Author(proposal.proposer, proposal.model, proposal.operator).name


# ---- what was tried ----


def _past(study: Study, lane: Lane) -> tuple[tuple[Try, ...], tuple[Failure, ...]]:
    """The latest discarded changes that ran, oldest first, those that failed apart."""
    tries: list[Try] = []
    failures: list[Failure] = []
    for state in _latest(study, lane):
        if len(tries) >= TRIES and len(failures) >= FAILURES:
            break
        run = _deciding_run(study, state)
        if state.verdict is None or state.ratchet_commit is not None or state.carried_by is not None or run is None:
            continue  # won, carried, or in conflict with a new champion before its turn came
        if run.measurement is None and run.outcome is not None and run.outcome is not Outcome.FUTILE:
            if len(failures) < FAILURES:
                failures.append(_failure(state, run, run.outcome))
        elif len(tries) < TRIES:
            proposal = state.candidate.proposal
            tries.append(
                Try(
                    candidate=proposal.id,
                    hypothesis=proposal.hypothesis[:TEXT],
                    operator=proposal.operator,
                    proposer=_by(proposal),
                    delta=state.delta,
                    delta_se=state.delta_se,
                    why=state.reason[:TEXT],
                )
            )
    return tuple(reversed(tries)), tuple(reversed(failures))


def _latest(study: Study, lane: Lane) -> Iterator[CandidateState]:
    """Candidates that are done with, newest first: every new program has put its own at the end of the fingerprints."""
    closed = (name for name in reversed(lane.fingerprints.values()) if name not in lane.open and name != lane.base)
    for name in islice(closed, LOOKED_AT):
        yield study.candidates[name]


def _deciding_run(study: Study, state: CandidateState) -> TrialState | None:
    """A run of a candidate that failed, else its first one; None before any has ended."""
    runs = [study.trials[name] for name in (screen_id(state.id), *state.races) if name in study.trials]
    ended = [run for run in runs if run.outcome is not None]
    failed = (run for run in ended if run.measurement is None)
    return next(failed, ended[0] if ended else None)


def _failure(state: CandidateState, run: TrialState, outcome: Outcome) -> Failure:
    proposal = state.candidate.proposal
    tail = "\n".join(run.log_tail[-TAIL:].splitlines()[-TAIL_LINES:])
    return Failure(
        candidate=proposal.id,
        hypothesis=proposal.hypothesis[:TEXT],
        proposer=_by(proposal),
        outcome=outcome,
        reason=run.reason[:TEXT],
        log_tail=tail,
    )


def _counted(reasons: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Reasons and how often they were given; that it was another candidate makes no other reason."""
    counts = Counter(_NAME.sub("another candidate", reason[:TEXT]) for reason in reasons)
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:REASONS])


# ---- what is open ----


def _flight(study: Study, lane: Lane) -> tuple[tuple[Flight, ...], int]:
    slug = lane.profile.slug
    running = [
        run.trial.candidate
        for run in study.running.values()
        if run.trial.profile == slug and run.trial.purpose is Purpose.SCREEN
    ]
    stages = (
        (Stage.RUNNING, running),
        (Stage.RACED, [*lane.racing, *lane.confirmed]),
        (Stage.IN_LINE, list(lane.line)),
    )
    shown = tuple(_in_flight(study.candidates[name], stage) for stage, names in stages for name in names[-FLIGHT:])
    return shown, sum(len(names) for _, names in stages)


def _in_flight(state: CandidateState, stage: Stage) -> Flight:
    proposal = state.candidate.proposal
    return Flight(
        candidate=proposal.id,
        stage=stage,
        hypothesis=proposal.hypothesis[:TEXT],
        proposer=_by(proposal),
        delta=state.delta,
        delta_se=state.delta_se,
    )


# ---- who proposed, and what came from elsewhere ----


def _yields(lane: Lane) -> tuple[tuple[Author, Yield], ...]:
    """Copies: what is in the lane goes on counting while a proposer reads these."""
    ordered = sorted(
        lane.yields.items(),
        key=lambda item: (
            -item[1].proposals - item[1].dropped,
            item[0].name,
            item[0].operator.value if item[0].operator else "",
        ),
    )
    return tuple((author, replace(found)) for author, found in ordered[:AUTHORS])


def _travelled(study: Study, lane: Lane) -> tuple[Travel, ...]:
    """The latest steps of other ratchets, as far as they did not come from here or elsewhere themselves."""
    others = [other for other in study.lanes.values() if other is not lane]
    wins = sorted((win.at, win.candidate) for other in others for win in other.wins[-STEPS:])
    if not wins:
        return ()
    kept = _sources(study, [win.candidate for win in lane.wins[-WINS:]])
    still_open = _sources(study, lane.open) | {one.source for one in study.waiting.values()}
    found: list[Travel] = []
    for _, name in wins:
        state = study.candidates[name]
        proposal = state.candidate.proposal
        if all(root.operator is Operator.TRANSFER for root in study.roots(proposal)):
            continue
        source = f"transfer {name}"
        fate = Fate.NOT_TRIED
        if source in kept:
            fate = Fate.KEPT
        elif source in still_open:
            fate = Fate.OPEN
        elif source in lane.sources:
            fate = Fate.NOT_KEPT
        found.append(Travel(name, proposal.profile, proposal.hypothesis[:TEXT], state.delta, fate))
    return tuple(found[-STEPS:])


def _sources(study: Study, names: Iterable[str]) -> set[str]:
    """What candidates that came from elsewhere, by themselves or in a union, were made of."""
    proposals = (study.candidates[name].candidate.proposal for name in names)
    came = (one for one in proposals if one.operator in (Operator.TRANSFER, Operator.COMBINE))
    return {root.source for one in came for root in study.roots(one)}
