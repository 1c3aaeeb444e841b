"""How the search core grows with a study: time of a decision and of a brief, replay, memory. It trains nothing.

`python benchmarks/scale.py` drives the real state, plan and judge with invented results, on many slots and a virtual
clock, and replays the journal that comes of it.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from raysearch import plan
from raysearch.brief import brief
from raysearch.config import StudyConfig
from raysearch.folder import replay as replay_study
from raysearch.journal import Journal
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
    SessionStarted,
    Trial,
    TrialFinished,
    TrialStarted,
)
from raysearch.schedule import Slot
from raysearch.study import Settings, Study, candidate_id

SIGMA = 0.001
TRIAL_S = 350.0
PARTS = {"start": 0.1, "import": 4.0, "data": 0.2, "build": 2.0, "first_step": 20.0, "train": 300.0, "eval": 20.0}
FACTS = {"num_steps": 900.0, "total_tokens": 4.7e8, "tokens_per_s": 1.5e6, "mfu_percent": 36.3, "num_params": 5e7}
SLUG = "card"


@dataclass
class World:
    """A coordinator without effects: performs what the plan says, with results drawn around known effects.

    Attributes:
        decisions_ms: Time of each call of the plan.
    """

    slots: int
    journal: Journal
    seed: int = 0
    study: Study = field(default_factory=lambda: Study(Settings()))
    at: float = 1.8e9
    decisions_ms: list[float] = field(default_factory=list[float])

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        self.truth: dict[str, float] = {"base": 1.0}
        self.ends: list[tuple[float, str]] = []
        self.places = [Slot(f"gpu{number}", SLUG) for number in range(self.slots)]
        software = {"torch": "2.13.0", "driver": "580.1"}
        profile = Profile(SLUG, "cuda", "a card", 81559, 0, software, "h100", "300 s", "corpus", "1-20971520", 0)
        self.add(SessionStarted("host", 1, "0"))
        self.add(ProfileAdded(profile, "base", "base program"))

    def add(self, event: Event) -> None:
        """Journals and applies an event."""
        self.study.apply(self.journal.append(event, seq=self.study.seq + 1, at=self.at))

    def run(self, trials: int) -> None:
        """Goes on until so many trials have ended."""
        while self.study.finished < trials:
            started = time.perf_counter()
            commands = plan.next_commands(self.study, self.places, asking={})
            self.decisions_ms.append(1000 * (time.perf_counter() - started))
            for command in commands:
                self.perform(command)
            if not commands or all(isinstance(command, plan.StartTrial) for command in commands):
                self.end()

    def perform(self, command: plan.Command) -> None:
        """Does what it says, at once."""
        match command:
            case plan.Ask(count=count, base=base):
                for _ in range(count):
                    self.propose(base, (), "tune")
            case plan.Carry(candidates=candidates, onto=onto):
                self.propose(onto, tuple(candidate.id for candidate in candidates), "tune")
            case plan.Materialise(proposal=proposal):
                self.materialise(proposal)
            case plan.Conclude(event=event):
                self.add(event)
            case plan.MoveRatchet(profile=slug, candidate=candidate, expected=expected):
                commit = hashlib.sha1(f"step {candidate.id}".encode()).hexdigest()
                self.truth[commit] = self.truth[candidate.commit]
                self.add(RatchetMoved(slug, candidate.id, commit, expected))
            case plan.StartTrial(trial=trial, attempt=attempt, slot=slot):
                self.add(TrialStarted(trial, attempt, slot))
                heapq.heappush(self.ends, (self.at + TRIAL_S * self.chance.uniform(0.97, 1.05), trial.id))
            case plan.Finish(reason=reason):
                raise SystemExit(f"the study ended: {reason}")

    def propose(self, base: str, carries: tuple[str, ...], proposer: str) -> None:
        """A proposal of a size that a change of two knobs has."""
        name = candidate_id(self.study.proposals + 1)
        patch = (
            f"--- a/train.py\n+++ b/train.py\n@@ -14,7 +14,7 @@\n-LR = 0.04\n+LR = {self.chance.random()}\n"
            + 6 * " x\n"
        )
        idea = f"MATRIX_LR 0.04 → {self.chance.random():.4f}"
        self.add(Proposed(Proposal(name, SLUG, base, patch, Operator.TUNE, idea, proposer, carries=carries)))

    def materialise(self, proposal: Proposal) -> None:
        """A commit with an effect: few are better, the fewer the longer it goes on."""
        commit = hashlib.sha1(proposal.id.encode()).hexdigest()
        rate = 0.2 / (1 + self.study.finished / 3000)
        better = self.chance.random() < rate
        effect = -self.chance.expovariate(1 / (2 * SIGMA)) if better else self.chance.expovariate(1 / (8 * SIGMA))
        if proposal.carries:
            carried = [self.study.candidate(name).candidate for name in proposal.carries]
            effect = sum(self.truth[one.commit] - self.truth[one.proposal.base] for one in carried)
        self.truth[commit] = self.truth[proposal.base] + effect
        self.add(Materialised(proposal.id, commit, f"{proposal.id} program", 21000))

    def end(self) -> None:
        """The next trial ends."""
        self.at, name = heapq.heappop(self.ends)
        state = self.study.running[name]
        trial: Trial = state.trial
        if trial.purpose is Purpose.SCREEN and self.chance.random() < 0.03:
            self.add(TrialFinished(name, state.attempt, Outcome.CRASHED, "exit code 1", log_tail="ValueError: shape"))
            return
        value = self.truth[trial.commit] + self.chance.gauss(0, SIGMA)
        parts = {part: seconds * self.chance.uniform(0.95, 1.05) for part, seconds in PARTS.items()}
        measured = Measurement(value, TRIAL_S, None, 300.0, 45000.0, parts, FACTS)
        self.add(TrialFinished(name, state.attempt, Outcome.MEASURED, measurement=measured, halfway=value + 0.05))


def briefs_ms(study: Study) -> list[float]:
    """Times of making what a model is told of the study, the shortest first."""
    found: list[float] = []
    for _ in range(50):
        started = time.perf_counter()
        brief(study, SLUG)
        found.append(1000 * (time.perf_counter() - started))
    return sorted(found)


def replay(path: Path) -> None:
    """Replays a journal in this process, which does nothing else, and prints seconds, memory and a decision's time."""
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    study = replay_study(StudyConfig(name="scale"), Journal(path, writer=False))
    seconds = time.perf_counter() - started
    mib = (psutil.Process().memory_info().rss - before) / 2**20
    print(f"{study.finished} {study.seq} {seconds} {mib}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--slots", type=int, default=1_000)
    parser.add_argument("--replay", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.replay:
        replay(arguments.replay)
        return
    print(f"{arguments.slots} slots; a decision is one call of plan.next_commands over the last 1,000 trials\n")
    print(
        f"{'trials':>8} {'events':>8} {'decision ms p50':>16} {'p99':>7} {'longest':>8} {'brief ms':>9} "
        f"{'replay s':>9} {'MiB':>7}"
    )
    for trials in arguments.trials:
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal(Path(folder) / "journal.db", writer=True, durable=False)
            world = World(arguments.slots, journal)
            world.run(max(1, trials - 1000))
            world.decisions_ms.clear()
            world.run(trials)
            brief_ms = briefs_ms(world.study)[25]
            journal.close()
            again = [sys.executable, __file__, "--replay", str(Path(folder) / "journal.db")]
            told = subprocess.run(again, capture_output=True, text=True, check=True).stdout.split()
        ms = sorted(world.decisions_ms)
        print(
            f"{trials:>8} {told[1]:>8} {ms[len(ms) // 2]:>16.2f} {ms[int(0.99 * len(ms))]:>7.2f} {ms[-1]:>8.1f}"
            f" {brief_ms:>9.2f} {float(told[2]):>9.2f} {float(told[3]):>7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
