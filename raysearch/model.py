"""Frozen facts of a study and the events that carry them, in the words of the design.

It decides nothing and reads nothing: decisions are in `study`, `schedule` and `judge`, effects in the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Operator(Enum):
    """What kind of change a proposal makes."""

    DRAFT = "draft"
    TUNE = "tune"
    ABLATE = "ablate"
    SIMPLIFY = "simplify"
    COMBINE = "combine"
    TRANSFER = "transfer"
    REPLICATE = "replicate"
    DEBUG = "debug"


class Outcome(Enum):
    """What happened to a trial."""

    MEASURED = "measured"
    CRASHED = "crashed"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    FUTILE = "futile"
    INVALID = "invalid"
    LOST = "lost"
    CANCELLED = "cancelled"

    @property
    def is_infrastructure(self) -> bool:
        """True when the machine failed and not the candidate: the trial is run again."""
        return self in (Outcome.LOST, Outcome.CANCELLED)


class Verdict(Enum):
    """What the judge makes of a candidate."""

    KEEP = "keep"
    DISCARD = "discard"
    RETEST = "retest"


class Purpose(Enum):
    """Why a trial is run."""

    BASELINE = "baseline"  # the profile's first program, for its noise
    SCREEN = "screen"  # the candidate's first run
    RACE = "race"  # the candidate's side of a pair
    REFERENCE = "reference"  # the other side: the program that candidates are built on, once for all that race then


class Direction(Enum):
    """Which way the metric gets better."""

    MINIMIZE = "minimize"
    MAXIMIZE = "maximize"


@dataclass(frozen=True, slots=True)
class Profile:
    """What makes two scores comparable; two profiles never share a champion.

    Attributes:
        slug: Names the ratchet's branch, e.g. `rtx3060-12gb`.
        device: `cuda` or `cpu`.
        hardware: GPU model or CPU model.
        memory_mb: GPU memory, 0 on a CPU.
        cores: CPU cores of the machine, 0 on a GPU.
        software: Versions that change numbers (torch, driver, capability), by name.
        preset: The preset that the ratchet starts from; empty for objectives without presets.
        budget: Seconds or tokens, as text with its unit (`20 s`, `200000 tokens`).
        data: Dataset, packing and hash of the data's manifest; empty where the objective has no data.
        evaluation: Version of the evaluation and its size.
        threads: CPU threads of one trial, 0 on a GPU.
    """

    slug: str
    device: str
    hardware: str
    memory_mb: int
    cores: int
    software: dict[str, str]
    preset: str
    budget: str
    data: str
    evaluation: str
    threads: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """An idea: a patch on a commit, with who had it and why.

    Attributes:
        id: Of the proposal, and of the candidate that it becomes.
        profile: Slug of the profile that it is for.
        base: Commit that the patch applies to.
        patch: Unified diff against `base`.
        predicted_delta: Expected change of the metric, if the proposer said one.
        carries: Candidates whose changes this one carries onto a newer champion; several are a union of wins.
        proposal_s: Seconds that the proposer took.
        model: Language model or coding agent that had the idea; empty for proposers that compute theirs.
        tokens_in, tokens_out: Of that model, what it read and wrote for this idea.
        source: What the proposer made it from (a step of another ratchet, a hunk), so that it is not made twice.
    """

    id: str
    profile: str
    base: str
    patch: str
    operator: Operator
    hypothesis: str
    proposer: str
    predicted_delta: float | None = None
    carries: tuple[str, ...] = ()
    cost_usd: float = 0.0
    proposal_s: float = 0.0
    source: str = ""
    model: str = ""
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A proposal as a git commit.

    Attributes:
        fingerprint: Hash of the program without comments and layout: equal programs have equal fingerprints.
        size: Of the program, as `knobs.size` counts it; 0 when it is not known.
    """

    proposal: Proposal
    commit: str
    fingerprint: str
    size: int = 0

    @property
    def id(self) -> str:
        """The proposal's id."""
        return self.proposal.id

    @property
    def profile(self) -> str:
        """Slug of the profile that the candidate competes on."""
        return self.proposal.profile


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of one candidate on one profile with one seed.

    Attributes:
        id: Unique and derived from what is run, so that asking for the same run twice is the same trial.
        rival: For the candidate's side of a pair: the trial of the other side, with the same seed.
        pair: For a pair: its number, from 1.
        holdout: Whether the second held-out split is measured as well, and the whole set where trials are scored on a
            part of it (both reported, never used to decide).
        futile_above: For a metric that is minimised: at half of the budget the trial ends as futile if the metric on
            a small slice is above this. None: it always runs to its end. (Maximised: below.)
    """

    id: str
    candidate: str
    profile: str
    commit: str
    purpose: Purpose
    seed: int
    rival: str | None = None
    pair: int = 0
    holdout: bool = False
    futile_above: float | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a measured trial gave.

    Attributes:
        value: The objective's metric (val_bpb for the bundled trainer).
        holdout: The metric on the second held-out split, where it was asked for.
        whole: The metric on the whole set, where that was asked for and is more than what every trial is scored on.
        training_s: Seconds that counted against the budget.
        wall_s: Seconds from outside: supervisor's start of the process to its end.
        peak_vram_mb: Memory held on the GPU, as the driver or the allocator's reservation has it; 0 on a CPU.
        parts_s: Seconds by part (start, import, data, build, first_step, train, eval, …).
        facts: Other numbers that the program reported (num_steps, mfu_percent, …).
    """

    value: float
    wall_s: float
    holdout: float | None = None
    training_s: float = 0.0
    peak_vram_mb: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict[str, float])
    facts: dict[str, float] = field(default_factory=dict[str, float])
    whole: float | None = None


# ---- events: what the journal holds; the state of a study is what they add up to ----


@dataclass(frozen=True, slots=True)
class SessionStarted:
    """A coordinator took the study over: whatever was in flight before is lost."""

    host: str
    pid: int
    version: str


@dataclass(frozen=True, slots=True)
class SessionEnded:
    """A coordinator stopped of its own accord."""

    reason: str


@dataclass(frozen=True, slots=True)
class ProfileAdded:
    """A kind of slot appeared for the first time; its ratchet starts at `commit`."""

    profile: Profile
    commit: str
    fingerprint: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Proposed:
    """A proposer had an idea; it is not yet a commit."""

    proposal: Proposal


@dataclass(frozen=True, slots=True)
class Dropped:
    """An answer of a proposer that is no proposal: it does not parse or apply, or never came. It cost all the same.

    Attributes:
        profile: Slug of the profile that it was asked for.
        model, cost_usd, tokens_in, tokens_out, proposal_s: See `Proposal`.
    """

    profile: str
    proposer: str
    reason: str
    model: str = ""
    cost_usd: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0
    proposal_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Directed:
    """The human's directions, as they are from now on.

    Attributes:
        file: Name of the file in the study's folder: `program.md` is for all profiles, `program-h100.md` for those
            whose preset is h100.
        text: All of it.
    """

    file: str
    text: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A proposal that never became a candidate: it does not apply, is a duplicate, touches what it may not."""

    proposal_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Materialised:
    """A proposal became a commit under `refs/trials/`."""

    proposal_id: str
    commit: str
    fingerprint: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class TrialStarted:
    """The intent to run, written before the run: without a `TrialFinished` the attempt was lost."""

    trial: Trial
    attempt: int
    slot: str


@dataclass(frozen=True, slots=True)
class TrialFinished:
    """How an attempt ended.

    Attributes:
        reason: One line for anything but `measured`.
        log_tail: The last lines of the output when it failed.
        halfway: The metric on a small slice of the evaluation at half of the budget, where that was measured.
    """

    trial_id: str
    attempt: int
    outcome: Outcome
    reason: str = ""
    measurement: Measurement | None = None
    log_tail: str = ""
    halfway: float | None = None


@dataclass(frozen=True, slots=True)
class Learned:
    """What a decided candidate says of changes in general, so that a replay need not weigh its runs again.

    Attributes:
        sigma: Run-to-run noise of what it was built on, in units of the metric.
        effects: Measured improvement, its standard error, both in units of the metric, and the degrees of freedom of
            that: by its first run, and by its race if it had one.
    """

    sigma: float
    effects: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Judged:
    """The judge spoke on a candidate.

    Attributes:
        delta: Estimated change of the metric against the program that it was built on (negative: lower).
        delta_se: Standard error of `delta`.
        pairs: Number of fresh pairs behind `delta`; 0 when it is the screening run's.
        p_better: Posterior probability that the change is an improvement.
        gain: What the change is worth after all that is known, in units of the metric with positive better.
        conflict: Whether its change cannot be merged onto the champion: a proposer may find another way.
        learned: None where nothing is learned, where a race failed, and in older journals: then it is worked out.
    """

    candidate: str
    verdict: Verdict
    reason: str
    delta: float | None = None
    delta_se: float | None = None
    pairs: int = 0
    p_better: float | None = None
    gain: float | None = None
    conflict: bool = False
    learned: Learned | None = None


@dataclass(frozen=True, slots=True)
class RatchetMoved:
    """A profile's branch moved from `previous` to `commit`, whose tree is the candidate's."""

    profile: str
    candidate: str
    commit: str
    previous: str


@dataclass(frozen=True, slots=True)
class SlotSetAside:
    """A slot drifts or is throttled: it gets no more trials, and those that still matter are run again elsewhere.

    Attributes:
        repeat: Trials whose results are no longer believed.
    """

    slot: str
    profile: str
    reason: str
    repeat: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SlotRestored:
    """A slot that was set aside gets trials again."""

    slot: str
    profile: str


@dataclass(frozen=True, slots=True)
class SlotGauged:
    """A slot joined, and its device was measured: a yardstick for others of its profile, now and in later sessions.

    Attributes:
        matmul_tflops: Dense matmul, 10^12 operations a second.
        copy_gb_per_s: Copy in its memory, 10^9 bytes a second, read and written.
    """

    slot: str
    profile: str
    matmul_tflops: float
    copy_gb_per_s: float


Event = (
    SessionStarted
    | SessionEnded
    | ProfileAdded
    | Proposed
    | Dropped
    | Directed
    | Refused
    | Materialised
    | TrialStarted
    | TrialFinished
    | Judged
    | RatchetMoved
    | SlotSetAside
    | SlotRestored
    | SlotGauged
)


@dataclass(frozen=True, slots=True)
class Record:
    """An event with its place and time in the journal.

    Attributes:
        seq: From 1, without gaps.
        at: Unix time in seconds.
    """

    seq: int
    at: float
    event: Event
