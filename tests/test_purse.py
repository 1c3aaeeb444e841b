"""Money in whole studies: a real server that is paid for by its tokens, beside a proposer that costs nothing."""

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_kit import Handler, Server, hangs, says
from toy import PROGRAM, Toy, audit

from raysearch import folder as folders

CALL_USD = 0.1  # what each answer costs, which is also the most that it can cost
MONTH_S = 3e6  # of the study's clock, which runs fast: no ask is given up while the server thinks
SPENT = "proposer chat is not asked any more: "


class Mind:
    """A server with a new program in every answer; after so many it says nothing until the end."""

    def __init__(self, answers: float) -> None:
        self.numbers = itertools.count(1)
        self.answers = answers
        self.hung = threading.Event()
        self.server = Server(self.act)

    def act(self, handler: Handler) -> None:
        number = next(self.numbers)
        if number > self.answers:
            self.hung.set()
            return hangs(handler)
        program = PROGRAM.replace("LR = 0.003", f"LR = {0.003 + number / 1000}").replace('= "slow"', '= "fast"')
        answer = {"hypothesis": f"step {number}", "operator": "draft", "predicted_delta": None, "edits": []}
        return says(json.dumps({**answer, "file": program}), (1000, 100))(handler)

    @property
    def calls(self) -> int:
        return len(self.server.seen)


MindOf = Callable[..., Mind]


@pytest.fixture
def mind_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[MindOf]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    made: list[Mind] = []

    def make(answers: float = math.inf) -> Mind:
        made.append(Mind(answers))
        return made[-1]

    yield make
    for mind in made:
        mind.server.end()


def toy_of(tmp_path: Path, mind: Mind, *, max_usd: float | None = None, proposers: str = "chat tune") -> Toy:
    """A study that asks a mind, and the proposer that moves knobs; the model's price is in a file of the user's."""
    prices = tmp_path / "prices.toml"
    prices.write_text("[m]\ninput = 0\noutput = 1000\n")
    model: dict[str, Any] = {"name": "m", "base_url": f"{mind.server.url}/v1", "max_output_tokens": 100}
    options: dict[str, Any] = {
        "models": [model | {"timeout_s": MONTH_S / 4}],
        "prices": str(prices),
        "search": {"proposers": proposers.split(), "seed": 1},
    }
    return Toy(tmp_path / "s", options=options, max_usd=max_usd)


def direct(toy: Toy, usd: float) -> None:
    (toy.path / "program.md").write_text(f"```raysearch\nbudget.usd = {usd}\n```\n")


def screens(toy: Toy) -> int:
    return toy.study.lanes["cpu"].screens if toy.study.lanes else 0


def paid(toy: Toy) -> list[float]:
    """What each proposal of the model has cost."""
    proposals = [state.candidate.proposal for state in toy.study.candidates.values()]
    return [proposal.cost_usd for proposal in proposals if proposal.model == "m"]


class Until:
    """Has a study drain as soon as so many first runs have ended after something came true."""

    def __init__(self, holds: Callable[[Toy], bool], more: int = 0) -> None:
        self.holds, self.more = holds, more
        self.since: int | None = None
        self.is_over = False

    def __call__(self, toy: Toy) -> None:
        if self.since is None and self.holds(toy):
            self.since = screens(toy)
        if self.since is not None and not self.is_over and screens(toy) >= self.since + self.more:
            self.is_over = True
            toy.coordinator.interrupt()


def says_that(line: str) -> Callable[[Toy], bool]:
    return lambda toy: line in toy.said.getvalue()


def test_the_cap_stops_whoever_costs_and_the_study_goes_on_with_the_others(tmp_path: Path, mind_of: MindOf):
    mind = mind_of()
    toy = toy_of(tmp_path, mind, max_usd=0.35)
    toy.drive(trials=None, meanwhile=Until(says_that(SPENT), more=6))
    said = toy.said.getvalue()
    assert said.count(SPENT) == 1
    assert f"{SPENT}$0.30 of $0.35 spent; the next call may cost $0.10; raise --max-usd" in said
    assert "failed" not in said
    assert mind.calls == 3
    assert paid(toy) == [pytest.approx(CALL_USD)] * 3
    assert toy.study.spent_usd == toy.purse.spent_usd == pytest.approx(3 * CALL_USD)
    assert not toy.study.dropped
    audit(toy)


def test_what_earlier_sessions_have_spent_counts_after_a_restart(tmp_path: Path, mind_of: MindOf):
    mind = mind_of()
    toy = toy_of(tmp_path, mind, max_usd=0.35)
    toy.drive(trials=None, meanwhile=Until(says_that(SPENT)))
    assert mind.calls == 3
    toy.drive(trials=None, meanwhile=Until(lambda toy: toy.said.getvalue().count(SPENT) == 2, more=2))
    assert mind.calls == 3
    assert toy.said.getvalue().count(f"{SPENT}$0.30 of $0.35 spent") == 2  # once a session
    toy.max_usd = 0.55
    toy.drive(trials=None, meanwhile=Until(says_that(f"{SPENT}$0.50 of $0.55 spent")))
    assert mind.calls == 5
    assert toy.replayed().spent_usd == pytest.approx(5 * CALL_USD)


def test_directions_narrow_the_purse_while_a_study_runs_and_what_they_give_back_is_used(
    tmp_path: Path, mind_of: MindOf
):
    mind = mind_of()
    toy = toy_of(tmp_path, mind, max_usd=0.55)
    folders.make(toy.folder, toy.config(), {"train.py": toy.program}, at=toy.clock())
    direct(toy, 0.25)
    wider = {f"{SPENT}$0.20 of $0.25 spent": 0.42, f"{SPENT}$0.40 of $0.42 spent": 9.0}
    done = Until(says_that(f"{SPENT}$0.50 of $0.55 spent"))  # whatever the directions give, --max-usd is the most

    def widen(toy: Toy) -> None:
        for line in [line for line in wider if line in toy.said.getvalue()]:
            direct(toy, wider.pop(line))
        done(toy)

    toy.drive(trials=None, meanwhile=widen)
    said = toy.said.getvalue()
    assert said.count(SPENT) == 3
    assert said.count("proposer chat is asked again") == 2
    assert mind.calls == 5
    assert toy.study.spent_usd == pytest.approx(5 * CALL_USD)
    audit(toy)


def test_directions_that_come_to_allow_less_than_was_spent_stop_whoever_costs(tmp_path: Path, mind_of: MindOf):
    mind = mind_of()
    toy = toy_of(tmp_path, mind)
    done = Until(says_that(SPENT), more=3)

    def narrow(toy: Toy) -> None:
        if len(paid(toy)) >= 2 and not toy.study.directed:
            direct(toy, 0.05)
        done(toy)

    toy.drive(trials=None, meanwhile=narrow)
    assert toy.said.getvalue().count(SPENT) == 1
    assert " of $0.05 spent; the next call may cost $0.10" in toy.said.getvalue()
    assert toy.study.spent_usd == pytest.approx(mind.calls * CALL_USD)


def test_a_study_that_asks_nobody_else_ends_when_its_money_is_spent(tmp_path: Path, mind_of: MindOf):
    toy = toy_of(tmp_path, mind_of(), max_usd=0.25, proposers="chat")
    assert toy.drive(trials=None) == (
        "no proposer has anything new to try; chat: $0.20 of $0.25 spent; the next call may cost $0.10; raise --max-usd"
    )
    assert toy.study.spent_usd == pytest.approx(2 * CALL_USD)
    assert not toy.study.running


def test_what_is_in_flight_at_the_end_is_journalled_as_spent_and_counts_later(tmp_path: Path, mind_of: MindOf):
    mind = mind_of(answers=2)
    toy = toy_of(tmp_path, mind, max_usd=0.35)
    toy.drive(trials=None, meanwhile=Until(lambda toy: mind.hung.is_set() and len(paid(toy)) == 2, more=1))
    (dropped,) = toy.study.dropped
    assert (dropped.proposer, dropped.reason) == ("ended", "what was in flight when the session ended")
    assert dropped.cost_usd == pytest.approx(CALL_USD)
    assert toy.replayed().spent_usd == pytest.approx(3 * CALL_USD)
    toy.drive(trials=None, meanwhile=Until(says_that(f"{SPENT}$0.30 of $0.35 spent")))
    assert mind.calls == 3
    assert len(toy.study.dropped) == 1
    audit(toy)
