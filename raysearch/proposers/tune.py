"""Changes knobs, by a model of what each of them does (`additive`) or by one of Ray Tune's searchers.

A model or a searcher has the whole range of every knob; a proposal moves some knobs of the champion a limited way
towards what it suggests, since a program with all of its knobs moved at once is nearly always worse. What it is told is
what was run. Runs that failed are constraints: the searcher hears that they exist, never a score
for them, and whatever lies nearer to a failed program than to one that ran is not proposed.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial)

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raysearch.knobs import (
    Knob,
    Value,
    Values,
    broken_rule,
    constant_lines,
    fingerprint,
    format_value,
    read_knobs,
    read_rules,
    rewrite,
    skeleton,
)
from raysearch.model import Direction, Operator
from raysearch.patches import unified_diff
from raysearch.proposers import Idea, Proposer, Request, Told
from raysearch.proposers.additive import Additive, Moves
from raysearch.proposers.reach import differs, place, reached, within_reach
from raysearch.proposers.searchers import LEARN_ALL, METRIC, MODELLED_RUNS, OWN, check_searcher, make_searcher

MOVED_KNOBS = (1, 2, 2, 3)  # how many knobs one proposal moves, drawn evenly
MODELLED_KNOBS = (1, 2, 4, 8)  # the same where a model of the knobs has a run or more for each of them
SUGGESTIONS = 30  # of the searcher, looked at for one proposal; then the neighbourhood is tried at random
WILD = 0.3  # share of the proposals whose knobs move anywhere near, not towards a suggestion (docs/adr/0007)
BEST_RUNS = 25  # of these; TPE's model of the good ones has no more
RANDOM_DRAWS = 600  # proposals tried at random before the proposer says that it has no idea


class _Run(NamedTuple):
    """A run that was told: knobs, metric (None: it failed), and what the program is but for its knobs."""

    values: Values
    value: float | None
    code: str


@dataclass
class _Space:
    """The searcher of one profile, with all that was told for it.

    Attributes:
        model: In place of the searcher, for `additive`.
        anchor: The champion that the searcher was made for.
        open: The searcher's own trials that are run as suggested, by fingerprint.
        scores: Told values, by fingerprint; for a searcher that only learns from what it suggested.
        places: Where the told runs lie, in units of the knobs' ranges; NaN where that cannot be said.
        fed: How many runs the searcher was told that it did not suggest.
        base: The commit that `prints` is for.
        prints: Fingerprints of it with other values, by the values.
    """

    knobs: dict[str, Knob] = field(default_factory=dict[str, Knob])
    anchor: Values = field(default_factory=dict[str, Value])
    searcher: Any = None
    model: Additive | None = None
    told: list[_Run] = field(default_factory=list[_Run])
    open: dict[str, str] = field(default_factory=dict[str, str])
    scores: dict[str, float | None] = field(default_factory=dict[str, float | None])
    places: list[list[float]] = field(default_factory=list[list[float]])
    fed: int = 0
    base: str = ""
    prints: dict[tuple[Value, ...], str] = field(default_factory=dict[tuple[Value, ...], str])
    asked: int = 0


class TuneProposer(Proposer):
    """Proposes knob values for one file of the program.

    Args:
        searcher: `additive`, `random`, or a name of `ray.tune.search`.
        seed: Of the searcher and of the choice of knobs.
        path: The file whose knobs are changed.

    Raises:
        UserError: The searcher is not known or not installed.
    """

    name = "tune"

    def __init__(self, *, searcher: str = "optuna", seed: int = 0, path: str = "train.py") -> None:
        check_searcher(searcher)
        self._searcher_name = searcher
        self._learns_all = searcher in (OWN, *LEARN_ALL)
        self._seed = seed
        self._path = path
        self._random = random.Random(seed)
        self._spaces: dict[str, _Space] = {}

    def check(self, source: str) -> None:
        """Refuses a program that the searcher cannot search; Optuna's two and the model can search any.

        Raises:
            UserError: The searcher does not know knobs of these kinds, or cannot be made here.
        """
        if self._searcher_name not in (OWN, "optuna", "random") and (knobs := read_knobs(source, path=self._path)):
            make_searcher(self._searcher_name, knobs, mode="min", seed=0)

    def ask(self, request: Request) -> list[Idea]:
        """Up to `request.count` programs that are the champion with a few knobs moved.

        Raises:
            UserError: The searcher cannot search knobs of these kinds, or a rule of the program cannot be computed.
        """
        source = request.files[self._path]
        knobs = request.directions.narrowed(read_knobs(source, path=self._path))
        if not knobs or Operator.TUNE in request.directions.forbidden:
            return []
        space = self._space(request, knobs)
        sieve = _Sieve(request, self._path, knobs, space)
        ideas: list[Idea] = []
        while len(ideas) < request.count:
            found = self._drawn(space, sieve) or self._next(space, sieve)
            if found is None:
                break
            values, predicted = found
            patch = unified_diff(self._path, source, rewrite(source, values))
            why = _hypothesis(sieve.champion, values, knobs)
            ideas.append(Idea(patch, Operator.TUNE, why, self.name, predicted_delta=predicted))
        return ideas

    def tell(self, told: Told) -> None:
        """Adds a run to what the profile's searcher knows, whoever proposed it."""
        space = self._spaces.setdefault(told.profile, _Space())
        values: Values = {name: knob.value for name, knob in read_knobs(told.files[self._path]).items()}
        value = told.value if told.value is not None and math.isfinite(told.value) else None
        code = skeleton(told.files, self._path)[0] if self._searcher_name == OWN else ""
        space.told.append(_Run(values, value, code))
        space.places.append(_place(values, space.knobs))
        if not self._learns_all:
            print_ = fingerprint(told.files)
            space.scores[print_] = value
            if (trial := space.open.pop(print_, None)) is not None:
                _complete(space, trial, value)
        elif space.searcher is not None or space.model is not None:
            _feed(space, space.told[-1])

    # ---- one proposal ----

    def _drawn(self, space: _Space, sieve: _Sieve) -> tuple[Values, float] | None:
        """Values that the model has drawn, and the change of the metric that it expects."""
        if space.model is None:
            return None
        if not sieve.is_weighed:
            options = {name: within_reach(knob, self._random.random) for name, knob in sieve.knobs.items()}
            sieve.moves, sieve.is_weighed = space.model.moves(sieve.champion, options), True
        if sieve.moves is None:
            return None
        rng = np.random.default_rng(self._random.getrandbits(64))
        counts = MODELLED_KNOBS if len(space.model) >= len(sieve.knobs) else MOVED_KNOBS
        for _ in range(SUGGESTIONS):
            moved, expected = sieve.moves.drawn(rng, self._random.choice(counts))
            values = sieve.champion | moved
            if sieve.passes(values):
                return values, -sieve.sign * expected
        return None

    def _next(self, space: _Space, sieve: _Sieve) -> tuple[Values, None] | None:
        """Values that may be proposed: towards a suggestion of the searcher, else anywhere near the champion."""
        found = None
        if space.searcher is not None:
            found = self._towards(space, sieve) if self._learns_all else self._as_suggested(space, sieve)
        if found is None:
            drawn = (values for _ in range(RANDOM_DRAWS) for values in self._dealt(sieve, self._anywhere(sieve))[:1])
            found = next((values for values in drawn if sieve.passes(values)), None)
        return None if found is None else (found, None)

    def _towards(self, space: _Space, sieve: _Sieve) -> Values | None:
        """A few knobs moved towards a suggestion, whose other knobs are left for the next proposals of the ask."""
        for _ in range(SUGGESTIONS):
            while sieve.dealt:
                values = sieve.dealt.pop(0)
                # Runs that are asked for together follow one model: without these they would all go one way.
                if self._searcher_name != "random" and self._random.random() < WILD:
                    values = next(iter(self._dealt(sieve, self._anywhere(sieve))), values)
                if sieve.passes(values):
                    return values
            trial, suggested = self._suggest(space)
            assert suggested is not None  # Optuna's never end
            _complete(space, trial, None)  # not run as suggested: nothing to learn from it
            sieve.dealt = self._dealt(sieve, suggested)
        return None

    def _as_suggested(self, space: _Space, sieve: _Sieve) -> Values | None:
        """A suggestion taken whole, for a searcher that only learns from its own."""
        for _ in range(SUGGESTIONS):
            trial, suggested = self._suggest(space)
            if suggested is None:
                break
            if sieve.passes(suggested):
                space.open[sieve.print_of(suggested)] = trial
                return suggested
            _complete(space, trial, space.scores.get(sieve.print_of(suggested)))
        return None

    def _dealt(self, sieve: _Sieve, suggested: Values) -> list[Values]:
        """The champion with a few of its knobs moved towards the suggestion, then with a few of the others, and so on.

        A suggestion takes TPE tens of milliseconds. It models the knobs one by one, so that these programs follow its
        model as well as those that have a suggestion each.
        """
        differing = [name for name, knob in sieve.knobs.items() if differs(knob, suggested[name])]
        self._random.shuffle(differing)
        dealt: list[Values] = []
        while differing:
            count = self._random.choice(MOVED_KNOBS)
            moved, differing = differing[:count], differing[count:]
            dealt.append(sieve.champion | {name: reached(sieve.knobs[name], suggested[name]) for name in moved})
        return dealt

    def _anywhere(self, sieve: _Sieve) -> Values:
        """Any value for each knob."""
        return {
            name: self._random.choice(knob.choices) if knob.choices else knob.nearest(knob.at(self._random.random()))
            for name, knob in sieve.knobs.items()
        }

    # ---- the searcher ----

    def _space(self, request: Request, knobs: Mapping[str, Knob]) -> _Space:
        """The profile's searcher; a new one when the knobs themselves have changed, fed with all that was told."""
        space = self._spaces.setdefault(request.profile, _Space())
        anchor: Values = {name: knob.value for name, knob in knobs.items()}
        same_ranges = _ranges(space.knobs) == _ranges(knobs)
        if not same_ranges:
            space.places = [_place(run.values, knobs) for run in space.told]
            space.prints = {}  # directions may leave other knobs of the same program
        space.knobs = dict(knobs)
        still_good = space.fed < 2 * MODELLED_RUNS if self._learns_all else space.anchor == anchor
        if same_ranges and (space.model is not None or (space.searcher is not None and still_good)):
            return space
        # The seed goes on with the study: after a restart it must not suggest all over what was run.
        self._random = random.Random(f"{self._seed} {request.profile} {len(space.told)}")
        mode = "min" if request.direction is Direction.MINIMIZE else "max"
        if self._searcher_name == OWN:
            space.model = Additive(knobs, 1.0 if request.direction is Direction.MINIMIZE else -1.0)
            for run in space.told:
                _feed(space, run)
            return space
        seed = self._random.getrandbits(32)
        space.searcher = make_searcher(self._searcher_name, knobs, mode=mode, seed=seed)
        space.anchor = anchor
        space.open.clear()  # they are trials of the searcher before
        space.fed = 0
        if self._learns_all:
            for run in _to_model(space.told, request.direction):
                _feed(space, run)
        return space

    def _suggest(self, space: _Space) -> tuple[str, Values | None]:
        space.asked += 1
        trial = f"ask{space.asked}"
        suggested: dict[str, Any] | None = space.searcher.suggest(trial)
        if not isinstance(suggested, dict):  # None or FINISHED: it has nothing more
            return trial, None
        return trial, {name: _clean(suggested[name], knob) for name, knob in space.knobs.items()}


def _complete(space: _Space, trial: str, value: float | None) -> None:
    """Tells the searcher how its own trial ended."""
    result = None if value is None else {METRIC: value, "training_iteration": 1}
    space.searcher.on_trial_complete(trial, result=result, error=result is None)


def _to_model(told: Sequence[_Run], direction: Direction) -> list[_Run]:
    """The best and the latest runs, in the order in which they were told."""
    sign = 1.0 if direction is Direction.MINIMIZE else -1.0
    worst_last = sorted(range(len(told)), key=lambda i: math.inf if (value := told[i].value) is None else sign * value)
    latest = range(max(0, len(told) - MODELLED_RUNS + BEST_RUNS), len(told))
    return [told[i] for i in sorted({*worst_last[:BEST_RUNS], *latest})]


def _feed(space: _Space, run: _Run) -> None:
    """Tells the searcher of a run that it did not suggest, if it lies in its space; or the model."""
    values, value, code = run
    if space.model is not None:
        if value is not None:
            space.model.add(values, value, code=code)
        return
    point = {name: values.get(name, knob.value) for name, knob in space.knobs.items()}
    if all(knob.allows(point[name]) for name, knob in space.knobs.items()):
        # A failed run is PRUNED without a number: TPE ranks it behind every run that has one.
        space.searcher.add_evaluated_point(point, value, pruned=value is None)
        space.fed += 1


class _Sieve:
    """What may be proposed on one champion: the cheap tests come first, and nothing passes twice.

    Attributes:
        sign: 1 where lower is better, -1 where higher is.
        dealt: Values that were made of a suggestion and not looked at yet.
        moves: What the model says of the champion's knobs; None before it `is_weighed`, or with too few runs.
    """

    def __init__(self, request: Request, path: str, knobs: Mapping[str, Knob], space: _Space) -> None:
        self.knobs = knobs
        self.sign = 1.0 if request.direction is Direction.MINIMIZE else -1.0
        self.dealt: list[Values] = []
        self.moves: Moves | None = None
        self.is_weighed = False
        self.champion: Values = {name: knob.value for name, knob in knobs.items()}
        self._files, self._path, self._source = request.files, path, request.files[path]
        self._constants = {name: line.value for name, line in constant_lines(self._source).items()}
        # A rule that the champion itself breaks, and runs, is no rule.
        self._rules = [rule for rule in read_rules(self._source) if self._holds([rule], self.champion)]
        self._known = set(request.known)
        self._seen = {tuple(self.champion.values())}
        self._runs = _Runs(space, self.champion)
        if space.base != request.base:
            space.base, space.prints = request.base, {}
        self._prints = space.prints

    def passes(self, values: Values) -> bool:
        """Whether it is new here, keeps the rules, is likely to run, and was not run."""
        key = tuple(values.values())
        if key in self._seen:
            return False
        self._seen.add(key)
        if not self._holds(self._rules, values) or not self._runs.likely(values):
            return False
        print_ = self.print_of(values)
        fresh = print_ not in self._known
        self._known.add(print_)
        return fresh

    def print_of(self, values: Values) -> str:
        """Fingerprint of the champion with these values."""
        key = tuple(values.values())
        if key not in self._prints:  # parsing a program takes longer than all the rest
            self._prints[key] = fingerprint({**self._files, self._path: rewrite(self._source, values)})
        return self._prints[key]

    def _holds(self, rules: Sequence[str], values: Values) -> bool:
        return broken_rule(rules, self._constants | values) is None


class _Runs:
    """Where the runs lie in the space of the knobs, and which of them failed."""

    def __init__(self, space: _Space, champion: Values) -> None:
        self._knobs = space.knobs
        failed = [run.value is None for run in space.told]
        places = [*space.places, _place(champion, space.knobs)]  # the champion ran, whether or not it was told
        self._failed: NDArray[np.bool_] = np.array([*failed, False])
        self._places: NDArray[np.float64] | None = np.array(places) if any(failed) else None

    def likely(self, values: Values) -> bool:
        """Whether the nearest program that was run, ran to its end."""
        if self._places is None:
            return True
        apart = np.nan_to_num(self._places - np.array(_place(values, self._knobs)))
        squares = (apart**2).sum(axis=1)
        return bool(squares[~self._failed].min() <= squares[self._failed].min())


def _place(values: Values, knobs: Mapping[str, Knob]) -> list[float]:
    """A program's place in units of the knobs' ranges; NaN for a knob that it has not, or has in another sense."""
    return [place(knob, values.get(name)) for name, knob in knobs.items()]


def _clean(value: Any, knob: Knob) -> Value:
    """A searcher's value as the program writes it: whole where whole numbers are due, 4 digits, inside the range."""
    if knob.choices:
        return next(choice for choice in knob.choices if choice == value)
    return knob.nearest(float(value))


def _ranges(knobs: Mapping[str, Knob]) -> list[tuple[object, ...]]:
    return [(knob.name, knob.low, knob.high, knob.log, knob.choices, knob.is_int) for knob in knobs.values()]


def _hypothesis(champion: Values, values: Values, knobs: Mapping[str, Knob]) -> str:
    moves = [
        f"{name} {format_value(champion[name])} → {format_value(value)}"
        for name, value in values.items()
        if value != champion[name]
    ]
    if len(moves) == 1:
        helps = next(knob.help for name, knob in knobs.items() if values[name] != champion[name])
        return f"{moves[0]} ({helps})" if helps else moves[0]
    return ", ".join(moves)
