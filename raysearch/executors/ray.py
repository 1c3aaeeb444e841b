"""Slots on Ray, the driver's side: an actor a GPU, or CPU slots where there is none. It decides nothing about trials.

The only `import ray` beside `ray_actors.py`, `proposers/tune.py` and `exporter.py`. Nothing is retried by Ray
(`max_restarts=0, max_task_retries=0`): a dead actor is reported as a lost run and a slot that left, and a new actor is
made while its node is alive.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial)

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # trials set their own
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray._private import worker as ray_worker
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raysearch import labels, leftovers
from raysearch.errors import UserError
from raysearch.executors import Report, RunEnded, SlotFailed, SlotInfo, SlotJoined, SlotLeft, SlotProgress
from raysearch.executors.ray_actors import Slot, SlotPlan, Store, said_by
from raysearch.joining import data_refusal
from raysearch.model import Outcome
from raysearch.runner import SESSION_MARK, STUDY_MARK, RunResult, RunSpec, sweep
from raysearch.secrecy import without_secrets

OBJECT_STORE_BYTES = 100 * 2**20  # results are small, and the machine may be
NODES_EVERY_S = 5.0
PROGRESS_EVERY_S = 1.0
MAX_FAILURES = 3
MAX_LOST = 2  # runs in a row of a slot that lives: one less than what makes a study give a trial up
RETRY_S = 30.0  # until a place is tried again whose disk was full, or which lost its runs
REACH_LIMIT_S = 5.0
ANSWER_LIMIT_S = 1.0
HEAD_PATIENCE_S = 30.0  # for a head that comes back with what it knew (Ray's fault tolerance with Redis)
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "raysearch"}
MAX_GIVERS = 3
CLOSE_LIMIT_S = 10.0  # supervisors end their trees within their grace periods, which are shorter
LONGEST_FOLDER = 40  # Ray puts sockets into it, under names of 63 to 67 characters, and a socket's path has at most 107

_SETTING_UP = ("describe", "obtain")
_TOKEN = secrets.token_hex(32)  # of the Ray that is started here: without one Ray writes one into the home folder


def _say_nothing(*_args: Any, **_options: Any) -> None:
    pass


# Ray prints deaths of workers to stdout whatever `log_to_driver` says; here they are reports of `poll`.
ray_worker.print_to_stdstream = _say_nothing


class _LocalRay:
    """A Ray of this process's own. However this process ends, its Ray and the trials on it end too, and leave no file.

    A helper waits for the end behind a pipe: Ray's own agents outlive a killed driver by a minute.
    """

    def __init__(self, plan: SlotPlan, cpus: int, metrics_port: int | None) -> None:
        self._folder = tempfile.mkdtemp(prefix="raysearch-", dir=_short_folder())
        self._helper = subprocess.Popen(
            [sys.executable, "-I", "-S", leftovers.__file__, SESSION_MARK, plan.session, self._folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        settings: dict[str, str | None] = {
            STUDY_MARK: plan.study,  # every process of this Ray inherits these two
            SESSION_MARK: plan.session,
            "SPT_NOENV": "1",  # and keeps them: the titles of Ray's processes are not written over the environment
            "RAY_memory_monitor_refresh_ms": "0",  # it would end the slot, where the kernel ends the trial
        }
        try:
            with _environment(_secrets(plan.withheld) | settings | _token()):
                ray.init(
                    address="local",  # whatever RAY_ADDRESS says
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _temp_dir=self._folder,
                    _metrics_export_port=metrics_port,
                    **QUIET,
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        ray.shutdown()
        assert self._helper.stdin is not None
        self._helper.stdin.close()
        self._helper.wait()


@dataclass
class _Actor:
    """An actor with its place in the cluster."""

    handle: Any
    place: str
    node: str
    device: str
    slot: SlotInfo | None = None
    running: RunSpec | None = None
    lost: int = 0  # runs in a row, while it lived
    lacks: str = ""  # the preset whose data its machine does not have
    obtains: bool = False  # it was told to get them


class RayExecutor:
    """Slots on a Ray cluster, or on a Ray that it starts on this machine.

    Args:
        plan: What the slots are told.
        address: Of a cluster (`auto` for the one of this machine); None starts Ray here.
        device: `auto`, `cuda` or `cpu`.
        cpu_slots: CPU slots a machine; 0 for as many as it has cores.
        threads: CPU threads of a trial on a CPU slot.
        metrics_port: Where a Ray that is started here shows metrics; None for any that is free.

    Raises:
        UserError: Ray cannot be reached or started.
    """

    def __init__(
        self,
        plan: SlotPlan,
        *,
        address: str | None,
        device: str = "auto",
        cpu_slots: int = 0,
        threads: int = 1,
        metrics_port: int | None = None,
    ) -> None:
        self._plan = dataclasses.replace(plan, datasets=dict(plan.datasets), manifests=dict(plan.manifests))
        self._device = device
        self._cpu_slots = cpu_slots
        self._threads = threads
        self._actors: dict[str, _Actor] = {}  # by place
        self._pending: dict[Any, tuple[str, _Actor]] = {}  # ref -> (method, actor)
        self._hosts: dict[str, str] = {}  # by node
        self._labels: dict[str, tuple[str, int]] = {}  # by node: what it says that it is, and its GPUs
        self._failures: dict[tuple[str, str], int] = {}  # by node and place: how often it could not be set up there
        self._retry_at: dict[str, float] = {}  # by place: when what was wrong there may have passed
        self._nodes_at = -math.inf
        self._progress_at = 0.0
        self._has_asked = False
        self._unmade: set[str] = set()  # presets whose data a slot could not make: the others need not wait
        self._turns = itertools.count(1)
        self._store: Any = None
        self._local: _LocalRay | None = None
        if address is None:
            sweep(plan.study, session=plan.session)  # before anything of a killed session is read or run again
            self._local = _started(plan, (cpu_slots or _usable_cores()) * threads, metrics_port)
        else:
            _join(address)
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._head, self._silent_at = (host.strip("[]"), int(port)), 0.0
        remote: Any = ray.remote
        self._slot_class = remote(concurrency_groups={"control": 2, "give": 1, "fetch": 1})(Slot)
        self._store_class = remote(concurrency_groups={"give": 1})(Store)

    # ---- the protocol ----

    def start(self, slot_id: str, spec: RunSpec) -> None:
        """Starts an attempt on a free slot.

        Raises:
            UserError: The slot has left.
        """
        actor = next((actor for actor in self._actors.values() if actor.slot and actor.slot.id == slot_id), None)
        if actor is None:
            raise UserError(f"slot {slot_id!r} is not there; it has just left")
        actor.running = spec
        self._pending[actor.handle.run.remote(spec)] = ("run", actor)

    def poll(self, timeout_s: float) -> list[Report]:
        """What happened since the last call; waits up to `timeout_s` for something to happen.

        Raises:
            UserError: Ray itself is gone.
        """
        try:
            return self._poll(timeout_s)
        except (RayError, ConnectionError, RuntimeError) as error:
            raise UserError(f"Ray is gone: {said_by(error)}; start the study again, it goes on where it was") from None

    def cancel(self, trial_id: str) -> None:
        """Ends an attempt in flight."""
        for actor in self._actors.values():
            if actor.running and actor.running.trial_id == trial_id:
                call = actor.handle.cancel.options(concurrency_group="control")
                call.remote(trial_id, actor.running.attempt)

    def want(self, slots: Mapping[str, int]) -> None:
        """Asks Ray's autoscaler for nodes with so many slots of each kind, by their label `raysearch/profile`.

        Where nobody starts nodes it changes nothing. Version 1 of the autoscaler looks at GPUs and not at labels.
        """
        one = {slug: {"CPU": self._threads} if slug == "cpu" else {"GPU": 1} for slug in slots}
        asked = [(one[slug], {labels.PROFILE: slug}) for slug, count in slots.items() for _ in range(count)]
        if asked or self._has_asked:
            self._has_asked = bool(asked)
            request_resources(
                bundles=[bundle for bundle, _ in asked], bundle_label_selectors=[selector for _, selector in asked]
            )

    def starting(self) -> int:
        """Slots that are being set up."""
        return sum(actor.slot is None for actor in self._actors.values())

    def close(self) -> None:
        """Ends all attempts and disconnects; a Ray that was started here is stopped."""
        try:
            self.want({})  # or the autoscaler keeps the nodes
            runs = [ref for ref, (method, _) in self._pending.items() if method == "run"]
            for actor in self._actors.values():
                if actor.running:
                    self.cancel(actor.running.trial_id)
            if runs:
                ray.wait(runs, num_returns=len(runs), timeout=CLOSE_LIMIT_S, fetch_local=False)
            for handle in [*(actor.handle for actor in self._actors.values()), *filter(None, [self._store])]:
                ray.kill(handle)
        except (RayError, ConnectionError, RuntimeError):
            pass  # Ray is gone already, and the slots with it
        finally:
            self._actors.clear()
            self._pending.clear()
            if self._local:
                self._local.close()
            else:
                ray.shutdown()

    # ---- nodes and actors ----

    def _poll(self, timeout_s: float) -> list[Report]:
        now = time.monotonic()
        if now - self._nodes_at > NODES_EVERY_S and self._head_answers():
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
        self._supply()
        if self._nodes_at == -math.inf and self._head_answers():  # an actor died
            self._match_nodes()  # now: a slot that comes back counts as starting, and not as gone
        return reports

    def _head_answers(self) -> bool:
        """Whether Ray's head is there. Ray itself would wait a minute for it, and then end this process.

        Raises:
            RuntimeError: It has not been there for too long.
        """
        self._nodes_at = time.monotonic()
        try:
            socket.create_connection(self._head, timeout=ANSWER_LIMIT_S).close()
        except OSError:
            self._silent_at = self._silent_at or self._nodes_at
            if self._nodes_at - self._silent_at > HEAD_PATIENCE_S:
                where = ":".join(map(str, self._head))
                raise RuntimeError(f"its head at {where} has not answered for {HEAD_PATIENCE_S:g} s") from None
            return False
        self._silent_at = 0.0
        return True

    def _match_nodes(self) -> None:
        """Makes the actors that are missing: a node may have come, an actor may have died."""
        self._nodes_at = time.monotonic()
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if self._local and not nodes:
            raise RuntimeError("its node on this machine died")
        self._name_hosts(nodes)
        self._labels = {
            node["NodeID"]: (node["Labels"].get(labels.PROFILE, ""), int(node["Resources"].get("GPU", 0)))
            for node in nodes
        }
        use_gpus = self._device == "cuda" or (
            self._device == "auto" and any(node["Resources"].get("GPU", 0) for node in nodes)
        )
        for node in nodes:
            for place, device in self._places(node, use_gpus=use_gpus):
                usable = self._failures.get((node["NodeID"], place), 0) < MAX_FAILURES
                waits = self._retry_at.get(place, -math.inf) > self._nodes_at
                if usable and not waits and place not in self._actors:
                    self._make_actor(place, node["NodeID"], device)

    def _name_hosts(self, nodes: list[dict[str, Any]]) -> None:
        """By host name; two Ray nodes may share one (containers, tests): the second one's has its id behind it."""
        alive = {node["NodeID"] for node in nodes}
        self._hosts = {node: host for node, host in self._hosts.items() if node in alive}
        for node in nodes:
            name = node["NodeManagerHostname"]
            taken = name in self._hosts.values()
            self._hosts.setdefault(node["NodeID"], f"{name}@{node['NodeID'][-6:]}" if taken else name)

    def _places(self, node: Mapping[str, Any], *, use_gpus: bool) -> list[tuple[str, str]]:
        host, resources = self._hosts[node["NodeID"]], node["Resources"]
        if use_gpus:
            return [(f"{host}:gpu{index}", "cuda") for index in range(int(resources.get("GPU", 0)))]
        fitting = int(resources.get("CPU", 0)) // self._threads
        count = min(self._cpu_slots, fitting) if self._cpu_slots else fitting
        return [(f"{host}:cpu{index}", "cpu") for index in range(count)]

    def _make_actor(self, place: str, node: str, device: str) -> None:
        resources = {"num_gpus": 1, "num_cpus": 0} if device == "cuda" else {"num_cpus": self._threads}
        there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        make = self._slot_class.options(**resources, max_restarts=0, max_task_retries=0, scheduling_strategy=there)
        actor = _Actor(make.remote(self._plan, self._hosts[node], place, device, self._threads), place, node, device)
        self._actors[place] = actor
        self._pending[actor.handle.describe.remote()] = ("describe", actor)

    def _ask_progress(self) -> None:
        asked = [actor.place for method, actor in self._pending.values() if method == "progress"]
        for actor in self._actors.values():
            if actor.slot and actor.place not in asked:  # of an idle one too: so its death is noticed
                ref = actor.handle.progress.options(concurrency_group="control").remote()
                self._pending[ref] = ("progress", actor)

    # ---- what actors say ----

    def _settle(self, ref: Any) -> list[Report]:
        method, actor = self._pending.pop(ref)
        try:
            value: Any = ray.get(ref)
        except RayActorError as error:
            return self._bury(actor, said_by(error))
        except (RayError, UserError) as error:
            return self._raised(method, actor, getattr(error, "cause", None) or error)
        if method in _SETTING_UP:
            return self._described(actor, value)
        if method == "run":
            return self._came_back(actor, value)
        if method == "progress" and value and actor.slot and actor.running:
            return [SlotProgress(actor.slot.id, str(value.get("phase", "")), _fraction(value.get("progress")))]
        return []

    def _described(self, actor: _Actor, found: SlotInfo) -> list[Report]:
        """A slot is set up; the first one of a preset settles the data for all."""
        plan, data = self._plan, found.data
        if found.preset and not data:
            actor.lacks = found.preset
            return []
        if data and data.dataset != plan.datasets.setdefault(found.preset, data.dataset):
            self._remove(actor)  # both made their choice at the same time; it makes the settled data now
            self._nodes_at = -math.inf
            return []
        against = data_refusal(found, plan.manifests.get(found.preset))
        if against is not None:
            return self._refuse(actor, against)
        if data:
            plan.manifests[found.preset] = data.manifest_sha256
        label, gpus = self._labels.get(actor.node, ("", 0))
        is_of_concern = actor.device == "cuda" or not gpus  # of a GPU node, whose CPU is used, it says nothing
        actor.slot = dataclasses.replace(found, label=label if is_of_concern else "", node_gpus=gpus)
        self._share_cache(actor, found.compile_cache)
        return [SlotJoined(actor.slot)]

    def _supply(self) -> None:
        """Has slots get the data that they lack: from those that have them, else one makes them and the others wait."""
        actors = self._actors.values()
        need_no_wait = {actor.slot.preset for actor in actors if actor.slot} | self._unmade
        making = {actor.lacks for actor in actors if actor.obtains}
        for actor in actors:
            preset = actor.lacks
            if preset and not actor.obtains and (preset in need_no_wait or preset not in making):
                making.add(preset)
                actor.obtains = True
                dataset = self._plan.datasets.get(preset) or self._plan.dataset
                manifest = self._plan.manifests.get(preset, "")
                self._pending[actor.handle.obtain.remote(dataset, manifest, self._givers(actor))] = ("obtain", actor)

    def _givers(self, actor: _Actor) -> list[tuple[str, Any]]:
        """Who may have the data that a slot lacks: other nodes, in turn, then the coordinator's machine."""
        joined = [other for other in self._actors.values() if other.slot and other.slot.preset == actor.lacks]
        others = deque({other.node: other for other in joined if other.node != actor.node}.values())
        others.rotate(-next(self._turns))  # or all would ask the same ones
        found = [(other.place.rpartition(":")[0], other.handle) for other in others][:MAX_GIVERS]
        here = ray.get_runtime_context().get_node_id()
        if actor.node == here or here not in self._hosts:
            return found
        if self._store is None:
            there = NodeAffinitySchedulingStrategy(node_id=here, soft=False)
            make = self._store_class.options(num_cpus=0, max_restarts=-1, scheduling_strategy=there)
            self._store = make.remote(os.environ.get("RAYSEARCH_CACHE"))
        return [*found, (self._hosts[here], self._store)]

    def _share_cache(self, actor: _Actor, kind: str) -> None:
        """Has a new slot ask other nodes for the compile cache of its kind, and they it; nobody waits for that."""
        joined = [other for other in self._actors.values() if other.slot and kind and other.slot.compile_cache == kind]
        others = {other.node: other for other in joined if other.node != actor.node}
        if not others or any(other.node == actor.node for other in joined if other is not actor):
            return  # slots of one machine have one cache
        self._have_fetched(actor, list(others.values())[:MAX_GIVERS])
        for other in others.values():
            self._have_fetched(other, [actor])

    def _have_fetched(self, actor: _Actor, givers: list[_Actor]) -> None:
        handles = [giver.handle for giver in givers]
        ref = actor.handle.fetch_cache.options(concurrency_group="fetch").remote(handles)
        self._pending[ref] = ("fetch", actor)

    def _ended(self, actor: _Actor, result: RunResult) -> list[Report]:
        spec, actor.running = actor.running, None
        return [RunEnded(spec.trial_id, spec.attempt, result)] if spec else []

    def _came_back(self, actor: _Actor, result: RunResult) -> list[Report]:
        """A run of a slot that lives ended. A slot that loses all would take the whole line, faster than any other."""
        actor.lost = actor.lost + 1 if result.outcome is Outcome.LOST else 0
        reports = self._ended(actor, result)
        return reports if actor.lost < MAX_LOST else [*reports, *self._retire(actor, result.reason)]

    def _retire(self, actor: _Actor, reason: str) -> list[Report]:
        self._remove(actor)
        self._retry_at[actor.place] = time.monotonic() + RETRY_S
        return [SlotLeft(actor.slot.id, reason)] if actor.slot else [SlotFailed(actor.place, reason)]

    def _raised(self, method: str, actor: _Actor, error: BaseException) -> list[Report]:
        """A method of an actor that lives raised: a slot that cannot be set up, or a full disk on the worker."""
        reason = said_by(error)
        if method == "run":
            return [*self._ended(actor, RunResult(Outcome.LOST, reason)), *self._retire(actor, reason)]
        if method not in _SETTING_UP:
            return []
        if method == "obtain":
            self._unmade.add(actor.lacks)
        return self._retire(actor, reason) if isinstance(error, OSError) else self._refuse(actor, reason)

    def _refuse(self, actor: _Actor, reason: str) -> list[Report]:
        self._remove(actor)
        self._failures[actor.node, actor.place] = MAX_FAILURES  # the same machine would say the same again
        return [SlotFailed(actor.place, reason)]

    def _bury(self, actor: _Actor, reason: str) -> list[Report]:
        """An actor died, or its node: its run is lost, and its place is free for a new one."""
        self._remove(actor)
        self._nodes_at = -math.inf
        reports = self._ended(actor, RunResult(Outcome.LOST, f"its slot died: {reason}"))
        if actor.slot:
            return [*reports, SlotLeft(actor.slot.id, reason)]
        key = actor.node, actor.place
        self._failures[key] = self._failures.get(key, 0) + 1
        return [SlotFailed(actor.place, reason)] if self._failures[key] == MAX_FAILURES else []

    def _remove(self, actor: _Actor) -> None:
        del self._actors[actor.place]
        self._pending = {ref: entry for ref, entry in self._pending.items() if entry[1] is not actor}
        ray.kill(actor.handle)  # it may only be out of reach


# ---- Ray itself ----


def _started(plan: SlotPlan, cpus: int, metrics_port: int | None) -> _LocalRay:
    try:
        return _LocalRay(plan, cpus, metrics_port)
    except (ConnectionError, RuntimeError, ValueError, OSError, RayError) as error:
        raise UserError(
            f"Ray cannot be started on this machine: {said_by(error)}; free memory and disk, or join one with --address"
        ) from None


def _join(address: str) -> None:
    """Connects to a cluster, after a quick look at its port: Ray itself takes minutes to give up."""
    named = _started_here() if address == "auto" else address
    if named is None:
        raise UserError(
            "--address 'auto': no Ray was started on this machine; `ray start --head` does, or leave it out"
        )
    host, _, port = named.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UserError(f"--address {named!r}: it must be HOST:PORT or `auto`; `ray start --head` prints it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_LIMIT_S).close()
        ray.init(address=named, **QUIET)
    except (ConnectionError, RuntimeError, ValueError, OSError, OverflowError, RayError) as error:
        raise UserError(
            f"Ray is not reachable at {named!r}: {said_by(error)}; start it with `ray start --head`, or drop --address"
        ) from None


def _started_here() -> str | None:
    """Where `ray start` on this machine has put or found the cluster; never a Ray that another study started."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    with contextlib.suppress(OSError):
        return os.environ.get("RAY_ADDRESS") or Path(folder, "ray/ray_current_cluster").read_text().strip()
    return None


def _secrets(named: Collection[str]) -> dict[str, str | None]:
    """Takes the secrets out of the environment but for Ray's own: a trial can read that of a process of its user's."""
    seen = without_secrets(os.environ, named)
    return {name: None for name in os.environ if name not in seen and not name.startswith("RAY_")}


def _token() -> dict[str, str | None]:
    own = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    return {} if own else {"RAY_AUTH_TOKEN": _TOKEN}


def _short_folder() -> str:
    """A folder for temporary files whose path is short enough for Ray's sockets."""
    folders = [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]
    fitting = [folder for folder in folders if len(folder) <= LONGEST_FOLDER - 19 and os.access(folder, os.W_OK)]
    return fitting[0] if fitting else folders[0]


def _usable_cores() -> int:
    """Cores that this process may use: of a container that is limited to two of sixty-four, two."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit
        quota_us, period_us = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota_us) // int(period_us)))
    return cores


@contextlib.contextmanager
def _environment(changes: Mapping[str, str | None]) -> Generator[None]:
    """Sets variables for a while; those that are None are not there."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _fraction(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
