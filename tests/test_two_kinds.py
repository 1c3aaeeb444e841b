"""The figures of a study on two kinds of cards: no second of a card is counted twice or not at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy import PROGRAM, SIGMA, Toy, gpu, true_score

from raysearch.knobs import Value, read_knobs
from raysearch.model import Measurement, Outcome, RatchetMoved, SessionStarted, TrialFinished
from raysearch.runner import RunResult, RunSpec
from raysearch.study import candidate_number

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "two_kinds.py"
PARTS = {"import": 1.5, "first_step": 2.0, "train": 9.0, "eval": 1.25}
FAILED = {"import": 1.5, "train": 4.0}


def behaviour(spec: RunSpec, values: dict[str, Value]) -> RunResult | None:
    """As a trainer with parts; one whose harness reports its failure, and one that fails before it can."""
    number = candidate_number(spec.trial_id.partition("-")[0]) if spec.trial_id.endswith("-screen") else 0
    if number % 5 == 4:
        return RunResult(Outcome.CRASHED, "it never came so far as to report")
    if number % 5 == 3:
        out = Path(spec.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(json.dumps({"outcome": "crashed", "seconds": FAILED, "peak_vram_mb": 9000.0}))
        return RunResult(Outcome.CRASHED, "it diverged")
    value = true_score(values) + SIGMA * (spec.seed % 7 - 3) / 3
    facts = {"tokens_per_s": 1000.0}
    measured = Measurement(value, wall_s=16.0, training_s=9.0, peak_vram_mb=7000.0, parts_s=PARTS, facts=facts)
    return RunResult(Outcome.MEASURED, "", measured)


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, dict[str, Any], Path]:
    cards = (gpu("NVIDIA H100 80GB HBM3", 81559), gpu("NVIDIA GeForce RTX 3060", 12288))
    toy = Toy(tmp_path_factory.mktemp("two"), hardware=cards, behaviour=behaviour)
    toy.drive(trials=12)
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, str(SCRIPT), "figures", str(toy.path), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found == json.loads((out / "figures.json").read_text())
    return toy, found, out


def test_a_cards_time_is_what_its_trials_and_the_gaps_add_up_to(driven: tuple[Toy, dict[str, Any], Path]):
    toy, found, _ = driven
    records = toy.records()
    (began,) = [record.at for record in records if isinstance(record.event, SessionStarted)]
    assert list(found["profiles"]) == ["h100-80gb", "rtx3060-12gb"]
    assert found["session_s"] == pytest.approx(records[-1].at - began, abs=0.1)
    for one in found["profiles"].values():
        assert sum(one["seconds"].values()) == pytest.approx(one["held_s"], abs=0.2)
        assert sum(one["shares"].values()) == pytest.approx(1.0, abs=0.002)
        assert one["training_share"] == pytest.approx(one["seconds"]["train"] / one["held_s"], abs=0.001)
        assert one["held_s"] == pytest.approx(found["session_s"], abs=1.0)
    total = sum(one["seconds"]["train"] for one in found["profiles"].values())
    assert found["training_share"] == pytest.approx(total / found["held_s"], abs=0.001)


def test_trials_that_failed_count_with_what_their_harness_reported(driven: tuple[Toy, dict[str, Any], Path]):
    toy, found, _ = driven
    ends = [record.event for record in toy.records() if isinstance(record.event, TrialFinished)]
    failed = [end for end in ends if end.outcome is Outcome.CRASHED]
    reported = sum(end.reason == "it diverged" for end in failed)
    assert 0 < reported < len(failed)
    profiles = found["profiles"].values()
    counted = sum(one["trials_by_outcome"].get("crashed", 0) for one in profiles)
    trained = PARTS["train"] * (len(ends) - len(failed)) + FAILED["train"] * reported
    assert counted == len(failed)
    assert sum(one["seconds"]["train"] for one in profiles) == pytest.approx(trained, abs=0.1)
    assert sum("trials without a report" in one["seconds"] for one in profiles) > 0
    assert max(one["largest_peak_vram_mb"] for one in profiles) == 9000.0
    assert all(one["median_of_a_measured_trial_s"]["eval"] == PARTS["eval"] for one in profiles)


def test_each_ratchet_has_its_steps_and_its_first_baseline(driven: tuple[Toy, dict[str, Any], Path]):
    toy, found, _ = driven
    moves = [record.event for record in toy.records() if isinstance(record.event, RatchetMoved)]
    for slug, one in found["profiles"].items():
        own = [move for move in moves if move.profile == slug]
        assert own
        assert [step["candidate"] for step in one["steps"]] == [move.candidate for move in own]
        assert one["champion_commit"] == own[-1].commit
        assert all(step["delta"] < 0 for step in one["steps"])
        assert one["first_baseline"] == toy.study.trials[f"{slug}-base-1"].value
        assert one["champion"] < one["baseline"]


def test_the_journal_that_is_copied_is_whole(driven: tuple[Toy, dict[str, Any], Path], tmp_path: Path):
    toy, found, out = driven
    copy = tmp_path / "copy"
    (copy / "trials").mkdir(parents=True)
    (copy / "study.toml").write_bytes(toy.folder.config.read_bytes())
    (copy / "journal.db").write_bytes((out / "journal.db").read_bytes())
    assert sorted(path.name for path in out.iterdir()) == ["figures.json", "journal.db"]
    command = [sys.executable, str(SCRIPT), "figures", str(copy), str(tmp_path)]
    again = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert again["session_s"] == found["session_s"]
    assert [one["steps"] for one in again["profiles"].values()] == [one["steps"] for one in found["profiles"].values()]


def test_a_program_is_printed_with_other_knobs(tmp_path: Path):
    (tmp_path / "train.py").write_text(PROGRAM)
    command = [sys.executable, str(SCRIPT), "edit", str(tmp_path / "train.py"), "WIDTH=128", 'MODE="fast"']
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, after = read_knobs(PROGRAM), read_knobs(done.stdout)
    changed = {name: knob.value for name, knob in after.items() if knob.value != before[name].value}
    assert changed == {"WIDTH": 128, "MODE": "fast"}
