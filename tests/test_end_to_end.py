"""Whole studies through `python -m raysearch.run` and a real Ray: the real trainer, kill -9, Ctrl-C, people."""

import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from session_kit import OBJECTIVE, PROGRAM, Bench, finished, in_flight, until
from toy import audit

from raysearch import leftovers
from raysearch.model import Outcome, SessionStarted, TrialFinished, TrialStarted
from raysearch.study import Win


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    (tmp_path / "objective.toml").write_text(OBJECTIVE)
    (tmp_path / "score.py").write_text(PROGRAM)
    found = Bench(tmp_path, [])
    yield found
    found.kill_sessions()


def test_a_study_of_the_real_trainer_that_is_killed_once_runs_to_its_end(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYSEARCH_CACHE", str(bench.path / "cache"))
    options = ("--study", "real", "--device", "cpu", "--trials", "2", "--baseline-runs", "2")
    killed = bench.start(*options, "--budget-tokens", "16384")
    progress = bench.path / "studies/real/trials/cpu-base-1/progress.json"
    until(lambda: '"train"' in read(progress), killed)
    killed.process.kill()
    killed.process.wait()
    assert "data for preset cpu: sotu" in killed.said()
    session = bench.start(*options)
    assert session.ends(240) == 0, session.said()

    toy = bench.study("real")
    for name in ("results.tsv", "report.md", "progress.png", "study.toml"):
        assert (toy.path / name).stat().st_size > 100, name
    audit(toy)
    study = toy.replayed()
    assert {state.outcome for state in study.trials.values()} == {Outcome.MEASURED}
    assert study.trials["cpu-base-1"].attempt == 2
    assert study.lanes["cpu"].screens == 2
    for name, state in study.trials.items():
        assert state.measurement is not None
        assert state.measurement.facts["total_tokens"] >= 16384
        assert state.measurement.parts_s["train"] > 0
        left = toy.folder.run(name, state.attempt)
        assert json.loads((left / "result.json").read_text())["val_bpb"] == state.measurement.value
        assert 1.0 < state.measurement.value < 8.0
        names = {path.name for path in left.iterdir()}
        assert {"run.log", "result.json", "curve.jsonl", "documents.npz"} <= names
        assert state.measurement.facts["matmul_tflops"] > 0  # of its slot, measured when that was set up
        assert state.measurement.facts["mfu_measured_percent"] > 0
    assert re.search(r"joined as cpu: .*, matmul [\d.]+ TFLOPS, copy \d+ GB/s", session.said())
    first = study.trials["cpu-base-1"].measurement
    assert first is not None
    assert first.holdout is not None
    rows = (toy.path / "results.tsv").read_text().splitlines()
    assert rows[0].split("\t")[:5] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert bench.processes("real") == []

    reported = bench.call("report", "real")
    assert reported.returncode == 0
    assert reported.stdout.strip() == (toy.path / "report.md").read_text().strip()
    assert "val_bpb" in reported.stdout
    assert rows == (toy.path / "results.tsv").read_text().splitlines()
    status = bench.call("status", "real", "--json")
    assert status.returncode == 0
    assert json.loads(status.stdout)["running"] is False


def test_killed_again_and_again_no_finished_trial_is_lost_and_none_is_run_twice(bench: Bench):
    seed = int(os.environ.get("RAYSEARCH_TEST_SEED") or random.randrange(10**6))
    print(f"RAYSEARCH_TEST_SEED={seed}")
    moments = random.Random(seed)
    trials = 10
    for _ in range(3):
        before = bench.events()
        session = bench.quick("--trials", str(trials))
        until(partial(starts_after, bench, len(before)), session)
        time.sleep(moments.uniform(0.0, 2.5))
        of_this_session = set(bench.processes())
        assert of_this_session
        session.process.kill()
        session.process.wait()
        after = bench.events()
        assert after[: len(before)] == before
        until_gone(of_this_session)
    last = bench.events()
    interrupted = in_flight(last)
    session = bench.quick("--trials", str(trials))
    assert session.ends() == 0, session.said()

    events = bench.events()
    done = finished(events)
    assert finished(last).items() <= done.items()
    ends = Counter(
        record.event.trial_id
        for record in events
        if isinstance(record.event, TrialFinished) and not record.event.outcome.is_infrastructure
    )
    assert set(ends.values()) == {1}
    for record in events:
        if isinstance(record.event, TrialStarted) and record.event.trial.id in done:
            assert record.seq < done[record.event.trial.id][0]
    attempts = {name: finish.attempt for name, (_, finish) in done.items()}
    for name, attempt in interrupted.items():
        assert attempts[name] in (attempt, attempt + 1)  # the same one if it ended between the kill and its journal
    assert len([record for record in events if isinstance(record.event, SessionStarted)]) == 4
    toy = bench.study("quick")
    assert toy.replayed().lanes["cpu"].screens == trials
    audit(toy)
    assert bench.processes() == []


def starts_after(bench: Bench, seq: int) -> bool:
    return any(isinstance(record.event, TrialStarted) for record in bench.events()[seq:])


def until_gone(pids: set[int], limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while left := [pid for pid in pids if leftovers.marks(pid)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def test_people_propose_look_on_interrupt_and_stop(bench: Bench):
    session = bench.quick()
    until(lambda: finished(bench.events()), session)

    second = bench.call("--study", "quick")
    assert second.returncode == 2
    assert second.stdout == ""
    (line,) = second.stderr.splitlines()
    assert "'quick' is driven by another coordinator" in line
    assert "raysearch status quick" in line

    (bench.path / "mine.py").write_text(PROGRAM.replace("score = 1 +", "score = 0.5 +"))
    proposed = bench.call("propose", "mine.py", "--why", "less is more", "--by", "ada")
    assert proposed.returncode == 0, proposed.stderr
    assert "takes it now" in proposed.stderr
    win = until(lambda: won_by_ada(bench), session)
    assert json.loads(bench.call("status", "quick", "--json").stdout)["running"] is True

    session.press_ctrl_c()
    assert session.ends(20) == 0, session.said()
    assert "draining" in session.said()
    assert "Traceback" not in session.said()
    assert in_flight(bench.events()) == {}
    toy = bench.study("quick")
    assert "score = 0.5 +" in toy.repo().read(win.commit, "score.py")
    assert "less is more" in (toy.path / "results.tsv").read_text()
    audit(toy)
    assert bench.processes() == []


def won_by_ada(bench: Bench) -> Win | None:
    study = bench.study("quick").replayed()
    return next(
        (
            win
            for lane in study.lanes.values()
            for win in lane.wins
            if study.candidates[win.candidate].candidate.proposal.proposer == "ada"
        ),
        None,
    )


@pytest.mark.parametrize("how", ["Ctrl-C twice", "SIGTERM"])
def test_a_study_that_is_stopped_ends_its_trials_and_runs_them_again_later(bench: Bench, how: str):
    slow = PROGRAM.replace("SECONDS = 0.7", "SECONDS = 20")
    (bench.path / "score.py").write_text(slow)
    session = bench.quick()
    until(lambda: len(in_flight(bench.events())) == 2, session)
    if how == "SIGTERM":
        session.process.terminate()
    else:
        session.press_ctrl_c()
        until(lambda: "draining" in session.said(), session)
        session.press_ctrl_c()
    assert session.ends(20) == 130, session.said()
    assert "Traceback" not in session.said()
    assert "stopped at once" in session.said()
    assert bench.processes() == []
    assert len(in_flight(bench.events())) == 2
