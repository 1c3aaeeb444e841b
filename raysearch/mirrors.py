"""Keeps copies of a study elsewhere: its repository in git remotes, all else wherever fsspec reaches.

Every mirror has a thread of its own that runs one process at a time, `git push` or `raysearch.copying`, for a limited
time: a mirror that fails or hangs is said once and costs the study nothing. Nothing is ever forced or deleted there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raysearch import bound
from raysearch.errors import UserError
from raysearch.folder import Folder
from raysearch.model import RatchetMoved, Record, SessionStarted
from raysearch.schedule import Slot
from raysearch.wording import clean

EVERY_S = 60.0  # what is not urgent
SHARE = 20.0  # a pass that takes a second is followed by this many without one
PASS_LIMIT_S = 300.0
END_LIMIT_S = 60.0  # for the last pass, when the study has ended
PATIENCE_S = 3.0  # of whoever looks on, before that is said
LONGEST_PAUSE_S = 900.0
NONE = "none"  # in place of a URL: no mirrors any more
REFSPECS = tuple(f"refs/{name}:refs/{name}" for name in ("heads/main", "heads/ratchet/*", "trials/*"))
GIT_SCHEMES = ("ssh", "git", "http", "https", "git+ssh", "ssh+git", "git+https")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOST_AND_PATH = re.compile(r"[^/:\s]+:[^\s]+")  # as scp and git have it: host:path
_SECRET = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*@|(?<=http://)[^/@\s]+@|(?<=https://)[^/@\s]+@")


def is_git(url: str) -> bool:
    """Whether a mirror is a git remote: a path, HOST:PATH or a URL of ssh, git or http; other URLs are fsspec's."""
    scheme = _SCHEME.match(url)
    return scheme is None or scheme[1].lower() in GIT_SCHEMES


def chosen(urls: Sequence[str]) -> list[str]:
    """What `study.toml` has of the mirrors that were named.

    Raises:
        UserError: One of them cannot be a mirror.
    """
    if list(urls) == [NONE]:
        return []
    return list(dict.fromkeys(_checked(url) for url in urls))


def _checked(url: str) -> str:
    if _SECRET.search(url):
        raise UserError(
            f"--mirror {without_secrets(url)}: the address is kept in study.toml and may hold no password or token; "
            "leave them to git's credential helper, or to fsspec's own configuration and environment"
        )
    if not is_git(url):
        _check_file_system(url)
        return url
    if _SCHEME.match(url) or (_HOST_AND_PATH.fullmatch(url) and not Path(url).exists()):
        return url
    path = Path(url).expanduser().absolute()
    if not (path / "HEAD").exists() and not (path / ".git").exists():
        raise UserError(
            f"--mirror {url!r}: it is no git repository; make it with `git init --bare {path}`, or name an "
            f"fsspec URL for all but the ratchets, such as file://{path}"
        )
    return str(path)


def _check_file_system(url: str) -> None:
    import fsspec  # noqa: PLC0415 # pyright: ignore[reportMissingTypeStubs]

    try:
        fsspec.get_filesystem_class(url.split("://", 1)[0])  # pyright: ignore[reportUnknownMemberType]
    except (ValueError, ImportError) as error:
        raise UserError(f"--mirror {url}: {error}; install what it needs, or mirror elsewhere") from None


def without_secrets(text: str) -> str:
    """A text with the passwords and tokens in its URLs left out."""
    return _SECRET.sub("…@", text)


@dataclass(frozen=True)
class Due:
    """When a mirror is next brought up to date. Times are of one clock that never goes back, in seconds.

    Attributes:
        changed: Something happened since the last pass.
        urgent: Something that is not to wait.
        done_at: When the last pass ended; `took_s` is what it took.
        failures: Passes in a row that failed.
        ending: The study has ended: one last pass.
    """

    changed: bool = False
    urgent: bool = False
    done_at: float = 0.0
    took_s: float = 0.0
    failures: int = 0
    ending: bool = False

    def at(self, *, every_s: float = EVERY_S) -> float | None:
        """When the next pass is due; None while there is nothing for it to do."""
        if not self.changed:
            return None
        if self.ending:
            return self.done_at
        if self.failures:
            return self.done_at + min(every_s * 2 ** (self.failures - 1), LONGEST_PAUSE_S)
        return self.done_at if self.urgent else self.done_at + max(every_s, SHARE * self.took_s)


class Mirrors:
    """All mirrors of one study, as an onlooker of its coordinator.

    Args:
        place: The study.
        urls: Git remotes and fsspec URLs.
        say: Is given a line about a mirror, in the thread that calls `refresh` or `close`.
        every_s: Between two passes of which neither is urgent.
        pass_limit_s: For one pass.
    """

    def __init__(
        self,
        place: Folder,
        urls: Sequence[str],
        *,
        say: Callable[[str], None],
        every_s: float = EVERY_S,
        pass_limit_s: float = PASS_LIMIT_S,
    ) -> None:
        self._say = say
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._given_up = False
        self._mirrors = [
            _Mirror(url, _command(place, url), self._notes.put, every_s=every_s, pass_limit_s=pass_limit_s)
            for url in urls
        ]

    def record(self, record: Record) -> None:
        """Something happened; moves of a ratchet are pushed at once."""
        urgent = isinstance(record.event, RatchetMoved | SessionStarted)
        for mirror in self._mirrors:
            mirror.change(urgent=urgent and is_git(mirror.url))

    def refresh(self, now: float, slots: Sequence[Slot]) -> None:
        """Says what there is to say of the mirrors."""
        del now, slots
        while not self._notes.empty():
            self._say(self._notes.get())

    def give_up(self) -> None:
        """Ends the wait in `close`; for a signal handler."""
        self._given_up = True

    def close(self, limit_s: float = END_LIMIT_S) -> None:
        """Brings all mirrors up to date for a last time and waits for that, but not longer than `limit_s`."""
        for mirror in self._mirrors:
            mirror.end()
        started, said = time.monotonic(), False
        while any(mirror.is_alive() for mirror in self._mirrors) and not self._given_up:
            waited_s = time.monotonic() - started
            if waited_s > limit_s:
                break
            if waited_s > PATIENCE_S and not said:
                said = True
                self._say(f"waiting for the mirrors, {limit_s:g} s at most; Ctrl-C leaves them as they are")
            for mirror in self._mirrors:
                mirror.join(0.05)
            self.refresh(0.0, ())
        for mirror in self._mirrors:
            mirror.kill()
        self.refresh(0.0, ())
        for mirror in self._mirrors:
            if not mirror.is_current:
                self._say(f"mirror {mirror.shown} lacks the end of the study; the study's next session brings it there")


class _Mirror(threading.Thread):
    """One mirror and the process that is at work on it."""

    def __init__(
        self, url: str, command: Sequence[str], note: Callable[[str], None], *, every_s: float, pass_limit_s: float
    ) -> None:
        super().__init__(name="mirror", daemon=True)
        self.url = url
        self.shown = without_secrets(url)
        self._command = command
        self._note = note
        self._every_s = every_s
        self._pass_limit_s = pass_limit_s
        self._condition = threading.Condition()
        self._due = Due(done_at=time.monotonic())
        self._killed = False
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def is_current(self) -> bool:
        """Whether all that happened is there."""
        return not self._due.changed and not self.is_alive()

    def change(self, *, urgent: bool) -> None:
        """Something happened."""
        with self._condition:
            if not self._due.changed or (urgent and not self._due.urgent):
                self._due = dataclasses.replace(self._due, changed=True, urgent=urgent or self._due.urgent)
                self._condition.notify()

    def end(self) -> None:
        """Has the thread end after one more pass, where anything is left to do."""
        with self._condition:
            self._due = dataclasses.replace(self._due, ending=True)
            self._condition.notify()

    def kill(self) -> None:
        """Ends the process that is at work; its thread ends with it."""
        with self._condition:
            self._killed = True
            self._condition.notify()
        self._end_process()
        self.join(1.0)

    def run(self) -> None:
        """Works until the end."""
        while self._wait():
            started = time.monotonic()
            failure = self._pass()
            with self._condition:
                self._settle(failure, took_s=time.monotonic() - started)

    def _wait(self) -> bool:
        """Until the next pass is due; False if there will be none. What happens from here on is for the one after."""
        with self._condition:
            while not self._killed:
                due_at = self._due.at(every_s=self._every_s)
                if due_at is None and self._due.ending:
                    return False
                left_s = None if due_at is None else due_at - time.monotonic()
                if left_s is not None and left_s <= 0:
                    self._due = dataclasses.replace(self._due, changed=False, urgent=False)
                    return True
                self._condition.wait(left_s)
            return False

    def _settle(self, failure: str, *, took_s: float) -> None:
        before, failures = self._due.failures, self._due.failures + 1 if failure else 0
        self._due = dataclasses.replace(self._due, done_at=time.monotonic(), took_s=took_s, failures=failures)
        if not failure:
            if before:
                self._note(f"mirror {self.shown} works again")
            return
        self._due = dataclasses.replace(self._due, changed=True)
        if not before and not self._killed:
            self._note(f"mirror {self.shown} failed: {failure}; it is tried again, and the study goes on")
        if self._due.ending:
            self._killed = True  # that was the last pass

    def _pass(self) -> str:
        """Runs the process; why it failed, or nothing."""
        try:
            with self._condition:
                if self._killed:
                    return "the study has ended"
                process = self._process = _started(self._command)
        except OSError as error:
            return f"{self._command[0]}: {error.strerror}"
        with process:
            try:
                _, said = process.communicate(timeout=self._pass_limit_s)
            except subprocess.TimeoutExpired:
                self._end_process()
                return f"not done within {self._pass_limit_s:g} s"
        return reason(said.decode(errors="replace")) if process.returncode else ""

    def _end_process(self) -> None:
        if self._process is not None and self._process.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its session: git has helpers


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us, and no terminal can be asked for a password
        env=_environment(os.environ),
    )


def reason(said: str) -> str:
    """What went wrong, in a line, from the messages of git or of `copying`."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("!", "fatal:", "remote:", "error:"))]
    return clean(without_secrets((telling or lines[-1:] or ["no message"])[0].removeprefix("fatal: ")), 300)


def _command(place: Folder, url: str) -> list[str]:
    bind = [sys.executable, "-I", "-S", bound.__file__, str(os.getpid())]
    if not is_git(url):
        return [*bind, sys.executable, "-m", "raysearch.copying", str(place.path), url]
    plain = ("-c", "core.hooksPath=/dev/null", f"--git-dir={place.repo}")
    return [*bind, "git", *plain, "push", "--quiet", "--", url, *REFSPECS]


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Git's own configuration and helpers are the user's; nothing may ask, and no other repository is meant."""
    other = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE")
    kept = {name: value for name, value in ours.items() if name not in other}
    return {**kept, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
