"""Slots on Ray: one actor a GPU, or CPU slots where there is no GPU. It decides nothing about trials.

The only `import ray` beside `proposers/tune.py`. Nothing is retried by Ray (`max_restarts=0, max_task_retries=0`): a
dead actor is reported as a lost run and a slot that left, and a new actor is made while its node is alive.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial)

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # trials set their own
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysearch import objective, profile
from raysearch.data import prepare
from raysearch.errors import UserError
from raysearch.executors import (
    Report,
    RunEnded,
    SlotFailed,
    SlotInfo,
    SlotJoined,
    SlotLeft,
    SlotProgress,
)
from raysearch.model import Outcome
from raysearch.profile import Hardware
from raysearch.runner import Run, RunResult, RunSpec, returned_files, sweep

OBJECT_STORE_BYTES = 100 * 2**20  # results are small, and the machine may be
NODES_EVERY_S = 5.0
PROGRESS_EVERY_S = 1.0
MAX_FAILURES = 3


@dataclass(frozen=True)
class SlotPlan:
    """What every slot of a study is told once.

    Attributes:
        study: Id of the study.
        session: Id of the coordinator's session.
        folder: The study's folder on the coordinator's machine.
        token: A file in it, by which a slot finds out whether it sees the same disk.
        preset: Name of the preset, or `auto` by hardware, or empty for objectives without presets.
        dataset: Named dataset, or empty for the preset's own choice.
        datasets: Datasets that were settled earlier, by preset.
    """

    study: str
    session: str
    folder: str
    token: str
    preset: str
    dataset: str
    datasets: dict[str, str]


class _Slot:
    """The actor: owns one device, runs one trial at a time, each in processes of its own."""

    def __init__(self, plan: SlotPlan, place: str, device: str, scratch: str) -> None:
        self._plan = plan
        self._place = place
        self._device = device
        self._scratch = Path(scratch)
        self._data = ""
        self._shares_disk = (Path(plan.folder) / plan.token).exists()
        self._run: Run | None = None

    def describe(self) -> SlotInfo:
        """Finds out what the slot is made of and sees to its data; takes long when data must be made first."""
        hardware = self._hardware()
        preset, data = "", None
        if self._plan.preset:
            presets = objective.load_presets()
            if self._plan.preset == "auto":
                chosen = objective.choose_preset(presets, device=hardware.device, memory_mb=hardware.memory_mb)
            else:
                chosen = objective.named_preset(presets, self._plan.preset)
            preset = chosen.name
            data = prepare(chosen, self._plan.datasets.get(preset) or self._plan.dataset or None)
            self._data = data.folder
        slot_id = f"{self._place}:{hardware.uuid[:12]}" if hardware.uuid else self._place
        return SlotInfo(slot_id, hardware, preset, data, self._shares_disk)

    def _hardware(self) -> Hardware:
        if self._device == "cpu":
            return profile.cpu()
        done = subprocess.run(
            [sys.executable, "-m", "raysearch.profile"], capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode != 0:
            raise UserError(f"the GPU of {self._place} cannot be read: {done.stderr.strip().splitlines()[-1:]}")
        found = [Hardware(**fields) for fields in json.loads(done.stdout)]
        if found[0].device != "cuda":
            raise UserError(f"{self._place} has no GPU that NVML shows; check the driver on that node")
        return found[0]

    def run(self, spec: RunSpec) -> RunResult:
        """Runs one attempt to its end."""
        out = Path(spec.out) if self._shares_disk else self._scratch / spec.trial_id
        env = dict(os.environ)
        if self._device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
        self._run = Run(spec, out=out, data=self._data, env=env)
        try:
            result = self._run.wait()
        finally:
            self._run = None
        if self._shares_disk:
            return result
        files = returned_files(out)
        shutil.rmtree(out, ignore_errors=True)
        return dataclasses.replace(result, files=files)

    def progress(self) -> dict[str, Any]:
        """What the trial in flight says of itself."""
        run = self._run
        return run.progress() if run else {}

    def cancel(self) -> None:
        """Ends the trial in flight."""
        run = self._run
        if run:
            run.cancel()


@ray.remote
def _sweep(study: str, session: str) -> list[int]:
    return sweep(study, session=session)


@dataclass
class _Actor:
    """An actor with its place in the cluster."""

    handle: Any
    place: str
    node: str
    device: str
    slot: SlotInfo | None = None
    running: RunSpec | None = None


class RayExecutor:
    """Slots on a Ray cluster, or on a Ray that it starts on this machine.

    Args:
        plan: What the slots are told.
        address: Of a cluster (`auto` for the one of this machine); None starts Ray here.
        device: `auto`, `cuda` or `cpu`.
        cpu_slots: CPU slots a machine; 0 for as many as it has cores.
        threads: CPU threads of a trial on a CPU slot.

    Raises:
        UserError: Ray cannot be reached or started.
    """

    def __init__(
        self, plan: SlotPlan, *, address: str | None, device: str = "auto", cpu_slots: int = 0, threads: int = 1
    ) -> None:
        self._plan = plan
        self._device = device
        self._cpu_slots = cpu_slots
        self._threads = threads
        self._actors: dict[str, _Actor] = {}  # by place
        self._pending: dict[Any, tuple[str, str]] = {}  # ref -> (what, place)
        self._failures: dict[str, int] = {}  # by place: how often an actor could not be set up there
        self._swept: set[str] = set()
        self._nodes_at = 0.0
        self._progress_at = 0.0
        self._connect(address)
        remote: Any = ray.remote
        self._slot_class = remote(concurrency_groups={"control": 2})(_Slot)

    def _connect(self, address: str | None) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "raysearch"}
        if address is None:
            cpus = (self._cpu_slots or os.cpu_count() or 1) * self._threads
            options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        else:
            options["address"] = address
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
            where = f"at {address!r}" if address else "on this machine"
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            remedy = "start it with `ray start --head`, or leave --address out" if address else "see /tmp/ray for logs"
            raise UserError(f"Ray is not reachable {where}: {said}; {remedy}") from None

    # ---- the protocol ----

    def start(self, slot_id: str, spec: RunSpec) -> None:
        """Starts an attempt on a free slot."""
        actor = self._by_slot(slot_id)
        if actor is None:
            raise UserError(f"slot {slot_id!r} is not there; it has just left")
        actor.running = spec
        self._pending[actor.handle.run.remote(spec)] = ("run", actor.place)

    def poll(self, timeout_s: float) -> list[Report]:
        """What happened since the last call."""
        now = time.monotonic()
        if now - self._nodes_at > NODES_EVERY_S:
            self._nodes_at = now
            self._match_nodes()
        if now - self._progress_at > PROGRESS_EVERY_S:
            self._progress_at = now
            self._ask_progress()
        refs = list(self._pending)
        if not refs:
            time.sleep(timeout_s)
            return []
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready and len(refs) > 1:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        reports: list[Report] = []
        for ref in ready:
            if ref in self._pending:  # a death earlier in this round may have settled it
                reports += self._settle(ref)
        return reports

    def cancel(self, trial_id: str) -> None:
        """Ends an attempt in flight."""
        for actor in self._actors.values():
            if actor.running and actor.running.trial_id == trial_id:
                actor.handle.cancel.options(concurrency_group="control").remote()

    def starting(self) -> int:
        """Slots that are being set up."""
        return sum(actor.slot is None for actor in self._actors.values())

    def close(self) -> None:
        """Ends all attempts and disconnects; a Ray that was started here is stopped."""
        runs = [ref for ref, (what, _) in self._pending.items() if what == "run"]
        for actor in self._actors.values():
            if actor.running:
                actor.handle.cancel.options(concurrency_group="control").remote()
        if runs:  # supervisors end their trees within their grace period
            ray.wait(runs, num_returns=len(runs), timeout=10)
        for actor in self._actors.values():
            ray.kill(actor.handle)
        ray.shutdown()

    # ---- nodes and actors ----

    def _match_nodes(self) -> None:
        """Makes the actors that are missing: a node may have come, an actor may have died."""
        nodes = [node for node in ray.nodes() if node["Alive"]]
        gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in nodes}
        use_gpus = self._device == "cuda" or (self._device == "auto" and any(gpus.values()))
        for node in nodes:
            if use_gpus:
                places = [
                    (f"{node['NodeManagerHostname']}:gpu{index}", "cuda") for index in range(gpus[node["NodeID"]])
                ]
            else:
                cpus = int(node["Resources"].get("CPU", 0)) // self._threads
                count = min(self._cpu_slots, cpus) if self._cpu_slots else cpus
                places = [(f"{node['NodeManagerHostname']}:cpu{index}", "cpu") for index in range(count)]
            if node["NodeID"] not in self._swept:
                self._swept.add(node["NodeID"])
                task: Any = _sweep.options(scheduling_strategy=_on(node["NodeID"]), num_cpus=0)
                self._pending[task.remote(self._plan.study, self._plan.session)] = ("sweep", "")
            for place, device in places:
                name = _unique(place, node["NodeID"], self._actors)
                if name not in self._actors and self._failures.get(name, 0) < MAX_FAILURES:
                    self._make_actor(name, node["NodeID"], device)

    def _make_actor(self, place: str, node: str, device: str) -> None:
        resources = {"num_gpus": 1, "num_cpus": 0} if device == "cuda" else {"num_cpus": self._threads}
        handle = self._slot_class.options(
            **resources, max_restarts=0, max_task_retries=0, scheduling_strategy=_on(node)
        ).remote(self._plan, place, device, str(Path(tempfile.gettempdir()) / f"raysearch-{self._plan.study}"))
        self._actors[place] = _Actor(handle, place, node, device)
        self._pending[handle.describe.remote()] = ("describe", place)

    def _ask_progress(self) -> None:
        asked = {place for what, place in self._pending.values() if what == "progress"}
        for actor in self._actors.values():
            if actor.running and actor.place not in asked:
                ref = actor.handle.progress.options(concurrency_group="control").remote()
                self._pending[ref] = ("progress", actor.place)

    def _by_slot(self, slot_id: str) -> _Actor | None:
        return next((actor for actor in self._actors.values() if actor.slot and actor.slot.id == slot_id), None)

    def _settle(self, ref: Any) -> list[Report]:
        what, place = self._pending.pop(ref)
        try:
            value: Any = ray.get(ref)
        except RayActorError as error:
            return self._bury(place, str(error).strip().splitlines()[0])
        except (RayError, UserError) as error:
            return self._failed(what, place, error)
        return self._said(what, self._actors[place], value) if place else []

    def _said(self, what: str, actor: _Actor, value: Any) -> list[Report]:
        if what == "describe":
            actor.slot = value
            return [SlotJoined(value)]
        if what == "run":
            spec, actor.running = actor.running, None
            return [RunEnded(spec.trial_id, spec.attempt, value)] if spec else []
        if not value or actor.slot is None or actor.running is None:
            return []
        return [SlotProgress(actor.slot.id, str(value.get("phase", "")), float(value.get("progress") or 0.0))]

    def _failed(self, what: str, place: str, error: Exception) -> list[Report]:
        """A method of an actor that lives raised: a slot that cannot be set up, or a bug on the worker's side."""
        cause = getattr(error, "cause", None) or error
        reason = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
        if what == "describe":
            actor = self._actors.pop(place)
            ray.kill(actor.handle)
            self._failures[place] = MAX_FAILURES  # the same machine would say the same again
            return [SlotFailed(place, reason)]
        if what == "run":
            actor = self._actors[place]
            spec, actor.running = actor.running, None
            if spec:
                return [RunEnded(spec.trial_id, spec.attempt, RunResult(Outcome.LOST, reason))]
        return []

    def _bury(self, place: str, reason: str) -> list[Report]:
        """An actor died, or its node: its run is lost, and its place is free for a new one."""
        actor = self._actors.pop(place, None)
        if actor is None:
            return []
        self._pending = {ref: entry for ref, entry in self._pending.items() if entry[1] != place}
        if actor.slot is None:
            self._failures[place] = self._failures.get(place, 0) + 1
        self._nodes_at = 0.0
        reports: list[Report] = []
        if actor.running:
            result = RunResult(Outcome.LOST, f"its slot died: {reason}")
            reports.append(RunEnded(actor.running.trial_id, actor.running.attempt, result))
        if actor.slot:
            reports.append(SlotLeft(actor.slot.id, reason))
        else:
            reports.append(SlotFailed(place, reason))
        return reports


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def _unique(place: str, node: str, actors: dict[str, _Actor]) -> str:
    """Two Ray nodes may share a host name (containers, tests): the second one's places carry its id."""
    taken = actors.get(place)
    return place if taken is None or taken.node == node else f"{place}@{node[:6]}"
