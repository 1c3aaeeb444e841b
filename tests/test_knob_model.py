"""The additive model of knobs: what it learns, what it leaves open, and that its variances get likelier."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from raysearch.knobs import Value, Values, read_knobs
from raysearch.proposers import knob_model
from raysearch.proposers.knob_model import KnobModel, Moves

KNOBS = read_knobs(
    "LR = 0.1  # in [0.001, 1.0] log: a\n"
    "DECAY = 0.2  # in [0.0, 1.0]: a\n"
    "DEPTH = 8  # in [2, 16]: a\n"
    "WIDTH = 256  # in {64, 128, 256, 512}: a\n"
    'KIND = "b"  # in {"a", "b", "c"}: a\n'
    "IDLE = 0.5  # in [0.0, 1.0]: a\n"
)
FIRST: Values = {name: knob.value for name, knob in KNOBS.items()}


def truth(values: Values) -> float:
    """A sum: one bowl inside of its range, one slope, one knob that does nothing, a choice."""
    unit = {name: KNOBS[name].unit(value) for name, value in values.items() if name != "KIND"}
    bowls = 3 * (unit["LR"] - 0.3) ** 2 + (unit["DECAY"] - 0.9) ** 2 + 0.4 * unit["DEPTH"] + 0.2 * unit["WIDTH"]
    return bowls + {"a": 0.0, "b": 0.1, "c": 0.3}[str(values["KIND"])]


def product(values: Values) -> float:
    """A factor for each knob, over a floor."""
    return 1.0 + 0.2 * math.exp(3 * truth(values))


def anywhere(chance: random.Random) -> Values:
    return {
        name: chance.choice(knob.choices) if knob.choices else knob.nearest(knob.at(chance.random()))
        for name, knob in KNOBS.items()
    }


def near(chance: random.Random) -> Values:
    """Two knobs moved, as a search does."""
    values = anywhere(chance)
    return FIRST | {name: values[name] for name in chance.sample(list(KNOBS), 2)}


def told(
    runs: int,
    *,
    seed: int = 0,
    noise: float = 0.01,
    sign: float = 1.0,
    score: Callable[[Values], float] = truth,
    draw: Callable[[random.Random], Values] = near,
) -> KnobModel:
    chance, model = random.Random(seed), KnobModel(KNOBS, sign)
    for _ in range(runs):
        values = draw(chance)
        model.add(values, sign * (score(values) + chance.gauss(0, noise)))
    return model


def weighed(model: KnobModel, options: dict[str, list[Value]]) -> Moves:
    moves = model.moves(FIRST, options)
    assert moves is not None
    return moves


def anything(moved: Values) -> bool:
    return True


OPTIONS: dict[str, list[Value]] = {
    "LR": [0.01, 0.03, 0.5],
    "DECAY": [0.1, 0.4, 0.5],
    "DEPTH": [4, 12],
    "WIDTH": [128, 512],
    "KIND": ["a", "c"],
    "IDLE": [0.2, 0.8],
}
GAINS = np.array([truth(FIRST) - truth(FIRST | {name: value}) for name, values in OPTIONS.items() for value in values])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_it_learns_what_single_moves_are_worth_from_runs_that_move_two(sign: float):
    moves = weighed(told(120, sign=sign), OPTIONS)
    assert np.corrcoef(moves.mean, GAINS)[0, 1] > 0.97
    assert (np.abs(moves.mean - GAINS) < 0.05 + 0.35 * np.abs(GAINS)).all()  # it takes effects to shrink
    assert moves.names[:3] == ["LR", "LR", "LR"]


def test_changes_that_helped_a_bad_program_are_expected_to_help_a_good_one_less(monkeypatch: pytest.MonkeyPatch):
    """Where each change takes away a share of what is left, what bad programs say holds for the best one too."""
    champion = FIRST | {"LR": 0.008, "DECAY": 0.85, "DEPTH": 3}
    errors: list[float] = []
    for curve in (knob_model.CURVE, 1e9):
        monkeypatch.setattr(knob_model, "CURVE", curve)
        model = told(60, score=product)
        model.add(champion, product(champion))
        moves = model.moves(champion, OPTIONS)
        assert moves is not None
        values = zip(moves.names, moves.values, strict=True)
        gains = [product(champion) - product(champion | {name: value}) for name, value in values]
        errors.append(float(np.square(moves.mean - np.array(gains)).mean()))
    assert errors[0] < 0.5 * errors[1]


def test_what_it_does_not_know_is_within_what_it_says_that_it_does_not_know():
    """Over many models: errors in units of the posterior's standard deviation, few runs and many."""
    for runs in (12, 60):
        errors = []
        for seed in range(20):
            moves = weighed(told(runs, seed=seed), OPTIONS)
            errors += list((moves.mean - GAINS) / np.sqrt((moves.spread**2).sum(axis=1)))
        assert 0.3 < math.sqrt(float(np.mean(np.square(errors)))) < 2.2  # this truth is a sum, not a product


def test_draws_have_the_mean_and_the_spread_of_the_posterior_and_differ():
    moves = weighed(told(20), {"LR": [0.01], "IDLE": [0.2]})
    rng = np.random.default_rng(0)
    drawn = [moves.drawn(rng, 1, anything) for _ in range(2000)]
    best = np.mean([next(iter(values)) == "LR" for values, _ in drawn])
    apart, spread = moves.mean[0] - moves.mean[1], moves.spread[0] - moves.spread[1]
    expected = 0.5 * (1 + math.erf(float(apart / np.sqrt(spread @ spread) / math.sqrt(2))))
    assert best == pytest.approx(expected, abs=0.04)
    assert {predicted for _, predicted in drawn} == {float(gain) for gain in moves.mean} or best in (0.0, 1.0)


def test_a_draw_moves_each_knob_once_and_only_where_it_improves_but_for_the_first():
    moves = Moves(["A", "A", "B", "C"], [1, 2, 3, 4], np.array([1.0, 2.0, 0.5, -1.0]), np.zeros((4, 3)))
    rng = np.random.default_rng(0)
    assert moves.drawn(rng, 8, anything) == ({"A": 2, "B": 3}, 2.5)
    assert moves.drawn(rng, 1, anything) == ({"A": 2}, 2.0)
    worse = Moves(["C", "D"], [4, 5], np.array([-1.0, -2.0]), np.zeros((2, 3)))
    assert worse.drawn(rng, 8, anything) == ({"C": 4}, -1.0)


def test_moves_that_cannot_be_run_are_passed_over_for_the_next_best_ones():
    moves = Moves(["A", "A", "B", "C"], [1, 2, 3, 4], np.array([1.0, 2.0, 0.5, 0.4]), np.zeros((4, 3)))
    rng = np.random.default_rng(0)

    def fits(moved: Values) -> bool:
        return moved.get("A") != 2 and not {"B", "C"} <= set(moved)

    assert moves.drawn(rng, 8, fits) == ({"A": 1, "B": 3}, 1.5)
    assert moves.sure(1.0, fits) == ({"A": 1, "B": 3}, 1.5)
    assert moves.drawn(rng, 8, lambda moved: False) == ({}, 0.0)


def test_a_move_that_breaks_a_rule_takes_one_of_a_tied_knob_along_if_both_together_improve():
    values: list[Value] = [576, 64, 32, 1, 2]
    tied = {"WIDTH": {"HEAD", "OTHER"}, "HEAD": {"WIDTH"}, "OTHER": {"WIDTH"}}

    def fits(moved: Values) -> bool:
        return int(moved.get("WIDTH", 512)) % int(moved.get("HEAD", 128)) == 0

    def moves(*mean: float) -> Moves:
        return Moves(["WIDTH", "HEAD", "HEAD", "OTHER", "FREE"], values, np.array(mean), np.zeros((5, 3)), tied)

    alone = replace(moves(2.0, -0.5, -1.0, -3.0, -1.0), tied={})
    assert alone.sure(0.0, fits) == ({}, 0.0)
    assert moves(2.0, -0.5, -1.0, -3.0, -1.0).sure(0.0, fits) == ({"WIDTH": 576, "HEAD": 64}, 1.5)
    assert moves(2.0, -1.5, -1.0, -3.0, 0.5).sure(0.0, fits) == ({"WIDTH": 576, "HEAD": 32, "FREE": 2}, 1.5)
    assert moves(2.0, -2.5, -3.0, 0.5, 0.3).sure(0.0, fits) == ({"OTHER": 1, "FREE": 2}, 0.8)
    rng = np.random.default_rng(0)
    assert moves(2.0, -0.5, -1.0, -3.0, 1.0).drawn(rng, 1, fits) == ({"WIDTH": 576, "HEAD": 64}, 1.5)
    assert moves(2.0, -0.5, -1.0, -3.0, 3.0).drawn(rng, 1, fits) == ({"FREE": 2}, 3.0)


def test_sure_moves_are_all_those_that_improve_by_a_lower_bound():
    spread = np.array([[0.3, 0.4], [3.0, 0.0], [0.0, 0.1], [0.0, 0.0]])  # standard deviations 0.5, 3, 0.1, 0
    moves = Moves(["A", "A", "B", "C"], [1, 2, 3, 4], np.array([1.0, 2.0, 0.15, -1.0]), spread)
    assert moves.sure(0.0, anything) == ({"A": 2, "B": 3}, 2.15)
    assert moves.sure(1.0, anything) == ({"A": 1, "B": 3}, 1.15)
    assert moves.sure(1.9, anything) == ({"A": 1}, 1.0)
    assert moves.sure(2.5, anything) == ({}, 0.0)


def test_other_code_has_an_offset_of_its_own():
    """Half of the runs have other code that is worse by 5, and other values of one knob: no effect of that knob."""
    chance, model = random.Random(1), KnobModel(KNOBS, 1.0)
    for number in range(120):
        is_other = number % 2 == 1
        values = near(chance) | {"IDLE": chance.uniform(0.6, 1.0) if is_other else chance.uniform(0.0, 0.4)}
        model.add(values, truth(values) + 5.0 * is_other + chance.gauss(0, 0.01), code="other" if is_other else "first")
    moves = weighed(model, {"IDLE": [0.0, 1.0], "LR": [0.03]})
    assert np.abs(moves.mean[:2]).max() < 0.1
    assert moves.mean[2] == pytest.approx(truth(FIRST) - truth(FIRST | {"LR": 0.03}), abs=0.1)


def test_code_that_ran_once_tells_of_knobs_as_far_as_others_of_its_kind_agree():
    chance, model = random.Random(2), KnobModel(KNOBS, 1.0)
    for number in range(150):
        values = near(chance)
        model.add(values, truth(values) + chance.gauss(0, 0.05), code=f"text {number}")
    assert np.abs(weighed(model, OPTIONS).mean - GAINS).max() < 0.15


def test_runs_that_are_far_off_do_not_drown_the_small_effects():
    """One run in thirty is worse by up to a thousand times what there is to find."""

    def score(values: Values) -> float:
        return truth(values) + (300.0 * float(values["LR"]) if float(values["LR"]) > 0.5 else 0.0)

    moves = weighed(told(200, score=score), {name: OPTIONS[name] for name in ("DECAY", "DEPTH", "KIND")})
    gains = np.concatenate([GAINS[3:8], GAINS[10:12]])
    assert (np.abs(moves.mean - gains) < 0.05 + 0.35 * np.abs(gains)).all()


def test_values_that_a_knob_does_not_know_add_nothing():
    model = told(40)
    model.add({"LR": "warm", "KIND": "z"}, 1.0)  # a program with other knobs
    model.add({}, 1.0)
    assert np.isfinite(weighed(model, OPTIONS).mean).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 1e300, -1e-300])
def test_runs_that_are_all_alike_say_nothing_and_break_nothing(value: float):
    model = KnobModel(KNOBS, 1.0)
    for seed in range(6):
        model.add(near(random.Random(seed)), value)
    moves = weighed(model, OPTIONS)
    assert np.isfinite(moves.spread).all()
    assert np.abs(moves.mean).max() < 0.1


def test_it_says_nothing_before_it_has_a_few_runs_or_without_moves():
    assert told(knob_model.LEAST - 1).moves(FIRST, OPTIONS) is None
    assert told(knob_model.LEAST).moves(FIRST, {"LR": []}) is None
    assert told(knob_model.LEAST).moves(FIRST, OPTIONS) is not None


def test_it_keeps_the_latest_runs_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knob_model, "MODELLED", 30)
    assert len(told(100)) == 30


def opposite(values: Values) -> float:
    """As `truth`, but that learning rate and depth do the opposite."""
    unit = {name: float(KNOBS[name].unit(values[name])) for name in ("LR", "DEPTH")}
    return truth(values) - 6 * (unit["LR"] - 0.3) ** 2 - 0.8 * unit["DEPTH"]


def of_two(here: int, elsewhere: int, score: Callable[[Values], float], *, level: float = 0.0) -> KnobModel:
    """Told of runs by `truth` elsewhere, and of runs by another function here, in any order."""
    chance, model = random.Random(1), KnobModel(KNOBS, 1.0)
    for where in chance.sample(["elsewhere", knob_model.HERE], elsewhere + here, counts=[elsewhere, here]):
        values = near(chance)
        value = score(values) if where == knob_model.HERE else truth(values) + level
        model.add(values, value + chance.gauss(0, 0.01), where=where)
    return model


def error(model: KnobModel, score: Callable[[Values], float]) -> float:
    moves = weighed(model, OPTIONS)
    gains = [score(FIRST) - score(FIRST | {name: value}) for name, value in zip(moves.names, moves.values, strict=True)]
    return float(np.sqrt(np.mean((moves.mean - np.array(gains)) ** 2)))


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch):
    """Far from the best runs a change is worth what it is near them."""
    monkeypatch.setattr(knob_model, "CURVE", 1e6)


@pytest.mark.parametrize("level", [0.0, 50.0])
def test_runs_elsewhere_tell_of_what_knobs_do_here_whatever_the_level_there(straight: None, level: float):
    assert error(of_two(6, 100, truth, level=level), truth) < 0.3 * error(of_two(6, 0, truth), truth)


def test_what_is_otherwise_here_is_learned_and_the_rest_is_shared(straight: None):
    alone, shared, alike = of_two(30, 0, opposite), of_two(30, 150, opposite), of_two(30, 150, truth)
    assert error(shared, opposite) < error(alone, opposite)
    assert error(alike, truth) < error(shared, opposite)
    assert shared._own > 2 * alike._own


def test_the_runs_of_many_profiles_do_not_make_it_slow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(knob_model, "MODELLED", 40)
    model, chance, rows = told(60), random.Random(2), list[int]()
    for number in range(240):
        values = near(chance)
        model.add(values, truth(values), where=f"card {number % 4}")
    fitted = model._posterior
    monkeypatch.setattr(model, "_posterior", lambda data: (rows.append(len(data.rows)), fitted(data))[1])
    assert np.isfinite(weighed(model, OPTIONS).mean).all()
    assert set(rows) == {80}


def test_it_says_nothing_of_here_from_runs_elsewhere_alone():
    assert of_two(knob_model.LEAST - 1, 50, truth).moves(FIRST, OPTIONS) is None


def log_posterior(model: KnobModel, data: knob_model._Data) -> float:
    """Of the variances, up to a constant, from the covariance of all runs, which the model never makes."""
    covariance = (data.rows * model._prior(data)) @ data.rows.T + np.diag(model._posterior(data).around)
    _, determinant = np.linalg.slogdet(covariance)
    found = -0.5 * (determinant + data.values @ np.linalg.solve(covariance, data.values))
    priors = [(knob_model.WEIGHTS_PRIOR, float(variance)) for variance in [*model._variances, model._of_code]]
    priors += [(knob_model.OWN_PRIOR, model._own)] * (len(model._runs) > 1)
    priors += [(knob_model.NOISE_PRIOR, model._noise), (knob_model.MISFIT_PRIOR, model._misfit)]
    return float(found) - sum(weight * (math.log(v) + mode / v) for (weight, mode), v in priors)


@pytest.mark.parametrize("elsewhere", [(), ("y", "z")])
@pytest.mark.parametrize("seed", range(6))
def test_each_step_makes_the_variances_likelier(seed: int, elsewhere: tuple[str, ...]):
    chance, model = random.Random(seed), KnobModel(KNOBS, 1.0)
    for number in range(chance.randint(5, 60)):
        values = chance.choice([near, anywhere])(chance)
        where = chance.choice([knob_model.HERE, *elsewhere]) if number else knob_model.HERE
        value = truth(values) + chance.gauss(0, 0.05) + len(where)
        model.add(values, value, code=chance.choice(["a", "b", f"{number}"]), where=where)
    data = knob_model._Data(model._runs, model._blocks, model._harms)
    first = before = log_posterior(model, data)
    for _ in range(25):
        model._learn(data)
        after = log_posterior(model, data)
        assert after >= before - 1e-6 * abs(before)
        before = after
    assert before > first + 1
