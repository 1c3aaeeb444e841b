"""Ray Tune's searchers, made as a library: no Tuner, no `ray.init`, no network."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial)

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from raysearch.errors import UserError
from raysearch.knobs import Knob
from raysearch.proposers.reach import allowed, neighbourhood

METRIC = "score"
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
LEARN_ALL = ("hebo", "optuna", "random")  # they have `add_evaluated_point`: they learn from what they did not suggest
MODELLED_RUNS = 300  # that a new searcher is told: TPE's time grows with them, and it gives old ones next to no weight


def check_searcher(name: str) -> None:
    """Refuses a searcher that cannot be had.

    Raises:
        UserError: The name is none of `ray.tune.search`'s, or its package is not installed.
    """
    if name not in PACKAGES:
        known = ", ".join(sorted(PACKAGES))
        raise UserError(f"searcher {name!r} is not known; known: {known}; take one with --searcher")
    if find_spec(PACKAGES[name]) is None:
        raise UserError(f"searcher {name!r} needs the package {PACKAGES[name]!r}, which is not installed; install it")


def make_searcher(name: str, knobs: Mapping[str, Knob], *, mode: str, seed: int) -> Any:
    """A searcher, of the whole ranges if it learns from all runs, else of the champion's neighbourhood.

    Args:
        name: See `check_searcher`.
        knobs: Of the champion.
        mode: `min` or `max`.
        seed: Of the searcher, 32 bits.

    Raises:
        UserError: It does not know knobs of these kinds, or cannot be made here.
    """
    from ray.tune import search  # noqa: PLC0415 - costs a second
    from ray.tune.search.optuna import OptunaSearch  # noqa: PLC0415

    learns_all = name in LEARN_ALL
    domains = {key: _domain(knob if learns_all else neighbourhood(knob)) for key, knob in knobs.items()}
    if name in ("optuna", "random"):
        import optuna  # noqa: PLC0415

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Knob by knob: most runs have most of their knobs at a champion's values, and a joint model of 20 knobs
        # then suggests little but the champion (docs/adr/0007 has figures).
        sampler: Any = (
            optuna.samplers.TPESampler(seed=seed, multivariate=False)
            if name == "optuna"
            else optuna.samplers.RandomSampler(seed=seed)
        )
        space = OptunaSearch.convert_search_space(domains)
        return OptunaSearch(space=space, metric=METRIC, mode=mode, sampler=sampler)
    seeds = {"random_state_seed": seed, "random_state": seed, "seed": seed}  # each searcher has its own name for it
    start = [{key: allowed(knob) for key, knob in knobs.items()}]
    try:
        own = _own_arguments(name)
        found: Any = search.create_searcher(name, metric=METRIC, mode=mode, points_to_evaluate=start, **seeds, **own)
        found.set_search_properties(METRIC, mode, domains)
    except (ValueError, TypeError, AssertionError, ImportError) as error:  # bayesopt knows no choices, for instance
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"searcher {name!r} cannot search these knobs: {reason}; take another with --searcher"
        ) from None
    return found


def _own_arguments(searcher: str) -> dict[str, Any]:
    """What a searcher of Ray's cannot be made without."""
    if searcher == "nevergrad":
        import nevergrad  # noqa: PLC0415 # pyright: ignore[reportMissingImports]

        return {"optimizer": nevergrad.optimizers.NGOpt, "optimizer_kwargs": {"budget": MODELLED_RUNS}}
    return {"budget": MODELLED_RUNS} if searcher == "zoopt" else {}


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
