"""The journal: what was written is read back the same, by anybody, at any time, and after any end of its writer."""

import dataclasses
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from histories import realistic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysearch.errors import UserError
from raysearch.journal import Journal
from raysearch.model import (
    Event,
    Judged,
    Measurement,
    Outcome,
    Proposed,
    Record,
    SessionEnded,
    SessionStarted,
    TrialFinished,
    Verdict,
)
from raysearch.study import Settings, Study

KINDS = get_args(Event)


@contextmanager
def opened(path: Path, *, writer: bool) -> Iterator[Journal]:
    journal = Journal(path, writer=writer)
    try:
        yield journal
    finally:
        journal.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "overnight"
    folder.mkdir()
    return folder / "journal.db"


def ended(number: int) -> SessionEnded:
    return SessionEnded(f"reason {number}")


# ---- what is written is read ----


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.tuples(*(st.from_type(kind) for kind in KINDS)), at=st.floats(0, 1e10))
def test_every_kind_of_event_is_read_back_the_same(tmp_path: Path, events: tuple[Event, ...], at: float):
    path = tmp_path / "journal.db"
    path.unlink(missing_ok=True)
    with opened(path, writer=True) as journal:
        written = [journal.append(event, seq=seq, at=at) for seq, event in enumerate(events, start=1)]
    with opened(path, writer=False) as journal:
        read = list(journal.read())
        assert repr(list(journal.read(after=4))) == repr(read[4:])
    # as text, since no NaN is like another
    assert repr(read) == repr(written) == repr([Record(seq, at, event) for seq, event in enumerate(events, start=1)])


def test_all_kinds_of_events_of_the_model_are_known():
    assert len(KINDS) == 15
    assert all(dataclasses.is_dataclass(kind) for kind in KINDS)


def test_a_measurement_of_a_version_that_knew_no_whole_set_is_read(path: Path):
    found = TrialFinished(
        "c0001-screen", 1, Outcome.MEASURED, measurement=Measurement(1.5, 20.0, holdout=1.6, whole=1.7)
    )
    with opened(path, writer=True) as journal:
        journal.append(found, seq=1, at=1.0)
    with sqlite3.connect(path) as db:
        assert db.execute("UPDATE events SET body = replace(body, ',\"whole\":1.7', '')").rowcount == 1
    db.close()
    with opened(path, writer=False) as journal:
        (read,) = journal.read()
    assert read.event == dataclasses.replace(found, measurement=Measurement(1.5, 20.0, holdout=1.6))


def test_numbers_that_are_none_leave_the_journal_readable(path: Path):
    """A trainer prints NaN for what it could not compute; msgspec's own JSON makes null of that."""
    odd = Measurement(
        math.nan, math.inf, holdout=math.nan, parts_s={"eval": -math.inf}, facts={"mfu_percent": math.nan}
    )
    with opened(path, writer=True) as journal:
        journal.append(TrialFinished("c0001-screen", 1, Outcome.MEASURED, measurement=odd), seq=1, at=1.0)
        journal.append(ended(2), seq=2, at=2.0)
    with opened(path, writer=False) as journal:
        first, second = journal.read()
    assert second.event == ended(2)
    assert isinstance(first.event, TrialFinished)
    found = first.event.measurement
    assert found is not None
    assert math.isnan(found.value)
    assert math.isnan(found.facts["mfu_percent"])
    assert (found.wall_s, found.parts_s["eval"]) == (math.inf, -math.inf)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff\udc00b", "\ud800A", "\x00", "\U0001f600", "\ud800\\u0041"])
def test_text_that_is_no_unicode_is_read_back_to_the_letter(path: Path, text: str):
    event = TrialFinished(
        text, 1, Outcome.MEASURED, log_tail=text, measurement=Measurement(math.inf, 1.0, facts={text: 1.0})
    )
    with opened(path, writer=True) as journal:
        assert journal.append(event, seq=1, at=1.0).event == event
        assert [record.event for record in journal.read()] == [event]


def test_what_could_not_be_read_again_is_not_written(path: Path):
    wrong: Any = {"steps": "many"}
    with opened(path, writer=True) as journal:
        with pytest.raises(ValueError, match="facts"):
            journal.append(
                TrialFinished("t", 1, Outcome.MEASURED, measurement=Measurement(1.0, 1.0, facts=wrong)), seq=1, at=1.0
            )
        journal.append(ended(1), seq=1, at=1.0)
        assert [record.event for record in journal.read()] == [ended(1)]


def test_numbers_of_numpy_are_written_as_plain_ones(path: Path):
    with opened(path, writer=True) as journal:
        journal.append(Judged("c0001", Verdict.KEEP, "", delta=np.float64(-0.1)), seq=1, at=1.0)
        (record,) = journal.read()
    assert record.event == Judged("c0001", Verdict.KEEP, "", delta=-0.1)
    assert isinstance(record.event, Judged)
    assert type(record.event.delta) is float


def test_what_json_has_no_word_for_is_refused_before_it_is_written(path: Path):
    with opened(path, writer=True) as journal:
        for wrong in (object(), np.float32(0.1), np.zeros(2)):
            with pytest.raises(ValueError, match="an event holds numbers, text and the types of the model"):
                journal.append(SessionEnded(wrong), seq=1, at=1.0)  # pyright: ignore[reportArgumentType]
        assert list(journal.read()) == []


def test_a_whole_study_replays_from_its_journal(path: Path):
    history = realistic()
    with opened(path, writer=True) as journal:
        for record in history.records:
            journal.append(record.event, seq=record.seq, at=record.at)
    study = Study(Settings(max_trials=200))
    with opened(path, writer=False) as journal:
        for record in journal.read():
            study.apply(record)
    for name in ("seq", "lanes", "candidates", "trials", "running", "waiting", "refused", "proposals"):
        assert getattr(study, name) == getattr(history.study, name), name


# ---- readers and writers ----


def test_a_reader_follows_while_the_writer_writes(path: Path):
    with opened(path, writer=True) as writer, opened(path, writer=False) as reader:
        seen: list[Record] = []
        for number in range(1, 30):
            writer.append(ended(number), seq=number, at=float(number))
            if number % 3 == 0:
                seen += reader.read(after=len(seen))
                assert len(seen) == number
        half_way = reader.read()
        next(half_way)
        writer.append(ended(30), seq=30, at=30.0)  # an open reader holds nobody up
        assert 28 <= len(list(half_way)) <= 29
        assert [record.event for record in reader.read()] == [ended(number) for number in range(1, 31)]


def test_a_reader_cannot_write(path: Path):
    with opened(path, writer=True):
        pass
    with opened(path, writer=False) as reader, pytest.raises(UserError, match="readonly"):
        reader.append(ended(1), seq=1, at=1.0)


def test_a_second_writer_is_refused_in_one_line(path: Path):
    with opened(path, writer=True), pytest.raises(UserError) as refused:
        Journal(path, writer=True)
    assert str(refused.value) == (
        "study 'overnight' is driven by another coordinator; one at a time: stop that one, "
        "watch it with `raysearch status overnight`, or take another --study"
    )
    with opened(path, writer=True) as journal:
        journal.append(ended(1), seq=1, at=1.0)


def test_a_number_that_is_taken_is_refused_in_one_line(path: Path):
    with opened(path, writer=True) as journal:
        journal.append(ended(1), seq=1, at=1.0)
        with pytest.raises(UserError, match="event 1 is there already; one coordinator at a time"):
            journal.append(ended(2), seq=1, at=1.0)


def test_a_study_is_driven_while_a_writer_holds_it(path: Path):
    assert not Journal.is_driven(path)
    with opened(path, writer=True):
        assert Journal.is_driven(path)
        with opened(path, writer=False):
            assert Journal.is_driven(path)
    assert not Journal.is_driven(path)
    with opened(path, writer=False):
        assert not Journal.is_driven(path)


def test_asking_whether_a_study_is_driven_keeps_no_writer_out(path: Path):
    with opened(path, writer=True):
        pass
    ask = "import sys; from pathlib import Path; from raysearch.journal import Journal; print('ready', flush=True)\n"
    ask += "while True: Journal.is_driven(Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", ask, str(path)], stdout=subprocess.PIPE) as asker:
        try:
            assert asker.stdout is not None
            asker.stdout.readline()
            for _ in range(10):
                Journal(path, writer=True).close()
        finally:
            asker.kill()


# ---- ends ----

WRITER = """
import subprocess, sys
from pathlib import Path
from raysearch.journal import Journal
from raysearch.model import SessionEnded
journal = Journal(Path(sys.argv[1]), writer=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
seq = max([record.seq for record in journal.read()], default=0)
while True:
    seq += 1
    journal.append(SessionEnded(f"reason {seq}"), seq=seq, at=float(seq))
    print(seq, flush=True)
"""


def write_until_killed(path: Path, events: int) -> int:
    """Kills a writer in the middle of its work; returns the last event that it said was written."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        child = int(writer.stdout.readline())
        try:
            first = int(writer.stdout.readline())
            last = first
            while last < first + events:
                last = int(writer.stdout.readline())
            assert Journal.is_driven(path)
            writer.kill()
            said = [line for line in writer.stdout.read().splitlines() if line]
            writer.wait()
            # its child lives on, as Ray's processes may, and must not hold the lock
            assert not Journal.is_driven(path)
        finally:
            writer.kill()
            os.kill(child, signal.SIGKILL)
        return int(said[-1]) if said else last


def test_what_was_acknowledged_is_there_after_kill_9_and_the_next_writer_goes_on(path: Path):
    before = 0
    for events in (1, 20, 7):
        acknowledged = write_until_killed(path, events)
        with opened(path, writer=False) as journal:
            numbers = [record.seq for record in journal.read()]
        assert numbers == list(range(1, len(numbers) + 1))
        assert before < acknowledged <= len(numbers) <= acknowledged + 1  # one may be written, but not yet said
        before = len(numbers)


def test_an_event_is_on_the_disk_when_append_returns(path: Path):
    with opened(path, writer=True) as journal:
        found = sqlite3.connect(path)
        assert found.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        found.close()
        level = journal._db.execute("PRAGMA synchronous").fetchone()  # pyright: ignore[reportPrivateUsage]
        assert level == (2,)  # FULL: in WAL mode, fsync at every commit


def test_a_simulation_does_not_wait_for_the_disk_and_is_read_like_any_other(path: Path):
    journal = Journal(path, writer=True, durable=False)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (0,)  # pyright: ignore[reportPrivateUsage]
    journal.append(ended(1), seq=1, at=1.0)
    with opened(path, writer=False) as reader:
        assert [record.event for record in reader.read()] == [ended(1)]
    journal.close()


def test_a_batch_reaches_readers_and_the_disk_at_its_end(path: Path):
    with opened(path, writer=True) as journal, opened(path, writer=False) as reader:
        with journal.batch(), journal.batch():
            for number in (1, 2):
                assert journal.append(ended(number), seq=number, at=1.0).event == ended(number)
            assert list(reader.read()) == []
            assert len(list(journal.read())) == 2
        assert [record.event for record in reader.read()] == [ended(1), ended(2)]
        journal.append(ended(3), seq=3, at=1.0)  # on its own again
        assert len(list(reader.read())) == 3


def append_in_batch(journal: Journal, *events: tuple[int, Event]) -> None:
    with journal.batch():
        for seq, event in events:
            journal.append(event, seq=seq, at=1.0)
        raise ZeroDivisionError


def test_a_batch_that_fails_keeps_what_it_has_appended(path: Path):
    with opened(path, writer=True) as journal, opened(path, writer=False) as reader:
        with pytest.raises(ZeroDivisionError):
            append_in_batch(journal, (1, ended(1)))
        with pytest.raises(UserError, match="event 2 is there already"):
            append_in_batch(journal, (2, ended(2)), (2, ended(3)))
        journal.append(ended(3), seq=3, at=1.0)
        assert [record.event for record in reader.read()] == [ended(1), ended(2), ended(3)]


def test_a_disk_that_is_full_within_a_batch_is_one_error_and_leaves_the_journal_whole(path: Path):
    with opened(path, writer=True) as journal:
        journal.append(ended(1), seq=1, at=1.0)
        pages = journal._db.execute("PRAGMA page_count").fetchone()[0]  # pyright: ignore[reportPrivateUsage]
        journal._db.execute(f"PRAGMA max_page_count={pages}")  # pyright: ignore[reportPrivateUsage]
        with pytest.raises(UserError, match="full; every event must be on the disk"):
            append_in_batch(journal, (2, ended(2)), (3, SessionEnded("x" * 100_000)))
        journal._db.execute(f"PRAGMA max_page_count={pages + 100}")  # pyright: ignore[reportPrivateUsage]
        left = list(journal.read())
        assert [record.event for record in left] == [ended(1), ended(2)][: len(left)]
        journal.append(ended(3), seq=len(left) + 1, at=1.0)


def test_a_kill_within_a_batch_leaves_nothing_of_it(path: Path):
    code = "import os, sys; from pathlib import Path; from raysearch.journal import Journal\n"
    code += "from raysearch.model import SessionEnded\njournal = Journal(Path(sys.argv[1]), writer=True)\n"
    code += "journal.append(SessionEnded('a'), seq=1, at=1.0)\nwith journal.batch():\n"
    code += "    journal.append(SessionEnded('b'), seq=2, at=1.0)\n    os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    with opened(path, writer=False) as journal:
        assert [record.event for record in journal.read()] == [SessionEnded("a")]


def test_a_journal_that_was_killed_at_its_birth_is_empty_and_not_wrong(path: Path):
    path.touch()
    with opened(path, writer=False) as reader:
        assert list(reader.read()) == []
        with opened(path, writer=True) as journal:
            journal.append(ended(1), seq=1, at=1.0)
        assert len(list(reader.read())) == 1


# ---- what is wrong with the file ----


def told(path: Path, *, writer: bool) -> str:
    with pytest.raises(UserError) as error, opened(path, writer=writer) as journal:
        list(journal.read())
    assert "\n" not in str(error.value)
    assert not Journal.is_driven(path)
    return str(error.value)


@pytest.mark.parametrize("writer", [False, True])
def test_a_file_that_is_no_database_is_said_so(path: Path, writer: bool):
    path.write_text("val_bpb 1.0\n" * 1000)
    assert "file is not a database; it must be a readable study journal: restore it" in told(path, writer=writer)
    assert path.read_text().startswith("val_bpb")


@pytest.mark.parametrize("writer", [False, True])
def test_a_database_of_something_else_is_left_alone(path: Path, writer: bool):
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE songs (name TEXT)")
    db.close()
    before = path.read_bytes()
    assert "is no study journal, but a database of something else" in told(path, writer=writer)
    assert path.read_bytes() == before


@pytest.mark.parametrize("writer", [False, True])
@pytest.mark.parametrize("other", [1, 7])
def test_another_format_is_said_so(path: Path, writer: bool, other: int):
    with opened(path, writer=True) as journal:
        journal.append(ended(1), seq=1, at=1.0)
    change(path, f"PRAGMA user_version={other}")
    assert f"has journal format {other}; this version reads 2: use the version that made it" in told(
        path, writer=writer
    )


def test_a_missing_journal_is_said_so_to_a_reader(path: Path):
    with pytest.raises(UserError, match="does not exist; name a study that was started with `raysearch --study NAME`"):
        Journal(path, writer=False)


def filled(path: Path, count: int = 400) -> None:
    with opened(path, writer=True) as journal:
        for number in range(1, count + 1):
            journal.append(ended(number), seq=number, at=float(number))


def change(path: Path, statement: str) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(statement)
    db.close()


def test_a_damaged_page_is_said_so(path: Path):
    filled(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(os.urandom(size // 4))
    assert re.search("cannot be read|malformed", told(path, writer=False))


def test_a_cut_file_is_said_so(path: Path):
    filled(path)
    os.truncate(path, path.stat().st_size // 2)
    assert re.search("cannot be read|malformed", told(path, writer=False))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM events WHERE seq = 2", "event 2 is missing; restore the journal from a copy"),
        ("UPDATE events SET kind = 'Danced' WHERE seq = 3", "event 3 cannot be read ('Danced'); use the version that"),
        ("UPDATE events SET body = '{\"reason\": ' WHERE seq = 1", "event 1 cannot be read"),
        ("UPDATE events SET body = '{\"cause\": 1}' WHERE seq = 1", "event 1 cannot be read"),
    ],
)
def test_an_event_that_cannot_be_read_is_named(path: Path, statement: str, message: str):
    filled(path, 3)
    change(path, statement)
    assert message in told(path, writer=False)


def test_a_folder_in_place_of_the_journal_is_said_so(path: Path):
    path.mkdir()
    assert "unable to open database file" in told(path, writer=True)


def test_a_path_with_odd_characters_can_be_read(tmp_path: Path):
    path = tmp_path / "what? 100%#1" / "journal.db"
    path.parent.mkdir()
    filled(path, 1)
    with opened(path, writer=False) as journal:
        assert len(list(journal.read())) == 1


def test_somebody_who_holds_the_database_is_named_as_the_cause(path: Path):
    with opened(path, writer=True) as journal:
        journal._db.execute("PRAGMA busy_timeout=50")  # pyright: ignore[reportPrivateUsage]
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="database is locked; every event must be on the disk"):
            journal.append(SessionStarted("host", 1, "0"), seq=1, at=time.time())
        other.close()
        journal.append(SessionStarted("host", 1, "0"), seq=1, at=time.time())


def test_proposals_keep_their_patches_to_the_letter(path: Path):
    patch = (
        "--- a/train.py\r\n+++ b/train.py\n@@ -1 +1 @@\n-x = '\\u2028'\n+x = '→ \x00 \x85 \u2028 \U0001f600 \ud800'\n"
    )
    proposals = [record.event for record in realistic().records if isinstance(record.event, Proposed)]
    event = Proposed(dataclasses.replace(proposals[0].proposal, patch=patch))
    with opened(path, writer=True) as journal:
        journal.append(event, seq=1, at=1.0)
        (record,) = journal.read()
    assert record.event == event
