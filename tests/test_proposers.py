"""The contract of every proposer, then what is particular to the searchers and the inbox."""

import itertools
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proposer_contract import GROWN, PROGRAM, Contract, full_request, patched, values_of
from ray.tune import search
from ray.tune.search import Searcher
from toy import ideas_of

from benchmarks.slow_minds import SlowMind
from raysearch.directions import Directions, Range, parse, refusal
from raysearch.errors import UserError
from raysearch.knobs import Knob, Value, Values, broken_rule, fingerprint, read_knobs, read_rules, rewrite
from raysearch.model import Direction, Operator, Outcome
from raysearch.proposers import Idea, Proposer, Request, Told, inbox, searchers, tune
from raysearch.proposers.ablate import AblateProposer
from raysearch.proposers.additive import MODELLED_KNOBS, AdditiveProposer
from raysearch.proposers.combine import CombineProposer
from raysearch.proposers.reach import LEAST, PLACES, REACH
from raysearch.proposers.searchers import LEARN_ALL, PACKAGES, check_searcher
from raysearch.proposers.simplify import SimplifyProposer
from raysearch.proposers.transfer import TransferProposer
from raysearch.proposers.tune import TuneProposer
from raysearch.ratchet import Ratchet
from raysearch.study import MOVERS

MINIMIZE = Direction.MINIMIZE


class Dense(Searcher):
    """A searcher that only learns from what it suggested, and is strict about what it is told, as nevergrad is."""

    made: ClassVar[list["Dense"]] = []

    def __init__(
        self,
        metric: str | None = None,
        mode: str | None = None,
        points_to_evaluate: list[dict[str, Any]] | None = None,
        random_state_seed: int | None = None,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self.points = list(points_to_evaluate or [])
        self.state = np.random.RandomState(random_state_seed)
        self.space: dict[str, Any] = {}
        self.open: dict[str, dict[str, Any]] = {}
        self.learnt: list[tuple[dict[str, Any], float]] = []
        Dense.made.append(self)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **_: Any) -> bool:
        self.space = config
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        drawn = {name: domain.sample(random_state=self.state) for name, domain in self.space.items()}
        self.open[trial_id] = self.points.pop(0) if self.points else drawn
        return self.open[trial_id]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        point = self.open.pop(trial_id)
        assert error == (result is None)
        if result:
            assert self.metric is not None
            self.learnt.append((point, result[str(self.metric)]))


@pytest.fixture(autouse=True)
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(search.SEARCH_ALG_IMPORT, "dense", lambda: Dense)
    monkeypatch.setitem(searchers.PACKAGES, "dense", "optuna")
    monkeypatch.setattr(Dense, "made", [])


SEARCHERS = ("additive", "optuna", "random", "dense")


@pytest.fixture(params=SEARCHERS)
def searcher(request: pytest.FixtureRequest) -> str:
    return request.param


def mover(searcher: str, seed: int = 0) -> Proposer:
    """What moves knobs by a model of them, or by a searcher."""
    return AdditiveProposer(seed=seed) if searcher == "additive" else TuneProposer(searcher=searcher, seed=seed)


@dataclass
class Bench:
    """Drives a proposer as a study does, one profile, with scores from a function; git only where a test asks."""

    proposer: Proposer
    champion: str = PROGRAM
    direction: Direction = Direction.MINIMIZE
    profile: str = "cpu"
    known: set[str] = field(default_factory=set[str])
    tried: list[tuple[str, Outcome, float | None]] = field(default_factory=list[tuple[str, Outcome, float | None]])

    def __post_init__(self) -> None:
        self.known.add(fingerprint({"train.py": self.champion}))

    def ask(self, count: int = 1) -> list[Idea]:
        files = {"train.py": self.champion}
        base = fingerprint(files)
        asked = Request(self.profile, base, files, count, frozenset(self.known), self.direction)
        return ideas_of(self.proposer, asked)

    def programs(self, count: int = 1) -> list[str]:
        """The programs of an ask, seen to be valid, new and near; they are known from now on."""
        ideas = self.ask(count)
        assert len(ideas) <= count
        return [self.checked(idea) for idea in ideas]

    def checked(self, idea: Idea) -> str:
        program = patched(self.champion, idea.patch)
        knobs = read_knobs(program)  # raises where a value is not in its range
        assert broken_rule(read_rules(program), values_of(program)) is None
        print_ = fingerprint({"train.py": program})
        assert print_ not in self.known
        self.known.add(print_)
        before = read_knobs(self.champion)
        moved = [knob for name, knob in before.items() if knobs[name].value != knob.value]
        assert moved
        assert len(moved) <= 3 or getattr(self.proposer, "_searcher_name", "additive") in ("additive", "dense")
        for knob in moved:
            assert knob.name in idea.hypothesis
            assert is_near(knob, knobs[knob.name].value), f"{knob.name} {knob.value} → {knobs[knob.name].value}"
        assert (idea.operator, idea.proposer) == (Operator.TUNE, self.proposer.name)
        return program

    def tell(self, program: str, value: float | None = None, outcome: Outcome | None = None) -> None:
        outcome = outcome or (Outcome.CRASHED if value is None else Outcome.MEASURED)
        self.tried.append((program, outcome, value))
        self.known.add(fingerprint({"train.py": program}))
        self.proposer.tell(Told(self.profile, {"train.py": program}, outcome, value))

    def climb(self, score: Callable[[Values], float | None], asks: int) -> list[float]:
        """Asks, runs and tells in turn; what is better becomes the champion. Returns the best score after each."""
        best = score(values_of(self.champion))
        assert best is not None
        self.tell(self.champion, best)
        course: list[float] = []
        for _ in range(asks):
            for program in self.programs():
                value = score(values_of(program))
                self.tell(program, value)
                if value is not None and value < best:
                    best, self.champion = value, program
            course.append(best)
        return course


def is_near(knob: Knob, value: Value) -> bool:
    if knob.choices:
        numbers = all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in knob.choices)
        ordered = numbers and list(knob.choices) == sorted(knob.choices, key=float)
        return not ordered or abs(knob.choices.index(value) - knob.choices.index(knob.value)) <= PLACES
    assert not isinstance(value, str)
    assert not isinstance(knob.value, str)
    rounding = 0.51 if knob.is_int else 0.001 * abs(value)  # to a whole number, or to 4 digits
    reach = [knob.unit(min(max(value + off, knob.low or 0), knob.high or 0)) for off in (-rounding, rounding)]
    here = knob.unit(knob.value)
    return abs(value - knob.value) == 1 or min(abs(unit - here) for unit in (*reach, knob.unit(value))) <= REACH + 1e-6


# ---- the contract of every proposer, as those without a model keep it ----

PROPOSERS: dict[str, Callable[[int], Proposer]] = {
    "tune": lambda seed: TuneProposer(seed=seed),
    "additive": lambda seed: AdditiveProposer(seed=seed),
    "ablate": lambda seed: AblateProposer(seed=seed),
    "simplify": lambda seed: SimplifyProposer(seed=seed),
    "transfer": lambda _: TransferProposer(),
    "combine": lambda _: CombineProposer(),
}


Make = Callable[[int], Proposer]


def any_directions(chance: random.Random) -> Directions:
    """What somebody may want of proposals for GROWN, be it within reach or not."""
    knobs = read_knobs(GROWN)
    ranges: dict[str, Range] = {}
    for name in chance.sample(sorted(knobs), chance.randint(1, 5)):
        knob = knobs[name]
        if knob.choices:
            ranges[name] = Range(choices=tuple(chance.sample(knob.choices, chance.randint(1, len(knob.choices)))))
        else:
            low, high = sorted(float(knob.nearest(knob.at(chance.random()))) for _ in range(2))
            ranges[name] = Range(low, high)
    frozen = chance.sample([*knobs, "SEED_WORD", "NOWHERE"], chance.randint(0, 3))
    forbidden = chance.sample(list(Operator), chance.choice([0, 0, 1]))
    return Directions(frozen=frozenset(frozen), ranges=ranges, forbidden=frozenset(forbidden))


class TestWithoutAModel(Contract):
    @pytest.fixture(params=PROPOSERS)
    def make(self, request: pytest.FixtureRequest) -> Make:
        return PROPOSERS[request.param]

    def test_the_same_seed_and_request_give_the_same_ideas(self, make: Make):
        assert make(3).ask(full_request(4)) == make(3).ask(full_request(4))

    def test_a_request_with_nothing_to_work_on_gives_no_idea(self, make: Make):
        plain = {"train.py": "def train(run):\n    return run.value()\n"}
        request = full_request(files=plain, origin={}, elsewhere=(), unmerged=())
        assert make(5).ask(request) == []
        assert make(5).ask(full_request(files=plain, origin=plain)) == []

    def test_no_idea_breaks_the_directions_whatever_they_were_before(self, make: Make):
        given = 0
        for seed in range(12):
            chance, proposer = random.Random(seed), make(seed)
            for _ in range(3):  # on one program: what has changed holds at the next ask
                directions = any_directions(chance)
                for idea in ideas_of(proposer, full_request(4, directions=directions)):
                    given += 1
                    program = {"train.py": patched(GROWN, idea.patch)}
                    before = {"train.py": GROWN}
                    assert refusal(directions, before=before, after=program, operator=idea.operator) is None
                    assert read_knobs(program["train.py"])
        assert given > 8

    def test_a_forbidden_operator_gives_no_idea_and_the_others_stay(self, make: Make):
        proposer = make(6)
        own = frozenset({Operator.TUNE if proposer.name in MOVERS else Operator(proposer.name)})
        assert proposer.ask(full_request(5, directions=Directions(forbidden=own))) == []
        assert proposer.ask(full_request(5, directions=Directions(forbidden=frozenset(Operator) - own)))

    def test_what_directions_barred_is_proposed_once_they_are_lifted(self, make: Make):
        barred = Directions(frozen=frozenset(read_knobs(GROWN)))
        fresh, proposer = make(7), make(7)
        if fresh.name in MOVERS:
            assert proposer.ask(full_request(9, directions=barred)) == []
            assert len(ideas_of(proposer, full_request(9))) == 9
            return
        before = ideas_of(proposer, full_request(99, directions=barred))
        after = ideas_of(proposer, full_request(99))
        wanted = ideas_of(fresh, full_request(99))
        assert len(before) < len(wanted)
        assert {idea.source for idea in (*before, *after)} >= {idea.source for idea in wanted}


class TestSeveralAsksAtOnce(Contract):
    @pytest.fixture
    def make(self) -> Make:
        return lambda seed: SlowMind(parallel=4, seed=seed)


@pytest.mark.parametrize("name", [name for name in PROPOSERS if name not in MOVERS])
def test_what_was_proposed_is_not_proposed_again_and_then_there_is_nothing(name: str):
    proposer = PROPOSERS[name](2)
    known, sources = set(full_request().known), set[str]()
    while ideas := ideas_of(proposer, full_request(2, known=frozenset(known), sources=frozenset(sources))):
        known |= {fingerprint({"train.py": patched(GROWN, idea.patch)}) for idea in ideas}
        sources |= {idea.source for idea in ideas}
    assert PROPOSERS[name](2).ask(full_request(50, known=frozenset(known))) == []
    assert PROPOSERS[name](2).ask(full_request(50, sources=frozenset(sources))) == []


# ---- the contract of every searcher ----


def test_programs_are_told_apart_when_directions_leave_another_knob(searcher: str):
    source = "A = 1  # in [1, 2]: a\nB = 1  # in [1, 2]: b\n"
    proposer, known = mover(searcher=searcher), set[str]()
    for frozen, moved in (("A", "B"), ("B", "A")):
        directions = Directions(frozen=frozenset({frozen}))
        asked = Request("cpu", "b", {"train.py": source}, 1, frozenset(known), MINIMIZE, directions=directions)
        (idea,) = ideas_of(proposer, asked)
        program = patched(source, idea.patch)
        assert values_of(program) == {frozen: 1, moved: 2}
        known.add(fingerprint({"train.py": program}))


@pytest.mark.parametrize(
    "block",
    [
        "LR = [0.0911, 0.2]",
        "LR = [0.001, 0.0015]",
        "LR = {choices = [0.1, 0.15, 0.2, 0.25]}",
        "DEPTH = [9, 11]",
        "DEPTH = [2.5, 3.5]",
        "DEPTH = {choices = [12, 2]}",
        "WIDTH = [128, 300]",
        "WIDTH = {choices = [16]}",
        "MODE = {choices = ['odd']}",
        "BIAS = {choices = [false]}",
        "DECAY = [0.31, 0.31]",
    ],
)
def test_a_knob_that_stands_outside_of_its_directions_is_left_or_moved_inside(searcher: str, block: str):
    directions = parse(f"```raysearch\nranges.{block}\n```", where="program.md")
    ((name, allowed),) = directions.ranges.items()
    assert not allowed.allows(values_of(PROGRAM)[name])
    proposer, known, inside = mover(searcher=searcher, seed=3), set[str](), set[Value]()
    proposer.tell(Told("cpu", {"train.py": PROGRAM}, Outcome.MEASURED, 1.0))
    for _ in range(12):
        asked = Request("cpu", "b", {"train.py": PROGRAM}, 6, frozenset(known), MINIMIZE, directions=directions)
        ideas = ideas_of(proposer, asked)
        assert ideas
        for idea in ideas:
            program = patched(PROGRAM, idea.patch)
            known.add(fingerprint({"train.py": program}))
            value = values_of(program)[name]
            assert value == values_of(PROGRAM)[name] or allowed.allows(value)
            inside |= {value} if allowed.allows(value) else set()
    assert inside


def test_git_applies_every_idea_to_the_champion_and_gets_the_same_program(searcher: str, tmp_path: Path):
    bench = Bench(mover(searcher=searcher, seed=3))
    repo = Ratchet.create(tmp_path / "repo", {"train.py": PROGRAM}, message="base", at=0.0)
    base = repo.resolve("main")
    for idea in bench.ask(4):
        commit = repo.commit_patch(base, idea.patch, editable=("train.py",), message="an idea", at=0.0)
        assert repo.read(commit, "train.py") == bench.checked(idea)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_an_ask_gives_at_most_what_was_asked_for_and_nothing_twice(searcher: str, count: int):
    bench = Bench(mover(searcher=searcher))
    programs = bench.programs(count)
    assert len(programs) == count  # there is room for as many
    assert len({fingerprint({"train.py": program}) for program in programs}) == count


def test_ideas_stay_valid_new_and_near_over_a_whole_search(searcher: str):
    bench = Bench(mover(searcher=searcher, seed=1))
    course = bench.climb(bowl, 25)
    start = bowl(values_of(PROGRAM))
    assert start is not None
    assert course[-1] < start
    assert len(bench.tried) == 26


def bowl(values: Values) -> float | None:
    assert not isinstance(values["LR"], str)
    return (math.log10(values["LR"]) + 1) ** 2 + (float(values["DEPTH"]) - 3) ** 2 / 20 + float(values["DECAY"])


def test_a_proposer_can_be_told_of_every_outcome(searcher: str):
    bench = Bench(mover(searcher=searcher))
    bench.tell(PROGRAM, 1.0)
    for outcome in Outcome:
        (program,) = bench.programs()
        bench.tell(program, 0.9 if outcome is Outcome.MEASURED else None, outcome)
    assert len(bench.programs(3)) == 3


def test_a_number_that_is_none_is_a_failure_and_not_a_score(searcher: str):
    bench = Bench(mover(searcher=searcher))
    bench.tell(PROGRAM, 1.0)
    for value in (math.nan, math.inf, -math.inf):
        (program,) = bench.programs()
        bench.tell(program, value)
    assert bench.programs(2)
    again = Bench(mover(searcher=searcher), known=bench.known)
    for program, outcome, value in bench.tried:
        again.tell(program, value, outcome)
    assert again.programs(2)


def test_programs_that_others_proposed_are_learnt_from(searcher: str):
    bench = Bench(mover(searcher=searcher))
    bench.programs()
    bench.tell(PROGRAM.replace("return LR", "return 2 * LR"), 0.8)
    bench.tell(PROGRAM.replace("DEPTH = 6", "DEPTH = 2").replace("return LR", "return 3 * LR"), None)
    assert len(bench.programs(3)) == 3


def test_a_fresh_proposer_that_is_told_the_history_goes_on(searcher: str):
    bench = Bench(mover(searcher=searcher, seed=5))
    bench.climb(bowl, 8)
    later = Bench(mover(searcher=searcher, seed=5), champion=bench.champion, known=set(bench.known))
    for program, outcome, value in bench.tried:
        later.tell(program, value, outcome)
    assert len(later.programs(3)) == 3
    assert later.climb(bowl, 5)[-1] <= bowl(values_of(bench.champion))  # type: ignore[operator]


def test_a_restart_does_not_go_through_the_same_suggestions_again(searcher: str):
    """Else a search with a fixed seed would find everything known after enough restarts, and end."""
    firsts: set[str] = set()
    for told in range(4):
        bench = Bench(mover(searcher=searcher, seed=5))
        for number in range(told):
            bench.tell(PROGRAM.replace("0.02", f"0.0{number + 3}"), 1.0)
        firsts.add(bench.ask()[0].patch)
    assert len(firsts) == 4


def test_the_same_history_and_seed_give_the_same_ideas(searcher: str):
    courses: list[list[str]] = []
    for _ in range(2):
        bench = Bench(mover(searcher=searcher, seed=9))
        bench.climb(bowl, 6)
        courses.append([program for program, _, _ in bench.tried])
    assert courses[0] == courses[1]


def test_ideas_follow_the_champion(searcher: str):
    bench = Bench(mover(searcher=searcher))
    bench.tell(PROGRAM, 1.0)
    early = bench.ask(2)
    bench.champion = rewrite(PROGRAM, {"LR": 0.1, "MODE": "fast"}).replace("return LR", "return 5 * LR")
    bench.tell(bench.champion, 0.5)
    for program in bench.programs(4):  # `checked` sees that they are the new champion, moved a little
        assert "return 5 * LR" in program
    bench.tell(patched(PROGRAM, early[0].patch), 0.9)  # what was proposed on the old one comes in late
    assert bench.programs()


CHANGES: dict[str, tuple[str, str]] = {
    "a new knob": ("SEED_WORD", "GAIN = 1.0  # in [0.5, 2.0]: of the input\nSEED_WORD"),
    "a knob less": ("DECAY = 0.1  # in [0.0, 0.5]: of the weights\n", ""),
    "a wider range": ("in [1, 12]", "in [1, 24]"),
    "a narrower range": ("in [1, 12]", "in [5, 7]"),
    "other choices": ('{"slow", "fast", "odd"}', '{"slow", "brisk"}'),
    "a range of choices": ('MODE = "slow"  # in {"slow", "fast", "odd"}', "MODE = 1.5  # in [1.0, 2.0]"),
    "choices of a range": ("DECAY = 0.1  # in [0.0, 0.5]", 'DECAY = "none"  # in {"none", "some"}'),
    "whole numbers no more": ("HEADS = 4  # in [1, 8]", "HEADS = 4.0  # in [1, 8]"),
    "another order": ("LR = 0.02  # in [0.001, 0.3] log: step size\n", ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_champion_with_other_knobs_is_searched_on_with_what_is_known(searcher: str, change: str):
    bench = Bench(mover(searcher=searcher))
    bench.tell(PROGRAM, 1.0)
    for program, value in zip(bench.programs(3), (0.9, None, 1.1), strict=True):
        bench.tell(program, value)
    bench.champion = PROGRAM.replace(*CHANGES[change])
    if change == "another order":
        bench.champion += "\nLR = 0.02  # in [0.001, 0.3] log: step size\n"
    assert bench.champion != PROGRAM
    bench.tell(bench.champion, 0.8)
    for program in bench.programs(3):
        bench.tell(program, None)
    assert bench.programs()
    bench.champion = PROGRAM  # and back again
    assert bench.programs()


def test_profiles_are_searched_apart(searcher: str):
    proposer = mover(searcher=searcher)
    one, other = Bench(proposer), Bench(proposer, profile="gpu")
    one.tell(PROGRAM, 1.0)
    assert one.programs(2)
    assert other.programs(2)
    for program in other.programs(2):
        other.tell(program, 0.5)
    assert one.programs()


def test_a_program_without_knobs_gives_no_idea(searcher: str):
    bench = Bench(mover(searcher=searcher), champion="LR = 0.1\n\ndef train(run):\n    return None\n")
    bench.tell(bench.champion, 1.0)
    assert bench.ask(3) == []


TINY = 'A = 1  # in {1, 2, 4}: a\nB = "x"  # in {"x", "y"}: b\nC = 3  # in [3, 4]: c\nD = 1.0  # in [1.0, 1.0]: fixed\n'


def test_a_space_is_searched_to_its_end_and_then_there_are_no_ideas(searcher: str):
    bench = Bench(mover(searcher=searcher), champion=TINY)
    bench.tell(TINY, 1.0)
    found = 0
    while programs := bench.programs(2):
        found += len(programs)
        for program in programs:
            bench.tell(program, 1.0)
    assert found == 3 * 2 * 2 - 1
    started = time.thread_time()
    assert bench.ask(8) == []
    assert time.thread_time() - started < 2


def test_a_champion_among_failures_has_no_ideas_soon(searcher: str):
    """Every neighbour lies nearer to a failure than to the champion."""
    bench = Bench(mover(searcher=searcher), champion="A = 5  # in [1, 9]: a\nB = 5  # in [1, 9]: b\n")
    bench.tell(bench.champion, 1.0)
    for a in range(4, 7):
        for b in range(4, 7):
            if (a, b) != (5, 5):
                bench.tell(rewrite(bench.champion, {"A": a, "B": b}), None)
    started = time.thread_time()
    assert bench.ask(4) == []
    assert time.thread_time() - started < 2


def test_a_champion_that_was_never_told_is_a_program_that_ran(searcher: str):
    """Carried wins are measured in pairs, which a proposer is not told of."""
    bench = Bench(mover(searcher=searcher))
    bench.tell(PROGRAM.replace("return LR", "return undefined"), None)  # a draft that crashed, with the same knobs
    assert len(bench.programs(3)) == 3


def test_what_does_not_fit_the_memory_is_avoided_more_and_more():
    """Programs that are large in all runs out of memory; the best lie not far from there."""
    source = "".join(f"{name} = 10  # in [1, 20]: a\n" for name in "ABCD")

    def size(values: Values) -> int:
        return sum(int(value) for value in values.values())

    failed = [0, 0]
    for seed in range(12):
        bench = Bench(TuneProposer(seed=seed), champion=source)
        bench.climb(lambda values: None if size(values) > 44 else abs(size(values) - 34), 40)
        for number, (program, _, value) in enumerate(bench.tried[1:]):
            failed[number // 20] += value is None
            assert (value is None) == (size(values_of(program)) > 44)
    assert failed[0] > 24
    assert failed[1] < 0.7 * failed[0]


def test_what_no_rule_says_is_learned_from_what_fails():
    """A width that is no multiple of the head fails, and all that the metric says is that wide models are good."""
    source = "WIDTH = 512  # in {384, 448, 512, 576, 640, 704, 768}: a\nHEAD = 128  # in {64, 128}: b\n"
    source += "".join(f"{name} = 0.5  # in [0.0, 1.0]: c\n" for name in "ABCDEFGH")

    def score(values: Values) -> float | None:
        width, head, *rest = map(float, values.values())
        return None if width % head else 2 - width / 2000 - head / 1000 + sum((place - 0.6) ** 2 for place in rest)

    failed: list[list[bool]] = []
    for seed in range(6):
        bench = Bench(AdditiveProposer(seed=seed), champion=source)
        bench.climb(score, 60)
        failed.append([value is None for _, _, value in bench.tried])
    first, later = (sum(sum(one[part]) for one in failed) for part in (slice(0, 20), slice(20, 60)))
    assert first > 4
    assert later < 0.7 * first  # in twice as many runs


def test_what_a_rule_forbids_alone_is_proposed_together():
    """The best width goes with the smaller head alone, and that was never run with it."""
    program = "WIDTH = 512  # in {384, 448, 512, 576, 640, 704, 768}: a\nHEAD = 128  # in {32, 64, 128}: b\n"
    program += "# rule: WIDTH % HEAD == 0\n" + "".join(f"{name} = 0.5  # in [0.0, 1.0]: c\n" for name in "ABCDEF")
    bench, chance = Bench(AdditiveProposer(seed=1), champion=program), random.Random(1)
    for _ in range(60):
        values: Values = {name: chance.uniform(0.3, 0.7) for name in chance.sample("ABCDEF", 2)}
        width, head = chance.choice([(384, 128), (512, 128), (512, 128), (640, 128), (512, 64), (448, 64)])
        lost = ((width - 576) / 64) ** 2 - head / 500 + sum((float(place) - 0.5) ** 2 for place in values.values())
        bench.tell(rewrite(program, {**values, "WIDTH": width, "HEAD": head}), lost)
    proposed = [values_of(program) for program in bench.programs(16)]
    assert sum((values["WIDTH"], values["HEAD"]) == (576, 64) for values in proposed) >= 8


def test_rules_of_constants_that_are_no_knobs_are_kept(searcher: str):
    source = "A = 8  # in {2, 4, 8, 12, 16, 20}: a\nSTEP = 4\n# rule: A % STEP == 0\n"
    bench = Bench(mover(searcher=searcher), champion=source)
    assert sorted(int(values_of(program)["A"]) for program in bench.programs(9)) == [4, 12, 16]


def test_a_rule_that_the_champion_itself_breaks_holds_nothing_up(searcher: str):
    source = "A = 8  # in [1, 16]: a\nB = 3  # in [1, 16]: b\n# rule: A + B == 12\n# rule: A < 12\n"
    proposer = mover(searcher=searcher)
    ideas = ideas_of(proposer, Request("cpu", "x", {"train.py": source}, 5, frozenset(), Direction.MINIMIZE))
    assert len(ideas) == 5
    assert all(int(values_of(patched(source, idea.patch))["A"]) < 12 for idea in ideas)


def test_a_rule_that_cannot_be_computed_is_said_in_one_line(searcher: str):
    with pytest.raises(UserError, match="only arithmetic, comparisons"):
        Bench(mover(searcher=searcher), champion="A = 1  # in [1, 9]: a\n# rule: open(A)\n").ask()


def test_the_tuned_file_may_have_another_name():
    proposer = TuneProposer(path="score.py")
    request = Request("cpu", "x", {"score.py": PROGRAM, "b.txt": "-"}, 1, frozenset(), Direction.MINIMIZE)
    assert proposer.ask(request)[0].patch.startswith("diff --git a/score.py b/score.py")


# ---- the knobs of a proposal ----


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_program_with_knobs_can_be_tuned(seed: int):
    chance = random.Random(seed)
    bench = Bench(
        mover(searcher=chance.choice(["additive", "optuna", "random"]), seed=seed), champion=any_program(chance)
    )
    for program in bench.programs(4):
        bench.tell(program, chance.choice([None, chance.random()]))
    bench.programs(2)


def any_program(chance: random.Random) -> str:
    lines: list[str] = []
    for number in range(chance.randint(1, 6)):
        kind = chance.choice(["int", "log int", "float", "log", "numbers", "words"])
        if kind in ("int", "log int"):
            low = chance.randint(1, 50) if "log" in kind else chance.randint(-9, 50)
            high = low + chance.choice([0, 1, 2, 7, 1000])
            text = f"{chance.randint(low, high)}  # in [{low}, {high}]{' log' * ('log' in kind)}"
        elif kind in ("float", "log"):
            low = chance.choice([1e-7, 0.123456, 0.99995, 3.0, 12345.678])
            high = low * chance.choice([1.0, 1.00001, 1.5, 1000.0])
            text = f"{low!r}  # in [{low!r}, {high!r}]{' log' * (kind == 'log')}"
        else:
            pool: list[Value] = [1, 2, 4, 8, 16, 0.5] if kind == "numbers" else ["a", "é", 'q"', "", "b c"]
            choices = chance.sample(pool, chance.randint(1, 5))
            text = f"{choices[0]!r}  # in {{{', '.join(map(repr, choices))}}}"
        lines.append(f"K_{number} = {text}: help\n")
    return "".join(lines)


def moves(source: str, name: str, *, searcher: str = "random", asks: int = 80) -> list[Value]:
    """All values that a knob is given on one champion."""
    bench = Bench(mover(searcher=searcher), champion=source)
    return [values_of(program)[name] for program in bench.programs(asks)]


def test_a_range_of_two_whole_numbers_can_be_moved(searcher: str):
    """A third of such a range is less than a whole number."""
    assert moves("A = 1  # in [1, 2]: a\n", "A", searcher=searcher) == [2]
    assert moves("A = 2  # in [1, 2] log: a\n", "A", searcher=searcher) == [1]


def test_choices_of_numbers_in_order_move_at_most_two_places(searcher: str):
    rising = "A = 16  # in {1, 2, 4, 8, 16, 32, 64, 128}: a\n"
    assert sorted(int(value) for value in moves(rising, "A", searcher=searcher)) == [4, 8, 32, 64]
    falling = "A = 0.5  # in {4.0, 2.0, 0.5, 0.1, 0.01, 0.0}: a\n"
    assert sorted(float(value) for value in moves(falling, "A", searcher=searcher)) == [0.01, 0.1, 2.0, 4.0]


@pytest.mark.parametrize("choices", ['"a", "b", "c", "d", "e"', "3, 1, 2, 5, 4", "True, 1.5, 2, 3, 4"])
def test_other_choices_may_jump(searcher: str, choices: str):
    first = choices.partition(",")[0]
    assert len(moves(f"A = {first}  # in {{{choices}}}: a\n", "A", searcher=searcher)) == 4


def test_a_range_is_moved_far_enough_to_be_seen_and_no_further_than_a_third():
    values = [float(value) for value in moves("A = 0.5  # in [0.0, 1.0]: a\n", "A", asks=200)]
    assert min(abs(value - 0.5) for value in values) >= LEAST - 1e-4
    assert max(abs(value - 0.5) for value in values) == pytest.approx(REACH, abs=1e-3)


def test_values_have_four_digits_and_stay_inside_ranges_with_more():
    for value in moves("A = 0.5  # in [0.123456, 0.987654]: a\n", "A", asks=100):
        assert len(str(value)) <= 6
    for start in (0.123456, 0.987654):
        for value in moves(f"A = {start}  # in [0.123456, 0.987654]: a\n", "A", asks=60):
            assert 0.123456 <= float(value) <= 0.987654


@pytest.mark.parametrize("searcher", LEARN_ALL[1:])
def test_proposals_of_one_suggestion_share_no_knob(searcher: str, monkeypatch: pytest.MonkeyPatch):
    """What is asked for at once is as various as it can be, and takes a suggestion for every few proposals."""
    monkeypatch.setattr("raysearch.proposers.tune.WILD", 0.0)
    source = "".join(f"K_{name} = 0.0  # in [0.0, 1.0]: a\n" for name in "ABCDEFGHIJKLMNOPQRST")
    proposer = TuneProposer(searcher=searcher, seed=3)
    bench = Bench(proposer, champion=source)
    programs = bench.programs(64)
    taken = proposer._spaces["cpu"].asked
    assert 64 / 20 < taken < 64 / 4
    moved = [{name for name, value in values_of(program).items() if value} for program in programs]
    assert all(1 <= len(names) <= 3 for names in moved)
    assert not any(one & other for one, other in itertools.pairwise(moved[:4]))


def test_the_hypothesis_names_the_moves_and_helps_with_a_single_one():
    bench = Bench(TuneProposer(seed=2))
    hypotheses = [idea.hypothesis for idea in bench.ask(30)]
    single = [text for text in hypotheses if ", " not in text]
    assert any(text.startswith("LR 0.02 → 0.") and text.endswith(" (step size)") for text in single)
    assert any(text.count(" → ") == 3 for text in hypotheses)


# ---- searchers ----


def smooth(best: Mapping[str, float]) -> Callable[[Values], float]:
    def score(values: Values) -> float:
        knobs = read_knobs(SIX)
        return sum((1 + i % 3) * (knobs[name].unit(values[name]) - best[name]) ** 2 for i, name in enumerate(knobs))

    return score


SIX = "".join(
    f"{name} = 0.001  # in [0.001, 1.0] log: a\n" if name in "ACE" else f"{name} = 0.0  # in [0.0, 1.0]: a\n"
    for name in "ABCDEF"
)


def test_tpe_and_the_model_use_what_they_were_told():
    """On a smooth function of six knobs, 60 proposals one after the other, against the same at random."""
    ends: dict[str, list[float]] = {"additive": [], "optuna": [], "random": []}
    for seed in range(7):
        chance = random.Random(seed)
        score = smooth({name: chance.uniform(0.2, 0.9) for name in "ABCDEF"})
        for name, end in ends.items():
            end.append(Bench(mover(searcher=name, seed=seed), champion=SIX).climb(score, 60)[-1])
    assert median(ends["optuna"]) < 0.8 * median(ends["random"])
    assert median(ends["additive"]) < 0.8 * median(ends["optuna"])


def test_moves_that_cannot_be_run_do_not_stand_in_the_way_of_those_that_help_less():
    """Eight knobs help most and are kept where they are by rules; four others are what there is to move."""
    names = [f"K{number}" for number in range(12)]
    rules = "".join(f"# rule: {name} <= 0.5\n" for name in names[:8])
    program = "".join(f"{name} = 0.5  # in [0.0, 1.0]: a\n" for name in names) + rules
    bench, chance = Bench(AdditiveProposer(seed=1), champion=program), random.Random(1)
    for _ in range(150):
        values: Values = {name: chance.uniform(0.2, 0.8) for name in chance.sample(names, 3)}
        gain = sum((float(value) - 0.5) * (3 if name in names[:8] else 1) for name, value in values.items())
        bench.tell(rewrite(program, values), -gain)
    ideas = bench.ask(16)
    assert all(idea.predicted_delta is not None and idea.predicted_delta < 0 for idea in ideas)
    assert len(ideas) == 16


def test_all_knobs_that_the_model_is_sure_of_are_moved_at_once_in_some_proposals():
    names = [f"K{number}" for number in range(2 * max(MODELLED_KNOBS))]
    program = "".join(f"{name} = 0.5  # in [0.0, 1.0]: a\n" for name in names)
    bench, chance = Bench(AdditiveProposer(seed=1), champion=program), random.Random(1)
    for _ in range(150):
        values: Values = {name: chance.uniform(0.2, 0.8) for name in chance.sample(names, 3)}
        bench.tell(
            rewrite(program, values), sum(-float(value) for value in (dict.fromkeys(names, 0.5) | values).values())
        )
    moved = [values_of(program) for program in bench.programs(16)]
    ups = [sum(float(value) > 0.5 for value in values.values()) for values in moved]
    assert max(ups) == len(names)
    assert sum(up <= max(MODELLED_KNOBS) for up in ups) >= 8  # the others still look about


@pytest.mark.parametrize("asked_first", [False, True])
def test_the_model_of_a_profile_learns_from_runs_on_another_one(asked_first: bool):
    """Told much of one card and hardly anything of the other, whose metric has another level."""
    lost: dict[bool, list[float]] = {True: [], False: []}
    for elsewhere, seed in itertools.product(lost, range(5)):
        chance, proposer = random.Random(seed), AdditiveProposer(seed=seed, elsewhere=elsewhere)
        score = smooth({name: chance.uniform(0.2, 0.9) for name in "ABCDEF"})
        here, other = (Bench(proposer, champion=SIX, profile=profile) for profile in ("here", "other"))
        if asked_first:
            here.ask()
        for bench, runs, level in ((other, 120, 3.0), (here, 5, 0.0)):
            for _ in range(runs):
                values: Values = {name: chance.choice([0.1, 0.3, 0.5, 0.9]) for name in chance.sample("ABCDEF", 2)}
                program = rewrite(SIX, values)
                bench.tell(program, level + score(values_of(program)))
        lost[elsewhere] += [score(values_of(program)) for program in here.programs(8)]
    assert median(lost[True]) < 0.7 * median(lost[False])


def told_of_a_lucky_one(proposer: Proposer, *, replicates: int) -> list[Idea]:
    """What is proposed after runs of no effect and one that was lucky in its first run, and not in its later ones."""
    bench, chance = Bench(proposer, champion=SIX), random.Random(1)
    for _ in range(20):
        bench.tell(rewrite(SIX, {name: chance.uniform(0.1, 0.9) for name in chance.sample("ABCDEF", 2)}), 1.0)
    lucky = rewrite(SIX, {"A": 0.1, "B": 0.5})
    bench.tell(lucky, 0.0)
    for number in range(replicates):
        value = 1.0 + number / 1000
        proposer.tell(Told("cpu", {"train.py": lucky}, Outcome.MEASURED, value, f"pair{number}", is_replicate=True))
    return bench.ask(8)


def test_replicates_teach_the_model_and_are_no_programs_to_a_searcher():
    first, last = (told_of_a_lucky_one(AdditiveProposer(seed=1), replicates=count) for count in (0, 20))
    most = [max(-(idea.predicted_delta or 0.0) for idea in ideas) for ideas in (first, last)]
    assert most[1] < 0.5 * most[0]
    first, last = (told_of_a_lucky_one(TuneProposer(seed=1), replicates=count) for count in (0, 20))
    assert [idea.patch for idea in first] == [idea.patch for idea in last]


def test_the_direction_of_the_metric_is_heeded():
    """Told the same scores, TPE goes where they are low, or where they are high."""
    ends: dict[Direction, list[float]] = {direction: [] for direction in Direction}
    for direction, end in ends.items():
        for seed in range(5):
            bench = Bench(TuneProposer(seed=seed), champion="A = 0.5  # in [0.0, 1.0]: a\n", direction=direction)
            for number in range(20):
                bench.tell(rewrite(bench.champion, {"A": 0.01 + number / 21}), number / 20)
            end += [float(values_of(program)["A"]) for program in bench.programs()]
    assert median(ends[Direction.MINIMIZE]) < 0.3
    assert median(ends[Direction.MAXIMIZE]) > 0.7


def test_a_long_study_is_modelled_by_its_best_and_its_latest_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "MODELLED_RUNS", 12)
    monkeypatch.setattr(tune, "BEST_RUNS", 3)
    bench = Bench(TuneProposer(seed=1), champion=SIX)
    chance = random.Random(1)
    for number in range(60):
        values: Values = {name: chance.uniform(0.01, 0.99) for name in "ABCDEF"}
        bench.tell(rewrite(SIX, values), None if number % 9 == 4 else abs(number - 20.0))
        if number % 5 == 0:
            bench.programs()
    bench.programs()
    assert isinstance(bench.proposer, TuneProposer)
    trials = bench.proposer._spaces["cpu"].searcher._ot_study.trials  # pyright: ignore[reportPrivateUsage]
    told = [trial.value for trial in trials if trial.state.is_finished() and trial.state.name != "FAIL"]
    assert len(told) < 24 + 5
    assert {0.0, 1.0} <= set(told)


def test_a_searcher_that_learns_only_from_its_own_is_told_of_the_champion_and_of_its_own():
    bench = Bench(TuneProposer(searcher="dense"))
    bench.tell(PROGRAM, 1.0)
    first, second = bench.programs(2)
    (made,) = Dense.made
    assert made.learnt == [(values_of(PROGRAM), 1.0)]
    bench.tell(second, 0.7)
    bench.tell(first, None)
    bench.tell(PROGRAM.replace("return LR", "return 2 * LR"), 0.2)
    assert [value for _, value in made.learnt] == [1.0, 0.7]
    assert made.open == {}


def test_a_new_champion_gets_a_new_searcher_of_its_own_neighbourhood():
    bench = Bench(TuneProposer(searcher="dense"))
    bench.tell(PROGRAM, 1.0)
    (late,) = bench.programs()
    bench.champion = rewrite(PROGRAM, {"DEPTH": 2, "WIDTH": 256})
    bench.tell(bench.champion, 0.5)
    bench.programs(2)
    bench.tell(late, 0.9)  # was suggested by the old searcher: the new one does not know it
    assert len(Dense.made) == 2
    assert [value for _, value in Dense.made[1].learnt] == [0.5]
    depth, width = (Dense.made[1].space[name] for name in ("DEPTH", "WIDTH"))
    assert (depth.lower, depth.upper) == (1, 6)  # upper is exclusive
    assert width.categories == [128, 192, 256]
    bench.champion = bench.champion.replace("return LR", "return 2 * LR")  # other code, the same knobs
    bench.programs()
    assert len(Dense.made) == 2


class Exhausted(Dense):
    """Has no more after its first suggestion."""

    def suggest(self, trial_id: str) -> Any:
        return super().suggest(trial_id) if self.points else Searcher.FINISHED


class Picky(Dense):
    """Knows no choices, as bayesopt."""

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **_: Any) -> bool:
        raise ValueError("BayesOpt does not support parameters of type `Categorical`\nwith more lines")


def test_when_the_searcher_has_no_more_the_neighbourhood_is_tried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(search.SEARCH_ALG_IMPORT, "dense", lambda: Exhausted)
    bench = Bench(TuneProposer(searcher="dense"))
    assert len(bench.programs(5)) == 5


def test_knobs_that_a_searcher_cannot_search_are_said_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(search.SEARCH_ALG_IMPORT, "dense", lambda: Picky)
    bench = Bench(TuneProposer(searcher="dense"))
    for refused in (bench.ask, lambda: TuneProposer(searcher="dense").check(bench.champion)):
        with pytest.raises(UserError) as error:
            refused()
        assert str(error.value) == (
            "searcher 'dense' cannot search these knobs: BayesOpt does not support parameters of type `Categorical`; "
            "take another with --searcher"
        )


class Unmakable(Dense):
    """Cannot be made without an argument of its own, and says nothing of it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise AssertionError


def test_a_searcher_that_cannot_be_made_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(search.SEARCH_ALG_IMPORT, "dense", lambda: Unmakable)
    with pytest.raises(UserError, match="searcher 'dense' cannot search these knobs: AssertionError; take another"):
        TuneProposer(searcher="dense").check(Bench(TuneProposer()).champion)


def test_an_unknown_searcher_is_refused_with_those_that_are_known():
    with pytest.raises(UserError) as error:
        check_searcher("gradient")
    assert str(error.value) == (
        "searcher 'gradient' is not known; known: ax, bayesopt, bohb, dense, hebo, hyperopt, nevergrad, optuna, "
        "random, zoopt; take one with --searcher"
    )
    with pytest.raises(UserError):
        TuneProposer(searcher="gradient")


def test_a_searcher_whose_package_is_missing_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(searchers.PACKAGES, "ax", "no_such_package")
    with pytest.raises(UserError, match="searcher 'ax' needs the package 'no_such_package', which is not installed"):
        check_searcher("ax")
    check_searcher("optuna")
    check_searcher("random")


def test_the_searchers_are_those_of_ray_and_learn_as_is_said():
    names = set(PACKAGES) - {"dense"}
    assert names == set(search.SEARCH_ALG_IMPORT) - {"variant_generator", "dense"}
    for name in names - {"random"}:
        kind: Any = search.SEARCH_ALG_IMPORT[name]()
        learns = kind.add_evaluated_point is not Searcher.add_evaluated_point
        assert learns == (name in LEARN_ALL), name


def test_proposing_starts_no_ray():
    code = (
        "from raysearch.proposers.tune import TuneProposer\nfrom raysearch.proposers import Request\n"
        "from raysearch.model import Direction\nimport sys\n"
        "files = {'train.py': 'A = 0.5  # in [0.0, 1.0]: a\\n'}\n"
        "ideas = TuneProposer().ask(Request('cpu', 'x', files, 2, frozenset(), Direction.MINIMIZE))\n"
        "import ray\nprint(len(ideas), ray.is_initialized(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False", "False"]
    assert done.stderr == ""


# ---- the inbox ----


def dropped(tmp_path: Path, **options: Any) -> Path:
    given: dict[str, Any] = {"patch": "a patch", "why": "Because: ½ of it", "by": "ada", "profiles": ["cpu"], "at": 1e9}
    return inbox.drop(tmp_path / "inbox", **given | options)


def test_what_is_dropped_is_taken_once_and_kept(tmp_path: Path):
    path = dropped(tmp_path, profiles=["cpu", "gpu"], patch="-a\r\n+é\n")
    ((item,), bad) = inbox.waiting(tmp_path / "inbox")
    assert bad == []
    assert (item.path, item.profiles) == (path, ("cpu", "gpu"))
    assert item.idea == Idea("-a\r\n+é\n", Operator.DRAFT, "Because: ½ of it", "ada", source=f"inbox {path.name}")
    assert inbox.is_from(item.idea.source)
    inbox.take(path)
    assert inbox.waiting(tmp_path / "inbox") == ([], [])
    assert (tmp_path / "inbox" / "taken" / path.name).exists()


def test_an_empty_or_missing_inbox_is_no_trouble(tmp_path: Path):
    assert inbox.waiting(tmp_path / "inbox") == ([], [])


def test_the_oldest_comes_first_and_a_half_written_one_is_not_seen(tmp_path: Path):
    dropped(tmp_path, at=2e9, why="later")
    dropped(tmp_path, at=1.5e9, why="earlier")
    (tmp_path / "inbox" / "1.tmp").write_text('{"patch": ')
    items, bad = inbox.waiting(tmp_path / "inbox")
    assert [item.idea.hypothesis for item in items] == ["earlier", "later"]
    assert bad == []


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "{}",
        json.dumps({"patch": "p", "why": "w", "by": "b"}),
        json.dumps({"patch": "p", "why": "w", "by": "b", "profiles": "cpu"}),
        json.dumps({"patch": None, "why": "w", "by": "b", "profiles": ["cpu"]}),
        json.dumps({"patch": "p", "why": "w", "by": "b", "profiles": [1]}),
        json.dumps({"patch": "p", "why": "half \ud800", "by": "b", "profiles": ["cpu"]}),
    ],
)
def test_a_file_that_is_no_item_is_told_from_the_others(tmp_path: Path, content: str):
    dropped(tmp_path)
    wrong = tmp_path / "inbox" / "0.json"
    wrong.write_text(content)
    items, bad = inbox.waiting(tmp_path / "inbox")
    assert len(items) == 1
    ((path, reason),) = bad
    assert path == wrong
    assert reason
    assert "\n" not in reason
    inbox.take(path)
    wrong.write_text(content)
    inbox.take(path)  # a second of that name is kept as well
    assert len(list((tmp_path / "inbox" / "taken").iterdir())) == 2
