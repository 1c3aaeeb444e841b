"""A study that needs no training: the real coordinator, journal, git, judge and proposer, on a virtual clock.

Only the machine is imagined: `ToyExecutor` gives scores of programs by their knobs, after a virtual time.
"""

from __future__ import annotations

import io
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raysearch import folder as folders
from raysearch import minds
from raysearch.asker import Asker
from raysearch.config import StudyConfig, parse_config
from raysearch.console import Console
from raysearch.coordinator import Coordinator, Onlooker, Session
from raysearch.errors import UserError
from raysearch.executors import Report, RunEnded, SlotInfo, SlotJoined, SlotLeft
from raysearch.folder import Folder
from raysearch.journal import Journal
from raysearch.knobs import Value, read_knobs
from raysearch.model import (
    Measurement,
    Outcome,
    ProfileAdded,
    RatchetMoved,
    Record,
    SessionStarted,
    TrialFinished,
    TrialStarted,
)
from raysearch.profile import Hardware
from raysearch.proposers import Idea, Proposer, Request
from raysearch.proposers.prices import Purse
from raysearch.proposers.tune import TuneProposer
from raysearch.ratchet import Ratchet
from raysearch.runner import RunResult, RunSpec
from raysearch.study import Study

PROGRAM = """\
\"\"\"A program whose score is known.\"\"\"

LR = 0.003    # in [0.0001, 1.0] log: step size
WIDTH = 64    # in {16, 32, 64, 128, 256}: units
DEPTH = 6     # in [1, 12]: layers
MODE = "slow"  # in {"slow", "fast"}: how
# rule: WIDTH * DEPTH <= 1024


def train(run):
    return None
"""

SIGMA = 0.01
RUN_S = 20.0


def true_score(values: dict[str, Value]) -> float:
    """Lower is better; the best is 1.0."""
    lr, width, depth = float(values["LR"]), float(values["WIDTH"]), float(values["DEPTH"])
    score = 1.0 + 0.2 * (math.log10(lr) + 1.0) ** 2 + 0.05 * (math.log2(width) - 7) ** 2 + 0.02 * (depth - 3) ** 2
    return score + (0.1 if values["MODE"] == "slow" else 0.0)


@dataclass
class Clock:
    """Unix time that passes when the executor says so."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class ToySlot:
    """One imagined GPU."""

    hardware: Hardware
    running: RunSpec | None = None
    ends_at: float = 0.0


def cpu(name: str = "toy cpu") -> Hardware:
    return Hardware("cpu", name, 0, "", "", "", 2, "0.0")


def gpu(name: str, memory_mb: int) -> Hardware:
    return Hardware("cuda", name, memory_mb, "8.6", "1.0", f"GPU-{name}", 8, "0.0")


Behaviour = Callable[[RunSpec, dict[str, Value]], RunResult | None]


class ToyExecutor:
    """Runs nothing: a program's score is a function of its knobs and of the seed."""

    def __init__(
        self,
        clock: Clock,
        hardware: Iterable[Hardware] = (cpu(), cpu()),
        behaviour: Behaviour | None = None,
        preset: str = "",
    ) -> None:
        self.clock = clock
        self.slots = {f"slot{number}": ToySlot(kind) for number, kind in enumerate(hardware)}
        self.behaviour = behaviour
        self.started: list[RunSpec] = []
        self.step_s = math.inf  # that pass in a poll at most
        self.wanted: list[dict[str, int]] = []
        self._reports: list[Report] = [
            SlotJoined(SlotInfo(name, slot.hardware, preset, None, True)) for name, slot in self.slots.items()
        ]

    def start(self, slot_id: str, spec: RunSpec) -> None:
        if slot_id not in self.slots:
            raise UserError(f"slot {slot_id!r} is not there")
        slot = self.slots[slot_id]
        assert slot.running is None, f"{slot_id} is busy with {slot.running}"
        slot.running, slot.ends_at = spec, self.clock.now + RUN_S * random.Random(spec.trial_id).uniform(0.8, 1.2)
        self.started.append(spec)

    def poll(self, timeout_s: float) -> list[Report]:
        time.sleep(0.0005)  # lets the proposer's thread in
        due = self.clock.now + min(timeout_s, self.step_s)
        busy = [(slot.ends_at, name) for name, slot in self.slots.items() if slot.running]
        if busy and min(busy)[0] <= due:
            ends_at, name = min(busy)
            self.clock.now = max(self.clock.now, ends_at)
            slot = self.slots[name]
            spec, slot.running = slot.running, None
            assert spec is not None
            self._reports.append(RunEnded(spec.trial_id, spec.attempt, self._result(spec, slot.hardware)))
        else:
            self.clock.now = due
        reports, self._reports = self._reports, []
        return reports

    def lose(self, slot_id: str) -> None:
        """The slot dies with its run."""
        slot = self.slots.pop(slot_id)
        if slot.running:
            lost = RunResult(Outcome.LOST, "its slot died")
            self._reports.append(RunEnded(slot.running.trial_id, slot.running.attempt, lost))
        self._reports.append(SlotLeft(slot_id, "it died"))

    def say(self, report: Report) -> None:
        """What comes with the next `poll`."""
        self._reports.append(report)

    def cancel(self, trial_id: str) -> None:
        for slot in self.slots.values():
            if slot.running and slot.running.trial_id == trial_id:
                slot.running = None
                self._reports.append(RunEnded(trial_id, 1, RunResult(Outcome.CANCELLED, "stopped by its slot")))

    def want(self, slots: Mapping[str, int]) -> None:
        self.wanted.append(dict(slots))

    def starting(self) -> int:
        return 0

    def close(self) -> None:
        pass

    def _result(self, spec: RunSpec, hardware: Hardware) -> RunResult:
        values = {name: knob.value for name, knob in read_knobs(spec.files["train.py"]).items()}
        special = self.behaviour(spec, values) if self.behaviour else None
        if special:
            return special
        noise = random.Random(f"{spec.seed} {values} {hardware.name}").gauss(0.0, SIGMA)
        return RunResult(Outcome.MEASURED, "", Measurement(true_score(values) + noise, wall_s=RUN_S, training_s=RUN_S))


@dataclass
class Toy:
    """A study in a folder, which can be driven again and again.

    Its proposers are the one that is given, or those of its options where these have a model or an agent, or the one
    that moves knobs.
    """

    path: Path
    clock: Clock = field(default_factory=Clock)
    hardware: tuple[Hardware, ...] = (cpu(), cpu())
    behaviour: Behaviour | None = None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    program: str = PROGRAM
    protected: dict[str, str] = field(default_factory=dict[str, str])
    proposer: Proposer | None = None
    others: tuple[Proposer, ...] = ()  # asked after that one
    own_purse: Purse | None = None  # that these were made with
    preset: str = ""
    max_usd: float | None = None
    wanted: dict[str, int] = field(default_factory=dict[str, int])
    onlookers: tuple[Onlooker, ...] = ()
    study: Study = field(init=False)
    executor: ToyExecutor = field(init=False)
    askers: list[Asker] = field(init=False)
    purse: Purse = field(init=False)
    coordinator: Coordinator = field(init=False)
    said: io.StringIO = field(default_factory=io.StringIO)  # by the console

    @property
    def folder(self) -> Folder:
        return Folder(self.path)

    def config(self) -> StudyConfig:
        task = {"kind": "command", "command": ["never run"], "metric": "score", "protected": [*self.protected]}
        return parse_config({"name": self.path.name, "objective": task, **self.options}, where="test")

    def drive(
        self,
        *,
        trials: int | None = 20,
        journal_type: type[Journal] = Journal,
        meanwhile: Callable[[Toy], None] | None = None,
    ) -> str:
        """Starts or continues the study, as the command line does; returns why it ended."""
        config = self.config()
        if not self.folder.config.exists():
            folders.make(self.folder, config, {"train.py": self.program, **self.protected}, at=self.clock())
        journal = journal_type(self.folder.journal, writer=True)
        try:
            self.study = folders.replay(config, journal, max_trials=trials)
            self.purse = self.own_purse or Purse(self.max_usd)
            proposers = self._proposers(config)
            names = tuple(proposer.name for proposer in proposers)
            self.study.settings = replace(self.study.settings, proposers=names)
            repo = Ratchet.open(self.folder.repo)
            folders.check_ratchets(self.study, repo, self.folder)
            self.executor = ToyExecutor(self.clock, self.hardware, self.behaviour, self.preset)
            if meanwhile:
                toy, poll = self, self.executor.poll

                def watched(timeout_s: float) -> list[Report]:
                    meanwhile(toy)
                    return poll(timeout_s)

                self.executor.poll = watched
            self.askers = [Asker(proposer, self.clock) for proposer in proposers]
            self.coordinator = Coordinator(
                folder=self.folder,
                config=config,
                study=self.study,
                journal=journal,
                repo=repo,
                executor=self.executor,
                askers=self.askers,
                console=Console(self.study, name="toy", metric="score", stream=self.said),
                session=Session("toy", "session", wanted=self.wanted),
                purse=self.purse,
                onlookers=self.onlookers,
                clock=self.clock,
            )
            return self.coordinator.run()
        finally:
            journal.close()

    def _proposers(self, config: StudyConfig) -> list[Proposer]:
        if self.proposer or not config.minds:
            return [self.proposer or TuneProposer(seed=1), *self.others]
        return minds.make(config, minds.Place(self.folder.scratch, self.protected, self.purse, lambda _: None))

    def replayed(self) -> Study:
        """The study as its journal alone has it."""
        journal = Journal(self.folder.journal, writer=False)
        try:
            return folders.replay(self.config(), journal)
        finally:
            journal.close()

    def records(self) -> list[Record]:
        journal = Journal(self.folder.journal, writer=False)
        try:
            return list(journal.read())
        finally:
            journal.close()

    def repo(self) -> Ratchet:
        return Ratchet.open(self.folder.repo)


def audit(toy: Toy) -> None:
    """What must hold of every study at every moment: journal and git agree, and no champion was not measured."""
    study, repo = toy.replayed(), toy.repo()
    audit_journal(toy.records())
    for state in study.candidates.values():
        if not state.candidate.id.endswith("-base"):
            assert repo.resolve(f"refs/trials/{state.candidate.id}") == state.candidate.commit
    for slug, lane in study.lanes.items():
        assert repo.head(slug) == lane.champion_commit
        steps = [lane.champion_commit]
        while steps[-1] != study.candidates[lane.base].candidate.commit:
            steps.append(repo.parents(steps[-1])[0])
        assert steps[:-1] == [win.commit for win in reversed(lane.wins)]
        for win in lane.wins:
            candidate = study.candidates[win.candidate].candidate
            assert candidate.profile == slug
            assert repo.changed(candidate.commit, win.commit) == []
            assert study.trials[f"{win.candidate}-pair1"].measurement is not None
            # judged against exactly what it stands on
            assert repo.changed(repo.parents(win.commit)[0], candidate.proposal.base) == []


def audit_journal(records: list[Record]) -> None:
    """Attempts follow one another, none ends twice, what ended by itself is never run again, ratchets go forward."""
    attempts, in_flight, tips = dict[str, int](), dict[str, int](), dict[str, str]()
    ended = set[str]()
    for record in records:
        match record.event:
            case SessionStarted():
                in_flight.clear()
            case TrialStarted(trial=trial, attempt=attempt):
                assert trial.id not in ended | in_flight.keys(), record
                assert attempt == attempts.get(trial.id, 0) + 1, record
                attempts[trial.id] = in_flight[trial.id] = attempt
            case TrialFinished(trial_id=trial_id, attempt=attempt, outcome=outcome):
                assert in_flight.pop(trial_id) == attempt, record
                if not outcome.is_infrastructure:
                    ended.add(trial_id)
            case ProfileAdded(profile=profile, commit=commit):
                tips[profile.slug] = commit
            case RatchetMoved(profile=slug, commit=commit, previous=previous):
                assert tips[slug] == previous, record
                tips[slug] = commit
            case _:
                pass


def ideas_of(proposer: Proposer, request: Request) -> list[Idea]:
    """The ideas of a proposer whose every answer is one."""
    answers = proposer.ask(request)
    ideas = [answer for answer in answers if isinstance(answer, Idea)]
    assert len(ideas) == len(answers)
    return ideas
