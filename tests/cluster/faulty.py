"""A study on several machines at once, ways to break them, and the audit that must hold whatever was broken."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from hosts import ENVIRONMENT, Bed, Host, until
from session_kit import OBJECTIVE, Bench, OnDisk, Session, in_flight
from toy import audit

from raysearch.model import Outcome, Record, TrialFinished, TrialStarted
from raysearch.runner import read_result

# Each kind of CPU has an optimum of its own, in a space that is not searched through in an hour, and each run leaves a
# daemon behind that somebody must end.
PROGRAM = """
import math, random, subprocess, sys, time

LR = 0.003  # in [0.0001, 1.0] log: step size
WIDTH = 64  # in {16, 32, 64, 128, 256}: units
DEPTH = 6  # in [1, 12]: layers
DECAY = 0.5  # in [0.0, 1.0]: weight decay
WARMUP = 0.5  # in [0.0, 1.0]: share of the steps
CLIP = 5.0  # in [0.1, 10.0] log: norm of the gradient
DROPOUT = 0.3  # in [0.0, 0.9]: share of the units
SECONDS = {seconds}

subprocess.Popen(["sleep", "1000"], start_new_session=True)
with open("/proc/cpuinfo") as file:
    best = 7 if "Alpha" in file.read() else 5
for _ in range(10):
    time.sleep(SECONDS / 10)
    print("step", flush=True)
noise = random.Random(f"{sys.argv} {LR} {WIDTH} {DEPTH}").gauss(0, 0.01)
score = 1 + 0.2 * (math.log10(LR) + 1) ** 2 + 0.05 * (math.log2(WIDTH) - best) ** 2 + 0.02 * (DEPTH - 3) ** 2
score += (DECAY - 0.1) ** 2 + (WARMUP - 0.2) ** 2 + 0.2 * math.log10(CLIP) ** 2 + DROPOUT**2
print(f"score: {score + noise}")
"""
LIMIT_S = 240.0  # of anything that is waited for: the machine may be busy with other things


@dataclass
class Cluster(Bench):
    """A bed with raysearch on it; `host` says where the next command runs, None for the head."""

    bed: Bed = field(kw_only=True)
    host: Host | None = None

    def command(self, *arguments: str) -> list[str]:
        # another mount namespace begins in its root
        return self.bed.inside("env", "--chdir", str(self.path), *super().command(*arguments), host=self.host)

    def environment(self) -> dict[str, str]:
        return os.environ | ENVIRONMENT

    def write(self, *, seconds: float) -> None:
        """The objective, with runs of so many seconds."""
        (self.path / "objective.toml").write_text(OBJECTIVE.replace("timeout_s = 30", "timeout_s = 600"))
        (self.path / "score.py").write_text(PROGRAM.replace("{seconds}", str(seconds)))

    def search(self, *arguments: str, name: str = "quick") -> Session:
        task = ("--objective", "objective.toml", "--device", "cpu", "--baseline-runs", "2")
        return self.start("--study", name, *task, "--address", self.bed.address, *arguments)

    def settle(self, *, slots: int = 2) -> None:
        """Has the head and both kinds of machine run, whatever an earlier test has left of them."""
        self.bed.revive_head()
        for name, host in list(self.bed.hosts.items()):
            if name not in ("alpha", "beta") or host.cut_off or host.frozen:
                self.bed.power_off(name)
        for name, cpu, sees in (("alpha", "Toy Alpha", True), ("beta", "Toy Beta", False)):
            host = self.bed.hosts.get(name)
            if host is None:
                self.bed.add(name, cpu=cpu, sees_study=sees, slots=slots)
            elif host.ip not in (self.bed.nodes() or {}):
                host.start_ray()
        ips = {host.ip for host in self.bed.hosts.values()}
        # a raylet that has just been killed may still have counted as a node above
        wait(lambda: self.bed.see_to_ray() or set(self.bed.nodes() or {}) >= ips)

    def running(self, host: str = "", name: str = "quick") -> dict[str, TrialStarted]:
        """Attempts in flight, by trial; those of one host."""
        events = self.events(name)
        open_attempts = in_flight(events)
        return {
            trial.id: event
            for record in events
            if isinstance(event := record.event, TrialStarted)
            and open_attempts.get((trial := event.trial).id) == event.attempt
            and event.slot.startswith(host)
        }

    def trees(self, host: str, name: str = "quick") -> dict[str, list[psutil.Process]]:
        """Processes of the trials on a host, by trial; their supervisors are not among them."""
        found: dict[str, list[psutil.Process]] = {}
        for process in self.bed.hosts[host].processes():
            try:
                where = Path(process.cwd())
            except psutil.Error:
                continue
            if where.name == "work":
                found.setdefault(where.parent.name, []).append(process)
        return found

    def outcomes(self, name: str = "quick") -> Counter[Outcome]:
        return Counter(event.outcome for event in ends(self.events(name)))

    def orphans(self, name: str = "quick") -> list[psutil.Process]:
        """The study's processes on any machine that belong to no attempt in flight."""
        wanted = {self.study(name).folder.run(trial, event.attempt).name for trial, event in self.running().items()}
        found: list[psutil.Process] = []
        for pid in self.processes(name):
            try:
                process = psutil.Process(pid)
                if Path(process.cwd()).parent.name not in wanted:
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def audit(self, name: str = "quick", *, lost: int | None = None) -> OnDisk:
        """Journal against itself, git, files and processes.

        Args:
            name: Of the study, which has ended.
            lost: How many attempts may have been lost at most; None for any number.
        """
        toy = self.study(name)
        audit(toy)
        study = toy.replayed()
        assert not [state for state in study.trials.values() if state.outcome is Outcome.LOST], "given up"
        assert {state.outcome for state in study.trials.values() if state.outcome} <= {Outcome.MEASURED}
        for trial_id, state in study.trials.items():
            if state.measurement is None:
                continue
            left = read_result(toy.folder.run(trial_id, state.attempt), metric="score", attempt=state.attempt)
            assert left is not None, f"{trial_id} has left nothing"
            assert left.measurement == state.measurement
        wait(lambda: not self.processes(name))
        if lost is not None:
            assert self.outcomes(name)[Outcome.LOST] <= lost
        return toy


def ends(events: list[Record]) -> list[TrialFinished]:
    return [record.event for record in events if isinstance(record.event, TrialFinished)]


def wait(holds: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """`until`, with the patience of a study."""
    return until(holds, limit_s)
