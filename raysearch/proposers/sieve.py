"""Programs near a champion that may be proposed: new, within the rules of the program, and likely to run.

Both proposers that move knobs pass what they find through it. It does not know which of them are good.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
    tied,
)
from raysearch.model import Operator
from raysearch.patches import unified_diff
from raysearch.proposers import Idea, Request, Told
from raysearch.proposers.failures import Failures
from raysearch.proposers.reach import differs, places_of, reached

MOVED_KNOBS = (1, 2, 2, 3)  # how many knobs one proposal moves, drawn evenly
LIKELY, DARING = 0.5, 0.05  # the least probability to run to the end; a share of the ideas need none
RANDOM_DRAWS = 600  # proposals tried at random before a proposer says that it has no idea

Found = tuple[Values, float | None]  # values of all knobs, and the change of the metric that is predicted


class Run(NamedTuple):
    """A run that was told: knobs, metric (None: it failed), code without the knobs, and whether it was a race's."""

    values: Values
    value: float | None
    code: str = ""
    is_replicate: bool = False

    @classmethod
    def of(cls, told: Told, path: str, *, code: str = "") -> Run:
        """The run that was told, by the knobs of one file; a number that is none is a failure."""
        values: Values = {name: knob.value for name, knob in read_knobs(told.files[path]).items()}
        value = told.value if told.value is not None and math.isfinite(told.value) else None
        return cls(values, value, code, told.is_replicate)


@dataclass
class Known:
    """What was told for one profile, and the knobs in whose ranges it is placed.

    Attributes:
        told: Runs in the order in which they were told.
        knobs: Of the latest champion.
        places: Where the told runs lie, in units of the knobs' ranges; NaN where that cannot be said.
        base: The commit that `prints` is for.
        prints: Fingerprints of it with other values, by the values.
    """

    told: list[Run] = field(default_factory=list[Run])
    knobs: dict[str, Knob] = field(default_factory=dict[str, Knob])
    places: list[list[float]] = field(default_factory=list[list[float]])
    base: str = ""
    prints: dict[tuple[Value, ...], str] = field(default_factory=dict[tuple[Value, ...], str])

    def add(self, run: Run) -> None:
        """Takes in a run."""
        self.told.append(run)
        self.places.append(places_of(self.knobs, run.values))

    def look(self, knobs: Mapping[str, Knob]) -> bool:
        """Takes the knobs of a champion; whether they have the ranges of the one before."""
        same = _ranges(self.knobs) == _ranges(knobs)
        self.knobs = dict(knobs)
        if not same:
            self.places = [places_of(knobs, run.values) for run in self.told]
            self.prints = {}  # directions may leave other knobs of the same program
        return same


def movable(request: Request, path: str) -> dict[str, Knob]:
    """The knobs that a request's directions let move; none if nothing may be tuned."""
    if Operator.TUNE in request.directions.forbidden:
        return {}
    return request.directions.narrowed(read_knobs(request.files[path], path=path))


class Sieve:
    """What may be proposed on one champion: the cheap tests come first, and nothing passes twice.

    Attributes:
        knobs: That may be moved.
        champion: Their values.
        tied: Names that stand in a rule of the program with each.
    """

    def __init__(self, request: Request, path: str, known: Known, chance: random.Random) -> None:
        self.knobs = known.knobs
        self.champion: Values = {name: knob.value for name, knob in self.knobs.items()}
        self._files, self._path, self._source = request.files, path, request.files[path]
        self._count = request.count
        self._constants = {name: line.value for name, line in constant_lines(self._source).items()}
        # A rule that the champion itself breaks, and runs, is no rule.
        self._rules = [rule for rule in read_rules(self._source) if self._holds([rule], self.champion)]
        self.tied = tied(self._rules)
        self._known = set(request.known)
        self._seen = {tuple(self.champion.values())}
        self._failures = Failures(known.knobs, known.places, [run.value is None for run in known.told])
        self._chance, self._least_odds = chance, LIKELY
        if known.base != request.base:
            known.base, known.prints = request.base, {}
        self._prints = known.prints

    def fits(self, values: Values) -> bool:
        """Whether it keeps the rules and is likely to run."""
        return self._holds(self._rules, values) and self._failures.odds(values) > self._least_odds

    def passes(self, values: Values) -> bool:
        """Whether it is new here, keeps the rules, is likely to run, and was not run."""
        key = tuple(values.values())
        if key in self._seen:
            return False
        self._seen.add(key)
        if not self.fits(values):
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

    def ideas(self, proposer: str, find: Callable[[], Found | None]) -> list[Idea]:
        """As many ideas as the request wants, or as `find` gives values that have passed."""
        ideas: list[Idea] = []
        while len(ideas) < self._count:
            self._least_odds = 0.0 if self._chance.random() < DARING else LIKELY
            found = find()
            if found is None:
                break
            values, predicted = found
            patch = unified_diff(self._path, self._source, rewrite(self._source, values))
            why = _hypothesis(self.champion, values, self.knobs)
            ideas.append(Idea(patch, Operator.TUNE, why, proposer, predicted_delta=predicted))
        return ideas

    def _holds(self, rules: Sequence[str], values: Values) -> bool:
        return broken_rule(rules, self._constants | values) is None


# ---- values ----


def dealt(sieve: Sieve, suggested: Values, chance: random.Random) -> list[Values]:
    """The champion with a few of its knobs moved towards the suggestion, then with a few of the others, and so on."""
    differing = [name for name, knob in sieve.knobs.items() if differs(knob, suggested[name])]
    chance.shuffle(differing)
    found: list[Values] = []
    while differing:
        count = chance.choice(MOVED_KNOBS)
        moved, differing = differing[:count], differing[count:]
        found.append(sieve.champion | {name: reached(sieve.knobs[name], suggested[name]) for name in moved})
    return found


def wild(sieve: Sieve, chance: random.Random) -> Values | None:
    """The champion with a few of its knobs moved anywhere within reach; None if all of them stay as they are."""
    drawn = {
        name: chance.choice(knob.choices) if knob.choices else knob.nearest(knob.at(chance.random()))
        for name, knob in sieve.knobs.items()
    }
    return next(iter(dealt(sieve, drawn, chance)), None)


def near(sieve: Sieve, chance: random.Random) -> Values | None:
    """Values anywhere near the champion that pass; None if hardly any are left."""
    drawn = (wild(sieve, chance) for _ in range(RANDOM_DRAWS))
    return next((values for values in drawn if values is not None and sieve.passes(values)), None)


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
