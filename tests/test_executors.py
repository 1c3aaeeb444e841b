"""One contract for every executor, on the toy and on a real Ray; then what only real processes can break."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from toy import Clock, ToyExecutor
from trainer_kit import TINY, make_data, program

from raysearch import leftovers
from raysearch.errors import UserError
from raysearch.executors import Executor, Report, RunEnded, SlotInfo, SlotJoined, SlotLeft, SlotProgress
from raysearch.executors.ray import RayExecutor
from raysearch.executors.ray_actors import SlotPlan, gauged
from raysearch.knobs import Value
from raysearch.model import Measurement, Outcome
from raysearch.objective import TRAINER
from raysearch.runner import SESSION_MARK, RunResult, RunSpec

PROGRAM = """
import os, signal, subprocess, sys, time
KIND = "ok"  # in {"ok", "crash", "hang"}: how it ends
if KIND == "crash":
    raise RuntimeError("no such layer")
if KIND == "hang":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    open("../progress.json", "w").write('{"phase": "train", "progress": 0.5}')
    time.sleep(600)
print("score: 0.5")
"""
LIMIT_S = 60.0


def toy_result(spec: RunSpec, values: dict[str, Value]) -> RunResult:
    """What the toy says of the program above."""
    if values["KIND"] == "crash":
        return RunResult(Outcome.CRASHED, "RuntimeError: no such layer")
    if values["KIND"] == "hang":
        return RunResult(Outcome.TIMED_OUT, f"not done within {spec.total_limit_s:g} s in all")
    return RunResult(Outcome.MEASURED, "", Measurement(0.5, wall_s=20.0))


@dataclass
class Bench:
    """An executor with what it has reported."""

    executor: Executor
    folder: Path
    session: str = "session"
    slots: dict[str, SlotInfo] = field(default_factory=dict[str, SlotInfo])
    reports: list[Report] = field(default_factory=list[Report])
    limit_s: float = LIMIT_S

    def poll(self) -> None:
        for report in self.executor.poll(0.1):
            self.reports.append(report)
            if isinstance(report, SlotJoined):
                assert report.slot.id not in self.slots, "a slot joins once"
                self.slots[report.slot.id] = report.slot
            elif isinstance(report, SlotLeft):
                del self.slots[report.slot_id]

    def until(self, holds: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + self.limit_s
        while not (found := holds()):
            assert time.monotonic() < deadline, f"waited in vain; reports: {self.reports[-10:]}"
            self.poll()
        return found

    def spec(self, trial_id: str, kind: str = "ok", **changes: Any) -> RunSpec:
        plain = RunSpec(
            trial_id=trial_id,
            attempt=1,
            study=f"study-{os.getpid()}",
            session=self.session,
            files={"train.py": PROGRAM.replace('"ok"', f'"{kind}"', 1)},
            command=("{python}", "train.py"),
            metric="score",
            seed=0,
            startup_limit_s=0.0,
            total_limit_s=30.0,
            threads=1,
            niceness=5,
            out=str(self.folder / "trials" / trial_id),
        )
        return replace(plain, **changes)

    def ended(self, trial_id: str) -> RunResult:
        """Waits for the end of a run, which is reported once."""
        self.until(lambda: self._ends(trial_id))
        (result,) = self._ends(trial_id)
        return result

    def _ends(self, trial_id: str) -> list[RunResult]:
        return [
            report.result for report in self.reports if isinstance(report, RunEnded) and report.trial_id == trial_id
        ]

    def processes(self) -> list[psutil.Process]:
        """All of this executor's, trials and Ray's own."""
        pids = leftovers.marked(lambda marks: marks.get(SESSION_MARK) == self.session)
        return [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]

    def tree(self, trial_id: str) -> list[psutil.Process]:
        """The processes of a trial, without its supervisor."""
        return [process for process in self.processes() if cwd(process).endswith(f"/{trial_id}/work")]

    def supervisor(self, trial_id: str) -> psutil.Process:
        out = str(self.folder / "trials" / trial_id)
        (found,) = [process for process in self.processes() if process.cmdline()[-1:] == [out]]
        return found


def cwd(process: psutil.Process) -> str:
    try:
        return process.cwd()
    except psutil.Error:
        return ""


SECRETS = {"OPENAI_API_KEY": "sk-hidden", "MY_MODEL": "it-is-hidden"}


@pytest.fixture(scope="module")
def ray_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("study")
    (folder / ".token").write_text("study")
    plan = SlotPlan("study", "session", str(folder), ".token", "", "", {}, withheld=("MY_MODEL",))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        executor = RayExecutor(plan, address=None, device="cpu", cpu_slots=2)
        bench = Bench(executor, folder)
        yield bench
        assert {name: os.environ[name] for name in SECRETS} == SECRETS  # our own are as they were
        executor.close()
    assert bench.processes() == []


@pytest.fixture(params=["toy", "ray"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    if request.param == "ray":
        found: Bench = request.getfixturevalue("ray_bench")
        found.reports.clear()
    else:
        found = Bench(ToyExecutor(Clock(), behaviour=toy_result), tmp_path)
    found.until(lambda: len(found.slots) == 2)
    return found


# ---- Ray that is not there; first, because this process joins one below ----


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "nonsense", "ray://127.0.0.1:10001"])
def test_a_ray_that_is_not_reachable_is_said_quickly_in_one_line(tmp_path: Path, address: str):
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        RayExecutor(SlotPlan("study", "s", str(tmp_path), ".token", "", "", {}), address=address)
    assert time.monotonic() - started < 10
    assert address in str(error.value)
    assert "\n" not in str(error.value)
    assert "`ray start --head`" in str(error.value)


def test_auto_without_a_ray_of_this_machine_is_said_and_no_other_study_s_ray_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(UserError, match=r"no Ray was started on this machine; `ray start --head`"):
        RayExecutor(SlotPlan("study", "s", str(tmp_path), ".token", "", "", {}), address="auto")


# ---- the contract ----


def test_slots_join_and_then_none_is_starting(bench: Bench):
    assert len(bench.slots) == 2
    assert bench.executor.starting() == 0
    assert {slot.hardware.device for slot in bench.slots.values()} == {"cpu"}


def test_a_run_ends_with_its_measurement(bench: Bench):
    bench.executor.start(next(iter(bench.slots)), bench.spec("measured"))
    result = bench.ended("measured")
    assert result.outcome is Outcome.MEASURED
    assert result.measurement is not None
    assert result.measurement.value == 0.5


def test_a_crash_is_an_outcome_and_the_slot_lives(bench: Bench):
    bench.executor.start(next(iter(bench.slots)), bench.spec("crash", "crash"))
    result = bench.ended("crash")
    assert result.outcome is Outcome.CRASHED
    assert "no such layer" in result.reason
    assert len(bench.slots) == 2


def test_a_run_that_does_not_end_is_timed_out(bench: Bench):
    bench.executor.start(next(iter(bench.slots)), bench.spec("hang", "hang", total_limit_s=1.0))
    assert bench.ended("hang").outcome is Outcome.TIMED_OUT


def test_a_slot_runs_one_trial_after_another(bench: Bench):
    slot = next(iter(bench.slots))
    for number in range(3):
        bench.executor.start(slot, bench.spec(f"row{number}"))
        assert bench.ended(f"row{number}").outcome is Outcome.MEASURED


def test_slots_run_at_the_same_time(bench: Bench):
    one, two = bench.slots
    bench.executor.start(one, bench.spec("long", "hang", total_limit_s=8.0))
    bench.executor.start(two, bench.spec("short"))
    assert bench.ended("short").outcome is Outcome.MEASURED
    bench.executor.cancel("long")
    assert bench.ended("long").outcome is not Outcome.MEASURED


@pytest.mark.parametrize("wait_s", [0.0, 0.5], ids=["at once", "under way"])
def test_cancel_ends_a_run(bench: Bench, wait_s: float):
    name = f"cancelled{wait_s}"
    bench.executor.start(next(iter(bench.slots)), bench.spec(name, "hang"))
    time.sleep(wait_s)
    bench.executor.cancel(name)
    bench.executor.cancel("one that never was")
    assert bench.ended(name).outcome is Outcome.CANCELLED
    bench.executor.start(next(iter(bench.slots)), bench.spec(f"after {name}"))
    assert bench.ended(f"after {name}").outcome is Outcome.MEASURED


def test_a_slot_s_speed_is_measured_for_the_bundled_trainer_alone(bench: Bench):
    assert {slot.speed for slot in bench.slots.values()} == {None}


def test_a_speed_that_cannot_be_measured_is_none_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    broken = tmp_path / "python"
    for said, code in (("no JSON", 0), ('{"matmul_tflops": 0.1}', 0), ("", 1)):
        broken.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
        broken.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(broken))
        assert gauged("cpu", 1) is None
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    assert gauged("cpu", 1) is None


def test_a_slot_that_is_not_there_takes_nothing(bench: Bench):
    with pytest.raises(UserError, match="nowhere"):
        bench.executor.start("nowhere", bench.spec("never"))


# ---- real processes only ----


@pytest.fixture
def ray_slots(ray_bench: Bench) -> Bench:
    ray_bench.reports.clear()
    ray_bench.until(lambda: len(ray_bench.slots) == 2)
    return ray_bench


def kill_slots(bench: Bench) -> None:
    """Kills the processes of the slots' actors, as the kernel does when memory runs out."""
    actors = [process for process in bench.processes() if process.name().startswith("ray::Slot")]
    assert len(actors) == 2
    for actor in actors:
        actor.kill()


def test_a_slot_that_is_killed_loses_its_run_and_comes_back_under_its_name(
    ray_slots: Bench, capfd: pytest.CaptureFixture[str]
):
    before = dict(ray_slots.slots)
    busy = next(iter(before))
    ray_slots.executor.start(busy, ray_slots.spec("orphan", "hang"))
    ray_slots.until(lambda: len(ray_slots.tree("orphan")) == 2)
    kill_slots(ray_slots)
    result = ray_slots.ended("orphan")
    assert result.outcome is Outcome.LOST
    assert "its slot died" in result.reason
    ray_slots.until(lambda: sum(isinstance(report, SlotLeft) for report in ray_slots.reports) == 2)
    assert ray_slots.executor.starting() > 0
    ray_slots.until(lambda: ray_slots.slots == before)
    assert ray_slots.tree("orphan") == []
    ray_slots.executor.start(busy, ray_slots.spec("again"))
    assert ray_slots.ended("again").outcome is Outcome.MEASURED
    assert capfd.readouterr() == ("", ""), "Ray has a word to say"


def test_a_supervisor_that_is_killed_loses_its_run_and_the_slot_lives(ray_slots: Bench):
    slot = next(iter(ray_slots.slots))
    ray_slots.executor.start(slot, ray_slots.spec("alone", "hang"))
    ray_slots.until(lambda: len(ray_slots.tree("alone")) == 2)
    ray_slots.supervisor("alone").kill()
    assert ray_slots.ended("alone").outcome is Outcome.LOST
    assert ray_slots.tree("alone") == []
    ray_slots.executor.start(slot, ray_slots.spec("after"))
    assert ray_slots.ended("after").outcome is Outcome.MEASURED


@pytest.mark.parametrize("how", ["its disk takes nothing", "it loses run after run"])
def test_a_slot_that_cannot_run_trials_leaves_and_is_set_up_anew_after_a_while(
    ray_slots: Bench, monkeypatch: pytest.MonkeyPatch, how: str
):
    monkeypatch.setattr("raysearch.executors.ray.RETRY_S", 3.0)
    slot = next(iter(ray_slots.slots))
    if how == "its disk takes nothing":
        ray_slots.executor.start(slot, ray_slots.spec("nowhere", out="/dev/null/nowhere"))
        assert ray_slots.ended("nowhere").outcome is Outcome.LOST
    else:
        for name in ("first-loss", "second-loss"):
            assert slot in ray_slots.slots
            ray_slots.executor.start(slot, ray_slots.spec(name, command=("{python}", "-c", "raise SystemExit(2)")))
            assert ray_slots.ended(name).outcome is Outcome.LOST
    ray_slots.until(lambda: slot not in ray_slots.slots)
    ray_slots.until(lambda: slot in ray_slots.slots)
    ray_slots.executor.start(slot, ray_slots.spec(f"well-{len(how)}"))
    assert ray_slots.ended(f"well-{len(how)}").outcome is Outcome.MEASURED


def test_a_slot_reports_the_progress_of_its_trial(ray_slots: Bench):
    slot = next(iter(ray_slots.slots))
    ray_slots.executor.start(slot, ray_slots.spec("shown", "hang"))
    ray_slots.until(lambda: SlotProgress(slot, "train", 0.5) in ray_slots.reports)
    ray_slots.executor.cancel("shown")
    ray_slots.ended("shown")


def test_the_environment_of_a_trial_is_ours_and_not_that_of_a_ray_worker(ray_slots: Bench):
    program = "import json, os; print(json.dumps(dict(os.environ))); print(os.nice(0)); print('score: 1')"
    spec = ray_slots.spec("env", files={"train.py": program}, threads=2, niceness=os.nice(0) + 7)
    ray_slots.executor.start(next(iter(ray_slots.slots)), spec)
    assert ray_slots.ended("env").outcome is Outcome.MEASURED
    printed, nice, _ = (ray_slots.folder / "trials/env/run.log").read_text().splitlines()
    env = json.loads(printed)
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "2"
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert int(nice) == os.nice(0) + 7
    ours = {"RAYSEARCH_STUDY", "RAYSEARCH_SESSION", "RAYSEARCH_SLOT", "RAYSEARCH_SPAWNED_AT"}
    pythons = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES"}
    pythons |= {"PYTHONUNBUFFERED", "PYTHONHASHSEED", "LC_CTYPE"}
    added = {name for name, value in env.items() if os.environ.get(name) != value} - {"PYTEST_CURRENT_TEST"}
    assert added <= ours | pythons
    assert "PYTHONDONTWRITEBYTECODE" not in env


def test_no_process_of_our_own_ray_has_a_secret(ray_slots: Bench):
    ray_slots.executor.start(next(iter(ray_slots.slots)), ray_slots.spec("secretive", "hang"))
    ray_slots.until(lambda: len(ray_slots.tree("secretive")) == 2)
    processes = ray_slots.processes()
    assert len(processes) > 5  # Ray's own, slots, supervisor and trial
    assert [process.pid for process in processes if SECRETS.keys() & process.environ().keys()] == []
    ray_slots.executor.cancel("secretive")
    ray_slots.ended("secretive")
    files = [path for path in ray_slots.folder.rglob("*") if path.is_file()]
    assert [path for path in files if b"hidden" in path.read_bytes()] == []


def test_a_slot_that_does_not_see_the_folder_sends_the_files(ray_slots: Bench):
    token = ray_slots.folder / ".token"
    token.rename(token.with_suffix(".away"))
    try:
        kill_slots(ray_slots)
        ray_slots.until(lambda: [slot.shares_disk for slot in ray_slots.slots.values()] == [False, False])
        ray_slots.executor.start(next(iter(ray_slots.slots)), ray_slots.spec("far"))
        result = ray_slots.ended("far")
    finally:
        token.with_suffix(".away").rename(token)
    assert result.outcome is Outcome.MEASURED
    assert result.files["run.log"] == b"score: 0.5\n"
    assert not (ray_slots.folder / "trials/far").exists()


def in_waiting(bench: Bench) -> list[psutil.Process]:
    """Processes in waiting, without their supervisors."""
    return [process for process in bench.processes() if cwd(process) == "/" and "trainer.harness" in process.cmdline()]


def test_a_slot_has_a_process_wait_and_takes_it_along_when_it_is_killed(ray_slots: Bench, tmp_path: Path):
    """What is left here waits while the next test closes the executor."""
    slot, data = next(iter(ray_slots.slots)), str(make_data(tmp_path / "data"))

    def spec(trial_id: str, budget_s: str) -> RunSpec:
        command = tuple(data if argument == "{data}" else argument for argument in TRAINER.command)
        return ray_slots.spec(
            trial_id,
            files={"train.py": program(**TINY)},
            command=(*command, "--budget-s", budget_s, "--device", "cpu", "--threads", "1"),
            metric="val_bpb",
            waiting=(*TRAINER.command[:4], "--wait"),
        )

    ray_slots.executor.start(slot, spec("trains", "20"))
    ray_slots.until(lambda: in_waiting(ray_slots))
    kill_slots(ray_slots)
    assert ray_slots.ended("trains").outcome is Outcome.LOST
    ray_slots.until(lambda: len(ray_slots.slots) == 2 and not in_waiting(ray_slots))
    for trial_id in ("first", "served"):
        ray_slots.executor.start(slot, spec(trial_id, "2"))
        result = ray_slots.ended(trial_id)
        assert result.measurement is not None, result
        assert (result.measurement.facts["import_ahead_seconds"] > 0) == (trial_id == "served")
    assert len(in_waiting(ray_slots)) == 1


def test_close_ends_runs_in_flight_and_leaves_nothing(ray_slots: Bench):
    """The last one on this Ray."""
    for slot in ray_slots.slots:
        ray_slots.executor.start(slot, ray_slots.spec(f"last-{slot}", "hang"))
    ray_slots.until(lambda: all(len(ray_slots.tree(f"last-{slot}")) == 2 for slot in ray_slots.slots))
    ray_slots.executor.close()
    assert ray_slots.processes() == []
    assert psutil.Process().children(recursive=True) == []


DRIVER = """
import signal, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_executors import Bench
from raysearch.executors.ray import RayExecutor
from raysearch.executors.ray_actors import SlotPlan

signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
folder = Path({folder!r})
plan = SlotPlan("study", {session!r}, str(folder), ".token", preset="", dataset="", datasets={{}})
bench = Bench(RayExecutor(plan, address=None, device="cpu", cpu_slots=1), folder, {session!r})
bench.until(lambda: bench.slots)
bench.executor.start(next(iter(bench.slots)), bench.spec("held", "hang"))
bench.until(lambda: len(bench.tree("held")) == 2)
print("running", flush=True)
while True:
    bench.poll()
"""


def test_a_driver_takes_everything_along_when_it_is_killed_but_ctrl_c_alone_ends_no_trial(tmp_path: Path):
    """With a home that cannot be written and a TMPDIR that is too long for sockets, on the way."""
    (tmp_path / ".token").write_text("study")
    long_folder = tmp_path / ("long" * 20)
    long_folder.mkdir()
    session = f"driver-{os.getpid()}"
    bench = Bench(ToyExecutor(Clock()), tmp_path, session)
    code = DRIVER.format(tests=str(Path(__file__).parent), folder=str(tmp_path), session=session)
    env = os.environ | {"HOME": "/nonexistent", "TMPDIR": str(long_folder)}
    driver = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        process_group=0,  # as a shell does for what it starts in a terminal
    )
    assert driver.stdout is not None
    try:
        assert driver.stdout.readline() == "running\n"
        started = {process.pid for process in bench.processes()}
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.stdout.readline() == "interrupted\n"
        time.sleep(2.0)
        assert {process.pid for process in bench.processes()} >= started
        assert len(bench.tree("held")) == 2
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: bench.processes() == [])
    assert driver.stdout.read() == ""
    driver.stdout.close()
    assert not list(long_folder.iterdir())


def wait_until(holds: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
