"""On the worker: one folder for what torch.compile has made, for each kind of machine and software.

It survives studies and reboots, stays below a size, and can be packed for a worker of the same kind. It compiles
nothing, and does not know how an archive travels.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import IO

import platformdirs

from raysearch import profile
from raysearch.errors import UserError
from raysearch.profile import Hardware

LIMIT_BYTES = 4 * 2**30  # of all kinds together
PRUNED_SHARE = 0.75  # what is left after pruning, so that it is not done at every start
ARCHIVE_BYTES = 2**30  # at most, the entries used last
PIECE_BYTES = 8 * 2**20
SETTLED_S = 60.0  # what is younger may still be written: a linker writes in place
TORCH, TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
_PARTS = {TORCH: "inductor", TRITON: "triton"}
_LEFT_OUT = re.compile(r"^(locks|\..*|.*\.tmp|tmp\.pid_.*|lock)$")  # locks, and files that were never finished


@dataclass(frozen=True)
class Archive:
    """A packed cache.

    Attributes:
        file: It has no name, and is gone when it is closed.
    """

    file: IO[bytes]
    size_bytes: int
    sha256: str
    packed_at: float

    def piece(self, offset: int) -> bytes:
        """At most PIECE_BYTES from an offset on."""
        return os.pread(self.file.fileno(), PIECE_BYTES, offset)


@dataclass(frozen=True)
class _Entry:
    """What is kept or removed as a whole: a file of inductor's, a folder (a kernel) of Triton's."""

    path: Path
    files: tuple[Path, ...]
    size_bytes: int
    changed_at: float
    used_at: float


class CompileCache:
    """The cache of one kind of machine: a folder under the cache folder, beside those of other kinds.

    Several candidates write into it, and what they compile is loaded by others: one of them could poison it. Today's
    candidates run as one user without a sandbox, so nothing is lost by that; where they are walled off from one
    another, each needs a folder of its own, or one that only its base program could write.

    Args:
        root: Folder of all kinds.
        key: Name of the kind.
    """

    def __init__(self, root: Path, key: str) -> None:
        self.root, self.key, self.folder = root, key, root / key
        for part in _PARTS.values():
            (self.folder / part).mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        """Variables that make torch and Triton use it. Their caches of graphs are on by default since torch 2.6."""
        return {name: str(self.folder / part) for name, part in _PARTS.items()}

    @contextlib.contextmanager
    def in_use(self) -> Generator[None]:
        """While this holds, nothing is pruned: a program that has found an entry is about to read it."""
        with _locked(self.root / ".lock", fcntl.LOCK_SH):
            yield

    def is_empty(self) -> bool:
        """Whether nothing was compiled here yet."""
        return next(_entries(self.folder), None) is None

    def prune(self, limit_bytes: int = LIMIT_BYTES) -> int:
        """Removes the entries of all kinds that were used longest ago, if there are too many and no trial runs.

        Returns:
            How many bytes were removed.
        """
        with _locked(self.root / ".lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
            if not mine:
                return 0
            for left in self.root.glob(".incoming-*"):
                shutil.rmtree(left, ignore_errors=True)
            kinds = [kind for kind in self.root.iterdir() if kind.is_dir()]
            entries = sorted((e for kind in kinds for e in _entries(kind)), key=lambda entry: entry.used_at)
            before = kept = sum(entry.size_bytes for entry in entries)
            if before <= limit_bytes:
                return 0
            for entry in entries:
                if kept <= PRUNED_SHARE * limit_bytes:
                    break
                _remove(entry.path)
                kept -= entry.size_bytes
            return before - kept

    # ---- to another worker, and from one ----

    def pack(self) -> Archive | None:
        """Packs what was used last; None if there is nothing that has settled."""
        now = time.time()
        entries = [entry for entry in _entries(self.folder) if entry.changed_at <= now - SETTLED_S]
        file, size_bytes = tempfile.TemporaryFile(dir=self.root), 0  # noqa: SIM115 - the archive keeps it
        with tarfile.open(fileobj=file, mode="w") as tar:
            for entry in sorted(entries, key=lambda entry: -entry.used_at):
                size_bytes += entry.size_bytes
                if size_bytes > ARCHIVE_BYTES:
                    break
                for path in entry.files:
                    with contextlib.suppress(FileNotFoundError):  # a program replaces what it finds broken
                        tar.add(path, arcname=str(path.relative_to(self.folder)), recursive=False)
        if not size_bytes:
            file.close()
            return None
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Archive(file, os.fstat(file.fileno()).st_size, digest, now)

    @contextlib.contextmanager
    def to_be_filled(self) -> Generator[bool]:
        """Whether it is empty and nobody else on this machine is filling it; nobody else will while this holds."""
        with _locked(self.folder / ".fetch", fcntl.LOCK_EX | fcntl.LOCK_NB) as mine, self.in_use():
            yield mine and self.is_empty()

    def receive(self, pieces: Iterable[bytes], sha256: str) -> None:
        """Takes in an archive: unpacked beside, then moved in. What a trial has compiled meanwhile stays.

        Raises:
            UserError: It is not what was sent, or has something in it that no cache has; nothing is taken in.
            OSError: The disk is full.
        """
        with tempfile.TemporaryFile(dir=self.root) as file:
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
            if digest.hexdigest() != sha256:
                raise UserError("compile cache: the archive is damaged on its way; trials compile for themselves")
            file.seek(0)
            beside = Path(tempfile.mkdtemp(prefix=".incoming-", dir=self.root))
            try:
                self._unpack(file, beside)
                for part in _PARTS.values():
                    if (beside / part).exists():
                        _move_in(beside / part, self.folder / part)
            finally:
                shutil.rmtree(beside, ignore_errors=True)

    def _unpack(self, file: IO[bytes], beside: Path) -> None:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    source = tar.extractfile(member) if _is_welcome(member) else None
                    if source is None:
                        raise UserError(
                            f"compile cache: {member.name!r} in an archive is no plain file below "
                            f"{' or '.join(_PARTS.values())}; trials compile for themselves"
                        )
                    target = beside / member.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = source.read()
                    if target.name.startswith("__grp__"):
                        content = _at_home(content, self.folder / "triton" / target.parent.name)
                    target.write_bytes(content)
        except tarfile.TarError as error:
            raise UserError(
                f"compile cache: an archive cannot be read: {error}; trials compile for themselves"
            ) from None


def open_cache(hardware: Hardware, env: Mapping[str, str]) -> CompileCache | None:
    """The cache of trials on this hardware, pruned.

    Args:
        hardware: Of the slot.
        env: Of its trials: a folder that the user has chosen is left alone.

    Returns:
        None if the user has chosen one, or the folder cannot be written; then torch does as it would without us.
    """
    if env.get(TORCH) or env.get(TRITON):
        return None
    named = env.get("RAYSEARCH_CACHE")  # the trainer's rule for its data
    root = Path(named).expanduser().absolute() if named else platformdirs.user_cache_path("raysearch")
    try:
        cache = CompileCache(root / "compile", cache_key(hardware))
        cache.prune()
    except OSError:
        return None
    return cache


def cache_key(hardware: Hardware) -> str:
    """The kind of machine: GPU, torch, Triton, Python, and the CPU, for which a compiler makes host code too."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    python = ".".join(platform.python_version_tuple()[:2])
    text = f"{profile.base_slug(hardware)}-torch{hardware.torch}-triton{triton}-py{python}-{_cpu_kind()}"
    return re.sub(r"[^A-Za-z0-9.+-]", "_", text)


def _cpu_kind() -> str:
    """Eight digits for the CPU's instructions and the C library."""
    flags = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    facts = [platform.machine(), *sorted(flags.split()), *platform.libc_ver()]
    return hashlib.sha256(" ".join(facts).encode()).hexdigest()[:8]


# ---- files ----


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Generator[bool]:
    """Holds a lock; false if it is held by others, or the disk knows no locks."""
    try:
        file = path.open("a")
    except OSError:
        yield False
        return
    with file:  # closing it unlocks it
        try:
            fcntl.flock(file, how)
        except OSError:
            yield False
        else:
            yield True


def _entries(folder: Path) -> Iterator[_Entry]:
    for path in _files(folder / _PARTS[TORCH]):
        with contextlib.suppress(FileNotFoundError):
            yield _entry(path, (path,))
    for path in _listed(folder / _PARTS[TRITON]):
        with contextlib.suppress(FileNotFoundError):
            if files := tuple(_files(path)):
                yield _entry(path, files)


def _entry(path: Path, files: tuple[Path, ...]) -> _Entry:
    found = [file.stat() for file in files]
    changed_at = max(one.st_mtime for one in found)
    # a disk without access times still has the order in which things were made
    used_at = max(changed_at, *(one.st_atime for one in found))
    return _Entry(path, files, sum(one.st_size for one in found), changed_at, used_at)


def _files(folder: Path) -> Iterator[Path]:
    for path in _listed(folder):
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        elif path.is_file() and not path.is_symlink():
            yield path


def _listed(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not _LEFT_OUT.match(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_welcome(member: tarfile.TarInfo) -> bool:
    path = PurePosixPath(member.name)
    return member.isfile() and not path.is_absolute() and ".." not in path.parts and path.parts[0] in _PARTS.values()


def _at_home(group: bytes, folder: Path) -> bytes:
    """Triton lists a kernel's files by absolute paths (triton 3.6, `FileCacheManager.put_group`)."""
    try:
        table = json.loads(group)
        paths = {name: str(folder / PurePosixPath(path).name) for name, path in table["child_paths"].items()}
        return json.dumps(table | {"child_paths": paths}).encode()
    except (ValueError, KeyError, AttributeError, TypeError):
        return group  # Triton takes what it does not understand for a miss


def _move_in(source: Path, target: Path) -> None:
    """Moves what is not there yet, in steps that a program which looks meanwhile sees wholly or not at all."""
    if not target.exists():
        source.rename(target)
    elif source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _move_in(path, target / path.name)
