"""The supervisor, for real: outcomes, limits, and nothing left running."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from raysearch.model import Outcome
from raysearch.runner import SESSION_MARKER, STUDY_MARKER, Run, RunResult, RunSpec, sweep

MARK = "RAYSEARCH_TEST_MARK"


def spec(program: str, **changes: object) -> RunSpec:
    fields: dict[str, object] = {
        "trial_id": "c0001-screen",
        "attempt": 1,
        "study": "test-study",
        "session": "s1",
        "files": {"score.py": program},
        "command": ("{python}", "score.py", "--seed", "{seed}"),
        "metric": "score",
        "seed": 7,
        "startup_limit_s": 0.0,
        "total_limit_s": 30.0,
        "threads": 1,
        "niceness": 5,
    }
    return RunSpec(**(fields | changes))  # pyright: ignore[reportArgumentType]


def run(tmp_path: Path, program: str, **changes: object) -> RunResult:
    result = Run(spec(program, **changes), out=tmp_path / "out", data="", env=dict(os.environ)).wait()
    assert left(tmp_path) == []
    return result


def left(tmp_path: Path) -> list[int]:
    """Processes whose working directory is the trial's."""
    found: list[int] = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd().startswith(str(tmp_path)):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_last_printed_metric_is_the_measurement(tmp_path: Path):
    result = run(tmp_path, "import sys; print('score: 1.0'); print('score: 0.5'); print(sys.argv)")
    assert result.outcome is Outcome.MEASURED
    assert result.measurement is not None
    assert result.measurement.value == 0.5
    assert "'7'" in (tmp_path / "out/run.log").read_text()


@pytest.mark.parametrize(
    ("program", "outcome", "reason"),
    [
        ("raise RuntimeError('no such layer')", Outcome.CRASHED, "RuntimeError: no such layer"),
        ("print('nothing')", Outcome.INVALID, "no finite number `score"),
        ("print('score: nan')", Outcome.INVALID, "no finite number"),
        ("import sys; print('too big'); sys.exit(4)", Outcome.OUT_OF_MEMORY, "too big"),
        ("import sys; print('not causal'); sys.exit(3)", Outcome.INVALID, "not causal"),
        ("import os; os.kill(os.getpid(), 9)", Outcome.CRASHED, "killed from outside"),
        ("import sys; print('no data here'); sys.exit(2)", Outcome.LOST, "no data"),
    ],
)
def test_each_end_has_its_outcome_and_reason(tmp_path: Path, program: str, outcome: Outcome, reason: str):
    result = run(tmp_path, program)
    assert result.outcome is outcome
    assert reason in result.reason


def test_a_failure_keeps_the_last_lines_without_control_characters(tmp_path: Path):
    result = run(tmp_path, "for i in range(50): print(f'line {i}\\x1b[31m')\nraise SystemExit(1)")
    assert result.log_tail.splitlines()[-1] == "line 49[31m"
    assert len(result.log_tail.splitlines()) == 20


def test_a_trial_that_does_not_end_is_timed_out_with_its_whole_tree(tmp_path: Path):
    program = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""
    result = run(tmp_path, program, total_limit_s=2.0)
    assert result.outcome is Outcome.TIMED_OUT
    assert "2 s in all" in result.reason


def test_start_up_limit_ends_when_the_program_says_it_trains(tmp_path: Path):
    slow = "import time; time.sleep(3); print('score: 1')"
    assert "start-up limit" in run(tmp_path, slow, startup_limit_s=1.0).reason
    told = f"open('../progress.json', 'w').write('{{\"phase\": \"train\"}}'); {slow}"
    assert run(tmp_path, told, startup_limit_s=1.0).outcome is Outcome.MEASURED


def test_a_child_that_outlives_its_parent_is_ended(tmp_path: Path):
    program = """
import subprocess, sys
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
print('score: 1')
"""
    assert run(tmp_path, program).outcome is Outcome.MEASURED


def test_cancel_ends_the_trial(tmp_path: Path):
    attempt = Run(spec("import time; time.sleep(600)"), out=tmp_path / "out", data="", env=dict(os.environ))
    threading.Timer(1.0, attempt.cancel).start()
    assert attempt.wait().outcome is Outcome.CANCELLED
    assert left(tmp_path) == []


def test_a_clock_that_disagrees_with_ours_is_invalid(tmp_path: Path):
    program = "import json; json.dump({'score': 1.0, 'total_seconds': 900.0}, open('../result.json', 'w'))"
    result = run(tmp_path, program)
    assert result.outcome is Outcome.INVALID
    assert "900.0 s; measured from outside" in result.reason


SLOT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_runner import spec
from raysearch.runner import Run
run = Run(spec("import time; time.sleep(600)"), out=Path({out!r}), data="", env=dict(os.environ))
print("started", flush=True)
run.wait()
"""


@pytest.mark.parametrize("victim", ["slot", "supervisor"])
def test_death_of_slot_or_supervisor_ends_the_trial(tmp_path: Path, victim: str):
    code = SLOT.format(tests=str(Path(__file__).parent), out=str(tmp_path / "out"))
    slot = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert slot.stdout is not None
    assert slot.stdout.readline() == "started\n"
    wait_until(lambda: left(tmp_path) != [])
    target = slot.pid if victim == "slot" else psutil.Process(slot.pid).children()[0].pid
    os.kill(target, signal.SIGKILL)
    slot.wait()
    slot.stdout.close()
    wait_until(lambda: left(tmp_path) == [])


def test_sweep_ends_what_an_earlier_session_left_and_nothing_else(tmp_path: Path):
    def sleeper(study: str, session: str) -> subprocess.Popen[bytes]:
        env = os.environ | {STUDY_MARKER: study, SESSION_MARKER: session}
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=env, cwd=tmp_path)

    old, current, foreign = sleeper("test-study", "s0"), sleeper("test-study", "s1"), sleeper("other", "s0")
    try:
        wait_until(lambda: len(left(tmp_path)) == 3)
        assert sweep("test-study", session="s1") == [old.pid]
        assert old.wait(5) == -signal.SIGKILL
        assert current.poll() is None
        assert foreign.poll() is None
    finally:
        for process in (old, current, foreign):
            process.kill()
            process.wait()


def wait_until(holds, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
