"""Processes in waiting, for real: they become trials like any other, and nothing of them is left."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_runner import left, wait_until
from trainer_kit import TINY, make_data, program

from raysearch import leftovers, objective, supervisor
from raysearch.model import Outcome
from raysearch.nursery import Ahead, Nursery
from raysearch.runner import SESSION_MARK, SLOT_MARK, STUDY_MARK, Run, RunResult, RunSpec, sweep, trial_environment

WAITING = ("{python}", "-P", "-m", "trainer.harness", "--wait")
OPTIONS = ("--budget-tokens", "4096", "--device", "cpu", "--threads", "1")
SLOT = "here:gpu0"
STUDY = f"nursery-{os.getpid()}"  # so that two runs of the tests do not sweep one another


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


class Bench:
    """A slot with its nursery; its session is its own, so that its processes can be told from all others."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.session = f"nursery-{folder.name}-{os.getpid()}"
        self.env = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        self.env["HF_TOKEN"] = "hidden"
        self.nursery = Nursery()

    def spec(self, trial: str, source: str = "", options: tuple[str, ...] = OPTIONS, **changes: Any) -> RunSpec:
        fields: dict[str, Any] = {
            "trial_id": trial,
            "attempt": 1,
            "study": STUDY,
            "session": self.session,
            "files": {"train.py": source or program(**TINY)},
            "command": (*objective.TRAINER.command, *options),
            "metric": "val_bpb",
            "seed": 3,
            "startup_limit_s": 60.0,
            "total_limit_s": 60.0,
            "threads": 1,
            "niceness": 1,
            "waiting": WAITING,
        }
        return RunSpec(**(fields | changes))

    def start(self, spec: RunSpec) -> Run:
        out = self.folder / spec.trial_id
        return Run(spec, out=out, data=str(self.data), env=self.env, slot=SLOT, nursery=self.nursery)

    def run(self, spec: RunSpec) -> RunResult:
        result = self.start(spec).wait()
        assert left(self.folder) == []
        return result

    def result(self, trial: str) -> dict[str, Any]:
        return json.loads((self.folder / trial / "result.json").read_text())

    def ahead(self, spec: RunSpec) -> Ahead:
        command = tuple(sys.executable if argument == "{python}" else argument for argument in spec.waiting)
        return Ahead(command, trial_environment(self.env, spec, SLOT), spec.niceness)

    def prepare(self, spec: RunSpec, *, loaded: bool = True) -> psutil.Process:
        """Has a process wait for such a trial; returns it, when it has loaded all that it loads."""
        self.nursery.prepare(self.ahead(spec))
        wait_until(lambda: len(self.spares()) == 1)
        (spare,) = self.spares()
        if loaded:  # it reads its order when it is done: then it sleeps in a pipe
            wait_until(lambda: "torch" in maps(spare) and asleep(spare), 60)
        return spare

    def processes(self) -> list[psutil.Process]:
        pids = leftovers.marked(lambda marks: marks.get(SESSION_MARK) == self.session)
        return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]

    def spares(self) -> list[psutil.Process]:
        """Trials' processes that wait, without their supervisors."""
        found: list[psutil.Process] = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # a supervisor's starter is gone in a moment
                command = process.cmdline()
                if "--wait" in command and "-P" in command and process.cwd() == "/":
                    found.append(process)
        return found

    def supervisor(self) -> psutil.Process:
        (found,) = [
            process for process in self.processes() if process.cmdline()[-2:] == [supervisor.__file__, "--wait"]
        ]
        return found


def maps(process: psutil.Process) -> str:
    return "\n".join(entry.path for entry in process.memory_maps())


def asleep(process: psutil.Process) -> bool:
    before = process.cpu_times()
    time.sleep(0.2)
    return process.cpu_times() == before


@pytest.fixture
def bench(tmp_path: Path, data: Path) -> Iterator[Bench]:
    found = Bench(tmp_path, data)
    yield found
    found.nursery.close()
    assert found.processes() == []


def test_a_trial_of_a_process_in_waiting_is_like_any_other_but_for_its_import(bench: Bench):
    plain = bench.run(bench.spec("plain", waiting=()))
    spare = bench.prepare(bench.spec("served"))
    waited_until = time.time()
    served = bench.run(bench.spec("served"))
    assert (plain.outcome, served.outcome) == (Outcome.MEASURED, Outcome.MEASURED)
    assert plain.measurement is not None
    assert served.measurement is not None
    assert plain.measurement.value == served.measurement.value
    assert plain.measurement.facts["import_ahead_seconds"] == 0
    logs = [(bench.folder / trial / "run.log").read_text() for trial in ("plain", "served")]
    assert [line.partition(" ")[0] for line in logs[0].splitlines()] == [
        line.partition(" ")[0] for line in logs[1].splitlines()
    ]
    assert not spare.is_running()
    result, wall_s = bench.result("served"), served.measurement.wall_s
    ended = json.loads((bench.folder / "served/exit.json").read_text())
    assert ended["spawned_at"] >= waited_until, "the trial's clock begins with its order"
    assert result["total_seconds"] <= wall_s
    assert sum(result["seconds"].values()) <= wall_s
    assert result["seconds"]["import"] < result["import_ahead_seconds"] / 10


def test_the_next_process_waits_when_a_trial_trains_and_serves_one_trial(bench: Bench):
    long = bench.spec("first", options=("--budget-s", "3", "--device", "cpu", "--threads", "1"))
    assert bench.run(long).outcome is Outcome.MEASURED
    assert bench.result("first")["import_ahead_seconds"] == 0
    (spare,) = bench.spares()
    assert spare.nice() == 1
    assert bench.run(dataclasses.replace(long, trial_id="second", seed=4)).outcome is Outcome.MEASURED
    assert bench.result("second")["import_ahead_seconds"] > 0
    assert bench.result("second")["seed"] == 4
    assert not spare.is_running()
    (third,) = bench.spares()
    assert third.pid != spare.pid


def test_a_process_in_waiting_waits_with_the_marks_and_threads_of_a_trial_and_can_be_swept(bench: Bench):
    spare = bench.prepare(bench.spec("never", threads=2))
    env = spare.environ()
    marks = {STUDY_MARK: STUDY, SESSION_MARK: bench.session, SLOT_MARK: SLOT}
    assert {name: env.get(name) for name in marks} == marks
    assert env["OMP_NUM_THREADS"] == "2"
    assert "HF_TOKEN" not in env
    assert "HF_TOKEN" not in bench.supervisor().environ()
    waiting = {process.pid for process in bench.processes()}
    assert set(sweep(STUDY, session=bench.session, slot=SLOT)) == waiting
    assert bench.run(bench.spec("after", threads=2)).outcome is Outcome.MEASURED


def test_a_trial_that_asks_while_all_is_still_being_loaded_gets_the_rest_of_the_import_counted(bench: Bench):
    bench.prepare(bench.spec("early"), loaded=False)
    assert bench.run(bench.spec("early")).outcome is Outcome.MEASURED
    result = bench.result("early")
    assert result["seconds"]["import"] + result["seconds"]["start"] > 0.1


@pytest.mark.parametrize("victim", ["process", "supervisor"])
def test_a_process_in_waiting_that_died_costs_no_trial(bench: Bench, victim: str):
    spare = bench.prepare(bench.spec("served"))
    (spare if victim == "process" else bench.supervisor()).kill()
    wait_until(lambda: not spare.is_running() or spare.status() == psutil.STATUS_ZOMBIE)
    assert bench.run(bench.spec("served")).outcome is Outcome.MEASURED
    assert bench.result("served")["import_ahead_seconds"] == 0
    said = (bench.folder / "served/run.log").read_text()
    assert ("gone, exit code -9" in said) == (victim == "process")


def test_a_process_in_waiting_that_cannot_be_started_leaves_the_word_to_the_trial(bench: Bench):
    spec = bench.spec("served", waiting=("no-such-program", "--wait"), files={"score.py": "print('val_bpb: 1')"})
    spec = dataclasses.replace(spec, command=("{python}", "score.py"))
    bench.nursery.prepare(bench.ahead(spec))
    assert bench.run(spec).outcome is Outcome.MEASURED


@pytest.mark.parametrize("changes", [{"threads": 2}, {"niceness": 2}], ids=["threads", "niceness"])
def test_a_trial_of_another_kind_does_not_get_it_and_it_is_ended(bench: Bench, changes: dict[str, Any]):
    spare = bench.prepare(bench.spec("served"))
    assert bench.run(bench.spec("served", **changes)).outcome is Outcome.MEASURED
    assert bench.result("served")["import_ahead_seconds"] == 0
    assert not spare.is_running()


def test_limits_count_from_the_order_and_end_the_whole_tree(bench: Bench):
    hangs = "import subprocess, sys, time\n\ndef train(run):\n"
    hangs += "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    hangs += "    time.sleep(600)\n"
    spec = bench.spec("hangs", hangs, total_limit_s=3.0)
    bench.prepare(spec)
    time.sleep(3.5)  # longer than the trial may last
    result = bench.run(spec)
    assert (result.outcome, result.reason) == (Outcome.TIMED_OUT, "not done within 3 s in all")
    wall_s = json.loads((bench.folder / "hangs/exit.json").read_text())["wall_s"]
    assert 3 <= wall_s < 8


def test_a_trial_can_be_cancelled_before_its_process_has_taken_the_order(bench: Bench):
    bench.prepare(bench.spec("cancelled"), loaded=False)
    attempt = bench.start(bench.spec("cancelled", "import time; time.sleep(600)"))
    threading.Timer(0.1, attempt.cancel).start()
    assert attempt.wait().outcome is Outcome.CANCELLED


def test_a_crash_is_told_as_that_of_any_trial(bench: Bench):
    crashes = (
        "import os, sys\nprint(sys.stdin.read() == '', os.getcwd())\n\ndef train(run):\n    raise RuntimeError('no')\n"
    )
    bench.prepare(bench.spec("crashes"))
    result = bench.run(bench.spec("crashes", crashes))
    assert (result.outcome, result.reason) == (Outcome.CRASHED, "RuntimeError: no")
    log = (bench.folder / "crashes/run.log").read_text().splitlines()
    assert log[0] == f"True {bench.folder / 'crashes/work'}"


def test_death_of_the_supervisor_of_a_served_trial_loses_the_run_and_ends_the_tree(bench: Bench):
    spec = bench.spec("orphan", "import time\n\ndef train(run):\n    time.sleep(600)\n")
    bench.prepare(spec)
    attempt = bench.start(spec)
    wait_until(lambda: len(left(bench.folder)) == 1)
    bench.supervisor().kill()
    assert attempt.wait().outcome is Outcome.LOST
    wait_until(lambda: left(bench.folder) == [])  # killed it is; torch's memory takes a moment to be given back


OWNER = """
import os, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_nursery import Bench
bench = Bench(Path({folder!r}), Path({folder!r}))
bench.session = {session!r}
bench.prepare(bench.spec("never"))
print("waits", flush=True)
time.sleep(600)
"""


def test_a_slot_that_is_killed_takes_its_process_in_waiting_along(bench: Bench):
    code = OWNER.format(tests=str(Path(__file__).parent), folder=str(bench.folder), session=bench.session)
    slot = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert slot.stdout is not None
    assert slot.stdout.readline() == "waits\n"
    assert len(bench.spares()) == 1
    slot.send_signal(signal.SIGKILL)
    slot.wait()
    slot.stdout.close()
    wait_until(lambda: bench.processes() == [])


def test_no_process_waits_for_ever(bench: Bench):
    code = f"import sys; sys.path.insert(0, {str(Path(supervisor.__file__).parent)!r}); import supervisor\n"
    code += "supervisor.WAIT_LIMIT_S = 1.0; supervisor.wait_and_supervise()"
    ahead = bench.ahead(bench.spec("never"))
    line = json.dumps({"command": ahead.command, "env": dict(ahead.env), "niceness": ahead.niceness})
    waits = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, env=dict(ahead.env))
    assert waits.stdin is not None
    waits.stdin.write(line + "\n")
    waits.stdin.flush()
    wait_until(lambda: len(bench.spares()) == 1)
    assert waits.wait(20) == 0
    waits.stdin.close()
    assert bench.processes() == []


def test_only_trials_of_the_bundled_trainer_on_a_gpu_have_one():
    preset = objective.load_presets()["h100"]
    budget = objective.Budget(seconds=300)

    def waiting(device: str, of: objective.Objective = objective.TRAINER) -> tuple[str, ...]:
        return objective.plan_trial(of, preset, budget, device=device, threads=0, holdout=False).waiting

    assert waiting("cuda") == (*WAITING, "--compiler")
    assert waiting("cpu") == ()
    assert waiting("cuda", dataclasses.replace(objective.TRAINER, command=("{python}", "mine.py"))) == ()


@pytest.mark.slow
def test_a_process_in_waiting_has_loaded_what_a_first_compile_imports(bench: Bench):
    """Most of it: what is found out while compiling is loaded then."""
    compiles = "import sys, torch\n\ndef train(run):\n    before = set(sys.modules)\n"
    compiles += "    torch.compile(lambda x: (x * 2).sin().sum())(torch.ones(8, requires_grad=True)).backward()\n"
    compiles += "    print('torch modules:', sum(name.startswith('torch.') for name in set(sys.modules) - before))\n"
    counts: list[int] = []
    for waiting in ((), (*WAITING, "--compiler")):
        spec = bench.spec(f"compiles{len(waiting)}", compiles, waiting=waiting)
        if waiting:
            bench.prepare(spec)
        bench.run(spec)
        log = (bench.folder / spec.trial_id / "run.log").read_text()
        counts += [int(line.split()[-1]) for line in log.splitlines() if line.startswith("torch modules")]
    assert counts[0] > 300
    assert counts[1] < 50


@pytest.mark.gpu
def test_a_process_in_waiting_holds_nothing_of_the_gpu(bench: Bench):
    """The driver is opened by what it imports; a context would take hundreds of MB."""
    import pynvml

    def used_bytes() -> list[int]:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]

    pynvml.nvmlInit()
    before = used_bytes()
    bench.prepare(bench.spec("never", waiting=(*WAITING, "--compiler")))
    after = used_bytes()
    pynvml.nvmlShutdown()
    assert max(b - a for a, b in zip(before, after, strict=True)) < 100e6
