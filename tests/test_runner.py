"""The supervisor, for real: outcomes, limits, and nothing left running."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from raysearch.model import Measurement, Outcome
from raysearch.runner import SESSION_MARK, SLOT_MARK, STUDY_MARK, Run, RunResult, RunSpec, returned_files, sweep

STUDY = f"test-study-{os.getpid()}"  # so that two runs of the tests do not sweep one another


KILLS_ITS_CHILD = "import subprocess as s; s.run(['sh', '-c', 'kill -9 $$'], check=True)"


def spec(program: str, **changes: object) -> RunSpec:
    fields: dict[str, object] = {
        "trial_id": "c0001-screen",
        "attempt": 1,
        "study": STUDY,
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
    result = Run(spec(program, **changes), out=tmp_path / "out", data="", env=dict(os.environ), slot="here:cpu0").wait()
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
        ("import os; os.kill(os.getpid(), 9)", Outcome.LOST, "killed from outside"),
        (KILLS_ITS_CHILD, Outcome.LOST, "killed from outside: subprocess.CalledProcessError"),
        ("import os; os.kill(os.getpid(), 11)", Outcome.CRASHED, "killed by signal 11 (Segmentation fault)"),
        ("import os; os.remove('../run.log')", Outcome.INVALID, "no finite number"),
        ("import sys; print('no data here'); sys.exit(2)", Outcome.LOST, "no data"),
    ],
)
def test_each_end_has_its_outcome_and_reason(tmp_path: Path, program: str, outcome: Outcome, reason: str):
    result = run(tmp_path, program)
    assert result.outcome is outcome
    assert reason in result.reason


def test_a_program_that_fails_on_a_full_disk_is_not_to_blame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("raysearch.runner.LEAST_FREE_BYTES", 2**62)
    result = run(tmp_path, "raise SystemExit(1)")
    assert result.outcome is Outcome.LOST
    assert "MiB left; a run needs" in result.reason
    assert run(tmp_path, "print('score: 1')").outcome is Outcome.MEASURED


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
    attempt = Run(
        spec("import time; time.sleep(600)"), out=tmp_path / "out", data="", env=dict(os.environ), slot="here:cpu0"
    )
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
run = Run(spec({program!r}), out=Path({out!r}), data="", env=dict(os.environ), slot="here:cpu0")
print("started", flush=True)
run.wait()
"""


TREE = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)
time.sleep(600)
"""


def supervisor_of(out: Path) -> psutil.Process:
    (found,) = [
        process
        for process in psutil.process_iter()
        if process.status() != psutil.STATUS_ZOMBIE and process.cmdline()[-1:] == [str(out)]
    ]
    return found


def test_death_of_the_slot_ends_the_trial(tmp_path: Path):
    code = SLOT.format(tests=str(Path(__file__).parent), out=str(tmp_path / "out"), program=TREE)
    slot = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert slot.stdout is not None
    assert slot.stdout.readline() == "started\n"
    wait_until(lambda: len(left(tmp_path)) == 2)
    for child in psutil.Process(slot.pid).children():
        child.kill()  # Ray does this to the children of a worker that it ends
    slot.kill()
    slot.wait()
    slot.stdout.close()
    wait_until(lambda: left(tmp_path) == [])
    wait_until((tmp_path / "out/exit.json").exists)


def test_death_of_the_supervisor_ends_the_whole_tree_and_loses_the_run(tmp_path: Path):
    out = tmp_path / "out"
    attempt = Run(spec(TREE), out=out, data="", env=dict(os.environ), slot="here:cpu0")
    wait_until(lambda: len(left(tmp_path)) == 2)
    supervisor_of(out).kill()
    result = attempt.wait()
    assert result.outcome is Outcome.LOST
    assert "it was killed" in result.reason
    assert left(tmp_path) == []


def test_a_supervisor_that_fails_says_why(tmp_path: Path):
    result = run(tmp_path, "import os; os.mkdir('../exit.json.tmp')")
    assert result.outcome is Outcome.LOST
    assert "IsADirectoryError" in result.reason


def test_a_command_that_is_not_there_is_the_machine_s_fault_and_is_named(tmp_path: Path):
    result = run(tmp_path, "", command=("no-such-program",))
    assert result.outcome is Outcome.LOST
    assert "no-such-program" in result.reason


def test_a_trial_gets_an_environment_made_on_purpose(tmp_path: Path):
    inherited = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "64", "RAY_JOB_ID": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    program = (
        "import json, os, signal; print(json.dumps(dict(os.environ))); print(os.nice(0))\n"
        "print(len(signal.pthread_sigmask(signal.SIG_BLOCK, ())), signal.getsignal(signal.SIGTERM).name)"
    )
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as in a worker of Ray's
    try:
        changed = spec(program, threads=3, niceness=os.nice(0) + 7)
        Run(changed, out=tmp_path / "out", data="", env=inherited, slot="here:cpu0").wait()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    printed, nice, signals = (tmp_path / "out/run.log").read_text().splitlines()
    env = json.loads(printed)
    assert {name: env.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} == dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "3"
    )
    assert not {"RAY_JOB_ID", "PYTHONDONTWRITEBYTECODE"} & env.keys()
    assert float(env["RAYSEARCH_SPAWNED_AT"]) == pytest.approx(time.time(), abs=60)
    assert int(nice) == os.nice(0) + 7
    assert signals == "0 SIG_DFL"


def test_neither_a_trial_nor_a_file_that_it_leaves_has_a_secret(tmp_path: Path):
    secrets = {"OPENAI_API_KEY": "sk-hidden-1", "HF_TOKEN": "hf-hidden-2", "INDEX": "https://me:hidden-3@host/simple"}
    needed = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "HF_HOME": "/hf",
        "CUDA_VISIBLE_DEVICES": "",
        "PLAIN": "p",
    }
    program = """
import json, os, pathlib
parent = pathlib.Path(f"/proc/{os.getppid()}/environ").read_bytes().decode()
print(json.dumps([dict(os.environ), parent]))
print("score: 1")
"""
    asked = spec(program, withheld=("MY_MODEL",))
    env = needed | secrets | {"MY_MODEL": "hidden-4"}
    result = Run(asked, out=tmp_path / "out", data="", env=env, slot="here:cpu0").wait()
    assert result.outcome is Outcome.MEASURED
    seen, parent = json.loads((tmp_path / "out/run.log").read_text().splitlines()[0])
    assert needed.items() <= seen.items()
    assert not {*secrets, "MY_MODEL"} & seen.keys()
    assert "PLAIN=p" in parent  # its supervisor has the same environment
    assert "hidden" not in parent
    left_behind = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert tmp_path / "out/order.json" in left_behind
    assert [path for path, content in left_behind.items() if b"hidden" in content] == []


HALF = """
import json, sys
json.dump({{'score': 1.0, 'outcome': {outcome!r}, 'reason': '1.2 above 1.1', 'halfway_bpb': {half}}},
          open('../result.json', 'w'))
sys.exit({code})
"""


def test_a_futile_trial_says_where_it_stood_half_way(tmp_path: Path):
    result = run(tmp_path, HALF.format(outcome="futile", half=1.25, code=5))
    assert (result.outcome, result.reason, result.halfway) == (Outcome.FUTILE, "1.2 above 1.1", 1.25)
    assert run(tmp_path, HALF.format(outcome="futile", half="None", code=5)).halfway is None


def test_a_measured_trial_keeps_its_half_way_value_apart_from_its_facts(tmp_path: Path):
    result = run(tmp_path, HALF.format(outcome="measured", half=1.25, code=0))
    assert (result.outcome, result.halfway) == (Outcome.MEASURED, 1.25)
    assert result.measurement is not None
    assert set(result.measurement.facts) == {"score"}


def test_a_command_that_ends_with_5_for_reasons_of_its_own_has_crashed(tmp_path: Path):
    result = run(tmp_path, "import sys; print('no tests ran'); sys.exit(5)")
    assert (result.outcome, result.reason, result.halfway) == (Outcome.CRASHED, "no tests ran", None)


def test_numbers_that_the_journal_could_not_hold_are_left_out(tmp_path: Path):
    program = """
import json, math
parts = {'train': math.inf, 'eval': 3}
result = {'score': 1.0, 'mfu_percent': math.nan, 'steps': 10**400, 'fine': 2, 'seconds': parts}
json.dump(result, open('../result.json', 'w'))
"""
    result = run(tmp_path, program)
    assert result.measurement == Measurement(
        1.0,
        wall_s=result.measurement.wall_s if result.measurement else 0,
        parts_s={"eval": 3.0},
        facts={"score": 1.0, "fine": 2.0},
    )


def test_files_are_returned_whole_and_only_a_log_by_its_end(tmp_path: Path):
    (tmp_path / "run.log").write_bytes(b"x" * 2**21)
    (tmp_path / "documents.npz").write_bytes(bytes(range(256)) * 2**13)
    files = returned_files(tmp_path)
    assert {name: len(content) for name, content in files.items()} == {"run.log": 2**20, "documents.npz": 2**21}


def test_sweep_ends_what_earlier_sessions_and_its_own_slot_have_left_and_nothing_else(tmp_path: Path):
    def sleeper(study: str, session: str, slot: str) -> subprocess.Popen[bytes]:
        env = os.environ | {STUDY_MARK: study, SESSION_MARK: session, SLOT_MARK: slot}
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=env, cwd=tmp_path)

    old, other_slot, foreign = sleeper(STUDY, "s0", "a"), sleeper(STUDY, "s1", "b"), sleeper("other", "s0", "a")
    own_slot = sleeper(STUDY, "s1", "a")
    try:
        wait_until(lambda: len(left(tmp_path)) == 4)
        assert sweep(STUDY, session="s1") == [old.pid]
        assert old.wait(5) == -signal.SIGKILL
        assert sweep(STUDY, session="s1", slot="a") == [own_slot.pid]
        assert own_slot.wait(5) == -signal.SIGKILL
        assert other_slot.poll() is None
        assert foreign.poll() is None
    finally:
        for process in (old, other_slot, foreign, own_slot):
            process.kill()
            process.wait()


def wait_until(holds, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
