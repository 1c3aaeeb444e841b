"""The append-only event log of a study: SQLite in WAL mode, one writer, any number of readers at any time.

It stores and replays events; what they mean is `study`'s business. An event is on the disk (fsync) before `append`
returns, so that an effect that follows it never happens without its intent being known; a simulation, which has no
effects, may do without that.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import msgspec
from filelock import FileLock, Timeout

from raysearch.errors import UserError
from raysearch.model import Event, Record

FORMAT = 2
LOCK_PATIENCE_S = 0.5  # whoever asks whether the study is driven holds the lock for a moment

_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Event)}
_DECODERS = {name: msgspec.json.Decoder(kind) for name, kind in _KINDS.items()}


class Journal:
    """The journal of one study.

    Args:
        path: The database file; a writer makes it, a reader needs it.
        writer: Whether to append; the study is locked for other writers until `close` or the end of the process.
        durable: Whether `append` waits for the disk. Without it a power cut may lose or damage the journal; the end of
            the process alone does not.

    Raises:
        UserError: Another coordinator holds the study, or the file is missing, damaged or of another format.
    """

    def __init__(self, path: Path, *, writer: bool, durable: bool = True) -> None:
        self.path = path
        self._durable = durable
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
        """Whether a coordinator holds the journal now; a study of somebody else may be asked about as well."""
        try:
            descriptor = os.open(path.with_suffix(".lock"), os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def _take_lock(self) -> FileLock:
        lock = FileLock(self.path.with_suffix(".lock"), is_singleton=False)
        try:
            lock.acquire(timeout=LOCK_PATIENCE_S)
        except Timeout:
            raise UserError(
                f"study {self.path.parent.name!r} is driven by another coordinator; one at a time: "
                f"stop that one, watch it with `raysearch status {self.path.parent.name}`, or take another --study"
            ) from None
        return lock

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _open(self, writer: bool) -> sqlite3.Connection:
        place = self.path if writer else f"file:{quote(str(self.path))}?mode=ro"
        db = sqlite3.connect(place, uri=not writer, isolation_level=None)
        try:
            self._check_format(db)
            if writer:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'OFF'}")
                if _is_new(db):
                    db.execute("BEGIN IMMEDIATE")  # a kill leaves a journal or an empty file, nothing in between
                    db.execute(
                        "CREATE TABLE events (seq INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL,"
                        " body TEXT NOT NULL)"
                    )
                    db.execute(f"PRAGMA user_version={FORMAT}")
                    db.execute("COMMIT")
        except BaseException:
            db.close()
            raise
        return db

    def _check_format(self, db: sqlite3.Connection) -> None:
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found == 0 and not _is_new(db):
            raise UserError(f"{self.path} is no study journal, but a database of something else; move it away")
        if found not in (0, FORMAT):
            raise UserError(
                f"{self.path} has journal format {found}; this version reads {FORMAT}: use the version that made it"
            )

    def append(self, event: Event, *, seq: int, at: float) -> Record:
        """Writes one event and returns it as a record, as a reader will see it.

        Args:
            event: What happened.
            seq: Its number: one more than the last, so that a second writer can only fail.
            at: Unix time in seconds.

        Raises:
            ValueError: The event holds something that could not be read again; nothing was written.
            UserError: The disk does not take it.
        """
        kind = type(event).__name__
        body = _encoded(event)
        record = Record(seq, at, _decoded(kind, body))
        try:
            self._write("INSERT INTO events VALUES (?, ?, ?, ?)", (seq, at, kind, body))
        except sqlite3.IntegrityError:
            raise UserError(
                f"{self.path}: event {seq} is there already; one coordinator at a time: start this one again"
            ) from None
        return record

    @contextmanager
    def batch(self) -> Generator[None]:
        """Appends of the block reach the disk and the readers together at its end, with one fsync.

        For facts on which no effect within the block depends. A block that fails keeps what it has appended; a kill
        within it leaves nothing of it. A block within a block is part of the outer one.

        Raises:
            UserError: The disk does not take them; some or none of them were written, in order.
        """
        if self._db.in_transaction:
            yield
            return
        self._write("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            if self._db.in_transaction:  # a full disk has ended it already, and its own error is on the way
                try:
                    self._write("COMMIT")
                finally:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")

    def _write(self, statement: str, values: Sequence[Any] = ()) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path}: {error}; every event must be on the disk: see that there is space, and that no other "
                "program writes to it, and start again"
            ) from None

    def read(self, *, after: int = 0) -> Iterator[Record]:
        """All events with a number greater than `after`, in order.

        Raises:
            UserError: An event cannot be read, or one is missing.
        """
        last = after
        try:
            if _is_new(self._db):  # its writer has only just begun
                return
            rows = self._db.execute("SELECT seq, at, kind, body FROM events WHERE seq > ? ORDER BY seq", (after,))
            for seq, at, kind, body in rows:
                if seq != last + 1:
                    raise UserError(f"{self.path}: event {last + 1} is missing; restore the journal from a copy")
                yield Record(seq, at, _decoded(kind, body))
                last = seq
        except (KeyError, ValueError, sqlite3.DatabaseError) as error:
            detail = str(error).splitlines()[0]
            raise UserError(
                f"{self.path}: event {last + 1} cannot be read ({detail}); use the version that wrote it, or a copy"
            ) from None

    def close(self) -> None:
        """Closes the file and lets the next coordinator in."""
        self._db.close()
        self._release()


def _is_new(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def _encoded(event: Event) -> str:
    # Not msgspec's own JSON: it writes NaN as null and refuses half of a surrogate pair, both of which programs under
    # search can print.
    return json.dumps(msgspec.to_builtins(event, enc_hook=_plain), separators=(",", ":"))


def _plain(value: Any) -> Any:
    """A number or text of a library's own kind (numpy's are subclasses of ours) as the plain one."""
    for kind in (float, int, str):
        if isinstance(value, kind):
            return kind(value)
    raise ValueError(f"{value!r} is a {type(value).__name__}; an event holds numbers, text and the types of the model")


def _decoded(kind: str, body: str) -> Event:
    try:
        return _DECODERS[kind].decode(body)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError):  # NaN, or half of a surrogate pair: rare, and ten times slower
        return msgspec.convert(json.loads(body), _KINDS[kind])
