"""Mirrors with real repositories and file systems: what arrives there, and that none of them holds a study up."""

from __future__ import annotations

import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec  # pyright: ignore[reportMissingTypeStubs]
import psutil
import pytest
from toy import Toy, audit

from raysearch import folder as folders
from raysearch.copying import copy
from raysearch.errors import UserError
from raysearch.folder import Folder
from raysearch.journal import Journal
from raysearch.mirrors import LONGEST_PAUSE_S, Due, Mirrors, chosen, is_git, reason, without_secrets
from raysearch.model import Dropped, RatchetMoved, Record
from raysearch.run import main

MOVED = Record(1, 0.0, RatchetMoved("cpu", "c1", "a" * 40, "b" * 40))
SMALL = Record(2, 0.0, Dropped("cpu", "chat", "no block matches"))
LIMIT_S = 30.0


def git(*arguments: str | Path) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A study with wins, whose trials have left something."""
    toy = Toy(tmp_path_factory.mktemp("studies") / "s")
    toy.drive(trials=12)
    assert toy.study.lanes["cpu"].wins
    for name in toy.study.trials:
        (toy.folder.trials / name / "work").mkdir(parents=True)
        (toy.folder.trials / name / "run.log").write_text(f"log of {name}\n")
        (toy.folder.trials / name / "work/train.py").write_text("not for the mirror")
    return toy


@pytest.fixture
def toy(driven: Toy, tmp_path: Path) -> Toy:
    shutil.copytree(driven.path, tmp_path / "studies/s")
    return Toy(tmp_path / "studies/s", clock=driven.clock)


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    git("init", "--quiet", "--bare", tmp_path / "remote.git")
    return tmp_path / "remote.git"


class Watched:
    """Mirrors and what they said."""

    def __init__(self, place: Folder, *urls: str | Path, **options: Any) -> None:
        self.said: list[str] = []
        self.mirrors = Mirrors(place, chosen([str(url) for url in urls]), say=self.said.append, **options)

    def until(self, holds: Callable[[], Any]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not holds():
            assert time.monotonic() < deadline, self.said
            self.mirrors.refresh(0.0, ())
            time.sleep(0.01)


def refs(repo: Path) -> dict[str, str]:
    lines = git(f"--git-dir={repo}", "for-each-ref", "--format=%(refname) %(objectname)").splitlines()
    return dict(line.split(" ") for line in lines)


# ---- git ----


def test_a_move_is_pushed_at_once_with_all_candidates(toy: Toy, remote: Path):
    watched = Watched(toy.folder, remote)
    watched.mirrors.record(MOVED)
    watched.until(lambda: refs(remote) == refs(toy.folder.repo))
    assert "refs/heads/ratchet/cpu" in refs(remote)
    assert "refs/trials/c0001" in refs(remote)
    watched.mirrors.close()
    assert watched.said == []


def test_a_remote_with_another_program_is_left_alone_and_said_in_a_line(toy: Toy, remote: Path, tmp_path: Path):
    other = Toy(tmp_path / "other", program="LR = 1.0\n\n\ndef train(run):\n    return 1\n")
    folders.make(other.folder, other.config(), {"train.py": other.program}, at=1.0)
    git(f"--git-dir={other.folder.repo}", "push", "--quiet", str(remote), "main")
    before = refs(remote)["refs/heads/main"]
    watched = Watched(toy.folder, remote)
    watched.mirrors.record(MOVED)
    watched.until(lambda: watched.said)
    watched.mirrors.close()
    assert refs(remote)["refs/heads/main"] == before
    assert "[rejected]" in watched.said[0]
    assert "the study goes on" in watched.said[0]
    assert "lacks the end of the study" in watched.said[-1]
    assert len(watched.said) == 2
    assert all("\n" not in line for line in watched.said)


def test_a_remote_that_comes_back_is_said_and_brought_up_to_date(toy: Toy, remote: Path):
    away = remote.with_name("away.git")
    watched = Watched(toy.folder, remote, every_s=0.05)
    remote.rename(away)
    watched.mirrors.record(MOVED)
    watched.until(lambda: watched.said)
    away.rename(remote)
    watched.until(lambda: len(watched.said) == 2)
    assert watched.said[1] == f"mirror {remote} works again"
    assert refs(remote) == refs(toy.folder.repo)
    watched.mirrors.close()
    assert len(watched.said) == 2


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """The address of a host whose ssh says nothing for ever, and the file in which it says that it was called."""
    called, program = tmp_path / "called", tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\necho $$ >> {called}\nexec sleep 600\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("GIT_SSH_COMMAND", str(program))
    yield "ssh://git@head.invalid/s.git", called
    pids = [int(pid) for pid in called.read_text().split()]
    deadline = time.monotonic() + 5
    while any(map(lives, pids)):
        assert time.monotonic() < deadline, "it was left behind"
        time.sleep(0.01)


def test_a_remote_that_hangs_is_cut_off_and_keeps_nobody_waiting(toy: Toy, hanging: tuple[str, Path]):
    url, called = hanging
    watched = Watched(toy.folder, url, pass_limit_s=1.0)
    started = time.monotonic()
    for _ in range(1000):
        watched.mirrors.record(SMALL)
        watched.mirrors.record(MOVED)
        watched.mirrors.refresh(0.0, ())
    assert time.monotonic() - started < 1.0  # what hangs is another thread's
    watched.until(lambda: watched.said)
    assert watched.said == [f"mirror {url} failed: not done within 1 s; it is tried again, and the study goes on"]
    assert called.exists()
    watched.mirrors.close(limit_s=0.2)


def test_the_end_waits_for_a_hanging_mirror_only_so_long_and_leaves_no_process(toy: Toy, hanging: tuple[str, Path]):
    url, called = hanging
    watched = Watched(toy.folder, url)
    watched.mirrors.record(MOVED)
    watched.until(called.exists)
    started = time.monotonic()
    watched.mirrors.close(limit_s=0.5)
    assert 0.4 < time.monotonic() - started < 10
    assert watched.said == [f"mirror {url} lacks the end of the study; the study's next session brings it there"]


def test_ctrl_c_ends_the_wait(toy: Toy, hanging: tuple[str, Path]):
    url, called = hanging
    watched = Watched(toy.folder, url)
    watched.mirrors.record(MOVED)
    watched.until(called.exists)
    watched.mirrors.give_up()
    started = time.monotonic()
    watched.mirrors.close(limit_s=60)
    assert time.monotonic() - started < 10


def test_a_push_ends_when_its_coordinator_is_killed(toy: Toy, hanging: tuple[str, Path], tmp_path: Path):
    url, called = hanging
    code = (
        "import sys, time; from pathlib import Path; from raysearch.folder import Folder\n"
        "from raysearch.mirrors import Mirrors; from raysearch.model import Record, RatchetMoved\n"
        f"mirrors = Mirrors(Folder(Path({str(toy.path)!r})), [{url!r}], say=print)\n"
        "mirrors.record(Record(1, 0.0, RatchetMoved('cpu', 'c', 'a', 'b'))); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    deadline = time.monotonic() + LIMIT_S
    while not called.exists() or not called.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (ssh,) = (psutil.Process(int(pid)) for pid in called.read_text().split())
    (git_itself,) = [one for one in ssh.parents() if one.name() == "git"]
    process.kill()
    process.wait()
    while lives(git_itself.pid):
        assert time.monotonic() < deadline, "git outlived its coordinator"
        time.sleep(0.01)
    ssh.kill()  # ours never reads: a real one ends when git's end of its pipe is closed
    while lives(ssh.pid):
        time.sleep(0.01)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---- fsspec ----


def test_all_but_the_repository_is_copied_and_a_second_pass_sends_no_trial_again(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
):
    place: Any = fsspec.filesystem("memory")  # pyright: ignore[reportUnknownMemberType]
    place.store.clear()
    copy(toy.folder, "memory://bucket/s")
    names = {name.removeprefix("/bucket/s/") for name in place.find("/bucket/s")}
    logs = {f"trials/{name}/run.log" for name in toy.replayed().trials}
    assert names - logs == {
        "study.toml",
        "journal.db",
        "results.tsv",
        "report.md",
        "progress.png",
        ".token",
    }
    assert logs < names
    sent: list[str] = []
    monkeypatch.setattr(type(place), "put", lambda _self, _here, there: sent.extend(there))
    copy(toy.folder, "memory://bucket/s")
    assert sent == []


def test_a_journal_is_copied_whole_while_it_is_written_to(toy: Toy, tmp_path: Path):
    journal = Journal(toy.folder.journal, writer=True)
    seq = toy.replayed().seq
    try:
        journal.append(SMALL.event, seq=seq + 1, at=toy.clock())
        with journal.batch():
            journal.append(SMALL.event, seq=seq + 2, at=toy.clock())
            copy(toy.folder, f"file://{tmp_path}/mirror")
    finally:
        journal.close()
    with closing(sqlite3.connect(f"file:{tmp_path}/mirror/journal.db?mode=ro", uri=True)) as copied:
        assert copied.execute("SELECT max(seq) FROM events").fetchone() == (seq + 1,)
        assert copied.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert copied.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert not list((tmp_path / "mirror").glob("*.partial"))


def test_a_trial_s_large_files_and_those_of_runs_that_are_run_again_stay_here(toy: Toy, tmp_path: Path):
    measured, *_ = toy.replayed().trials
    (toy.folder.trials / measured / "weights.pt").write_bytes(bytes(2**20 + 1))
    (toy.folder.trials / "c9999-screen").mkdir()
    (toy.folder.trials / "c9999-screen/run.log").write_text("of no trial that is over")
    copy(toy.folder, f"file://{tmp_path}/mirror")
    assert {path.name for path in (tmp_path / "mirror/trials" / measured).iterdir()} == {"run.log"}
    assert not (tmp_path / "mirror/trials/c9999-screen").exists()


def test_a_place_that_refuses_is_said_in_a_line(toy: Toy, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    watched = Watched(toy.folder, f"file://{tmp_path}/file/mirror", every_s=0.0)
    watched.mirrors.record(SMALL)
    watched.until(lambda: watched.said)
    watched.mirrors.close()
    assert watched.said[0].startswith(f"mirror file://{tmp_path}/file/mirror failed: NotADirectoryError")
    assert all("\n" not in line for line in watched.said)


# ---- there and back ----


def test_what_was_mirrored_is_a_study_again_and_goes_on(
    toy: Toy, remote: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    watched = Watched(toy.folder, remote, f"file://{tmp_path}/mirror")
    watched.mirrors.record(MOVED)
    watched.mirrors.close()
    assert [line for line in watched.said if not line.startswith("waiting")] == []
    shutil.copytree(tmp_path / "mirror", tmp_path / "again/s")
    git("clone", "--quiet", "--mirror", remote, tmp_path / "again/s/repo")

    with pytest.raises(SystemExit) as ended:
        main(["status", "s", "--studies", str(tmp_path / "again")])
    assert ended.value.code == 0
    assert "cpu: score" in capsys.readouterr().out
    again = Toy(tmp_path / "again/s", clock=toy.clock)
    audit(again)
    before = len(again.replayed().trials)
    again.drive(trials=16)
    audit(again)
    assert len(again.study.trials) > before


class Killed(BaseException):
    """As if the coordinator's process ended here."""


def test_a_study_that_was_killed_and_goes_on_mirrors_again(remote: Path, tmp_path: Path):
    def die(toy: Toy) -> None:
        if toy.study.lanes and toy.study.lanes["cpu"].wins:
            raise Killed

    toy = Toy(tmp_path / "s")
    with pytest.raises(Killed):
        toy.drive(trials=20, meanwhile=die)  # of which no mirror hears
    assert refs(remote) == {}
    watched = Watched(toy.folder, remote)
    toy.onlookers = (watched.mirrors,)
    toy.drive(trials=20)
    watched.mirrors.close()
    assert refs(remote) == refs(toy.folder.repo)
    assert watched.said == []
    audit(toy)


def test_a_study_does_not_wait_for_a_mirror_that_hangs(hanging: tuple[str, Path], tmp_path: Path):
    url, called = hanging
    toy = Toy(tmp_path / "s")
    watched = Watched(toy.folder, url)
    toy.onlookers = (watched.mirrors,)
    assert toy.drive(trials=12) == "all 12 trials are done"
    watched.until(called.exists)
    watched.mirrors.close(limit_s=0.2)
    assert toy.study.lanes["cpu"].wins
    assert watched.said == [f"mirror {url} lacks the end of the study; the study's next session brings it there"]
    audit(toy)


# ---- what is a mirror, and when it is due ----


@pytest.mark.parametrize(
    ("url", "git_takes_it"),
    [
        ("git@host.org:me/s.git", True),
        ("ssh://git@host.org/s.git", True),
        ("https://host.org/me/s.git", True),
        ("/backup/s.git", True),
        ("s3://bucket/s", False),
        ("gs://bucket/s", False),
        ("file:///backup/s", False),
        ("memory://s", False),
    ],
)
def test_which_mirror_is_a_git_remote(url: str, git_takes_it: bool):
    assert is_git(url) is git_takes_it


def test_an_address_of_a_repository_on_this_machine_is_kept_in_full(remote: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(remote.parent)
    assert chosen(["remote.git", "git@host:s.git", "remote.git"]) == [str(remote), "git@host:s.git"]
    assert chosen(["none"]) == []


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("nowhere/s.git", ("no git repository", "git init --bare")),
        ("file3://x", ("Protocol not known", "mirror elsewhere")),
        ("https://me:hunter2@host.org/s.git", ("https://…@host.org/s.git", "no password", "credential helper")),
        ("https://ghp_hunter2@host.org/s.git", ("https://…@host.org/s.git", "no password")),
        ("s3://key:hunter2@bucket/s", ("s3://…@bucket/s", "no password", "fsspec's own configuration")),
    ],
)
def test_what_cannot_be_a_mirror_is_said_without_its_password(url: str, parts: tuple[str, ...]):
    with pytest.raises(UserError) as error:
        chosen([url])
    assert "hunter2" not in str(error.value)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_passwords_in_what_others_say_are_left_out():
    said = "warning: x\nfatal: unable to access 'https://me:hunter2@host.org/s.git/': Could not resolve host\n"
    assert reason(said) == "unable to access 'https://…@host.org/s.git/': Could not resolve host"
    assert without_secrets("abfs://container@account.net/s ssh://git@host/s") == (
        "abfs://container@account.net/s ssh://git@host/s"
    )


def test_when_a_mirror_is_due():
    assert Due(done_at=100.0).at() is None
    assert Due(changed=True, done_at=100.0).at(every_s=60) == 160
    assert Due(changed=True, urgent=True, done_at=100.0).at(every_s=60) == 100
    assert Due(changed=True, done_at=100.0, took_s=10.0).at(every_s=60) == 300  # a slow place has its rest
    waits = [Due(changed=True, urgent=True, failures=n).at(every_s=60) for n in range(1, 7)]
    assert waits == [60, 120, 240, 480, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert Due(changed=True, ending=True, failures=5, done_at=100.0).at() == 100
    assert Due(ending=True, done_at=100.0).at() is None
