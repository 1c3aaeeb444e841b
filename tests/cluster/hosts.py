"""Several machines on one: hosts with a network, a process table, a host name, a CPU and a disk of their own.

A host is a handful of Linux namespaces with a real `ray start` in it. Its cable goes into a bridge and can be pulled.
Everything hangs on one process: when that ends, hosts, cables and mounts are gone. It knows nothing of raysearch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

RAY = (sys.executable, "-m", "ray.scripts.scripts")
PORT = 20_000 + os.getpid() % 10_000  # Ray on the head takes a port for used when any process here names it
LIMIT_S = 120.0
SPAWN_S = 5.0  # after which a host has begun with what it was told to start
START_S = 60.0  # after which `ray start` has made a raylet, or given up
DISK_MB = 300  # of a host: Ray's logs, and the trials that do not see the study's folder
# A frozen or cut-off node is given up after some 5 s, instead of the minute that Ray takes by default.
WATCHFUL = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}

# The first process of a host. It collects orphans, and starts Ray again whenever it is told to.
INIT = """
set -e
hostname "$HOST_NAME"
mount --bind "$HOST_CPU" /proc/cpuinfo
mount -t tmpfs -o size="$HOST_DISK" tmpfs "$HOST_OWN"
mkdir "$HOST_OWN/tmp"
if [ -n "$HOST_HIDDEN" ]; then mount -t tmpfs tmpfs "$HOST_HIDDEN"; fi
cd "$HOST_OWN"
ip link set lo up
read -r _
ip addr add "$HOST_IP/24" dev eth0
ip link set eth0 up
set +e
while read -r _; do "$@" >> "$HOST_LOG" 2>&1 & done
"""


def missing() -> str | None:
    """Why hosts cannot be made here, if they cannot."""
    probe = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "type"]
    try:
        done = subprocess.run([*probe, "bridge"], capture_output=True, text=True, check=False, timeout=LIMIT_S)
    except OSError as error:
        return f"{error}: hosts need util-linux and iproute2"
    if done.returncode:
        return f"{done.stderr.strip()}: hosts need root; `unshare --user --map-root-user` gives enough"
    return None


def named(processes: Iterable[psutil.Process], part: str) -> list[psutil.Process]:
    """Those whose command line has a part."""
    found: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if part in " ".join(process.cmdline()):
                found.append(process)
    return found


@dataclass
class Host:
    """A machine of the bed.

    Attributes:
        name: Its host name.
        ip: Its address.
        process: Everything on it ends with this one.
        init: Id of its first process, as seen from outside.
        disk: Its own disk, as seen from outside.
    """

    name: str
    ip: str
    process: subprocess.Popen[bytes]
    init: int
    own: str
    cable: str
    frozen: bool = False
    cut_off: bool = False
    asked_at: float = 0.0  # to start Ray, by the monotonic clock

    @property
    def disk(self) -> Path:
        return Path(f"/proc/{self.init}/root{self.own}")

    def processes(self) -> list[psutil.Process]:
        """All that run on it but the first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.init).children(recursive=True)
        return []

    def named(self, part: str) -> list[psutil.Process]:
        """Its processes whose command line has a part."""
        return named(self.processes(), part)

    def raylets(self) -> list[psutil.Process]:
        """Its raylet, if there is one."""
        found: list[psutil.Process] = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.name() == "raylet":
                    found.append(process)
        return found

    def start_ray(self) -> None:
        self.asked_at = time.monotonic()
        assert self.process.stdin is not None
        self.process.stdin.write(b"ray\n")
        self.process.stdin.flush()

    def stop_ray(self) -> None:
        """Ends Ray; what it has started ends by itself, or does not."""
        _end(self.named("ray.scripts.scripts") + self.named("/raylet"))

    def lacks_ray(self) -> bool:
        """Whether nobody sees to Ray: `ray start --block` goes on for ever when its raylet was asked to end."""
        patience_s = START_S if self.named("ray.scripts.scripts") else SPAWN_S
        return not self.raylets() and time.monotonic() - self.asked_at > patience_s

    def power_off(self) -> None:
        """As a pulled plug: every process at once."""
        self.process.kill()
        self.process.wait()
        until(lambda: not psutil.pid_exists(self.init) or psutil.Process(self.init).status() == psutil.STATUS_ZOMBIE)
        self.process.stdin.close() if self.process.stdin else None

    def freeze(self) -> None:
        self._signal_all(signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)
        self.frozen = False

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@dataclass
class Bed:
    """A head and its hosts.

    Args:
        path: A short folder: Ray puts sockets under it.
        settings: Environment of the head's Ray.
    """

    path: Path
    settings: Mapping[str, str]
    hosts: dict[str, Host] = field(default_factory=dict[str, Host])
    _count: int = 1

    def __post_init__(self) -> None:
        for name in ("own", "shared", "logs"):
            (self.path / name).mkdir()
        script = 'hostname head; ip link set lo up; echo; while read -r _; do "$@" >> "$LOG" 2>&1 & done'
        self.switch = subprocess.Popen(
            ["unshare", "--uts", "--net", "bash", "-c", script, "head", *self._head()],
            env=os.environ | ENVIRONMENT | dict(self.settings) | {"LOG": str(self.path / "logs/head.log")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.switch.stdout is not None
        self.switch.stdout.readline()
        self.run("ip", "link", "add", "bridge", "type", "bridge")
        self.run("ip", "addr", "add", "10.77.0.1/24", "dev", "bridge")
        self.run("ip", "link", "set", "bridge", "up")
        self.start_head()

    @property
    def address(self) -> str:
        return f"10.77.0.1:{PORT}"

    def _head(self) -> list[str]:
        options = ["--port", str(PORT), "--node-ip-address", "10.77.0.1", "--num-cpus", "0", "--num-gpus", "0"]
        options += ["--temp-dir", str(self.path / "own/ray"), "--include-dashboard", "false"]
        return [*RAY, "start", "--head", "--block", *options, "--object-store-memory", str(100 * 2**20)]

    def start_head(self) -> None:
        """Starts it until it runs: Ray looks at all processes here, and refuses while those of an old head linger."""

        def runs() -> bool:
            if not self.head_processes("ray.scripts.scripts"):
                assert self.switch.stdin is not None
                self.switch.stdin.write(b"ray\n")
                self.switch.stdin.flush()
            time.sleep(1.0)
            return self.nodes() is not None

        until(runs)

    def revive_head(self) -> None:
        """Starts a head where none answers; nodes of the old one would wait for that for a minute."""
        if self.nodes() is None:
            for host in self.hosts.values():
                host.stop_ray()
            self.start_head()

    def see_to_ray(self) -> None:
        """Starts Ray on hosts where nobody sees to it; frozen ones may have it."""
        for host in self.hosts.values():
            if not host.frozen and host.lacks_ray():
                host.stop_ray()
                host.start_ray()

    def inside(self, *command: str, host: Host | None = None) -> list[str]:
        """A command as it runs on the head, or on a host."""
        if host is None:
            return ["nsenter", "--target", str(self.switch.pid), "--uts", "--net", *command]
        return ["nsenter", "--target", str(host.init), "--uts", "--net", "--mount", "--pid", *command]

    def run(self, *command: str, host: Host | None = None) -> str:
        done = subprocess.run(
            self.inside(*command, host=host),
            env=os.environ | ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout

    def add(self, name: str, *, cpu: str, slots: int = 2, sees_study: bool = True, ray: bool = True) -> Host:
        """Plugs a new machine in and starts Ray on it."""
        self._count += 1
        ip, cable = f"10.77.0.{self._count}", f"cable{self._count}"
        options = ["--address", self.address, "--node-ip-address", ip, "--num-cpus", str(slots), "--num-gpus", "0"]
        options += ["--object-store-memory", str(100 * 2**20), "--block"]
        env = {
            "HOST_NAME": name,
            "HOST_CPU": str(self._cpu(cpu)),
            "HOST_DISK": f"{DISK_MB}m",
            "HOST_OWN": str(self.path / "own"),
            "HOST_HIDDEN": "" if sees_study else str(self.path / "shared"),
            "HOST_IP": ip,
            "HOST_LOG": str(self.path / f"logs/{name}.log"),
            "TMPDIR": str(self.path / "own/tmp"),
        }
        spaces = ["--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen(
            ["unshare", *spaces, "bash", "-c", INIT, name, *RAY, "start", *options],
            env=os.environ | ENVIRONMENT | env,
            stdin=subprocess.PIPE,
        )
        init = until(lambda: next((child.pid for child in psutil.Process(process.pid).children()), None))
        host = Host(name, ip, process, init, str(self.path / "own"), cable)
        self.hosts[name] = host
        until((host.disk / "tmp").exists)
        self.run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(init))
        self.plug(host)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        if ray:
            host.start_ray()
        return host

    def _cpu(self, name: str) -> Path:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        path = self.path / f"{name.replace(' ', '-')}.cpuinfo"
        path.write_text("\n".join(f"model name\t: {name}" if "model name" in line else line for line in lines) + "\n")
        return path

    def plug(self, host: Host) -> None:
        self.run("ip", "link", "set", host.cable, "master", "bridge", "up")
        host.cut_off = False

    def unplug(self, host: Host) -> None:
        """Nothing gets through any more; neither end is told."""
        self.run("ip", "link", "set", host.cable, "nomaster")
        host.cut_off = True

    def power_off(self, name: str) -> None:
        self.hosts.pop(name).power_off()

    def nodes(self) -> dict[str, str] | None:
        """The nodes that Ray holds to be alive, id by address; None while Ray does not answer."""
        code = (
            "import sys; from ray._raylet import GcsClient; from ray.core.generated import gcs_pb2\n"
            f"nodes = GcsClient(address={self.address!r}).get_all_node_info(timeout=5)\n"
            "for node in nodes.values(): print(node.node_manager_address, node.node_id.hex(), node.state)"
        )
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("bash", "-c", f"exec 3<>/dev/tcp/10.77.0.1/{PORT}")  # Ray's client waits for long
            rows = [line.split() for line in self.run(sys.executable, "-c", code).splitlines()]
            return {row[0]: row[1] for row in rows if len(row) == 3 and row[2] == "0"}
        return None

    def drain(self, host: Host, deadline_s: int) -> None:
        """A spot notice, as the autoscaler passes it on."""
        node = (self.nodes() or {})[host.ip]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
        self.run(
            *(*RAY, "drain-node", "--address", self.address, "--node-id", node),
            *(*reason, "--deadline-remaining-seconds", str(deadline_s)),
        )

    def head_processes(self, part: str) -> list[psutil.Process]:
        """Those of the head whose command line has a part."""
        return named(psutil.Process(self.switch.pid).children(recursive=True), part)

    def close(self) -> None:
        for name in list(self.hosts):
            self.power_off(name)
        left = psutil.Process(self.switch.pid).children(recursive=True)
        _end(left)
        assert self.switch.stdin is not None
        assert self.switch.stdout is not None
        self.switch.kill()
        self.switch.wait()
        self.switch.stdin.close()
        self.switch.stdout.close()


@contextlib.contextmanager
def bed(settings: Mapping[str, str] = WATCHFUL) -> Iterator[Bed]:
    """A bed for a while; the test is skipped where there can be none."""
    why = missing()
    if why:
        pytest.skip(why)
    path = Path(tempfile.mkdtemp(prefix="bed", dir="/tmp"))  # short, for sockets
    found = Bed(path, settings)
    try:
        yield found
    finally:
        found.close()
        shutil.rmtree(path)


def _end(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(processes), timeout=10)


def until(holds: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    """Waits for something to hold, and returns what it came to."""
    deadline = time.monotonic() + limit_s
    while not (found := holds()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found
