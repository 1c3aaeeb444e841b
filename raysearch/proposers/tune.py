"""Changes knobs by one of Ray Tune's searchers, asked and told as a library: no Tuner, no `ray.init`, no network.

The searcher models the whole range of every knob; a proposal moves a few knobs of the champion a limited way towards
what the searcher suggests, since a program with all of its knobs moved at once is nearly always worse. What the
searcher is told is what was run. Runs that failed are constraints: the searcher hears that they exist, never a score
for them, and whatever lies nearer to a failed program than to one that ran is not proposed.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial)

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from raysearch.errors import UserError
from raysearch.knobs import Knob, Value, Values, broken_rule, fingerprint, format_value, read_knobs, read_rules, rewrite
from raysearch.model import Direction, Operator
from raysearch.patches import unified_diff
from raysearch.proposers import Idea, Request, Told

METRIC = "score"
REACH = 0.35  # of a knob's range (log range where it is one): the longest move in one proposal
MOVED_KNOBS = (1, 1, 2, 2, 3)  # how many knobs one proposal moves, drawn evenly
ATTEMPTS = 200  # suggestions looked at for one proposal before the proposer says that it has no idea
PACKAGES = {
    "ax": "ax",
    "bayesopt": "bayes_opt",
    "bohb": "hpbandster",
    "hebo": "hebo",
    "hyperopt": "hyperopt",
    "nevergrad": "nevergrad",
    "optuna": "optuna",
    "random": "optuna",
    "zoopt": "zoopt",
}


def check_searcher(name: str) -> None:
    """Refuses a searcher that cannot be had.

    Raises:
        UserError: The name is not one of `ray.tune.search`'s, or its package is not installed.
    """
    if name not in PACKAGES:
        raise UserError(
            f"searcher {name!r} is not known; known: {', '.join(sorted(PACKAGES))}; take one with --searcher"
        )
    if find_spec(PACKAGES[name]) is None:
        raise UserError(f"searcher {name!r} needs the package {PACKAGES[name]!r}, which is not installed; install it")


@dataclass
class _Space:
    """The searcher of one profile, with all that was told for it."""

    knobs: dict[str, Knob] = field(default_factory=dict[str, Knob])
    anchor: Values = field(default_factory=dict[str, Value])
    searcher: Any = None
    learns_all: bool = False
    told: list[tuple[Values, float | None]] = field(default_factory=list[tuple[Values, float | None]])
    open: dict[str, str] = field(default_factory=dict[str, str])  # fingerprint -> the searcher's own trial
    asked: int = 0


class TuneProposer:
    """Proposes knob values for one file of the program.

    Args:
        searcher: A name of `ray.tune.search`, or `random`.
        seed: Of the searcher and of the choice of knobs.
        path: The file whose knobs are changed.
    """

    name = "tune"

    def __init__(self, *, searcher: str = "optuna", seed: int = 0, path: str = "train.py") -> None:
        check_searcher(searcher)
        self._searcher_name = searcher
        self._seed = seed
        self._path = path
        self._random = random.Random(seed)
        self._spaces: dict[str, _Space] = {}

    def ask(self, request: Request) -> list[Idea]:
        """Up to `request.count` programs that are the champion with a few knobs moved."""
        source = request.files[self._path]
        knobs, rules = read_knobs(source), read_rules(source)
        if not knobs:
            return []
        space = self._space(request, knobs)
        champion: Values = {name: knob.value for name, knob in knobs.items()}
        ideas: list[Idea] = []
        known = set(request.known)
        for _ in range(request.count * ATTEMPTS):
            if len(ideas) == request.count:
                break
            trial, suggested = self._suggest(space)
            if suggested is None:
                break
            values = self._near(champion, suggested, knobs) if space.learns_all else suggested
            program = rewrite(source, values)
            print_ = fingerprint({**request.files, self._path: program})
            taken = print_ in known or broken_rule(rules, values) or not _feasible(values, knobs, space.told)
            if taken or space.learns_all:
                space.searcher.on_trial_complete(trial, error=True)  # not run as suggested: nothing to learn from it
            if taken:
                continue
            known.add(print_)
            space.open[print_] = trial
            patch = unified_diff(self._path, source, program)
            ideas.append(Idea(patch, Operator.TUNE, _hypothesis(champion, values, knobs), self.name))
        return ideas

    def tell(self, told: Told) -> None:
        """Adds a run to what the profile's searcher knows, whoever proposed it."""
        space = self._spaces.setdefault(told.profile, _Space())
        values: Values = {name: knob.value for name, knob in read_knobs(told.files[self._path]).items()}
        space.told.append((values, told.value))
        if space.searcher is None:
            return
        if space.learns_all:
            self._record(space, values, told.value)
            return
        trial = space.open.pop(fingerprint(told.files), None)
        if trial is not None:
            result = None if told.value is None else {METRIC: told.value, "training_iteration": 1}
            space.searcher.on_trial_complete(trial, result=result, error=result is None)

    # ---- the searcher ----

    def _space(self, request: Request, knobs: Mapping[str, Knob]) -> _Space:
        """The profile's searcher; a new one when the knobs themselves have changed, fed with all that was told."""
        space = self._spaces.setdefault(request.profile, _Space())
        anchor: Values = {name: knob.value for name, knob in knobs.items()}
        same_ranges = _ranges(space.knobs) == _ranges(knobs)
        if space.searcher is not None and same_ranges and (space.learns_all or space.anchor == anchor):
            return space
        space.knobs, space.anchor = dict(knobs), anchor
        mode = "min" if request.direction is Direction.MINIMIZE else "max"
        space.searcher, space.learns_all = self._make_searcher(knobs, anchor, mode)
        if space.learns_all:
            for values, value in space.told:
                self._record(space, values, value)
        return space

    def _make_searcher(self, knobs: Mapping[str, Knob], anchor: Values, mode: str) -> tuple[Any, bool]:
        """The searcher, and whether it can learn from runs that it did not suggest."""
        from ray.tune import search  # noqa: PLC0415 - costs a second
        from ray.tune.search.optuna import OptunaSearch  # noqa: PLC0415

        if self._searcher_name in ("optuna", "random"):
            import optuna  # noqa: PLC0415

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            seed = self._seed
            sampler: Any = (
                optuna.samplers.TPESampler(seed=seed)
                if self._searcher_name == "optuna"
                else optuna.samplers.RandomSampler(seed=seed)
            )
            space = OptunaSearch.convert_search_space({name: _domain(knob) for name, knob in knobs.items()})
            return OptunaSearch(space=space, metric=METRIC, mode=mode, sampler=sampler), True
        found: Any = search.create_searcher(
            self._searcher_name,
            metric=METRIC,
            mode=mode,
            points_to_evaluate=[dict(anchor)],
            random_state_seed=self._seed,
        )
        learns_all = type(found).add_evaluated_point is not search.Searcher.add_evaluated_point
        narrow = {name: _domain(knob if learns_all else _neighbourhood(knob)) for name, knob in knobs.items()}
        found.set_search_properties(METRIC, mode, narrow)
        return found, learns_all

    def _suggest(self, space: _Space) -> tuple[str, Values | None]:
        space.asked += 1
        trial = f"ask{space.asked}"
        suggested: dict[str, Any] | None = space.searcher.suggest(trial)
        if not isinstance(suggested, dict):  # None or FINISHED: it has nothing more
            return trial, None
        return trial, {name: _clean(suggested[name], knob) for name, knob in space.knobs.items()}

    def _record(self, space: _Space, values: Values, value: float | None) -> None:
        point = {name: values.get(name, knob.value) for name, knob in space.knobs.items()}
        if all(knob.allows(point[name]) for name, knob in space.knobs.items()):
            # A failed run is PRUNED without a number: TPE ranks it behind every run that has one.
            space.searcher.add_evaluated_point(point, value, pruned=value is None)

    def _near(self, champion: Values, suggested: Values, knobs: Mapping[str, Knob]) -> Values:
        """The champion with a few of its knobs moved towards the suggestion."""
        differing = [name for name in knobs if suggested[name] != champion[name]]
        count = min(len(differing), self._random.choice(MOVED_KNOBS))
        moved = self._random.sample(differing, count)
        return champion | {name: _towards(knobs[name], suggested[name]) for name in moved}


def _towards(knob: Knob, value: Value) -> Value:
    """`value`, or the furthest that one proposal may go from the knob's own value in that direction."""
    if knob.choices or isinstance(value, str):
        return value
    start, goal = knob.unit(knob.value), knob.unit(value)
    reached = min(max(goal, start - REACH), start + REACH)
    return value if reached == goal else _clean(_at(knob, reached), knob)


def _at(knob: Knob, unit: float) -> float:
    """Inverse of `Knob.unit` for a range."""
    assert knob.low is not None
    assert knob.high is not None
    if knob.log:
        return knob.low * math.exp(unit * math.log(knob.high / knob.low))
    return knob.low + unit * (knob.high - knob.low)


def _clean(value: Any, knob: Knob) -> Value:
    """A searcher's value as the program writes it: whole where whole numbers are due, 4 digits, inside the range."""
    if knob.choices:
        return next(choice for choice in knob.choices if choice == value)
    assert knob.low is not None
    assert knob.high is not None
    inside = min(max(float(value), knob.low), knob.high)
    if knob.is_int:
        return round(inside)
    short = float(format_value(inside))
    return short if knob.low <= short <= knob.high else inside


def _neighbourhood(knob: Knob) -> Knob:
    """The knob with its range cut to what one proposal may reach."""
    if knob.choices:
        return knob
    start = knob.unit(knob.value)
    low, high = _at(knob, max(0.0, start - REACH)), _at(knob, min(1.0, start + REACH))
    if knob.is_int:
        low, high = math.floor(low), math.ceil(high)
    return Knob(knob.name, knob.value, low, high, knob.log, (), knob.help, knob.line)


def _domain(knob: Knob) -> Any:
    """The knob's range as Ray Tune's domain."""
    from ray import tune  # noqa: PLC0415

    if knob.choices:
        return tune.choice(list(knob.choices))
    assert knob.low is not None
    assert knob.high is not None
    if knob.is_int:
        make = tune.lograndint if knob.log else tune.randint
        return make(int(knob.low), int(knob.high) + 1)
    return tune.loguniform(knob.low, knob.high) if knob.log else tune.uniform(knob.low, knob.high)


def _ranges(knobs: Mapping[str, Knob]) -> list[tuple[object, ...]]:
    return [(knob.name, knob.low, knob.high, knob.log, knob.choices, knob.is_int) for knob in knobs.values()]


def _feasible(values: Values, knobs: Mapping[str, Knob], told: Sequence[tuple[Values, float | None]]) -> bool:
    """Whether the nearest program that was run, in units of the knobs' ranges, ran to its end."""
    if all(value is not None for _, value in told):
        return True
    nearest_ran = min((_distance(values, other, knobs) for other, value in told if value is not None), default=math.inf)
    nearest_failed = min(_distance(values, other, knobs) for other, value in told if value is None)
    return nearest_ran <= nearest_failed


def _distance(one: Values, other: Values, knobs: Mapping[str, Knob]) -> float:
    return math.dist(
        [knob.unit(one.get(name, knob.value)) for name, knob in knobs.items()],
        [knob.unit(other.get(name, knob.value)) for name, knob in knobs.items()],
    )


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
