"""Models and agents, made as a study makes them, keep the contract of every proposer. Both repeat themselves."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_kit import Act, Handler, Server, says
from proposer_contract import GROWN, Contract, Make, checked, full_request, patched

from raysearch import leftovers, minds
from raysearch.config import StudyConfig, parse_config
from raysearch.knobs import fingerprint
from raysearch.proposers import Idea, NoIdea, Proposer
from raysearch.proposers.agent_run import AGENT_MARK
from raysearch.proposers.prices import Purse

LINE = "LR = 0.04137"  # of GROWN
SAID = "Hypothesis: another step size\nOperator: tune\nPredicted delta: -0.01"


def config_of(**tables: Any) -> StudyConfig:
    task = {"kind": "command", "command": ["never run"], "metric": "score", "protected": ["harness.py"]}
    return parse_config({"name": "test", "objective": task, **tables}, where="test")


def made(config: StudyConfig, folder: Path) -> Proposer:
    """The first proposer of a study."""
    place = minds.Place(folder, {"harness.py": "def evaluate():\n    return 1.0\n"}, Purse(None), print)
    return minds.make(config, place)[0]


# ---- chat models ----


def step_sizes(each: int) -> Act:
    """Proposes one step size after the other, each of them so many times."""
    numbers = itertools.count()

    def act(handler: Handler) -> None:
        edit = {"path": None, "search": LINE, "replace": f"LR = {0.005 + next(numbers) // each / 1000:.3f}"}
        usual = {"hypothesis": "another step size", "operator": "tune", "predicted_delta": -0.01, "file": None}
        says(json.dumps({**usual, "edits": [edit]}))(handler)

    return act


def chat(api: str, server: Server) -> Proposer:
    model = {"name": "m", "api": api, "base_url": server.url + ("/v1" if api == "openai" else "")}
    return made(config_of(models=[model]), Path("unused"))


class TestChat(Contract):
    rounds = 6

    @pytest.fixture(params=["openai", "anthropic"])
    def make(self, request: pytest.FixtureRequest) -> Iterator[Make]:
        servers: list[Server] = []

        def make(_seed: int) -> Proposer:
            servers.append(Server(step_sizes(4)))
            return chat(request.param, servers[-1])

        yield make
        for server in servers:
            server.end()

    def test_a_known_program_is_no_idea_however_often_it_comes(self, make: Make):
        known = frozenset(fingerprint({"train.py": GROWN.replace(LINE, f"LR = {size}")}) for size in ("0.005", "0.006"))
        proposer = make(1)
        answers = proposer.ask(full_request(5, known=known))
        assert [type(answer) for answer in answers] == [NoIdea] * 4 + [Idea]  # of two calls each but for the last
        assert all("was already tried here" in answer.reason for answer in answers if isinstance(answer, NoIdea))
        (program,) = checked(proposer, answers, {"train.py": GROWN})
        assert "LR = 0.007" in program
        proposer.close()


# ---- coding agents ----

# The number of a run is where its byte ends up in a file that all of them append to.
AGENT = f"""
import os
file = os.open({{count!r}}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(file, b"x")
number = os.lseek(file, 0, os.SEEK_CUR) - 1
text = open("train.py").read()
assert {LINE!r} in text and os.access("harness.py", os.R_OK)
open("train.py", "w").write(text.replace({LINE!r}, f"LR = {{{{0.005 + number // 2 / 1000:.3f}}}}"))
print({SAID!r})
"""


class TestAgent(Contract):
    rounds = 3  # each ask is a process
    count = 1

    @pytest.fixture
    def make(self, tmp_path: Path) -> Iterator[Make]:
        numbers = itertools.count()

        def make(_seed: int) -> Proposer:
            script = tmp_path / f"agent{next(numbers)}.py"
            script.write_text(AGENT.format(count=str(script.with_suffix(".count"))))
            agent = {"command": [sys.executable, "-S", str(script), "{prompt}"]}
            return made(config_of(agents={"fake": agent}), tmp_path / "scratch")

        yield make
        assert leftovers.marked(lambda marks: marks.get(AGENT_MARK, "").startswith(str(tmp_path))) == []

    def test_a_program_that_it_has_just_proposed_is_no_idea(self, make: Make):
        proposer = make(1)
        first, second, third = proposer.ask(full_request(3))
        assert isinstance(first, Idea)
        assert isinstance(second, NoIdea)
        assert second.reason == "its program was run before, or is about to be, but for comments and layout"
        assert isinstance(third, Idea)
        assert "LR = 0.006" in patched(GROWN, third.patch)
        proposer.close()
