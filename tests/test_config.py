"""`study.toml`: strict, complete, and said in one line what is wrong; a study that is there keeps its own."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raysearch import folder as folders
from raysearch.config import MOST_RUNS, StudyConfig, load_config, parse_config, write_config
from raysearch.errors import UserError
from raysearch.folder import Folder
from raysearch.model import Direction
from raysearch.objective import TRAINER

COMMAND = {"kind": "command", "command": ["{python}", "score.py", "--seed", "{seed}"], "metric": "score"}


def parse(text: str) -> StudyConfig:
    return parse_config(tomllib.loads(f'name = "s"\n{text}'), where="study.toml")


def refusal(text: str) -> str:
    with pytest.raises(UserError) as error:
        parse(text)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix("study.toml: ")


# ---- round trip ----


def test_defaults_are_written_out_and_read_back(tmp_path: Path):
    config = parse_config({"name": "s"}, where="options")
    path = tmp_path / "study.toml"
    write_config(path, config)
    assert load_config(path) == config
    table = tomllib.loads(path.read_text())
    assert table["judge"] == {
        "rule": "race",
        "baseline_runs": 3,
        "noise_share": 0.05,
        "screen_probability": 0.3,
        "frontier_probability": 0.8,
        "keep_probability": 0.95,
        "drop_probability": 0.25,
        "max_pairs": 5,
        "least_effect": 0.25,
        "simplify_margin": 1.0,
    }
    assert table["search"] == {
        "searcher": "optuna",
        "seed": 0,
        "parallel": 4,
        "frontier": True,
        "futility": True,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["study.toml"]


LINES = st.text(st.characters(codec="utf-8"), max_size=20)
TABLES = st.fixed_dictionaries(
    {"name": LINES},
    optional={
        "preset": LINES,
        "dataset": LINES,
        "datasets": st.dictionaries(LINES, LINES, max_size=3),
        "budget": st.one_of(
            st.fixed_dictionaries({"seconds": st.floats(1e-9, 1e9)}), st.fixed_dictionaries({"tokens": st.integers(1)})
        ),
        "search": st.fixed_dictionaries({"searcher": LINES, "seed": st.integers(-(2**62), 2**62)}),
        "judge": st.fixed_dictionaries(
            {"baseline_runs": st.integers(2, 99), "keep_probability": st.floats(0.5, 1, exclude_max=True)}
        ),
        "slots": st.fixed_dictionaries({"device": st.sampled_from(["auto", "cuda", "cpu"]), "threads": st.integers(1)}),
        "objective": st.builds(
            lambda metric, protected, way: {**COMMAND, "metric": metric, "protected": protected, "direction": way},
            LINES,
            st.lists(st.from_regex(r"[a-z]{2,9}/é[a-z]{0,4}", fullmatch=True), max_size=3, unique=True),
            st.sampled_from(["minimize", "maximize"]),
        ),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=TABLES)
def test_whatever_is_valid_is_read_back_the_same(tmp_path: Path, table: dict[str, Any]):
    config = parse_config(table, where="options")
    write_config(tmp_path / "study.toml", config)
    assert load_config(tmp_path / "study.toml") == config


def test_settings_and_objective_are_what_the_file_says():
    config = parse_config(
        {"name": "s", "objective": {**COMMAND, "direction": "maximize", "timeout_s": 5}}, where="test"
    )
    assert config.to_objective().command == ("{python}", "score.py", "--seed", "{seed}")
    assert config.to_objective().timeout_s == 5.0
    assert config.settings(7).direction is Direction.MAXIMIZE
    assert (config.settings(7).max_trials, config.settings(None).max_trials) == (7, None)
    assert parse("[judge]\nmax_pairs = 5").settings(None).rules.max_pairs == 5
    assert parse("").to_objective() is TRAINER


# ---- unknown keys ----


@pytest.mark.parametrize(
    ("text", "key", "known"),
    [
        (
            "presett = 'cpu'",
            "presett",
            "name, preset, dataset, datasets, manifests, objective, budget, search, judge, slots",
        ),
        ("[judges]\nmax_pairs = 2", "judges", "search, judge, slots"),
        ("[objective]\nmetrics = 'x'", "objective.metrics", "kind, editable, protected, command, metric, direction"),
        ("[budget]\nminutes = 5", "budget.minutes", "known here: seconds, tokens;"),
        ("[search]\nproposer = 'x'", "search.proposer", "known here: searcher, seed, proposers"),
        ("[judge]\nbaselineruns = 3", "judge.baselineruns", "known here: rule, baseline_runs"),
        ("[slots]\ngpus = 1", "slots.gpus", "known here: device, cpu_slots, threads, niceness;"),
    ],
)
def test_an_unknown_key_is_named_with_those_that_are_known_in_its_place(text: str, key: str, known: str):
    said = refusal(text)
    assert said.startswith(f"key {key!r} is not known; known here: ")
    assert known in said
    assert said.endswith("; remove it or mend its spelling")


# ---- values ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("preset = 3", "preset = 3: input should be a valid string"),
        ("budget = 20", "budget = 20: it must be a table, [budget]"),
        ("[budget]\nseconds = 0", "budget.seconds = 0: input should be greater than 0"),
        ("[budget]\nseconds = -1.5", "budget.seconds = -1.5: input should be greater than 0"),
        ("[budget]\nseconds = inf", "budget.seconds = inf: input should be a finite number"),
        ("[budget]\nseconds = nan", "budget.seconds = nan: input should be a"),
        ("[budget]\ntokens = 0", "budget.tokens = 0: input should be greater than 0"),
        ("[budget]\ntokens = 2.5", "budget.tokens = 2.5: input should be a valid integer"),
        ("[budget]\nseconds = '20 s'", "budget.seconds = '20 s': input should be a valid number"),
        ("[budget]\nseconds = 5\ntokens = 5", "budget: a budget is in seconds or in tokens, not in both; drop one"),
        ("[judge]\nbaseline_runs = 1", "judge.baseline_runs = 1: input should be greater than or equal to 2"),
        ("[judge]\nkeep_probability = 1", "judge.keep_probability = 1: input should be less than 1"),
        ("[judge]\nkeep_probability = 0.4", "judge.keep_probability = 0.4: input should be greater than or"),
        ("[judge]\ndrop_probability = 0.6", "judge.drop_probability = 0.6: input should be less than or equal to 0.5"),
        ("[judge]\nmax_pairs = 0", "judge.max_pairs = 0: input should be greater than or equal to 1"),
        ("[slots]\ndevice = 'tpu'", "slots.device = 'tpu': input should be 'auto', 'cuda' or 'cpu'"),
        ("[slots]\nthreads = 0", "slots.threads = 0: input should be greater than or equal to 1"),
        ("[slots]\ncpu_slots = -1", "slots.cpu_slots = -1: input should be greater than or equal to 0"),
        ("[slots]\nniceness = 20", "slots.niceness = 20: input should be less than or equal to 19"),
        ("[datasets]\ncpu = 3", "datasets.cpu = 3: input should be a valid string"),
        ("[objective]\nkind = 'python'", "objective.kind = 'python': input should be 'trainer' or 'command'"),
        ("[objective]\nkind = 'command'", 'objective: kind = "command" needs `command`, e.g. ["{python}", "score.py"'),
        ("[objective]\nmetric = 'loss'", 'objective: metric is for kind = "command"; the trainer has its own'),
    ],
)
def test_a_value_against_its_rule_is_said_with_the_rule_and_the_remedy(text: str, said: str):
    found = refusal(text)
    assert found.startswith(said)
    assert found.endswith("; change it or leave it out")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"direction": "up"}, "objective.direction = 'up': input should be 'minimize' or 'maximize'"),
        ({"editable": []}, "objective.editable = []: list should have at least 1 item"),
        ({"editable": "train.py"}, "objective.editable = 'train.py': input should be a valid list"),
        ({"editable": [1]}, "objective.editable.0 = 1: input should be a valid string"),
        ({"editable": ["/etc/passwd"]}, "objective: '/etc/passwd' must be a path inside the program's folder"),
        ({"protected": ["../data.py"]}, "objective: '../data.py' must be a path inside the program's folder"),
        ({"editable": [""]}, "objective: '' must be a path inside the program's folder"),
        ({"editable": ["a.py"], "protected": ["a.py"]}, "objective: 'a.py' is there twice; a file is either editable"),
        ({"timeout_s": 0}, "objective.timeout_s = 0: input should be greater than 0"),
        ({"timeout_s": float("inf")}, "objective.timeout_s = inf: input should be a finite number"),
    ],
)
def test_an_objective_of_ones_own_is_checked(keys: dict[str, Any], said: str):
    with pytest.raises(UserError) as error:
        parse_config({"name": "s", "objective": {**COMMAND, **keys}}, where="score.toml")
    assert str(error.value).startswith(f"score.toml: {said}")


def test_pairs_and_baselines_cannot_run_into_the_seeds_of_the_next_candidate():
    for key in ("max_pairs", "baseline_runs"):
        assert f"less than {MOST_RUNS}" in refusal(f"[judge]\n{key} = {MOST_RUNS}")
        parse(f"[judge]\n{key} = {MOST_RUNS - 1}")


def test_a_name_is_needed():
    with pytest.raises(UserError, match=r"^study.toml: name is missing; add it$"):
        parse_config({}, where="study.toml")


# ---- the file ----


def load_refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        load_config(path)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}")


def test_a_file_that_is_no_toml_is_named_with_the_line(tmp_path: Path):
    path = tmp_path / "study.toml"
    path.write_text('name = "s"\n[judge]\nmax_pairs = \n')
    assert load_refusal(path) == ": Invalid value (at line 3, column 13); it must be TOML: mend that line"


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path):
    path = tmp_path / "study.toml"
    assert load_refusal(path) == " does not exist; start the study with `raysearch --study NAME`"
    path.write_bytes(b'name = "\xff"\n')
    assert "it must be TOML" in load_refusal(path)
    path.unlink()
    path.mkdir()
    assert load_refusal(path) == ": Is a directory; it must be a file that can be read"


def test_a_wrong_value_in_the_file_is_named_with_the_file(tmp_path: Path):
    path = tmp_path / "study.toml"
    path.write_text('name = "s"\n[slots]\nthreads = 0\n')
    assert load_refusal(path).startswith(": slots.threads = 0: ")


# ---- a study that is there ----


def made(tmp_path: Path, chosen: dict[str, Any]) -> Folder:
    place = Folder(tmp_path / "night")
    config, is_new = folders.configure(place, chosen)
    assert is_new
    place.path.mkdir()
    write_config(place.config, config)
    return place


def test_a_study_goes_on_with_its_own_configuration(tmp_path: Path):
    place = made(tmp_path, {"preset": "cpu", "budget": {"seconds": 20.0}, "objective": COMMAND})
    for chosen in ({}, {"preset": "cpu"}, {"budget": {"seconds": 20}}, {"objective": COMMAND}, {"search": {"seed": 0}}):
        config, is_new = folders.configure(place, chosen)
        assert not is_new
        assert config == load_config(place.config)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"preset": "h100"}, "preset = 'h100': study 'night' was started with 'cpu'; leave the option out to go on"),
        ({"dataset": "tinystories"}, "dataset = 'tinystories': study 'night' was started with ''"),
        ({"budget": {"seconds": 30.0}}, "budget.seconds = 30.0: study 'night' was started with 20.0"),
        ({"budget": {"tokens": 1000}}, "budget.tokens = 1000: study 'night' was started with None"),
        ({"search": {"searcher": "random", "seed": 0}}, "search.searcher = 'random': study 'night' was started with"),
        ({"judge": {"baseline_runs": 5}}, "judge.baseline_runs = 5: study 'night' was started with 3"),
        ({"objective": COMMAND}, "objective.kind = 'command': study 'night' was started with 'trainer'"),
        ({"datasets": {"cpu": "sotu"}}, "datasets.cpu = 'sotu': study 'night' was started with None"),
        ({"objectives": COMMAND}, "options: key 'objectives' is not known"),
        ({"judge": {"max_pairs": 0}}, "options: judge.max_pairs = 0: input should be greater than or equal to 1"),
    ],
)
def test_a_choice_against_an_earlier_one_is_refused(tmp_path: Path, chosen: dict[str, Any], said: str):
    place = made(tmp_path, {"preset": "cpu", "budget": {"seconds": 20.0}})
    with pytest.raises(UserError) as error:
        folders.configure(place, chosen)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_folder_with_other_things_in_it_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex, but no study\.toml; a study needs a folder of its own"):
        folders.configure(Folder(tmp_path), {})


def test_an_empty_folder_may_become_a_study(tmp_path: Path):
    config, is_new = folders.configure(Folder(tmp_path), {"preset": "cpu"})
    assert is_new
    assert (config.name, config.preset) == (tmp_path.name, "cpu")


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a b", "ü", "x" * 65, "a\n"])
def test_a_name_that_is_no_name_of_a_folder_is_refused(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="a name has letters, digits"):
        folders.named_folder(name, tmp_path)


def test_a_study_may_be_named_by_its_path(tmp_path: Path):
    assert folders.named_folder(f"{tmp_path}/night", tmp_path / "elsewhere").path == tmp_path / "night"
    assert folders.named_folder("night", tmp_path).path == tmp_path / "night"
