"""How far one proposal may move a knob."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from raysearch.knobs import Knob, Value, Values

REACH = 0.35  # of a knob's range (log range where it is one): the longest move in one proposal
LEAST = 0.03  # of a knob's range: the shortest move; TPE mostly suggests values that were run, or nearly
STEPS = (0.035, 0.06, 0.1, 0.15, 0.21, 0.28, REACH)  # of a knob's range, about: moves that are weighed
PLACES = 2  # the longest move among choices that are numbers in order


def place(knob: Knob, value: Value | None) -> float:
    """Where a value lies in a knob's range, 0 to 1; NaN where that cannot be said."""
    known = value in knob.choices if knob.choices else isinstance(value, int | float)
    return knob.unit(value) if value is not None and known else math.nan


def places_of(knobs: Mapping[str, Knob], values: Values) -> list[float]:
    """A program's place, knob by knob; NaN for one that it has not, or has in another sense."""
    return [place(knob, values.get(name)) for name, knob in knobs.items()]


def within_reach(knob: Knob, chance: Callable[[], float]) -> list[Value]:
    """Values that one proposal may give a knob: all choices, or some of a range.

    Args:
        knob: With its own value.
        chance: Uniform in [0, 1): where about `STEPS` the values of a range lie.
    """
    if knob.choices:
        options = list(neighbourhood(knob).choices)
    else:
        start = knob.unit(knob.value)
        ends = [start + way * step * (0.9 + 0.2 * chance()) for step in STEPS for way in (-1, 1)]
        options = [reached(knob, knob.nearest(knob.at(min(max(end, 0.0), 1.0)))) for end in ends]
        if knob.is_int:
            assert not isinstance(knob.value, str)
            options += [near for near in (knob.value - 1, knob.value + 1) if knob.allows(near)]
    return [value for value in dict.fromkeys(options) if differs(knob, value)]


def allowed(knob: Knob) -> Value:
    """The knob's own value, or the nearest that it may be moved to: directions may leave the own one out."""
    if knob.allows(knob.value):
        return knob.value
    if not knob.is_number or isinstance(knob.value, str | bool):
        return knob.choices[0]
    near = knob.nearest(float(knob.value))
    return near if knob.allows(near) or knob.low is None else knob.low  # no number of 4 digits lies inside


def differs(knob: Knob, value: Value) -> bool:
    """Whether it is worth a run to move the knob towards the value."""
    if knob.choices or knob.is_int or not knob.allows(knob.value):
        return value != knob.value
    return abs(knob.unit(value) - knob.unit(knob.value)) >= LEAST


def reached(knob: Knob, value: Value) -> Value:
    """`value`, or the furthest that one proposal may go from the knob's own value in that direction."""
    if knob.choices:
        if not knob.is_ordered:
            return value
        here, there = knob.choices.index(allowed(knob)), knob.choices.index(value)
        return knob.choices[min(max(there, here - PLACES), here + PLACES)]
    assert not isinstance(value, str)
    assert not isinstance(knob.value, str)
    start, goal = knob.unit(knob.value), knob.unit(value)
    reached = min(max(goal, start - REACH), start + REACH)
    if reached == goal:
        return value
    moved = knob.nearest(knob.at(reached))
    if knob.is_int and moved == knob.value:  # a third of a narrow range is less than a whole number
        return knob.value + (1 if goal > start else -1)
    return moved


def neighbourhood(knob: Knob) -> Knob:
    """The knob with its range cut to what one proposal may reach."""
    if knob.choices:
        here = knob.choices.index(allowed(knob))
        near = knob.choices[max(0, here - PLACES) : here + PLACES + 1]
        return replace(knob, choices=near) if knob.is_ordered else knob
    assert knob.low is not None
    assert knob.high is not None
    own = allowed(knob)
    start = knob.unit(own)
    low, high = knob.at(max(0.0, start - REACH)), knob.at(min(1.0, start + REACH))
    if knob.is_int:
        assert not isinstance(own, str)
        low, high = min(math.ceil(low), own - 1), max(math.floor(high), own + 1)
    return replace(knob, low=max(low, knob.low), high=min(high, knob.high))
