"""The contract of every proposer: a class of tests, and a request in which there is something to do for all of them.

A proposer's tests subclass `Contract` and say how it is made; nothing here is about how one finds its ideas.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from toy import Clock

from raysearch.asker import Answer, Asker
from raysearch.knobs import Values, broken_rule, fingerprint, read_knobs, read_rules, rewrite
from raysearch.model import Direction, Outcome
from raysearch.proposers import Idea, NoIdea, Proposer, Request, Step, Told
from raysearch.ratchet import Ratchet

PROGRAM = '''\
"""A program."""

LR = 0.02  # in [0.001, 0.3] log: step size
DEPTH = 6  # in [1, 12]: layers
WIDTH = 64  # in {16, 32, 48, 64, 96, 128, 192, 256}: units
HEADS = 4  # in [1, 8]: heads
MODE = "slow"  # in {"slow", "fast", "odd"}: how
DECAY = 0.1  # in [0.0, 0.5]: of the weights
BIAS = True  # in {True, False}: whether there is one
SEED_WORD = "x"  # no knob
# rule: WIDTH % HEADS == 0
# rule: WIDTH * DEPTH <= 1024


def train(run):
    return LR * DEPTH
'''


def values_of(program: str) -> Values:
    return {name: knob.value for name, knob in read_knobs(program).items()}


def patched(old: str, patch: str) -> str:
    """A patch applied the quick way; that git thinks the same is a test of its own."""
    lines, result, at = old.splitlines(True), list[str](), 0
    for line in patch.splitlines(True):
        if line.startswith("@@"):
            start = int(line.split()[1].split(",")[0].removeprefix("-")) - 1
            result += lines[at:start]
            at = start
        elif line.startswith((" ", "-")) and not line.startswith("---"):
            assert lines[at] == line[1:]
            result += [line[1:]] * line.startswith(" ")
            at += 1
        elif line.startswith("+") and not line.startswith("+++"):
            result.append(line[1:])
    return "".join(result + lines[at:])


GROWN = rewrite(PROGRAM, {"LR": 0.04137, "DEPTH": 8, "DECAY": 0.1111, "MODE": "fast"}).replace(
    "    return LR * DEPTH\n", "    gain = 2\n    pass\n    return gain * LR * DEPTH\n\n\ndef unused():\n    return 1\n"
)


def step(before: str, after: str, *, id: str = "s1", delta: float = -0.01, profile: str = "gpu") -> Step:
    return Step(id, profile, f"why {id}", delta, {"train.py": before}, {"train.py": after})


STEPS = (
    step(PROGRAM, rewrite(PROGRAM, {"LR": 0.03, "HEADS": 2}), id="s1"),
    step(
        PROGRAM, PROGRAM.replace("WIDTH = 64", "WIDTH = 32").replace("    return", "    print()\n    return"), id="s2"
    ),
)
WINS = (
    step(PROGRAM, rewrite(PROGRAM, {"LR": 0.01}), id="w1"),
    step(PROGRAM, rewrite(PROGRAM, {"DEPTH": 4, "HEADS": 2}), id="w2"),
)


def full_request(count: int = 3, *, files: Mapping[str, str] | None = None, **others: Any) -> Request:
    """A request in which every proposer finds something to do."""
    files = files or {"train.py": GROWN}
    request = Request(
        profile="cpu",
        base=fingerprint(files),
        files=files,
        count=count,
        known=frozenset({fingerprint(files)}),
        direction=Direction.MINIMIZE,
        origin={"train.py": PROGRAM},
        elsewhere=STEPS,
        unmerged=WINS,
    )
    return replace(request, **others)


Make = Callable[[int], Proposer]
WAIT_S = 60.0  # for what another thread does: on a machine that is busy this takes its time


def answered(asker: Asker) -> list[Answer]:
    """All that comes of what is asked, and nothing is on its way any more."""
    answers: list[Answer] = []
    deadline = time.monotonic() + WAIT_S
    while asker.pace("cpu").asked:
        assert time.monotonic() < deadline, "no answer"
        answers += asker.answers()
        time.sleep(0.001)
    return answers


def checked(proposer: Proposer, answers: Sequence[Idea | NoIdea], files: Mapping[str, str]) -> list[str]:
    """The programs of an answer, each seen to be one; what is no idea says why, in one line."""
    programs: list[str] = []
    for answer in answers:
        assert answer.proposer == proposer.name
        assert answer.cost_usd >= 0.0
        assert answer.tokens_in >= 0
        assert answer.tokens_out >= 0
        text = answer.reason if isinstance(answer, NoIdea) else answer.hypothesis
        assert text
        assert "\n" not in text
        if isinstance(answer, Idea):
            program = patched(files["train.py"], answer.patch)
            assert fingerprint({"train.py": program}) != fingerprint(files)
            assert broken_rule(read_rules(program), values_of(program)) is None  # and every knob is in its range
            assert "def train(run)" in program
            programs.append(program)
    return programs


class Gated(Proposer):
    """A proposer whose asks wait for a gate; all else is the proposer's own."""

    def __init__(self, proposer: Proposer) -> None:
        self.name, self.parallel, self.one_by_one = proposer.name, proposer.parallel, proposer.one_by_one
        self.proposer = proposer
        self.gate = threading.Event()
        self.told = threading.Event()
        self.asking = threading.Semaphore(0)

    def ask(self, request: Request) -> Sequence[Idea | NoIdea]:
        self.asking.release()
        self.gate.wait()
        return self.proposer.ask(request)

    def tell(self, told: Told) -> None:
        self.proposer.tell(told)
        self.told.set()


class Contract:
    """What holds of every proposer. Subclasses give `make`, a fixture: a proposer by its seed.

    Attributes:
        rounds: Asks after which no more is expected of a proposer that always has another idea.
        count: Ideas that it is asked for where any number would do.
    """

    rounds: ClassVar[int] = 20
    count: ClassVar[int] = 3

    @pytest.fixture
    def make(self) -> Make:
        raise NotImplementedError

    @pytest.fixture
    def proposer(self, make: Make) -> Iterator[Proposer]:
        proposer = make(1)
        yield proposer
        proposer.close()

    @pytest.fixture
    def gated(self, proposer: Proposer) -> Iterator[Gated]:
        gated = Gated(proposer)
        yield gated
        gated.gate.set()

    # ---- asking ----

    def test_git_applies_what_it_says_and_gets_a_valid_new_program(self, proposer: Proposer, tmp_path: Path):
        repo = Ratchet.create(tmp_path / "repo", {"train.py": GROWN}, message="base", at=0.0)
        base = repo.resolve("main")
        answers = proposer.ask(full_request())
        programs = checked(proposer, answers, {"train.py": GROWN})
        ideas = [answer for answer in answers if isinstance(answer, Idea)]
        assert ideas
        for idea, program in zip(ideas, programs, strict=True):
            commit = repo.commit_patch(base, idea.patch, editable=("train.py",), message="an idea", at=0.0)
            assert repo.read(commit, "train.py") == program

    @pytest.mark.parametrize("count", [0, 1, 5])
    def test_it_gives_at_most_what_was_asked_for_and_nothing_twice(self, proposer: Proposer, count: int):
        answers = proposer.ask(full_request(count))
        programs = checked(proposer, answers, {"train.py": GROWN})
        assert len(answers) <= count
        assert len({fingerprint({"train.py": program}) for program in programs}) == len(programs)

    def test_nothing_known_is_proposed(self, proposer: Proposer):
        known, sources = set(full_request().known), set[str]()
        for _ in range(self.rounds):
            request = full_request(2, known=frozenset(known), sources=frozenset(sources))
            answers = proposer.ask(request)
            for program in checked(proposer, answers, request.files):
                print_ = fingerprint({"train.py": program})
                assert print_ not in known
                known.add(print_)
            named = {answer.source for answer in answers if isinstance(answer, Idea) and answer.source}
            assert not named & sources
            sources |= named
            if not answers:
                break

    # ---- telling ----

    @pytest.mark.parametrize("outcome", Outcome)
    def test_it_can_be_told_of_any_outcome_and_goes_on(self, proposer: Proposer, outcome: Outcome):
        proposer.tell(Told("cpu", {"train.py": GROWN}, outcome, 0.9 if outcome is Outcome.MEASURED else None))
        proposer.tell(Told("other", {"train.py": PROGRAM}, outcome, 0.9 if outcome is Outcome.MEASURED else None))
        assert checked(proposer, proposer.ask(full_request(self.count)), {"train.py": GROWN})

    def test_after_a_restart_in_the_middle_nothing_known_is_proposed(self, make: Make, proposer: Proposer):
        known, sources, history = set(full_request().known), set[str](), list[Told]()
        for number in range(4):
            request = full_request(1, known=frozenset(known), sources=frozenset(sources))
            answers = proposer.ask(request)
            sources |= {answer.source for answer in answers if isinstance(answer, Idea)}
            for program in checked(proposer, answers, request.files):
                history.append(Told("cpu", {"train.py": program}, Outcome.MEASURED, 1.0 - 0.01 * number))
                known.add(fingerprint({"train.py": program}))
            for told in history[-1:]:
                proposer.tell(told)
        assert history
        fresh = make(1)
        for told in history:
            fresh.tell(told)
        request = full_request(3, known=frozenset(known), sources=frozenset(sources))
        again = checked(fresh, fresh.ask(request), request.files)
        assert known.isdisjoint(fingerprint({"train.py": program}) for program in again)
        fresh.close()

    # ---- through an asker ----

    def test_its_answers_reach_the_loop_by_an_asker(self, proposer: Proposer):
        asker = Asker(proposer, Clock())
        asker.ask(full_request(3))
        assert asker.pace("cpu").asked == 3
        answers = answered(asker)
        assert sum(answer.request.count for answer in answers) == 3
        assert not [answer.failure for answer in answers if answer.failure]
        found = [idea for answer in answers for idea in answer.ideas]
        assert len(found) <= 3
        assert checked(proposer, found, {"train.py": GROWN})
        asker.close()

    def test_while_it_thinks_the_loop_goes_on(self, gated: Gated):
        # all in one thread: if any of these waited for the proposer, the gate would never be opened
        asker = Asker(gated, Clock())
        asker.ask(full_request(2))
        assert gated.asking.acquire(timeout=WAIT_S)
        for _ in range(3):
            asker.tell(lambda: Told("cpu", {"train.py": GROWN}, Outcome.MEASURED, 0.9))
            assert asker.answers() == []
            assert asker.notes() == []
            assert asker.pace("cpu").asked == 2
            asker.retry("cpu")
        if gated.parallel > 1:
            assert gated.told.wait(WAIT_S)  # while it is asked
        gated.gate.set()
        assert any(answer.ideas for answer in answered(asker))
        assert gated.told.wait(WAIT_S)
        assert asker.notes() == []
        asker.close()

    def test_an_end_of_the_study_does_not_wait_for_an_ask(self, gated: Gated):
        asker = Asker(gated, Clock())
        asker.ask(full_request(2))
        assert gated.asking.acquire(timeout=WAIT_S)
        asker.close()
        assert asker.notes() == []
        assert not gated.gate.is_set()

    def test_it_can_be_closed_while_it_is_asked(self, make: Make):
        asker = Asker(make(1), Clock())
        asker.ask(full_request(2))
        asker.close()
        assert asker.notes() == []  # neither did it fail to end, nor did it take its time
