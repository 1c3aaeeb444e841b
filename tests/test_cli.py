"""The command line: bad input is one line with the value, the rule and the remedy, and exit code 2."""

import json
import shutil
import sqlite3
from collections import namedtuple
from pathlib import Path

import pytest
from toy import Toy

from raysearch import folder as folders
from raysearch import programs
from raysearch.journal import Journal
from raysearch.knobs import read_knobs, rewrite
from raysearch.run import main

OBJECTIVE = """
[objective]
editable = ["score.py"]
command = ["{python}", "score.py"]
metric = "score"
timeout_s = 30
"""
SCORE = 'LR = 0.1  # in [0.01, 1.0] log: step size\nprint(f"score: {LR}")\n'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "objective.toml").write_text(OBJECTIVE)
    (tmp_path / "score.py").write_text(SCORE)
    (tmp_path / "broken.py").write_text("def train(run):\n    return (\n")
    (tmp_path / "idle.py").write_text("DEPTH = 1\n")
    (tmp_path / "range.py").write_text("DEPTH = 9  # in [1, 4]: layers\ndef train(run): ...\n")
    (tmp_path / "wrong.md").write_text("```raysearch\nforbidden = ['sing']\n```\n")
    (tmp_path / "studies/dirty").mkdir(parents=True)
    (tmp_path / "studies/dirty/notes.txt").write_text("mine")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "value", "rule", "remedy"),
    [
        (["--preset", "rtx306"], "'rtx306'", "known: cpu, h100, rtx3060", "leave --preset out"),
        (["--dataset", "wikipedia"], "'wikipedia'", "sotu", "--dataset"),
        (["--searcher", "gridd"], "'gridd'", "known: ax, bayesopt", "--searcher"),
        (["--searcher", "hebo"], "'hebo'", "not installed", "install it"),
        (["--budget-s", "0"], "0", "greater than 0", "leave it out"),
        (["--budget-tokens", "-5"], "-5", "greater than 0", "leave it out"),
        (["--budget-s", "5", "--budget-tokens", "100"], "budget", "not in both", "drop one"),
        (["--trials", "0"], "0", "more than 0", "leave it out"),
        (["--baseline-runs", "1"], "1", "greater than or equal to 2", "leave it out"),
        (["--train-file", "broken.py"], "broken.py", "valid Python", "mend"),
        (["--train-file", "idle.py"], "idle.py", "no `train(run)`", "define it"),
        (["--train-file", "range.py"], "DEPTH = 9", "not in its own range", "widen"),
        (["--train-file", "nowhere.py"], "nowhere.py", "No such file", "needs this file"),
        (["--study", "dirty"], "notes.txt", "no study.toml", "take another"),
        (["--study", "a b"], "'a b'", "letters, digits", "take another"),
        (["--program", "nowhere.md"], "nowhere.md", "no such file", "--program takes a text file"),
        (["--program", "wrong.md"], "wrong.md: operator 'sing'", "known: draft", "mend it in forbidden"),
        (["--objective", "nowhere.toml"], "nowhere.toml", "No such file", "readable TOML"),
        (["--deviec", "cpu"], "--deviec", "No such option", ""),
        (["--device", "tpu"], "tpu", "'auto', 'cuda', 'cpu'", ""),
        (["status", "nobody"], "'nobody'", "is not there", "raysearch --study NAME"),
        (["report", "nobody"], "'nobody'", "is not there", "raysearch --study NAME"),
        (["--mirror", "nowhere.git"], "'nowhere.git'", "no git repository", "git init --bare"),
        (["--mirror", "s4://bucket/s"], "s4://bucket/s", "Protocol not known", "mirror elsewhere"),
        (["--mirror", "https://me:pw@host/s.git"], "https://…@host/s.git", "no password", "credential helper"),
        (["--metrics-port", "0"], "0", "1<=x<=65535", ""),
        (["propose", "my.patch", "--why", "x"], "not clear", "none", "--study"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], value: str, rule: str, remedy: str
):
    code, error = said(capsys, *arguments)
    assert code == 2
    assert len(error.strip().splitlines()) == 1, error
    for part in (value, rule, remedy):
        assert part in error
    assert not Path("studies/default/journal.db").exists()


def test_unknown_key_in_study_toml_names_the_known_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    toy = Toy(tmp_path / "studies" / "s")
    toy.drive(trials=1)
    path = toy.folder.config
    path.write_text(path.read_text().replace("baseline_runs", "baselineruns"))
    code, error = said(capsys, "--study", "s")
    assert code == 2
    assert "judge.baselineruns" in error
    assert "baseline_runs" in error
    assert len(error.strip().splitlines()) == 1


def test_options_against_the_study_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    Toy(tmp_path / "studies" / "s").drive(trials=1)
    code, error = said(capsys, "--study", "s", "--searcher", "random")
    assert code == 2
    assert "'random'" in error
    assert "'optuna'" in error
    assert "leave the option out" in error


@pytest.mark.parametrize(
    "command", [["--study", "s"], ["status", "s"], ["report", "s"]], ids=lambda command: command[0]
)
def test_a_journal_whose_events_do_not_fit_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]
):
    toy = Toy(tmp_path / "studies" / "s")
    toy.drive(trials=1)
    with sqlite3.connect(toy.folder.journal) as journal:
        (kind, body) = journal.execute("SELECT kind, body FROM events WHERE kind = 'ProfileAdded'").fetchone()
        journal.execute("UPDATE events SET kind = ?, body = ? WHERE seq = 3", (kind, body))
    journal.close()
    code, error = said(capsys, *command)
    assert code == 2
    assert "profile cpu is in the study already" in error
    assert "restore it from a copy" in error
    assert len(error.strip().splitlines()) == 1


def test_a_second_coordinator_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    toy = Toy(tmp_path / "studies" / "s")
    toy.drive(trials=1)
    first = Journal(toy.folder.journal, writer=True)
    try:
        code, error = said(capsys, "--study", "s")
    finally:
        first.close()
    assert code == 2
    assert "driven by another coordinator" in error
    assert len(error.strip().splitlines()) == 1


def test_a_full_disk_is_said_before_anything_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 5 * 2**20))
    code, error = said(capsys, "--objective", "objective.toml")
    assert code == 2
    assert "5 MiB are free" in error
    assert "--studies" in error


def test_a_ratchet_moved_by_hand_is_refused_with_the_command_that_sets_it_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    toy = Toy(tmp_path / "studies" / "s")
    toy.drive(trials=12)
    repo = toy.repo()
    old = toy.study.lanes["cpu"].champion_commit
    (toy.folder.repo / "refs/heads/ratchet/cpu").write_text(repo.resolve("main") + "\n")
    code, error = said(capsys, "--study", "s")
    assert code == 2
    assert f"update-ref refs/heads/ratchet/cpu {old}" in error


def test_ray_that_is_not_there_is_said_in_one_line(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["--objective", "objective.toml", "--address", "127.0.0.1:1"])
    error = capfd.readouterr().err
    assert ended.value.code == 2
    assert "Ray is not reachable at '127.0.0.1:1'" in error
    assert "--address" in error
    assert len(error.strip().splitlines()) == 1, error


def test_a_study_has_the_directions_that_were_named_or_general_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    Path("mine.md").write_text("Be bold.")
    there = tmp_path / "studies" / "s" / "program.md"
    for options, text in (([], programs.general()), (["--program", "mine.md"], "Be bold."), ([], "Be bold.")):
        said(capsys, "--objective", "objective.toml", "--study", "s", "--address", "127.0.0.1:1", *options)
        assert there.read_text() == text
    there.write_text("```raysearch\nfrozen = 1\n```\n")
    code, error = said(capsys, "--study", "s", "--address", "127.0.0.1:1")
    assert code == 2
    assert error.startswith("raysearch: program.md: frozen = 1: it must be a list of names")


def test_a_folder_of_texts_means_the_same_on_every_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("files:texts", f"files:{tmp_path}/texts", "files:elsewhere/../texts"):
        said(capsys, "--preset", "cpu", "--study", "s", "--dataset", name, "--address", "127.0.0.1:1")
        assert f'dataset = "files:{tmp_path}/texts"' in (tmp_path / "studies/s/study.toml").read_text()


def test_mirrors_are_kept_and_may_be_others_later(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    url = f"file://{tmp_path}/copy"
    there = tmp_path / "studies" / "s" / "study.toml"
    for options, kept in (
        (["--mirror", "git@host:s.git", "--mirror", url], ["git@host:s.git", url]),
        ([], ["git@host:s.git", url]),
        (["--mirror", url], [url]),
        (["--mirror", "none"], []),
    ):
        said(capsys, "--objective", "objective.toml", "--study", "s", "--address", "127.0.0.1:1", *options)
        assert folders.load_config(there).mirrors == kept


def test_status_as_json_and_as_text(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    Toy(tmp_path / "studies" / "s").drive(trials=3)
    with pytest.raises(SystemExit):
        main(["status", "s", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["running"] is False
    with pytest.raises(SystemExit):
        main(["status", "s"])
    assert "cpu: score" in capsys.readouterr().out


def test_report_writes_its_files_and_prints_the_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    toy = Toy(tmp_path / "studies" / "s")
    toy.drive(trials=3)
    with pytest.raises(SystemExit):
        main(["report", "s"])
    assert capsys.readouterr().out.startswith("# ")
    assert {path.name for path in toy.path.iterdir()} >= {"results.tsv", "report.md", "progress.png"}


def test_propose_says_at_once_what_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    toy = Toy(tmp_path / "studies" / "s")
    toy.drive(trials=1)
    Path("cheat.patch").write_text("--- /dev/null\n+++ b/prepare.py\n@@ -0,0 +1 @@\n+cheat = 1\n")
    code, error = said(capsys, "propose", "cheat.patch", "--why", "cheat", "--study", "s")
    assert code == 2
    assert "prepare.py" in error
    assert not toy.folder.inbox.exists()


def test_propose_says_at_once_what_is_against_the_directions(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    toy = Toy(tmp_path / "studies" / "s")
    folders.make(toy.folder, toy.config(), {"train.py": toy.program}, at=toy.clock())
    (toy.path / "program.md").write_text("```raysearch\nfrozen = ['MODE']\nforbidden = ['draft']\n```")
    toy.drive(trials=1)
    champion = toy.repo().read(toy.study.lanes["cpu"].champion_commit, "train.py")
    Path("train.py").write_text(champion.replace('MODE = "slow"', 'MODE = "fast"'))
    code, error = said(capsys, "propose", "train.py", "--why", "fast", "--study", "s")
    assert code == 2
    assert "it is against program.md: MODE is frozen, and 'slow' became 'fast'; change the patch" in error
    Path("train.py").write_text(champion.replace("return None", "return run"))
    assert said(capsys, "propose", "train.py", "--why", "code", "--study", "s")[0] == 0


def test_propose_takes_a_patch_a_whole_file_and_a_commit(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    toy = Toy(tmp_path / "studies" / "s")
    toy.drive(trials=1)
    repo = toy.repo()
    champion = toy.study.lanes["cpu"].champion_commit
    text = repo.read(champion, "train.py")
    edited = rewrite(text, {"MODE": "slow" if read_knobs(text)["MODE"].value == "fast" else "fast"})
    Path("train.py").write_text(edited)
    commit = repo.commit_files(champion, {"train.py": edited}, message="fast\n", at=toy.clock())
    Path("my.patch").write_text(repo.diff(champion, commit))
    for arguments in (["my.patch"], ["train.py"], ["--commit", commit]):
        with pytest.raises(SystemExit) as ended:
            main(["propose", *arguments, "--why", "faster", "--study", "s"])
        assert ended.value.code == 0
    items = sorted(toy.folder.inbox.glob("*.json"))
    assert len(items) == 3
    toy.drive(trials=1)
    (same, same_again) = [reason for _, reason in toy.study.refused[-2:]]
    assert same == same_again
    assert same.startswith("the same program as")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--want", "h100"], "--want 'h100': it must be PROFILE=SLOTS, such as h100-80gb=4"),
        (["--want", "h100-80gb=0"], "--want 'h100-80gb=0': it must be"),
        (["--want", "H100 80GB=1"], "--want 'H100 80GB=1': it must be"),
        (["--want", "h100-80gb=1"], "--want is for a cluster that can start machines; give its --address"),
    ],
)
def test_slots_that_cannot_be_wanted_are_said(capsys: pytest.CaptureFixture[str], options: list[str], message: str):
    code, error = said(capsys, "--objective", "objective.toml", *options)
    assert code == 2
    assert message in error
