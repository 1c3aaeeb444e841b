"""Ray nodes started as a person starts them, with `ray start`, and ended without touching those of others."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from test_executors import wait_until

from raysearch import leftovers
from raysearch.runner import SESSION_MARK

STORE = f"--object-store-memory={100 * 2**20}"
START_LIMIT_S = 120.0  # on a busy machine


class Nodes:
    """Ray nodes on this machine; `address` is that of the head."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ray_folder = tempfile.mkdtemp(prefix="rs-nodes-", dir="/tmp")  # short, for sockets
        self._session = Path(self._ray_folder).name
        self._started: list[subprocess.Popen[bytes]] = []
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"

    def head(self, *options: str, env: Mapping[str, str] | None = None) -> None:
        """Starts the head, without a CPU or GPU."""
        where = [f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self._ray_folder}"]
        self._start("--head", *where, "--num-cpus=0", *options, env=env)

    def worker(self, *options: str, env: Mapping[str, str] | None = None) -> None:
        """Starts one more node."""
        self._start(f"--address={self.address}", *options, env=env)

    def _start(self, *options: str, env: Mapping[str, str] | None) -> None:
        log = self._folder / f"node{len(self._started)}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1"]
        ours = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        marks = {SESSION_MARK: self._session, "SPT_NOENV": "1"}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, "--num-gpus=0", STORE, *options],
                env=os.environ | ours | marks | dict(env or {}),
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        wait_until(lambda: "Ray runtime started" in log.read_text(), START_LIMIT_S)

    def close(self) -> None:
        """Ends all of them; what outlives that is killed."""
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)  # Ray drains a node for up to 30 s
        for pid in leftovers.marked(lambda marks: marks.get(SESSION_MARK) == self._session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.wait()
        shutil.rmtree(self._ray_folder, ignore_errors=True)


@contextlib.contextmanager
def nodes(folder: Path) -> Iterator[Nodes]:
    """Nodes that end with the block."""
    found = Nodes(folder)
    try:
        yield found
    finally:
        found.close()
