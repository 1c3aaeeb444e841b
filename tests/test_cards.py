"""The benchmark of smaller cards, as far as it goes without a card: its edits, its counts, its words."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_kit import TINY, TRAINER, make_data, program, run_harness

from benchmarks import cards
from raysearch import knobs
from raysearch.objective import base_program, load_presets

PROGRAM = base_program((TRAINER / "train.py").read_text(), load_presets()["rtx3060"])


def job(name: str = "edit", source: str = PROGRAM) -> cards.Job:
    return cards.Job(name, source, 12, "8.6", 3.0, 1024, {})


def ran(outcome: str, rows: int | None = None, log: str = "") -> cards.Ran:
    return cards.Ran(job(), {"outcome": outcome, "micro_batch_rows": rows}, log, 20.0)


def test_random_edits_are_in_range_keep_the_rules_and_repeat_themselves():
    known, rules = knobs.read_knobs(PROGRAM), knobs.read_rules(PROGRAM)
    drawn = [cards.edited(PROGRAM, chance) for chance in [random.Random(3)] for _ in range(100)]
    for values in drawn:
        assert list(values) == list(cards.EDITED)
        assert all(known[name].allows(value) for name, value in values.items())
        assert knobs.broken_rule(rules, cards.values_of(PROGRAM) | values) is None
    assert all(len({str(values[name]) for values in drawn}) > 5 for name in cards.EDITED)
    again = random.Random(3)
    assert [cards.edited(PROGRAM, again) for _ in range(100)] == drawn


def test_a_trial_is_lost_when_fewer_rows_would_have_been_possible():
    probes = (
        "micro-batch: 2 rows x 2048 tokens: out of memory, 1.00 GB were free\nmicro-batch: 1 rows x 2048 tokens: out"
    )
    all_of_them = [
        ran("measured", 8),
        ran("measured", 1),
        ran("out_of_memory", 4),
        ran("out_of_memory", 1),
        ran("out_of_memory", None, probes),
        ran("out_of_memory", None, "no probe at all"),
        ran("crashed", 8),
    ]
    assert cards.summary(all_of_them) == (
        "7 trials, 2 measured, 4 out of memory (2 with a single row), 2 lost, 1 ended otherwise"
    )


def test_a_program_can_be_forced_to_a_number_of_rows(tmp_path: Path):
    data = make_data(tmp_path / "data")
    found = run_harness(program(**TINY), data, tmp_path / "found").result["micro_batch_rows"]
    source = program(**TINY) + cards.FORCED.format(rows=4)
    forced = run_harness(source, data, tmp_path / "forced").result
    assert (forced["outcome"], forced["micro_batch_rows"]) == ("measured", 4)
    assert found != 4


@pytest.mark.parametrize(("rows", "twice"), [(16, 32), (32, 64), (64, None)])
def test_twice_as_many_rows_are_tried_where_a_step_has_them(rows: int, twice: int | None):
    proof = cards.doubled(ran("measured", rows))
    if twice is None:
        assert proof is None
    else:
        assert proof is not None
        assert proof.program.endswith(cards.FORCED.format(rows=twice))
        assert proof.memory_gb == 12


def test_without_a_card_it_predicts_the_evaluation_and_says_in_one_line_what_is_missing(tmp_path: Path):
    """From a folder of no importance: it finds its packages by itself."""
    script = Path(cards.__file__)
    env = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "torch sees no CUDA card here: what fits is measured on one; run this where there is one"
    ]
    subset = next(line for line in done.stdout.splitlines() if line.startswith("| 4,194,304"))
    assert all(float(cell) < 20 for cell in subset.split("|")[2:4])
