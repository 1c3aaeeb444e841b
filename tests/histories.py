"""Histories of studies for tests: the real `Study` and judge on a virtual clock, with trials that only have numbers.

No process, no git and no Ray runs here; commits are hashes of names.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from raysearch import plan
from raysearch.model import (
    Event,
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
)
from raysearch.schedule import Slot
from raysearch.study import Settings, Study, candidate_id

START = 1_767_225_600.0  # Unix time of the first event


@dataclass(frozen=True)
class Idea:
    """What a proposer of a history says, and what is true of it.

    Attributes:
        effect: Change of the metric that the idea really makes.
        outcome: Of its first run.
        refused: Why it never becomes a candidate.
    """

    hypothesis: str
    effect: float = 0.0
    outcome: Outcome = Outcome.MEASURED
    reason: str = ""
    log_tail: str = ""
    refused: str = ""
    proposer: str = "tune"
    operator: Operator = Operator.TUNE


@dataclass(frozen=True)
class Hardware:
    """A profile of a history: its numbers and its slots."""

    profile: Profile
    value: float
    sigma: float
    wall_s: float
    training_s: float
    slots: tuple[str, ...]
    vram_mb: float = 0.0


def cpu_profile(slug: str = "cpu") -> Profile:
    return Profile(
        slug=slug,
        device="cpu",
        hardware="AMD EPYC 7B13",
        memory_mb=0,
        cores=2,
        software={"torch": "2.13.0", "python": "3.11"},
        preset="cpu",
        budget="20 s",
        data="sotu-v1024-t256 (3f2a91c04d)",
        evaluation="1-65536",
        threads=1,
    )


def gpu_profile(slug: str = "rtx3060-12gb") -> Profile:
    return Profile(
        slug=slug,
        device="cuda",
        hardware="NVIDIA GeForce RTX 3060",
        memory_mb=12288,
        cores=0,
        software={"torch": "2.13.0", "driver": "580.65", "capability": "8.6"},
        preset="rtx3060",
        budget="60 s",
        data="climbmix-v8192-t2048 (90aa17be22)",
        evaluation="1-1048576-4194304",
        threads=0,
    )


CPU = Hardware(cpu_profile(), value=3.03, sigma=0.02, wall_s=26.0, training_s=20.0, slots=("cpu-0", "cpu-1"))
GPU = Hardware(
    gpu_profile(), value=1.1712, sigma=0.0008, wall_s=84.0, training_s=60.0, slots=("gpu-0",), vram_mb=9830.0
)

CPU_IDEAS = (
    Idea("MATRIX_LR 0.005 → 0.02: the learning rate of the matrices looks timid", -0.31),
    Idea("WINDOW_PATTERN 'L' → 'S'", 0.09),
    Idea("MATRIX_LR 0.005 → 0.02", refused="the same program as c0001"),
    Idea("SEQ_LEN 256 → 128: more rows a step", -0.11),
    Idea("WARMDOWN_RATIO 0.0 → 0.5: cool down over half of the budget", -0.17),
    Idea(
        "DEPTH 4 → 24",
        outcome=Outcome.OUT_OF_MEMORY,
        reason="out of memory while building the model",
        log_tail="building 24 layers\nRuntimeError: could not allocate 268435456 bytes",
    ),
    Idea("SCALAR_LR 0.1 → 0.102", -0.002),
    Idea("DEPTH 4 → 2: twice the steps", -0.14, proposer="inbox", operator=Operator.DRAFT),
    Idea(
        "a new activation",
        outcome=Outcome.CRASHED,
        reason="exit code 1",
        log_tail="Traceback (most recent call last):\n  train.py, line 88\nNameError: name 'gelu2' is not defined\n",
        proposer="inbox",
        operator=Operator.DRAFT,
    ),
    Idea("EMBEDDING_LR 0.05 → 0.3", -0.05),
    Idea("MODEL_DIM 128 → 160", 0.06),
    Idea("MATRIX_LR 0.02 → 0.2", outcome=Outcome.INVALID, reason="the loss is not finite at step 41"),
)
GPU_IDEAS = (
    Idea("TOTAL_BATCH_SIZE 2**17 → 2**16: more steps in the budget", -0.011),
    Idea("UNEMBEDDING_LR 0.004 → 0.008", 0.0008),
    Idea("DEPTH 8 → 6", -0.004),
    Idea("EMBEDDING_LR 0.6 → 0.8", -0.0005),
)


@dataclass
class History:
    """Applies events to a study one after the other.

    Attributes:
        at: The virtual time, in Unix seconds.
        listener: Called with each record after it was applied.
    """

    settings: Settings = field(default_factory=Settings)
    at: float = START
    listener: Callable[[Record], None] | None = None
    records: list[Record] = field(default_factory=list[Record])

    def __post_init__(self) -> None:
        self.study = Study(self.settings)

    def add(self, event: Event, after_s: float = 0.0) -> None:
        """Applies an event `after_s` later than the one before."""
        self.at += after_s
        record = Record(self.study.seq + 1, self.at, event)
        self.study.apply(record)
        self.records.append(record)
        if self.listener is not None:
            self.listener(record)

    def start(self, *hardware: Hardware) -> None:
        """A session begins, with these profiles where they are new."""
        self.add(SessionStarted(host="workstation", pid=4711, version="0.1.0"))
        for one in hardware:
            if one.profile.slug not in self.study.lanes:
                self.add(ProfileAdded(one.profile, commit_of(one.profile.slug), f"{one.profile.slug}-program"), 0.5)


def commit_of(name: str) -> str:
    """40 hexadecimal digits for a name."""
    return hashlib.sha1(name.encode()).hexdigest()


class Simulation:
    """A coordinator on a virtual clock: performs what the study asks for, with numbers drawn around the truth."""

    def __init__(
        self, history: History, ideas: Mapping[str, Iterable[Idea]], *hardware: Hardware, seed: int = 1
    ) -> None:
        self.history = history
        self.hardware = {one.profile.slug: one for one in hardware}
        self.slots = [Slot(slot, slug) for slug, one in self.hardware.items() for slot in one.slots]
        self.ideas: dict[str, Iterator[Idea]] = {slug: iter(some) for slug, some in ideas.items()}
        self.random = random.Random(seed)
        self.idea_of: dict[str, Idea] = {}
        self.truth: dict[str, float] = {slug: one.value for slug, one in self.hardware.items()}
        self.ends: dict[str, float] = {}

    def run(self, until_s: float = float("inf"), *, drain_after_s: float = float("inf")) -> bool:
        """Goes on until `until_s` seconds after the start of the history, or the end.

        Returns:
            Whether it came to its end; otherwise trials may be in flight.
        """
        while True:
            draining = self.history.at - START >= drain_after_s
            commands = plan.next_commands(self.history.study, self.slots, asking={}, draining=draining)
            if any(isinstance(command, plan.Finish) for command in commands):
                return True
            before = self.history.study.seq
            for command in commands:
                self._perform(command)
            if self.history.study.seq != before:
                continue
            if not self.ends:
                return True
            trial_id, end = min(self.ends.items(), key=lambda item: item[1])
            if end - START > until_s:
                self.history.at = START + until_s
                return False
            self.history.at = max(self.history.at, end)
            self._end(trial_id)

    def kill(self, away_s: float) -> None:
        """The coordinator dies with its trials; another session takes over `away_s` later."""
        self.ends.clear()
        self.history.at += away_s
        self.history.start(*self.hardware.values())

    def _perform(self, command: plan.Command) -> None:
        match command:
            case plan.Ask(slug, _, count, base):
                for _ in range(count):
                    self._propose(slug, base)
            case plan.Materialise(proposal):
                self._materialise(proposal)
            case plan.Conclude(event):
                self.history.add(event, 0.01)
            case plan.MoveRatchet(slug, candidate, expected):
                self.history.add(RatchetMoved(slug, candidate.id, candidate.commit, expected), 0.01)
            case plan.Carry(candidates, onto):
                self._carry([candidate.proposal for candidate in candidates], onto)
            case plan.StartTrial(trial, attempt, slot):
                self.history.add(TrialStarted(trial, attempt, slot), 0.02)
                self.ends[trial.id] = self.history.at + self._seconds(trial)
            case plan.Finish():
                pass

    def _propose(self, slug: str, base: str) -> None:
        idea = next(self.ideas.get(slug, iter(())), None)
        if idea is None:
            return
        name = candidate_id(self.history.study.proposals + 1)
        self.idea_of[name] = idea
        proposal = Proposal(name, slug, base, "", idea.operator, idea.hypothesis, idea.proposer)
        self.history.add(Proposed(proposal), 0.05)

    def _carry(self, proposals: Sequence[Proposal], onto: str) -> None:
        name = candidate_id(self.history.study.proposals + 1)
        first = proposals[0]
        self.idea_of[name] = replace(
            self.idea_of[first.id], effect=sum(self.idea_of[proposal.id].effect for proposal in proposals)
        )
        carried = Proposal(
            name,
            first.profile,
            onto,
            "",
            Operator.COMBINE,
            " + ".join(proposal.hypothesis for proposal in proposals),
            first.proposer,
            carries=tuple(proposal.id for proposal in proposals),
        )
        self.history.add(Proposed(carried), 0.01)

    def _materialise(self, proposal: Proposal) -> None:
        idea = self.idea_of[proposal.id]
        if idea.refused:
            self.history.add(Refused(proposal.id, idea.refused), 0.01)
            return
        commit = commit_of(f"{proposal.profile} {proposal.id}")
        base = self.truth.get(proposal.base, self.truth[proposal.profile])
        self.truth[commit] = base + idea.effect
        self.history.add(Materialised(proposal.id, commit, f"{proposal.id}-program"), 0.02)

    def _failure(self, trial: Trial) -> Idea | None:
        idea = self.idea_of.get(trial.candidate)
        return idea if idea and idea.outcome is not Outcome.MEASURED and trial.purpose is Purpose.SCREEN else None

    def _seconds(self, trial: Trial) -> float:
        wall_s = self.hardware[trial.profile].wall_s
        return wall_s * (0.2 if self._failure(trial) else self.random.uniform(0.98, 1.03))

    def _end(self, trial_id: str) -> None:
        del self.ends[trial_id]
        state = self.history.study.running[trial_id]
        idea = self._failure(state.trial)
        if idea is not None:
            event = TrialFinished(trial_id, state.attempt, idea.outcome, idea.reason, log_tail=idea.log_tail)
        else:
            event = TrialFinished(
                trial_id, state.attempt, Outcome.MEASURED, measurement=self._measurement(state.trial, state.started_at)
            )
        self.history.add(event, 0.01)

    def _measurement(self, trial: Trial, started_at: float) -> Measurement:
        one = self.hardware[trial.profile]
        truth = self.truth.get(trial.commit, one.value)
        rest_s = self.history.at - started_at - one.training_s
        return Measurement(
            value=self.random.gauss(truth, one.sigma),
            wall_s=self.history.at - started_at,
            holdout=self.random.gauss(truth + 0.01, one.sigma) if trial.holdout else None,
            whole=truth + 0.005 if trial.holdout and trial.profile == GPU.profile.slug else None,
            training_s=one.training_s,
            peak_vram_mb=one.vram_mb,
            parts_s={
                "start": 0.1 * rest_s,
                "import": 0.2 * rest_s,
                "data": 0.02 * rest_s,
                "build": 0.03 * rest_s,
                "first_step": 0.15 * rest_s,
                "train": one.training_s,
                "eval": 0.45 * rest_s,
            },
            facts={"num_steps": 412.0, "total_tokens": 843776.0, "num_params": 1052672.0, "mfu_percent": 31.2},
        )


def realistic(
    listener: Callable[[Record], None] | None = None, *, until_s: float = 700.0, settings: Settings | None = None
) -> History:
    """Two profiles with baselines, wins, discards, crashes, out of memory, a retest, a carried candidate, a refusal.

    With `until_s=700`, trials are in flight on both and a candidate waits for its second run.
    """
    history = History(settings or Settings(max_trials=200, noise_share=0.02), listener=listener)
    history.start(CPU, GPU)
    ideas = {
        CPU.profile.slug: [*CPU_IDEAS, *small_ideas(200, seed=5)],
        GPU.profile.slug: [*GPU_IDEAS, *small_ideas(50, seed=6, scale=0.001)],
    }
    Simulation(history, ideas, CPU, GPU).run(until_s)
    return history


def small_ideas(count: int, seed: int = 1, *, scale: float = 0.02) -> list[Idea]:
    """Ideas of which few help, a little, and some fail."""
    draw = random.Random(seed)
    knobs = ("MATRIX_LR", "EMBEDDING_LR", "WARMDOWN_RATIO", "TOTAL_BATCH_SIZE", "WEIGHT_DECAY", "SCALAR_LR", "HEAD_DIM")
    ideas: list[Idea] = []
    for _ in range(count):
        old = draw.uniform(0.001, 1.0)
        text = f"{draw.choice(knobs)} {old:.3g} → {old * draw.uniform(0.5, 2):.3g}"
        if draw.random() < 0.06:
            ideas.append(Idea(text, outcome=Outcome.CRASHED, reason="exit code 1", log_tail="ValueError: bad shape"))
        else:
            ideas.append(Idea(text, draw.gauss(scale, scale)))
    return ideas


def long_history(trials: int) -> History:
    """One profile with about `trials` finished trials, to its end."""
    history = History(Settings(max_trials=int(trials * 0.85)))
    history.start(CPU)
    Simulation(history, {CPU.profile.slug: small_ideas(trials, scale=0.03)}, CPU).run()
    history.add(SessionEnded("all trials are done"))
    return history
