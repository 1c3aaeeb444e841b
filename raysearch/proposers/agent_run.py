"""Runs a coding agent under limits and ends every process that it has left, by the supervisor that runs trials too.

It reads nothing of what the agent did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysearch import leftovers
from raysearch.nursery import join, start_supervisor
from raysearch.proposers.scratch import read_regular

AGENT_MARK = "RAYSEARCH_AGENT"
LOG_BYTES = 4 * 2**20  # of what an agent printed, the end: agents print the files that they read
NICENESS = 10  # its programs start while trials train on the cores beside it


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        stopped: Why it was ended before it ended itself; empty if it was not.
        code: Its exit status, None if it has none.
        log: The end of what it printed, to either stream.
        last_message: What it wrote into the file for its last message.
    """

    stopped: str
    code: int | None
    log: str
    last_message: str


class AgentRun:
    """A run in flight, in the folder `work` of its own folder.

    Args:
        folder: For what the run leaves.
        command: Argument vector.
        env: All of its environment. It is written to no file.
        limit_s: After this it is ended.
    """

    def __init__(self, folder: Path, command: Sequence[str], *, env: Mapping[str, str], limit_s: float) -> None:
        self._folder = folder
        order = {
            "command": list(command),
            "arguments": [],
            "attempt": 1,
            "startup_limit_s": 0.0,
            "total_limit_s": limit_s,
            "niceness": NICENESS,
        }
        (folder / "order.json").write_text(json.dumps(order))
        self._mark = str(folder)
        marked = {**env, AGENT_MARK: self._mark}
        self._supervisor = start_supervisor(str(folder), env=marked, log=folder / "supervisor.log")

    @staticmethod
    def last_message_file(folder: Path) -> Path:
        """Where the agent of a folder may write its last message."""
        return folder / "last_message.txt"

    def wait(self) -> Ended:
        """Waits until the agent and all that it has started are gone."""
        join(self._supervisor)
        found = self._exit()
        log = _read(self._folder / "run.log")
        last = _read(self.last_message_file(self._folder))
        if found is None:  # nobody has ended its tree
            leftovers.end(lambda marks: marks.get(AGENT_MARK) == self._mark)
            said = _read(self._folder / "supervisor.log").strip().splitlines()
            return Ended(f"its supervisor failed: {said[-1] if said else 'it was killed'}", None, log, last)
        return Ended(found["reason"], found["code"], log, last)

    def cancel(self) -> None:
        """Asks for its end; `wait` returns soon after."""
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.close()

    def _exit(self) -> dict[str, Any] | None:
        try:
            found = json.loads(_read(self._folder / "exit.json"))
            return {"reason": str(found["reason"]), "code": found["code"]}
        except (ValueError, KeyError, TypeError):
            return None


def sweep(folder: Path) -> list[int]:
    """Ends what runs in the folders below one were left by, when their supervisors were killed; returns their ids."""
    return leftovers.end(lambda marks: marks.get(AGENT_MARK, "").startswith(f"{folder}/"))


def _read(path: Path) -> str:
    return (read_regular(path, LOG_BYTES, end=True) or b"").decode("utf-8", "replace")
