"""A folder for one run of a coding agent: what it may edit, what it may read, and what it has changed afterwards.

It runs no agent. What is in such a folder after a run is untrusted: nothing in it is followed, executed or sourced.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raysearch.wording import clean

MAX_BYTES = 2**20  # of an editable file
MAX_ENTRIES = 10_000  # that are looked at: an agent may have unpacked the world
LISTED = 5  # names in a message
# What agents leave in the folder that they work in, beside `.aider…` and what Python leaves anywhere. It is never read.
LEFT_ALONE = (".git", ".claude", ".codex", ".gemini", ".opencode")
_IDENTITY = {"NAME": "raysearch", "EMAIL": "raysearch@localhost"}


class Rejected(Exception):
    """What an agent left is no proposal; the message is one line."""


@dataclass(frozen=True)
class Scratch:
    """A folder of one run.

    Attributes:
        work: The folder.
        files: The editable files as they were put there, text by path.
        read_only: The other files, likewise.
    """

    work: Path
    files: Mapping[str, str]
    read_only: Mapping[str, str]

    def make(self) -> None:
        """Writes all files, as a git repository of its own: no agent takes the one around it for its project.

        Raises:
            OSError: The disk, or git, failed.
        """
        self.work.mkdir(parents=True)
        for path, text in {**self.read_only, **self.files}.items():
            target = self.work / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(_bytes(text))
            target.chmod(0o644 if path in self.files else 0o444)
        for arguments in (("init", "--quiet", "--template="), ("add", "--all", "--force"), ("commit", "-qm", "Start")):
            _git(self.work, *arguments)

    def edits(self) -> dict[str, str]:
        """The editable files that differ now, text by path; no process may be left that still writes.

        Raises:
            Rejected: Something else was changed, added or removed, or an editable file is none any more.
            OSError: The folder cannot be read.
        """
        if self.work.is_symlink() or self.work.parent.is_symlink():
            raise Rejected("it put a link in the place of its folder; it may change files in it alone")
        found = dict(_entries(self.work))
        protected = {path: text for path, text in self.read_only.items() if path not in self.files}
        strange = [_named(self.work, path) for path in found if path not in self.files and path not in protected]
        strange += [
            problem
            for path, text in protected.items()
            if (problem := _breach(self.work, path, text=text, mode=found.get(path)))
        ]
        if strange:
            more = f" and {len(strange) - LISTED} more" if len(strange) > LISTED else ""
            allowed = ", ".join(self.files)
            raise Rejected(f"it touched {', '.join(sorted(strange)[:LISTED])}{more}; it may change {allowed} alone")
        texts = {path: _text(self.work, path, found.get(path)) for path in self.files}
        return {path: text for path, text in texts.items() if text != self.files[path]}


def read_regular(path: Path, limit: int, *, end: bool = False) -> bytes | None:
    """The first bytes of a file that somebody else may have put there, or its last; None if it is no regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        if end:
            file.seek(max(0, status.st_size - limit))
        return file.read(limit)


def remove(path: Path) -> None:
    """Removes a file or a folder with what is in it, whatever its modes; a link itself and not what it points to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    _open_up(str(path))
    with contextlib.suppress(OSError):
        for _, names, _, descriptor in os.fwalk(path):
            for name in names:
                with contextlib.suppress(OSError):
                    _open_up(name, descriptor)
    shutil.rmtree(path, ignore_errors=True)


def disarm(folder: Path) -> None:
    """Removes what git and its friends would execute for a user who only looks around there."""
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if name == ".git":
                remove(Path(at, name))


def forget(folder: Path, secrets: Sequence[str]) -> None:
    """Removes the files below a folder that hold a secret, and those that are too long to be looked through."""
    needles = [secret.encode() for secret in secrets]
    for place, _, names in os.walk(folder) if needles else ():
        for path in (Path(place, name) for name in names):
            content = read_regular(path, MAX_BYTES + 1) or b""
            if len(content) > MAX_BYTES or any(needle in content for needle in needles):
                remove(path)


def _open_up(name: str, parent: int | None = None) -> None:
    """Makes a folder readable; never what a link points to.

    Raises:
        OSError: It is no folder.
    """
    descriptor = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{descriptor}", 0o700)
    finally:
        os.close(descriptor)


def _entries(work: Path) -> Iterator[tuple[str, int]]:
    """All that is no folder, by path, with its mode; links are not followed.

    Raises:
        Rejected: There is too much of it.
    """
    folders, seen = [""], 0
    while folders:
        folder = folders.pop()
        _open_up(str(work / folder))
        with os.scandir(work / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if _is_left_alone(path):
                    continue
                seen += 1
                if seen > MAX_ENTRIES:
                    raise Rejected(f"it left more than {MAX_ENTRIES} files; it may change what was there alone")
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                else:
                    yield path, entry.stat(follow_symlinks=False).st_mode


def _is_left_alone(path: str) -> bool:
    return path in LEFT_ALONE or path.startswith(".aider") or path.rpartition("/")[2] == "__pycache__"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # half a character may come from a log


def _named(work: Path, path: str) -> str:
    kind = " (a symbolic link)" if (work / path).is_symlink() else ""
    return clean(path, 80) + kind


def _breach(work: Path, path: str, *, text: str, mode: int | None) -> str:
    """What was done to a file that may only be read; empty if nothing."""
    if mode is None:
        return f"{path} (removed)"
    before = _bytes(text)
    if not stat.S_ISREG(mode) or read_regular(work / path, len(before) + 1) != before:
        return f"{path} (changed)"
    return "" if stat.S_IMODE(mode) == 0o444 else f"{path} (its mode)"


def _text(work: Path, path: str, mode: int | None) -> str:
    if mode is None:
        raise Rejected(f"{path} is gone; it may be changed and not removed")
    if not stat.S_ISREG(mode):
        raise Rejected(f"{path} is no regular file any more; it may be changed and not replaced")
    data = read_regular(work / path, MAX_BYTES + 1)
    if data is None:
        raise Rejected(f"{path} cannot be read any more; it may be changed and not locked")
    if len(data) > MAX_BYTES:
        raise Rejected(f"{path} is larger than {MAX_BYTES // 2**20} MiB; a program is shorter")
    if b"\0" in data:
        raise Rejected(f"{path} holds a NUL; a program is text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected(f"{path} is not UTF-8 at byte {error.start}; a program is UTF-8 text") from None


def _git(work: Path, *arguments: str) -> None:
    """Runs git with nothing of the user's configuration, before any agent has been in the folder.

    Raises:
        OSError: It failed.
    """
    who = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in _IDENTITY.items()}
    plain = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "HOME": os.devnull}
    done = subprocess.run(
        ["git", *arguments],
        cwd=work,
        env={"PATH": os.environ.get("PATH", os.defpath), **plain, **who},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        process_group=0,  # Ctrl-C in a terminal is for us
        check=False,
    )
    if done.returncode:
        raise OSError(f"git {arguments[0]} in {work} failed: {clean(done.stderr.decode(errors='replace'))}")
