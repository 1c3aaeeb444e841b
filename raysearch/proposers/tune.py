"""Changes knobs, by a searcher of Ray Tune's.

A searcher has the whole range of every knob; a proposal moves some knobs of the champion a limited way towards what it
suggests, since a program with all of its knobs moved at once is nearly always worse. What it is told is what was run.
Runs that failed are constraints: the searcher hears that they exist, never a score for them, and whatever lies nearer
to a failed program than to one that ran is not proposed.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial)

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raysearch.knobs import Knob, Value, Values, fingerprint, read_knobs
from raysearch.model import Direction
from raysearch.proposers import Idea, Proposer, Request, Told
from raysearch.proposers.searchers import LEARN_ALL, METRIC, MODELLED_RUNS, check_searcher, make_searcher
from raysearch.proposers.sieve import Known, Run, Sieve, dealt, movable, near, wild

SUGGESTIONS = 30  # of the searcher, looked at for one proposal; then the neighbourhood is tried at random
WILD = 0.3  # share of the proposals whose knobs move anywhere near, not towards a suggestion (docs/adr/0007)
BEST_RUNS = 25  # of these; TPE's model of the good ones has no more


@dataclass
class _Space:
    """The searcher of one profile, with all that was told for it.

    Attributes:
        anchor: The champion that the searcher was made for.
        open: The searcher's own trials that are run as suggested, by fingerprint.
        scores: Told values, by fingerprint; for a searcher that only learns from what it suggested.
        fed: How many runs the searcher was told that it did not suggest.
        asked: How many suggestions it was asked for.
    """

    known: Known = field(default_factory=Known)
    anchor: Values = field(default_factory=dict[str, Value])
    searcher: Any = None
    open: dict[str, str] = field(default_factory=dict[str, str])
    scores: dict[str, float | None] = field(default_factory=dict[str, float | None])
    fed: int = 0
    asked: int = 0


class TuneProposer(Proposer):
    """Proposes knob values for one file of the program.

    Args:
        searcher: `random`, or a name of `ray.tune.search`.
        seed: Of the searcher and of the choice of knobs.
        path: The file whose knobs are changed.

    Raises:
        UserError: The searcher is not known or not installed.
    """

    name = "tune"

    def __init__(self, *, searcher: str = "optuna", seed: int = 0, path: str = "train.py") -> None:
        check_searcher(searcher)
        self._searcher_name = searcher
        self._learns_all = searcher in LEARN_ALL
        self._seed = seed
        self._path = path
        self._random = random.Random(seed)
        self._spaces: dict[str, _Space] = {}

    def check(self, source: str) -> None:
        """Refuses a program that the searcher cannot search; Optuna's two can search any.

        Raises:
            UserError: The searcher does not know knobs of these kinds, or cannot be made here.
        """
        if self._searcher_name not in ("optuna", "random") and (knobs := read_knobs(source, path=self._path)):
            make_searcher(self._searcher_name, knobs, mode="min", seed=0)

    def ask(self, request: Request) -> list[Idea]:
        """Up to `request.count` programs that are the champion with a few knobs moved.

        Raises:
            UserError: The searcher cannot search knobs of these kinds, or a rule of the program cannot be computed.
        """
        knobs = movable(request, self._path)
        if not knobs:
            return []
        space = self._space(request, knobs)
        sieve = Sieve(request, self._path, space.known, self._random)
        left: list[Values] = []  # of a suggestion whose first knobs were taken

        def find() -> tuple[Values, None] | None:
            values = self._towards(space, sieve, left) if self._learns_all else self._as_suggested(space, sieve)
            values = near(sieve, self._random) if values is None else values
            return None if values is None else (values, None)

        return sieve.ideas(self.name, find)

    def tell(self, told: Told) -> None:
        """Adds a first run to what the profile's searcher knows, whoever proposed it."""
        if told.is_replicate:  # a searcher would take it for another program
            return
        space = self._spaces.setdefault(told.profile, _Space())
        run = Run.of(told, self._path)
        space.known.add(run)
        if not self._learns_all:
            print_ = fingerprint(told.files)
            space.scores[print_] = run.value
            if (trial := space.open.pop(print_, None)) is not None:
                _complete(space, trial, run.value)
        elif space.searcher is not None:
            _feed(space, run)

    # ---- one proposal ----

    def _towards(self, space: _Space, sieve: Sieve, left: list[Values]) -> Values | None:
        """A few knobs moved towards a suggestion, whose other knobs are left for the next proposals of the ask.

        A suggestion takes TPE tens of milliseconds. It models the knobs one by one, so that these programs follow its
        model as well as those that have a suggestion each.
        """
        for _ in range(SUGGESTIONS):
            while left:
                values = left.pop(0)
                # Runs that are asked for together follow one model: without these they would all go one way.
                if self._searcher_name != "random" and self._random.random() < WILD:
                    values = wild(sieve, self._random) or values
                if sieve.passes(values):
                    return values
            trial, suggested = self._suggest(space)
            assert suggested is not None  # Optuna's never end
            _complete(space, trial, None)  # not run as suggested: nothing to learn from it
            left += dealt(sieve, suggested, self._random)
        return None

    def _as_suggested(self, space: _Space, sieve: Sieve) -> Values | None:
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

    # ---- the searcher ----

    def _space(self, request: Request, knobs: Mapping[str, Knob]) -> _Space:
        """The profile's searcher; a new one when the knobs themselves have changed, fed with all that was told."""
        space = self._spaces.setdefault(request.profile, _Space())
        anchor: Values = {name: knob.value for name, knob in knobs.items()}
        same_ranges = space.known.look(knobs)
        still_good = space.fed < 2 * MODELLED_RUNS if self._learns_all else space.anchor == anchor
        if same_ranges and space.searcher is not None and still_good:
            return space
        # The seed goes on with the study: after a restart it must not suggest all over what was run.
        self._random = random.Random(f"{self._seed} {request.profile} {len(space.known.told)}")
        mode = "min" if request.direction is Direction.MINIMIZE else "max"
        seed = self._random.getrandbits(32)
        space.searcher = make_searcher(self._searcher_name, knobs, mode=mode, seed=seed)
        space.anchor = anchor
        space.open.clear()  # they are trials of the searcher before
        space.fed = 0
        if self._learns_all:
            for run in _to_model(space.known.told, request.direction):
                _feed(space, run)
        return space

    def _suggest(self, space: _Space) -> tuple[str, Values | None]:
        space.asked += 1
        trial = f"ask{space.asked}"
        suggested: dict[str, Any] | None = space.searcher.suggest(trial)
        if not isinstance(suggested, dict):  # None or FINISHED: it has nothing more
            return trial, None
        return trial, {name: _clean(suggested[name], knob) for name, knob in space.known.knobs.items()}


def _complete(space: _Space, trial: str, value: float | None) -> None:
    """Tells the searcher how its own trial ended."""
    result = None if value is None else {METRIC: value, "training_iteration": 1}
    space.searcher.on_trial_complete(trial, result=result, error=result is None)


def _to_model(told: Sequence[Run], direction: Direction) -> list[Run]:
    """The best and the latest runs, in the order in which they were told."""
    sign = 1.0 if direction is Direction.MINIMIZE else -1.0
    worst_last = sorted(range(len(told)), key=lambda i: math.inf if (value := told[i].value) is None else sign * value)
    latest = range(max(0, len(told) - MODELLED_RUNS + BEST_RUNS), len(told))
    return [told[i] for i in sorted({*worst_last[:BEST_RUNS], *latest})]


def _feed(space: _Space, run: Run) -> None:
    """Tells the searcher of a run that it did not suggest, if it lies in its space."""
    point = {name: run.values.get(name, knob.value) for name, knob in space.known.knobs.items()}
    if all(knob.allows(point[name]) for name, knob in space.known.knobs.items()):
        # A failed run is PRUNED without a number: TPE ranks it behind every run that has one.
        space.searcher.add_evaluated_point(point, run.value, pruned=run.value is None)
        space.fed += 1


def _clean(value: Any, knob: Knob) -> Value:
    """A searcher's value as the program writes it: whole where whole numbers are due, 4 digits, inside the range."""
    if knob.choices:
        return next(choice for choice in knob.choices if choice == value)
    return knob.nearest(float(value))
