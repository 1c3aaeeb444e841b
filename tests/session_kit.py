"""Studies that are driven through `python -m raysearch.run` in a process of its own, and how their journals read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toy import Toy

from raysearch import leftovers
from raysearch.config import StudyConfig, load_config
from raysearch.folder import Folder
from raysearch.journal import Journal
from raysearch.model import Record, SessionStarted, TrialFinished, TrialStarted
from raysearch.runner import STUDY_MARK

OBJECTIVE = """
[objective]
editable = ["score.py"]
command = ["{python}", "score.py", "--seed", "{seed}"]
metric = "score"
timeout_s = 30
"""
PROGRAM = """
import math, random, sys, time

LR = 0.003  # in [0.0001, 1.0] log: step size
WIDTH = 64  # in {16, 32, 64, 128, 256}: units
DEPTH = 6  # in [1, 12]: layers
SECONDS = 0.7

time.sleep(SECONDS)
noise = random.Random(f"{sys.argv} {LR} {WIDTH} {DEPTH}").gauss(0, 0.01)
score = 1 + 0.2 * (math.log10(LR) + 1) ** 2 + 0.05 * (math.log2(WIDTH) - 7) ** 2 + 0.02 * (DEPTH - 3) ** 2
print(f"score: {score + noise}")
"""
LIMIT_S = 90.0


class OnDisk(Toy):
    """A study that was driven by the command line, for `audit`."""

    def config(self) -> StudyConfig:
        return load_config(self.folder.config)


@dataclass
class Session:
    """A `raysearch.run` in a process group of its own, as a shell starts it in a terminal."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        return self.log.read_text()

    def ends(self, limit_s: float = LIMIT_S) -> int:
        return self.process.wait(limit_s)

    def press_ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)


@dataclass
class Bench:
    """A folder of studies."""

    path: Path
    sessions: list[Session]

    def start(self, *arguments: str) -> Session:
        log = self.path / f"session{len(self.sessions)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command(*arguments),
                cwd=self.path,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self.sessions.append(Session(process, log))
        return self.sessions[-1]

    def quick(self, *arguments: str) -> Session:
        return self.start("--study", "quick", "--objective", "objective.toml", "--cpu-slots", "2", *arguments)

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command, env = self.command(*arguments), self.environment()
        return subprocess.run(
            command, cwd=self.path, env=env, capture_output=True, text=True, check=False, timeout=LIMIT_S
        )

    def kill_sessions(self) -> None:
        for session in self.sessions:
            session.process.kill()
            session.process.wait()

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "raysearch.run", *arguments]

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def study(self, name: str) -> OnDisk:
        return OnDisk(self.path / "studies" / name)

    def events(self, name: str = "quick") -> list[Record]:
        folder = Folder(self.path / "studies" / name)
        if not folder.journal.exists():
            return []
        journal = Journal(folder.journal, writer=False)
        try:
            return list(journal.read())
        finally:
            journal.close()

    def processes(self, name: str = "quick") -> list[int]:
        """Of the study's trials, supervisors and Ray; the coordinator and the helper behind it bear no mark."""
        token = Folder(self.path / "studies" / name).token.read_text()
        return leftovers.marked(lambda marks: marks.get(STUDY_MARK) == token)


def until(holds: Callable[[], Any], session: Session, limit_s: float = LIMIT_S) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := holds()):
        assert session.process.poll() is None, f"it ended; {session.said()}"
        assert time.monotonic() < deadline, f"waited in vain; {session.said()}"
        time.sleep(0.05)
    return found


def finished(events: list[Record]) -> dict[str, tuple[int, TrialFinished]]:
    """Trials that ended by themselves, with the number of the event."""
    return {
        record.event.trial_id: (record.seq, record.event)
        for record in events
        if isinstance(record.event, TrialFinished) and not record.event.outcome.is_infrastructure
    }


def in_flight(events: list[Record]) -> dict[str, int]:
    """Attempts that were started in the last session and have not ended."""
    found: dict[str, int] = {}
    for record in events:
        match record.event:
            case SessionStarted():
                found.clear()
            case TrialStarted(trial=trial, attempt=attempt):
                found[trial.id] = attempt
            case TrialFinished(trial_id=trial_id):
                found.pop(trial_id, None)
            case _:
                pass
    return found
