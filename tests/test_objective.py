"""How a trial of the bundled trainer is called: what its command says and what its limits allow."""

import dataclasses
from pathlib import Path

import pytest

from raysearch.model import Direction
from raysearch.objective import (
    SLICE_ROWS,
    TRAINER,
    Budget,
    Objective,
    evaluation_sizes,
    load_presets,
    plan_trial,
    slice_tokens,
)

PRESETS = load_presets()
COMMAND = Objective(("score.py",), (), ("{python}", "score.py"), "score", Direction.MAXIMIZE, False, timeout_s=60.0)


def planned(
    preset: str = "cpu", *, holdout: bool = False, futile_above: float | None = None
) -> tuple[list[str], float]:
    plan = plan_trial(
        TRAINER,
        PRESETS[preset],
        Budget(seconds=20.0),
        device="cpu",
        threads=1,
        holdout=holdout,
        futile_above=futile_above,
    )
    return list(plan.command), plan.total_limit_s


@pytest.mark.parametrize("preset", PRESETS)
def test_every_trial_of_a_profile_is_scored_on_the_same_slice_half_way(preset: str):
    commands = [planned(preset, futile_above=limit)[0] for limit in (None, 1.0)]
    slices = {command[command.index("--slice-tokens") + 1] for command in commands}
    tokens = slice_tokens(PRESETS[preset])
    assert slices == {str(tokens)}
    assert SLICE_ROWS * PRESETS[preset].row_tokens <= tokens <= PRESETS[preset].eval_tokens / 8


def test_a_slice_is_no_larger_than_the_evaluation():
    tiny = dataclasses.replace(PRESETS["cpu"], eval_tokens=512)
    assert slice_tokens(tiny) == 512


def test_where_a_trial_is_given_up_is_said_to_the_last_digit():
    bound = 1.2345678901234567
    command, _ = planned(futile_above=bound)
    assert float(command[command.index("--futile-above") + 1]) == bound
    assert "--futile-above" not in planned()[0]


def test_limits_leave_time_for_the_slice_and_for_each_split():
    preset = PRESETS["cpu"]
    once, twice = planned()[1], planned(holdout=True)[1]
    assert twice - once == preset.evaluation_limit_s
    training_s = 1.5 * 20.0 + 30
    slice_s = once - preset.startup_limit_s - training_s - preset.evaluation_limit_s
    assert slice_s == pytest.approx(preset.evaluation_limit_s * slice_tokens(preset) / preset.eval_tokens)


def test_the_whole_set_is_named_to_every_trial_and_has_time_where_it_is_scored():
    preset = PRESETS["rtx3060"]
    (once, once_s), (twice, twice_s) = planned("rtx3060"), planned("rtx3060", holdout=True)
    for command in (once, twice):
        assert command[command.index("--whole-tokens") + 1] == "20971520"
    assert twice_s - once_s == preset.evaluation_limit_s * preset.whole_tokens / preset.eval_tokens
    assert evaluation_sizes(preset) == "4194304-20971520"


@pytest.mark.parametrize("name", ["h100", "cpu"])
def test_where_every_trial_is_scored_on_the_whole_set_nothing_is_said_of_it(name: str):
    assert PRESETS[name].whole_tokens == PRESETS[name].eval_tokens
    assert "--whole-tokens" not in planned(name, holdout=True)[0]
    assert evaluation_sizes(PRESETS[name]) == str(PRESETS[name].eval_tokens)


def test_a_command_of_one_s_own_is_called_as_it_is():
    plan = plan_trial(COMMAND, None, Budget(), device="cpu", threads=1, holdout=False, futile_above=1.0)
    assert plan.command == COMMAND.command
    assert plan.total_limit_s == 60.0


def test_the_harness_knows_every_option_of_the_command():
    command, _ = planned("rtx3060", holdout=True, futile_above=1.0)
    source = (Path(__file__).parent.parent / "trainer" / "harness.py").read_text()
    options = {word for word in command if word.startswith("--")}
    assert options
    assert [option for option in options if f'"{option}"' not in source] == []
