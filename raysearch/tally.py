"""What people ask of a study, counted: pure, for console, report and pages. It writes nothing and decides nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean, median

from raysearch import yields
from raysearch.health import SPEED
from raysearch.judge import Noise
from raysearch.model import Measurement, Outcome, Profile, Purpose, SessionStarted, Verdict
from raysearch.study import MOVERS, CandidateState, Study, TrialState, screen_id
from raysearch.yields import Author, Comparison, Yield

START_PARTS = ("start", "import", "data", "build", "first_step")
EVALUATION_PARTS = ("eval", "holdout")
PER_DOUBLING_BPB = 0.04  # about, for twice the compute on a GPU (the design's figure, as in the simulator)


class Fate(Enum):
    """Where a candidate stands, in one word."""

    BASELINE = "baseline"  # the profile's first program
    KEEP = "keep"  # on the ratchet
    DISCARD = "discard"
    FAILED = "failed"  # discarded because a run of it gave no number
    CARRIED = "carried"  # replaced by its change on a newer champion
    RETEST = "retest"  # promising, its pairs are to come
    OPEN = "open"  # not judged yet

    @property
    def is_settled(self) -> bool:
        """Whether nothing more is going to happen to the candidate itself."""
        return self not in (Fate.RETEST, Fate.OPEN)


@dataclass(frozen=True)
class Line:
    """A candidate with its own finished runs, oldest first (runs of it as another's reference are not among them).

    Attributes:
        value: Mean of its fresh runs, else its screening run, else None.
        active_at: When it was last heard of, as Unix time.
    """

    state: CandidateState
    fate: Fate
    runs: list[TrialState]
    value: float | None
    active_at: float

    @property
    def outcome(self) -> Outcome | None:
        """Of the last run that failed, else of the last run; None before any has finished."""
        failed = [run.outcome for run in self.runs if run.measurement is None]
        return failed[-1] if failed else self.runs[-1].outcome if self.runs else None


@dataclass(frozen=True)
class Standing:
    """A profile's noise, baseline and champion.

    Attributes:
        runs: Fresh runs behind the champion's value; `baseline_runs` likewise.
        value_se: Standard error of the champion's value.
        delta: Champion minus baseline; None while the baseline is the champion, or unmeasured.
        holdout: Mean of the champion on the second held-out split, where it was measured.
        whole: Likewise on the whole set, where trials are scored on a part of it.
        steps: The ratchet's wins, oldest first.
    """

    profile: Profile
    noise: Noise | None
    baseline: float | None
    baseline_runs: int
    baseline_holdout: float | None
    baseline_whole: float | None
    champion: CandidateState
    commit: str
    value: float | None
    value_se: float | None
    runs: int
    delta: float | None
    delta_se: float | None
    holdout: float | None
    whole: float | None
    steps: list[CandidateState]
    blocked: str


@dataclass
class TimeUse:
    """Where the time of a profile's slots went, in seconds.

    Attributes:
        other_s: In measured trials, but in none of the parts: process end, gaps between parts.
        failed_s: In trials that gave no number.
        running_s: In trials in flight.
        idle_s: On no trial, or in attempts that the infrastructure lost.
        active_s: The profile's time, whatever the number of slots.
        gaps_s: From the end of a trial to the start of the next on the same slot, within a session.
    """

    training_s: float = 0.0
    evaluation_s: float = 0.0
    start_s: float = 0.0
    other_s: float = 0.0
    failed_s: float = 0.0
    running_s: float = 0.0
    idle_s: float = 0.0
    active_s: float = 0.0
    slots: int = 0
    finished: int = 0
    gaps_s: list[float] = field(default_factory=list[float])

    @property
    def slot_s(self) -> float:
        """All of the slots' time."""
        return sum((self.training_s, self.evaluation_s, self.start_s, self.other_s, self.failed_s)) + (
            self.running_s + self.idle_s
        )

    @property
    def trials_per_hour(self) -> float | None:
        """Finished trials per hour of the profile, on all its slots together; None before there is any time."""
        return 3600 * self.finished / self.active_s if self.active_s > 0 else None


@dataclass(frozen=True)
class CardUse:
    """How well a profile's trials used the card, and what that took; None for what they do not tell.

    Attributes:
        trials: Measured trials that these are the medians of.
        mfu_percent: Of the card's peak as the trainer's table has it.
        mfu_measured_percent: Of `matmul_tflops`.
        matmul_tflops: What a matmul reached when the slot was set up.
        energy_kj: Of a trial.
        total_energy_kj: Of all measured trials together: a sum.
        power_w: Mean of a trial's training.
        sm_clock_mhz: While training; `sm_clock_max_mhz` is what the card could do.
        temperature_c: The highest of a trial.
        hottest_c: The highest of all: a maximum.
        power_capped_share: Share of the training for which the power limit held the clock down: normal at full load.
    """

    trials: int
    mfu_percent: float | None
    mfu_measured_percent: float | None
    matmul_tflops: float | None
    energy_kj: float | None
    total_energy_kj: float | None
    power_w: float | None
    sm_clock_mhz: float | None
    sm_clock_max_mhz: float | None
    temperature_c: float | None
    hottest_c: float | None
    power_capped_share: float | None


@dataclass(frozen=True)
class Gains:
    """A win, taken apart: how much of it is speed, how much is learning.

    Attributes:
        speed: Tokens a second over those of the program that it was built on.
        learning: What is left of its delta at equal tokens, in bits per byte: an estimate, by `PER_DOUBLING_BPB`. None
            on a CPU, where a doubling is worth several times as much (docs/LOG.md: 0.3 from 10 to 20 s).
    """

    speed: float
    learning: float | None


@dataclass(frozen=True)
class ProposerTally:
    """What a proposer's ideas cost and gave.

    Attributes:
        parts: The same by model and operator, the busiest first; answers that were no proposal have no operator.
    """

    proposer: str
    total: Yield
    parts: list[tuple[Author, Yield]]


@dataclass(frozen=True)
class ModelTally:
    """A model against those that move knobs, on one profile."""

    profile: str
    author: str
    ours: Yield
    theirs: Yield
    found: Comparison


def finished(study: Study) -> list[TrialState]:
    """Trials that have an outcome, in the order in which they ended."""
    done = [run for run in study.trials.values() if run.outcome is not None]
    return sorted(done, key=lambda run: run.finished_at or 0.0)


def lines(study: Study, done: Iterable[TrialState] | None = None) -> list[Line]:
    """Every candidate, the one that was heard of last at the end.

    Args:
        study: What is told of.
        done: `finished(study)`, if it is at hand.
    """
    runs: dict[str, list[TrialState]] = {}
    heard: dict[str, float] = {}
    for run in finished(study) if done is None else done:
        trial = run.trial
        about = trial.candidate
        heard[about] = run.finished_at or 0.0
        if trial.purpose is not Purpose.REFERENCE:
            runs.setdefault(trial.candidate, []).append(run)
    bases = {lane.base for lane in study.lanes.values()}
    found: list[Line] = []
    for name, state in study.candidates.items():
        own = runs.get(name, [])
        fate = Fate.BASELINE if name in bases else _fate(state, own)
        found.append(Line(state, fate, own, study.value(name), heard.get(name, state.created_at)))
    return sorted(found, key=lambda line: line.active_at)


def _fate(state: CandidateState, own: list[TrialState]) -> Fate:
    if state.ratchet_commit is not None:
        return Fate.KEEP
    if state.carried_by is not None:
        return Fate.CARRIED
    if any(run.measurement is None for run in own):
        return Fate.FAILED
    if state.verdict is Verdict.DISCARD:
        return Fate.DISCARD
    return Fate.RETEST if state.verdict is Verdict.RETEST else Fate.OPEN


def standing(study: Study, slug: str) -> Standing:
    """A profile's noise, baseline and champion as they are now."""
    lane = study.lane(slug)
    noise, first_noise = study.noise(lane), study.noise(lane, lane.base)
    baseline, value = study.value(lane.base), study.value(lane.champion)
    baseline_runs, runs = len(lane.fresh.values(lane.base)), len(lane.fresh.values(lane.champion))
    delta = delta_se = None
    if lane.champion != lane.base and baseline is not None and value is not None:
        delta = value - baseline
        if noise is not None and first_noise is not None and runs and baseline_runs:
            delta_se = math.sqrt(noise.sigma**2 / runs + first_noise.sigma**2 / baseline_runs)
    of_base, of_champion = _reported(study, lane.base), _reported(study, lane.champion)
    return Standing(
        profile=lane.profile,
        noise=noise,
        baseline=baseline,
        baseline_runs=baseline_runs,
        baseline_holdout=of_base[0],
        baseline_whole=of_base[1],
        champion=study.candidate(lane.champion),
        commit=lane.champion_commit,
        value=value,
        value_se=noise.sigma / math.sqrt(runs) if noise is not None and runs else None,
        runs=runs,
        delta=delta,
        delta_se=delta_se,
        holdout=of_champion[0],
        whole=of_champion[1],
        steps=[study.candidate(win.candidate) for win in lane.wins],
        blocked=lane.blocked,
    )


def _reported(study: Study, candidate: str) -> tuple[float | None, float | None]:
    """Means of a candidate on the second held-out split and on the whole set, over the runs that measured them."""
    runs = [run.measurement for run in study.trials.values() if run.trial.candidate == candidate and run.measurement]
    holdouts = [run.holdout for run in runs if run.holdout is not None]
    wholes = [run.whole for run in runs if run.whole is not None]
    return fmean(holdouts) if holdouts else None, fmean(wholes) if wholes else None


def sessions(study: Study) -> list[tuple[float, float]]:
    """Start and end of each session in Unix time; one that was killed ends with the last that is known of it."""
    starts = [(place, r.at) for place, r in enumerate(study.sessions) if isinstance(r.event, SessionStarted)]
    spans: list[tuple[float, float]] = []
    for place, start in starts:
        following = study.sessions[place + 1] if place + 1 < len(study.sessions) else None
        if following is None:
            end = study.last_at
        elif isinstance(following.event, SessionStarted):
            times = [t for run in study.trials.values() for t in (run.started_at, run.finished_at) if t is not None]
            end = max((t for t in times if start <= t < following.at), default=start)
        else:
            end = following.at
        spans.append((start, end))
    return spans


def time_use(study: Study, slug: str) -> TimeUse:
    """Adds up where the time of a profile's slots went; a slot counts from its first trial in a session on."""
    use = TimeUse()
    by_slot: dict[str, list[TrialState]] = {}
    for run in sorted(study.trials.values(), key=lambda run: run.started_at):
        if run.trial.profile == slug:
            by_slot.setdefault(run.slot, []).append(run)
    use.slots = len(by_slot)
    use.finished = sum(run.outcome is not None for runs in by_slot.values() for run in runs)
    for start, end in sessions(study):
        first_start = end
        for runs in by_slot.values():
            here = [run for run in runs if start <= run.started_at <= end]
            if here:
                _add_slot(use, here, end)
                first_start = min(first_start, here[0].started_at)
        use.active_s += end - first_start
    return use


def _add_slot(use: TimeUse, runs: list[TrialState], end: float) -> None:
    """Adds one slot's trials of one session, which are in order of their start."""
    busy_s = 0.0
    previous_end: float | None = None
    for run in runs:
        if previous_end is not None:
            use.gaps_s.append(max(0.0, run.started_at - previous_end))
        previous_end = run.finished_at
        if run.running:
            use.running_s += end - run.started_at
            busy_s += end - run.started_at
        elif run.finished_at is not None and run.outcome is not None:
            seconds = run.finished_at - run.started_at
            busy_s += seconds
            _add_trial(use, run, seconds)
    use.idle_s += max(0.0, end - runs[0].started_at - busy_s)


def _add_trial(use: TimeUse, run: TrialState, seconds: float) -> None:
    measured = run.measurement
    if measured is None:
        use.failed_s += seconds
        return
    evaluation_s = sum(measured.parts_s.get(part, 0.0) for part in EVALUATION_PARTS)
    start_s = sum(measured.parts_s.get(part, 0.0) for part in START_PARTS)
    use.training_s += measured.training_s
    use.evaluation_s += evaluation_s
    use.start_s += start_s
    use.other_s += max(0.0, seconds - measured.training_s - evaluation_s - start_s)


def card_use(study: Study, slug: str) -> CardUse | None:
    """How the measured trials of a profile used its cards; None if none of them tells anything of that."""
    facts = [
        run.measurement.facts
        for run in study.trials.values()
        if run.trial.profile == slug and run.measurement is not None
    ]

    def of(name: str) -> list[float]:
        return [one[name] for one in facts if name in one]

    def middle(name: str) -> float | None:
        return median(of(name)) if of(name) else None

    energies, heats = of("energy_j"), of("temperature_c")
    found = CardUse(
        trials=len(facts),
        mfu_percent=middle("mfu_percent"),
        mfu_measured_percent=middle("mfu_measured_percent"),
        matmul_tflops=middle("matmul_tflops"),
        energy_kj=median(energies) / 1000 if energies else None,
        total_energy_kj=sum(energies) / 1000 if energies else None,
        power_w=middle("power_w"),
        sm_clock_mhz=middle("sm_clock_mhz"),
        sm_clock_max_mhz=middle("sm_clock_max_mhz"),
        temperature_c=middle("temperature_c"),
        hottest_c=max(heats, default=None),
        power_capped_share=middle("power_capped_share"),
    )
    return (
        found
        if any(v is not None for v in (found.mfu_percent, found.mfu_measured_percent, *energies, *heats))
        else None
    )


def gains(study: Study, state: CandidateState) -> Gains | None:
    """Speed and learning of a win in bits per byte; None unless both sides' runs tell their tokens.

    Both sides are the runs of its pairs, which its delta is from; without any (a greedy judge) all that there are.
    """
    pairs = [(study.trials[name], study.trials.get(study.trials[name].trial.rival or "")) for name in state.races]
    ours = [run.measurement for run, rival in pairs if rival is not None and rival.measurement is not None]
    theirs = [rival.measurement for run, rival in pairs if rival is not None and run.measurement is not None]
    if not pairs:
        ours, theirs = _runs_of(study, state.id), _runs_of(study, state.base)
    speed, tokens = _ratio(ours, theirs, SPEED), _ratio(ours, theirs, "total_tokens")
    if state.delta is None or speed is None or tokens is None:
        return None
    on_gpu = study.lane(state.candidate.profile).profile.device == "cuda"
    return Gains(speed, state.delta + PER_DOUBLING_BPB * math.log2(tokens) if on_gpu else None)


def _runs_of(study: Study, candidate: str) -> list[Measurement | None]:
    lane = study.lane(study.candidate(candidate).candidate.profile)
    names = (screen_id(candidate), *lane.fresh_runs.get(candidate, ()))
    return [study.trials[name].measurement for name in names if name in study.trials]


def _ratio(ours: Iterable[Measurement | None], theirs: Iterable[Measurement | None], fact: str) -> float | None:
    """Geometric mean of a fact of some runs over that of others; None where either side does not have it."""
    sides = [
        [math.log(run.facts[fact]) for run in side if run and run.facts.get(fact, 0.0) > 0] for side in (ours, theirs)
    ]
    return math.exp(fmean(sides[0]) - fmean(sides[1])) if all(sides) else None


def refusals(study: Study) -> list[tuple[str, int]]:
    """Reasons for which proposals were refused, the most frequent first."""
    return Counter(reason for _, reason in study.refused).most_common()


def proposers(study: Study) -> list[ProposerTally]:
    """What each proposer's ideas cost and gave, over all profiles, the busiest first."""
    parts: dict[str, dict[Author, list[Yield]]] = {}
    for lane in study.lanes.values():
        for author, found in lane.yields.items():
            parts.setdefault(author.proposer, {}).setdefault(author, []).append(found)
    tallies: list[ProposerTally] = []
    for proposer, by_author in parts.items():
        summed = [(author, yields.total(some)) for author, some in by_author.items()]
        summed.sort(key=lambda part: (_busy(part[1]), part[0].name, part[0].operator.value if part[0].operator else ""))
        tallies.append(ProposerTally(proposer, yields.total(one for _, one in summed), summed))
    return sorted(tallies, key=lambda one: (_busy(one.total), one.proposer))


def _busy(one: Yield) -> int:
    return -(one.proposals + one.dropped)


def models(study: Study) -> list[ModelTally]:
    """How each model's ideas do against those that move knobs and cost nothing, by profile; without these, nothing.

    Gains on two profiles are no equal goods, and a profile's first hours give more than its last: what is compared is
    of one profile, and of the same days.
    """
    found: list[ModelTally] = []
    for slug, lane in study.lanes.items():
        by_name: dict[str, list[Yield]] = {}
        for author, one in lane.yields.items():
            if author.model or author.proposer in MOVERS:
                by_name.setdefault(author.name, []).append(one)
        theirs = yields.total(one for name in MOVERS for one in by_name.pop(name, ()))
        if theirs.proposals:
            for name, some in sorted(by_name.items()):
                ours = yields.total(some)
                found.append(ModelTally(slug, name, ours, theirs, yields.compare(ours, theirs)))
    return found


def chain(study: Study, state: CandidateState) -> Iterator[CandidateState]:
    """A candidate, the one that carries its change onto a newer champion, the one that carries that, and so on."""
    yield state
    while (follower := study.candidates.get(state.carried_by or "")) is not None:
        state = follower
        yield state


def tried(study: Study) -> int:
    """Candidates whose first run has ended, which is what a limit on trials counts."""
    return sum(run.trial.purpose is Purpose.SCREEN and run.outcome is not None for run in study.trials.values())
