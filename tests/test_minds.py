"""Who proposes, as options and files say it: what is made of it, what is refused, and what a study may change."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from test_cli import OBJECTIVE, SCORE, said

from raysearch import folder as folders
from raysearch import minds
from raysearch.config import PROPOSERS, StudyConfig, load_config, parse_config, write_config
from raysearch.errors import UserError
from raysearch.folder import Folder
from raysearch.proposers.prices import Purse

LOCAL = "http://127.0.0.1:1/v1"  # a server that needs no key
NOWHERE = ("--address", "127.0.0.1:1")  # a Ray that is not there: all that comes before it has worked


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "objective.toml").write_text(OBJECTIVE)
    (tmp_path / "score.py").write_text(SCORE)
    (tmp_path / "prices.toml").write_text("[m]\ninput = 1\noutput = 2\n")
    (tmp_path / "agent").write_text("#!/bin/sh\n")
    (tmp_path / "agent").chmod(0o755)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a new study is refused, before anything of it is there."""
    code, error = said(capsys, "--objective", "objective.toml", *arguments)
    assert code == 2
    assert len(error.strip().splitlines()) == 1, error
    assert not Path("studies").exists()
    return error.removeprefix("raysearch: ").strip()


def went(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[StudyConfig, list[str]]:
    """What a study has when it has come as far as Ray, and what was said until then."""
    code, error = said(capsys, "--objective", "objective.toml", "--study", "s", *NOWHERE, *arguments)
    *notes, last = error.strip().splitlines()
    assert code == 2
    assert "Ray is not reachable" in last, error
    return load_config(Path("studies/s/study.toml")), notes


# ---- options ----


@pytest.mark.parametrize(
    ("option", "table"),
    [
        ("gpt-5-mini", {"name": "gpt-5-mini"}),
        ("3*gpt-5-mini", {"name": "gpt-5-mini", "weight": 3.0}),
        ("0.5*anthropic:claude-opus-5", {"name": "claude-opus-5", "api": "anthropic", "weight": 0.5}),
        ("1*x", {"name": "x"}),
        (f"qwen3:8b@{LOCAL}", {"name": "qwen3:8b", "base_url": LOCAL}),
        (f"2*openai:a/b@{LOCAL}", {"name": "a/b", "api": "openai", "base_url": LOCAL, "weight": 2.0}),
        ("claude-opus-4@20250514", {"name": "claude-opus-4@20250514"}),
        (f"@cf/meta/llama@{LOCAL}", {"name": "@cf/meta/llama", "base_url": LOCAL}),
    ],
)
def test_the_short_form_of_a_model_says_weight_api_name_and_url(option: str, table: dict[str, Any]):
    assert minds.model_table(option) == table


@pytest.mark.parametrize(
    "option",
    [
        *("", "2*", "*x", "-1*x", "1.2.3*x", "nan*x", "openai:", "2*anthropic:", "a b", f"a b@{LOCAL}"),
        *("x@localhost:8080", "x@localhost", "x@10.0.0.7:8000/v1", "x@ftp://host/v1", f"@{LOCAL}", "x@http://"),
    ],
)
def test_what_is_no_short_form_of_a_model_is_refused_with_the_form(capsys: pytest.CaptureFixture[str], option: str):
    line = refused(capsys, "--model", option)
    assert line.startswith(f"--model {option!r}: it must be [WEIGHT*][API:]NAME[@URL], such as ")
    assert line.endswith("see --minds")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", f"0*m@{LOCAL}"], "model 'm': weight 0.0 must be above 0; leave the model out instead"),
        (
            ["--model", "x@http://me:hunter2@host/v1"],
            "model 'x': base_url 'host/v1' is no http(s) address without a password; give one",
        ),
        (
            ["--model", "m"],
            "model 'm' needs a key: OPENAI_API_KEY is not set; export it, or name another variable by key_env in a "
            "file for --minds",
        ),
        (["--model", "anthropic:m"], "model 'm' needs a key: ANTHROPIC_API_KEY is not set; export it, or"),
        (
            ["--agent", "nobody"],
            "the coding agent 'nobody' is not known; known: claude, codex, gemini, opencode, aider; take one of these",
        ),
        (["--agent", "tune"], "options: agents: 'tune' is the name of another proposer; give the agent another name"),
        (["--max-usd", "0"], "--max-usd 0.0: it must be more than 0; leave it out for no limit"),
        (["--max-usd", "-2"], "--max-usd -2.0: it must be more than 0; leave it out for no limit"),
        (["--max-usd", "nan"], "--max-usd nan: it must be more than 0; leave it out for no limit"),
        (
            ["--proposers", "tune,foo"],
            "options: search.proposers: 'foo' is not known; known here: tune, additive, ablate, simplify, transfer, "
            "combine; chat needs --model, an agent needs --agent",
        ),
        (["--proposers", "chat"], "options: search.proposers: 'chat' is not known; known here: tune"),
        (
            ["--proposers", "tune, tune"],
            "options: search.proposers: 'tune' is there twice; name each proposer once",
        ),
        (["--parallel", "0"], "options: search.parallel = 0: input should be greater than or equal to 1"),
        (["--prices", "nowhere.toml"], "price file '{here}/nowhere.toml' cannot be read: [Errno 2] No such file"),
        (["--minds", "nowhere.toml"], "nowhere.toml: [Errno 2] No such file or directory"),
        (["--minds", "."], ".: [Errno 21] Is a directory: '.'; --minds takes a readable TOML file"),
    ],
)
def test_an_option_that_cannot_work_is_one_line_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], line: str
):
    said_ = refused(capsys, *arguments)
    assert said_.startswith(line.replace("{here}", str(tmp_path)))
    assert "hunter2" not in said_
    assert ";" in said_


def test_an_agent_whose_program_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refused(capsys, "--agent", "claude=some-model")
    assert line.startswith("agent 'claude': 'claude' is not on PATH; a coding agent runs on the machine of the coord")
    assert line.endswith("install it there, or give its path in `command`")


def test_a_package_that_is_missing_is_said_with_the_extra_that_has_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    find = importlib.util.find_spec
    absent = ("openai", "anthropic")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    for api in absent:
        line = refused(capsys, "--model", f"{api}:m@{LOCAL}")
        assert f"need the package '{api}', which is not installed" in line
        assert line.endswith(f"run: pip install 'autoresearch-ray[{api}]'")


def test_a_cap_needs_prices_that_are_known(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-real-key")
    far = ("--max-usd", "3", "--model", "m@https://models.example/v1")
    line = refused(capsys, *far)
    assert line == (
        "the price of model 'm' is not known, so a spend cap cannot hold; add [m] with input and output in USD per "
        "million tokens to a file for --prices"
    )
    config, notes = went(capsys, *far, "--prices", "prices.toml")
    assert notes == []
    assert Path(config.prices).is_absolute()


# ---- files ----


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = \n", "minds.toml: Invalid value (at line 1, column 5); --minds takes a readable TOML file"),
        ("model = 3", "minds.toml: key 'model' is not known; known here: models, agents, prices; remove it"),
        ("models = 3", "minds.toml: models = 3: it must be tables, [[models]]; correct it"),
        ("models = [3]", "minds.toml: models = [3]: it must be tables, [[models]]; correct it"),
        ("[models]\nname = 'm'", "minds.toml: models = {'name': 'm'}: it must be tables, [[models]]; correct it"),
        ("agents = 3", "minds.toml: agents = 3: it must be tables, [agents.NAME]; correct it"),
        ("agents.a = 3", "minds.toml: agents = {'a': 3}: it must be tables, [agents.NAME]; correct it"),
        ("prices = 3", "minds.toml: prices = 3: it must be the path of a file; correct it"),
        ("[[models]]\nnam = 'm'", "[[models]] ?: the key 'nam' is not known; known: name, api, base_url, key_env"),
        ("[[models]]\nweight = 2", "[[models]] ?: Object missing required field `name`; correct it"),
        (
            "[[models]]\nname = 'm'\nweight = 'a'",
            "[[models]] m: weight = 'a': expected `float`, got `str`; correct it",
        ),
        (
            "[[models]]\nname = 'm'\napi = 'gemini'",
            "[[models]] m: api = 'gemini': invalid enum value 'gemini'; known: openai, anthropic; correct it",
        ),
        (
            "[[models]]\nname = 'm'\nkey_env = 'sk-hunter2'",
            "model 'm': key_env is no name of an environment variable; export the key, and give its name",
        ),
        ("[agents.claude]\ntimeout = 5", "[agents.claude]: the key 'timeout' is not known; known: like, command, tim"),
        (
            "[agents.claude]\ntimeout_s = 'x'",
            "[agents.claude]: timeout_s = 'x': expected `float`, got `str`; correct it",
        ),
        ("[agents.mine]\nmodel = 'm'", "the coding agent 'mine' is not known; known: claude"),
        (
            "[agents.mine]\ncommand = ['true']\nenv = ['MY_KEY=sk-hunter2']",
            "agent 'mine': env sets MY_KEY, a secret that the study's files would hold; export it, and give its name",
        ),
        ("prices = 'none.toml'", "price file '{here}/far/none.toml' cannot be read: [Errno 2] No such file"),
    ],
)
def test_a_file_of_minds_that_cannot_work_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, line: str
):
    Path("far").mkdir()
    Path("far/minds.toml").write_text(text)
    said_ = refused(capsys, "--minds", "far/minds.toml")
    assert said_.removeprefix("far/").startswith(line.replace("{here}", str(tmp_path)))
    assert "hunter2" not in said_


@pytest.mark.parametrize(
    ("text", "said_"),
    [("[m", "Expected ']'"), ("[m]\ninput = 1", "missing required field `output`"), ("m = 3", "Expected `object`")],
)
def test_a_price_file_that_is_none_is_refused_even_where_nothing_costs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said_: str
):
    Path("bad.toml").write_text(text)
    line = refused(capsys, "--prices", "bad.toml")
    assert line.startswith(f"price file '{tmp_path}/bad.toml': ")
    assert said_ in line
    assert line.endswith("in USD per million tokens")


def test_options_come_on_top_of_a_file_whose_prices_lie_beside_it(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    Path("far").mkdir()
    Path("prices.toml").rename("far/mine.toml")
    text = f"prices = 'mine.toml'\n[[models]]\nname = 'a'\nbase_url = '{LOCAL}'\n[agents.{{}}]\ncommand = ['{{}}']"
    Path("far/minds.toml").write_text(text.format("own", tmp_path / "agent"))
    config, notes = went(capsys, "--minds", "far/minds.toml", "--model", f"2*m@{LOCAL}")
    assert notes == []
    assert [(model["name"], model.get("weight")) for model in config.models] == [("a", None), ("m", 2.0)]
    assert config.prices == str(tmp_path / "far/mine.toml")
    assert config.proposers == ("chat", "own", *PROPOSERS)


def test_proposers_are_made_in_the_order_in_which_they_are_named(tmp_path: Path):
    table = {
        "name": "s",
        "objective": {"kind": "command", "command": ["x"], "metric": "score"},
        "models": [{"name": "m", "base_url": LOCAL, "timeout_s": 500.0}],
        "agents": {"own": {"command": [str(tmp_path / "agent")], "timeout_s": 9.0}},
        "search": {"proposers": ["tune", "own", "chat", "simplify"], "parallel": 3},
    }
    place = minds.Place(tmp_path / "scratch", {}, Purse(None), lambda _: None)
    made = minds.make(parse_config(table, where="test"), place)
    assert [proposer.name for proposer in made] == ["tune", "own", "chat", "simplify"]
    assert [proposer.parallel for proposer in made] == [1, 3, 3, 1]
    assert made[2].limit_s == 1100.0  # two calls of the slowest model
    assert [proposer.wants_brief for proposer in made] == [False, True, True, False]


# ---- a study that is there ----

MODEL = {"name": "m", "base_url": LOCAL}


def study(tmp_path: Path, **chosen: Any) -> Folder:
    place = Folder(tmp_path / "night")
    place.path.mkdir()
    write_config(place.config, folders.configure(place, {"preset": "cpu", **chosen})[0])
    return place


def test_a_study_goes_on_with_other_models_agents_and_prices_and_nothing_is_written_until_they_are_known_to_work(
    tmp_path: Path,
):
    place = study(tmp_path, models=[MODEL], agents={"claude": {}})
    before = place.config.read_text()
    config, is_new = folders.configure(place, {"models": [{"name": "n"}], "prices": "/p.toml"})
    assert not is_new
    assert (config.models, config.agents, config.prices) == ([{"name": "n"}], {"claude": {}}, "/p.toml")
    assert config.proposers == ("chat", "claude", *PROPOSERS)
    assert folders.configure(place, {"agents": {"codex": {}}})[0].proposers == ("chat", "codex", *PROPOSERS)
    assert folders.configure(place, {"models": []})[0].proposers == ("claude", *PROPOSERS)
    assert place.config.read_text() == before


@pytest.mark.parametrize("key", ["seed", "searcher", "parallel", "frontier", "futility"])
def test_of_the_search_nothing_changes_but_who_is_asked(tmp_path: Path, key: str):
    place = study(tmp_path)
    stored = load_config(place.config).search.model_dump()[key]
    other = {"seed": 5, "searcher": "random", "parallel": 9}.get(key, not stored)
    with pytest.raises(UserError, match=f"search.{key} = {other!r}: study 'night' was started with {stored!r}"):
        folders.configure(place, {"search": {key: other, "proposers": ["tune"]}, "models": [MODEL]})


@pytest.mark.parametrize(
    ("named", "chosen", "asked"),
    [
        (["tune", "chat"], {}, "tune chat"),
        (["tune", "chat"], {"search": {"proposers": ["tune", "chat"]}}, "tune chat"),
        (["tune", "chat"], {"search": {"proposers": ["ablate"]}}, "ablate"),
        (["tune"], {"prices": "/p.toml"}, "tune"),
        (["tune"], {"models": [{"name": "n"}]}, "chat tune"),
        (["tune", "chat"], {"models": [{"name": "n"}]}, "tune chat"),
        (["tune"], {"models": [{"name": "n"}], "search": {"proposers": ["tune"]}}, "tune"),
        (["tune"], {"agents": {"codex": {}}}, "codex tune"),
        (["claude", "tune"], {"agents": {"codex": {}}}, "codex tune"),
        (["claude"], {"agents": {"codex": {}}, "models": [MODEL]}, "chat codex"),
        (["tune", "chat"], {"models": []}, "tune"),
        (["chat"], {"models": []}, "claude tune additive ablate simplify transfer combine"),
        (None, {"search": {"proposers": ["tune"]}}, "tune"),
    ],
)
def test_who_is_named_one_by_one_stays_and_who_is_new_comes_in_front(
    tmp_path: Path, named: list[str] | None, chosen: dict[str, Any], asked: str
):
    search = {"search": {"proposers": named}} if named else {}
    place = study(tmp_path, models=[MODEL], agents={"claude": {}}, **search)
    config, _ = folders.configure(place, chosen)
    assert " ".join(config.proposers) == asked
    write_config(place.config, config)
    assert load_config(place.config) == config


def test_whoever_is_not_known_any_more_is_refused_where_he_is_named(tmp_path: Path):
    place = study(tmp_path, agents={"claude": {}})
    with pytest.raises(UserError, match=r"'claude' is not known; known here: codex, tune"):
        folders.configure(place, {"agents": {"codex": {}}, "search": {"proposers": ["claude", "tune"]}})


def test_a_study_is_told_whom_it_asks_when_that_changes(capsys: pytest.CaptureFixture[str]):
    local = ("--model", f"m@{LOCAL}")
    assert went(capsys, "--proposers", "tune,ablate")[1] == []
    assert went(capsys, "--proposers", "tune,ablate")[1] == []
    config, notes = went(capsys, *local)
    assert notes == ["asked from now on: chat, tune, ablate; --proposers names others"]
    assert config.proposers == ("chat", "tune", "ablate")
    config, notes = went(capsys, *local, "--proposers", "tune")
    assert notes == [
        "asked from now on: tune; --proposers names others",
        "chat will not be asked: --proposers is tune; add it there",
    ]
    assert went(capsys) == (config, [])
    assert config.models == [{"name": "m", "base_url": LOCAL}]


@pytest.mark.parametrize("bad", [["--model", "anthropic:x"], ["--agent", "nobody"], ["--prices", "nowhere.toml"]])
def test_what_cannot_work_leaves_a_study_as_it_was(capsys: pytest.CaptureFixture[str], bad: list[str]):
    config, _ = went(capsys, "--model", f"m@{LOCAL}")
    code, error = said(capsys, "--study", "s", *NOWHERE, *bad)
    assert code == 2
    assert "Ray" not in error
    assert len(error.strip().splitlines()) == 1, error
    assert went(capsys) == (config, [])


def test_an_agent_that_may_pass_the_cap_is_named(tmp_path: Path):
    lines: list[str] = []
    (tmp_path / "mine").write_text("#!/bin/sh\n")
    (tmp_path / "mine").chmod(0o755)
    for max_usd, named in ((0, True), (0.5, False)):
        table = {"command": [str(tmp_path / "mine"), "{prompt}"], "max_usd": max_usd}
        config = parse_config({"name": "s", "agents": {"mine": table}}, where="options")
        minds.make(config, minds.Place(tmp_path / "scratch", {}, Purse(1.0), lines.append))
        assert any("agent mine: without a max_usd" in line for line in lines) == named
        lines.clear()
