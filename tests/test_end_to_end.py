"""Whole studies through the command line and Ray: the real trainer, SIGKILL in the middle, Ctrl-C, a person's patch."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from raysearch.config import load_config
from raysearch.folder import Folder, replay
from raysearch.journal import Journal
from raysearch.model import Outcome
from raysearch.ratchet import Ratchet
from raysearch.study import Study

OBJECTIVE = """
[objective]
editable = ["score.py"]
command = ["{python}", "score.py", "{seed}"]
metric = "score"
timeout_s = 60
"""
SCORE = """\
import random, sys, time

LR = 0.01   # in [0.001, 1.0] log: step size
DEPTH = 6   # in [1, 12]: layers
MODE = 0    # in {0, 1}: how

time.sleep(0.7)
noise = random.Random(f"{sys.argv[1]} {LR} {DEPTH}").gauss(0, 0.01)
print(f"score: {(LR - 0.1) ** 2 + 0.1 * abs(DEPTH - 3) - 0.5 * MODE + noise}")
"""


class Command:
    """`python -m raysearch.run` in a folder of its own, as a user has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "raysearch.run", *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        out, error = self.start(*arguments).communicate(timeout=280)
        assert self.started[-1].returncode == code, error[-3000:]
        return out, error

    def study(self, name: str) -> Study:
        place = Folder(self.folder / "studies" / name)
        journal = Journal(place.journal, writer=False)
        try:
            return replay(load_config(place.config), journal)
        finally:
            journal.close()

    def reaches(self, name: str, holds: Callable[[Study], bool], timeout_s: float = 90.0) -> Study:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if (self.folder / "studies" / name / "journal.db").exists():
                study = self.study(name)
                if holds(study):
                    return study
            time.sleep(0.1)
        raise AssertionError(f"waited in vain: {self.started[-1].poll()}")


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    (tmp_path / "objective.toml").write_text(OBJECTIVE)
    (tmp_path / "score.py").write_text(SCORE)
    command = Command(tmp_path)
    yield command
    for process in command.started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def left(folder: Path) -> list[str]:
    """Command lines of processes that work in the folder's trials."""
    found: list[str] = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(folder / "studies") in process.cwd():
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def audit(command: Command, name: str) -> None:
    """Journal, git and files agree."""
    study = command.study(name)
    repo = Ratchet.open(command.folder / "studies" / name / "repo")
    for state in study.candidates.values():
        if not state.candidate.id.endswith("-base"):
            assert repo.resolve(f"refs/trials/{state.candidate.id}") == state.candidate.commit
    for slug, lane in study.lanes.items():
        assert repo.head(slug) == lane.champion_commit
        for win in lane.wins:
            assert repo.changed(study.candidates[win.candidate].candidate.commit, win.commit) == []
    assert not study.running
    for trial_id, state in study.trials.items():
        if state.outcome is Outcome.MEASURED:
            assert (command.folder / "studies" / name / "trials" / trial_id / "run.log").exists()
    assert left(command.folder) == []


def test_a_real_study_of_the_real_trainer(command: Command):
    out, error = command.run(
        "--study", "real", "--dataset", "sotu", "--device", "cpu", "--budget-tokens", "16384", "--trials", "2",
        "--baseline-runs", "2",
    )  # fmt: skip
    assert "cpu: val_bpb" in out, error
    folder = command.folder / "studies/real"
    assert {path.name for path in folder.iterdir()} >= {"study.toml", "results.tsv", "report.md", "progress.png"}
    study = command.study("real")
    baseline = study.trials["cpu-base-1"].measurement
    assert baseline is not None
    assert 2.0 < baseline.value < 5.0
    assert baseline.holdout is not None
    assert baseline.facts["total_tokens"] >= 16384
    assert study.lanes["cpu"].screens == 2
    assert json.loads((folder / "trials/cpu-base-1/result.json").read_text())["val_bpb"] == baseline.value
    (state,) = json.loads(command.run("status", "real", "--json")[0])["profiles"]
    assert state
    assert command.run("report", "real")[0].startswith("# real")
    audit(command, "real")


def test_sigkill_in_the_middle_loses_no_finished_trial(command: Command):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    quick = ("--study", "killed", "--objective", "objective.toml", "--trials", "8", "--cpu-slots", "2")
    finished: dict[str, int] = {}
    for wanted in (1, 5, 9):
        process = command.start(*quick)

        def far_enough(study: Study, wanted: int = wanted) -> bool:
            return sum(state.outcome is not None for state in study.trials.values()) >= wanted and bool(study.running)

        command.reaches("killed", far_enough)
        time.sleep(draw.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        deadline = time.monotonic() + 30
        while left(command.folder) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left(command.folder) == []
        study = command.study("killed")
        now = {name: state.attempt for name, state in study.trials.items() if state.outcome}
        assert finished.items() <= now.items()
        finished = now
    in_flight = set(command.study("killed").running)
    command.run(*quick)
    study = command.study("killed")
    assert study.lanes["cpu"].screens == 8
    assert all(study.trials[name].attempt == attempt for name, attempt in finished.items())
    assert all(study.trials[name].attempt >= 2 for name in in_flight if name not in finished)
    audit(command, "killed")


def test_ctrl_c_once_drains_and_a_second_coordinator_is_refused(command: Command):
    quick = ("--study", "drained", "--objective", "objective.toml", "--cpu-slots", "2")
    process = command.start(*quick)
    command.reaches("drained", lambda study: len(study.running) == 2)
    _, error = command.run(*quick, code=2)
    assert "driven by another coordinator" in error
    assert len(error.strip().splitlines()) == 1
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    process.communicate(timeout=60)
    assert process.returncode == 0
    study = command.study("drained")
    assert all(state.outcome is Outcome.MEASURED for state in study.trials.values())
    audit(command, "drained")


def test_ctrl_c_twice_stops_at_once_and_leaves_nothing_running(command: Command):
    (command.folder / "score.py").write_text(SCORE.replace("time.sleep(0.7)", "time.sleep(20)"))
    process = command.start("--study", "stopped", "--objective", "objective.toml", "--cpu-slots", "2")
    command.reaches("stopped", lambda study: len(study.running) == 2)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.8)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert left(command.folder) == []


def test_a_patch_proposed_while_the_study_runs_is_run_and_reported(command: Command):
    process = command.start("--study", "asked", "--objective", "objective.toml", "--cpu-slots", "2", "--trials", "12")
    command.reaches("asked", lambda study: bool(study.lanes))
    (command.folder / "mine.py").write_text(SCORE.replace("MODE = 0 ", "MODE = 1 "))
    command.run("propose", "mine.py", "--why", "the other mode is better", "--by", "ada")
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error[-2000:]
    study = command.study("asked")
    mine = [s for s in study.candidates.values() if s.candidate.proposal.proposer == "ada"]
    assert mine
    assert any(state.ratchet_commit for state in mine)
    assert "the other mode is better" in (command.folder / "studies/asked/results.tsv").read_text()
    audit(command, "asked")
