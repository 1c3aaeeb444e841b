"""The append-only event log of a study: SQLite in WAL mode, one writer, any number of readers at any time.

It stores and replays events; what they mean is `study`'s business. An event is on the disk (fsync) before `append`
returns, so that an effect that follows it never happens without its intent being known.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from raysearch.errors import UserError
from raysearch.model import Event, Record

FORMAT = 1

_ADAPTERS: dict[str, TypeAdapter[Any]] = {kind.__name__: TypeAdapter(kind) for kind in get_args(Event)}


class Journal:
    """The journal of one study.

    Args:
        path: The database file; a writer makes it, a reader needs it.
        writer: Whether to append; the study is locked for other writers until `close` or the end of the process.

    Raises:
        UserError: Another coordinator holds the study, or the file is missing, damaged or of another format.
    """

    def __init__(self, path: Path, *, writer: bool) -> None:
        self._path = path
        self._lock: FileLock | None = None
        if writer:
            self._lock = self._take_lock()
        elif not path.exists():
            raise UserError(f"{path} does not exist; name a study that was started with `raysearch --study NAME`")
        try:
            self._db = self._open(writer)
        except sqlite3.DatabaseError as error:
            self._release()
            raise UserError(f"{path}: {error}; it must be a readable study journal: restore it from a copy") from None
        except UserError:
            self._release()
            raise

    @staticmethod
    def is_driven(path: Path) -> bool:
        """Whether a coordinator holds the journal now."""
        if not path.with_suffix(".lock").exists():
            return False
        lock = FileLock(path.with_suffix(".lock"), is_singleton=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def _take_lock(self) -> FileLock:
        lock = FileLock(self._path.with_suffix(".lock"), is_singleton=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"study {self._path.parent.name!r} is driven by another coordinator; one at a time: "
                f"stop that one, watch it with `raysearch status {self._path.parent.name}`, or take another --study"
            ) from None
        return lock

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _open(self, writer: bool) -> sqlite3.Connection:
        if not writer:
            db = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, isolation_level=None)
        else:
            db = sqlite3.connect(self._path, isolation_level=None)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            if db.execute("PRAGMA user_version").fetchone() == (0,):
                db.execute(
                    "CREATE TABLE IF NOT EXISTS events"
                    " (seq INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL)"
                )
                db.execute(f"PRAGMA user_version={FORMAT}")
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found != FORMAT:
            db.close()
            raise UserError(
                f"{self._path} has journal format {found}; this version reads {FORMAT}: use the version that made it"
            )
        return db

    def append(self, event: Event, *, seq: int, at: float) -> Record:
        """Writes one event and returns it as a record.

        Args:
            event: What happened.
            seq: Its number: one more than the last, so that a second writer can only fail.
            at: Unix time in seconds.
        """
        kind = type(event).__name__
        body = _ADAPTERS[kind].dump_json(event).decode()
        try:
            self._db.execute("INSERT INTO events VALUES (?, ?, ?, ?)", (seq, at, kind, body))
        except sqlite3.OperationalError as error:
            raise UserError(
                f"{self._path}: {error}; every event must be on the disk: free space and start again"
            ) from None
        return Record(seq, at, event)

    def read(self, *, after: int = 0) -> Iterator[Record]:
        """All events with a number greater than `after`, in order.

        Raises:
            UserError: An event cannot be read.
        """
        rows = self._db.execute("SELECT seq, at, kind, body FROM events WHERE seq > ? ORDER BY seq", (after,))
        try:
            for seq, at, kind, body in rows:
                yield Record(seq, at, _ADAPTERS[kind].validate_json(body))
        except (KeyError, ValidationError, sqlite3.DatabaseError) as error:
            detail = str(error).splitlines()[0]
            raise UserError(
                f"{self._path}: an event cannot be read ({detail}); use the version that wrote it, or a copy"
            ) from None

    def close(self) -> None:
        """Closes the file and lets the next coordinator in."""
        self._db.close()
        self._release()
