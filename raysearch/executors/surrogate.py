"""A model of val_bpb over the knobs of a GPT that is trained for a fixed time on one card, fitted to published runs.

It computes numbers from knob values, with no clock, no chance and no program; `simulated` makes runs of it. The data is
in published.toml, the fit and what is assumed beyond the data in docs/adr/0008.
"""

from __future__ import annotations

import math
import random
import statistics
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, cached_property, lru_cache
from importlib import resources
from itertools import product
from typing import Any

from raysearch.errors import UserError
from raysearch.knobs import Value, Values, format_value, read_knobs
from raysearch.model import Outcome
from raysearch.profile import Hardware, base_slug

PATH = "train.py"
VOCABULARY = 8192
SEQ_LEN = 2048
MODEL_MIB = 12 * 1e6 / 2**20  # of weights, gradients and moments, for a million parameters
FREE_STEPS = 11  # at the start, which autoresearch does not count against the budget
USABLE = 0.985  # of a card's memory, before a run is out of it
REACH = 3  # so much of a knob's range a bowl is a parabola to either side of its best place: a third
LONGEST = {"L": 1.0, "SL": 2.0, "SSSL": 4.0, "SSSSL": 5.0, "SSSSSL": 6.0}  # one layer of so many looks all the way back


class Regime(Enum):
    """How far a search has come when it starts."""

    EARLY = "early"  # the published baseline
    MID = "mid"
    LATE = "late"
    EXHAUSTED = "exhausted"  # no single change helps any more


# ---- knobs ----


@dataclass(frozen=True)
class Dial:
    """A knob of the simulated program.

    Attributes:
        first: Its value in the published baseline.
        bounds: Of a range, as they stand in the program; empty for choices.
    """

    name: str
    first: Value
    help: str
    bounds: tuple[float, float] | tuple[()] = ()
    choices: tuple[Value, ...] = ()
    log: bool = False

    def number(self, value: Value) -> float:
        """The value as the model computes with it."""
        return LONGEST[value] if isinstance(value, str) else float(value)

    def place(self, number: float) -> float:
        """The number on the knob's own scale: logarithmic or linear."""
        return math.log(number) if self.log else number

    def number_at(self, place: float) -> float:
        """Inverse of `place`."""
        return math.exp(place) if self.log else place

    @property
    def span(self) -> float:
        """Length of the knob's range on its own scale."""
        low, high = self.bounds or (min(map(self.number, self.choices)), max(map(self.number, self.choices)))
        return self.place(high) - self.place(low)

    def nearest(self, number: float) -> Value:
        """The value of the program that lies nearest."""
        if self.choices:
            goal = self.place(max(number, 1e-9))
            return min(self.choices, key=lambda choice: abs(self.place(self.number(choice)) - goal))
        low, high = self.bounds or (number, number)
        inside = min(max(number, low), high)
        return round(inside) if isinstance(self.first, int) else float(format_value(inside))

    def line(self, value: Value) -> str:
        """The knob's line in the program."""
        if self.choices:
            allowed = "{" + ", ".join(format_value(choice) for choice in self.choices) + "}"
        else:
            low, high = self.bounds or (0, 0)
            allowed = f"[{low}, {high}]" + " log" * self.log
        return f"{self.name} = {format_value(value)}  # in {allowed}: {self.help}\n"


def _range(name: str, first: Value, low: float, high: float, help_: str, *, log: bool = True) -> Dial:
    return Dial(name, first, help_, bounds=(low, high), log=log)


def _choice(name: str, first: Value, choices: Iterable[Value], help_: str) -> Dial:
    return Dial(name, first, help_, choices=tuple(choices), log=True)


DIALS = (
    _range("DEPTH", 8, 2, 24, "transformer layers"),
    _choice("MODEL_DIM", 512, (128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 896, 1024), "width"),
    _choice("HEAD_DIM", 128, (32, 64, 128), "width of an attention head"),
    _range("MLP_RATIO", 4.0, 1.0, 8.0, "hidden width of the MLP over the width"),
    _choice("WINDOW_PATTERN", "SSSL", LONGEST, "which layers look all the way back"),
    _choice("SHORT_WINDOW", 2, (2, 4, 6, 8, 10, 12, 16), "the others look back this part of the row"),
    _choice("TOTAL_BATCH_SIZE", 2**19, (2**bits for bits in range(15, 21)), "tokens a step"),
    _range("MATRIX_LR", 0.04, 0.005, 0.3, "Muon, the matrices of the layers"),
    _range("EMBEDDING_LR", 0.6, 0.1, 3.0, "Adam, token and value embeddings"),
    _range("UNEMBEDDING_LR", 0.004, 0.0005, 0.05, "Adam, the output matrix"),
    _range("SCALAR_LR", 0.5, 0.05, 2.0, "Adam, the scalars of the residual stream"),
    _range("WEIGHT_DECAY", 0.2, 0.0, 0.5, "of the matrices", log=False),
    _range("EMBEDDING_DECAY", 0.0, 0.0, 0.005, "of the token embeddings", log=False),
    _range("UNEMBEDDING_DECAY", 0.0, 0.0, 0.05, "of the output matrix", log=False),
    _range("VALUE_DECAY", 0.0, 0.0, 0.01, "of the value embeddings", log=False),
    _range("MOMENTUM_WARMUP", 300, 20, 1000, "steps in which Muon's momentum rises"),
    _range("WARMUP_RATIO", 0.0, 0.0, 0.2, "share of the budget that goes up from 0", log=False),
    _range("WARMDOWN_RATIO", 0.5, 0.1, 1.0, "share of the budget that goes down", log=False),
    _range("FINAL_LR_FRAC", 0.0, 0.0, 0.2, "where it ends", log=False),
    _range("SOFT_CAP", 15.0, 5.0, 50.0, "logits are squashed into this"),
    _range("X0_INIT", 0.1, 0.0, 0.3, "weight of the embedding in each layer, at first", log=False),
    _range("ROPE_BASE", 10000.0, 1000.0, 1000000.0, "the rotary embedding's longest wavelength, over 2 pi"),
    _range("INIT_SCALE", 1.0, 0.2, 3.0, "of the layers' first weights"),
)
BASELINE: Values = {dial.name: dial.first for dial in DIALS}
_DIALS = {dial.name: dial for dial in DIALS}
_HEAD = '"""A program with knobs and nothing else: what it would score is computed from them."""\n\n'
_RULES = "# rule: MODEL_DIM % HEAD_DIM == 0\n# rule: WARMUP_RATIO + WARMDOWN_RATIO <= 1\n"
_TAIL = "\n\ndef train(run):\n    return None\n"


def program(values: Mapping[str, Value]) -> str:
    """The text of the simulated program.

    Args:
        values: By knob; those that are left out have the baseline's.
    """
    given = BASELINE | dict(values)
    return _HEAD + "".join(dial.line(given[dial.name]) for dial in DIALS) + _RULES + _TAIL


@lru_cache(maxsize=65536)  # every program is run, judged against and reported on several times
def values_of(text: str) -> Values:
    """The knob values of a program; shared, and not to be changed.

    Raises:
        UserError: It is no program with knobs.
    """
    return {name: knob.value for name, knob in read_knobs(text).items()}


# ---- the model ----


@dataclass(frozen=True)
class Law:
    """How shape and batch act: what one card computes in the budget, and what a model learns from it.

    A step's time is that of its tokens, a token's that of the matrix products, with an overhead a layer. The loss falls
    with capacity and with steps as powers, and rises where batches are too small to average over (compare Kaplan et
    al. 2020, arXiv:2001.08361, and McCandlish et al. 2018, arXiv:1812.06162).

    Attributes:
        token_us: Microseconds of a token for a million parameters in matrix products.
        layer_us: The same for each layer.
        floor: The loss that stays.
        capacity: (weight, power) of the layers' parameters, in units of 25.2 million.
        learning: (weight, power) of the number of steps, in units of 1,000.
        batch: Weight of one over the batch, in units of 262,144 tokens.
        aspect: (weight, best) of width over depth, on a log scale.
    """

    token_us: float
    layer_us: float
    floor: float
    capacity: tuple[float, float]
    learning: tuple[float, float]
    batch: float
    aspect: tuple[float, float]

    def steps(self, point: Mapping[str, float], budget_s: float) -> float:
        """Steps of a run."""
        token_us = self.token_us * _matrices_m(point) + self.layer_us * point["DEPTH"]
        return FREE_STEPS + budget_s * 1e6 / (token_us * point["TOTAL_BATCH_SIZE"])

    def loss(self, point: Mapping[str, float], budget_s: float) -> float:
        """The loss when all other knobs are at their best."""
        learned = self.learning[0] * (self.steps(point, budget_s) / 1000) ** -self.learning[1]
        held = self.capacity[0] * (_layers_m(point) / 25.165824) ** -self.capacity[1]
        aside = math.log(point["MODEL_DIM"] / point["DEPTH"] / self.aspect[1])
        return self.floor + learned + held + self.batch * 262144 / point["TOTAL_BATCH_SIZE"] + self.aspect[0] * aside**2


@dataclass(frozen=True)
class Bowl:
    """The effect of one knob: a parabola on the knob's own scale, a straight line beyond `reach`.

    Attributes:
        best: Where it is lowest, on the knob's own scale.
        weight: Of the squared distance.
    """

    name: str
    best: float
    weight: float
    reach: float

    def loss(self, place: float) -> float:
        """How much is lost there."""
        apart = abs(place - self.best)
        return self.weight * (apart * apart if apart < self.reach else self.reach * (2 * apart - self.reach))


def _interactions(point: Mapping[str, float]) -> Mapping[str, float]:
    """How far the best place of a knob moves with other knobs; assumed, but for the sense of each."""
    return {
        "MATRIX_LR": 0.25 * math.log(point["TOTAL_BATCH_SIZE"] / 262144 * 640 / point["MODEL_DIM"]),
        "WEIGHT_DECAY": -0.1 * math.log(point["MATRIX_LR"] / 0.04),
        "WARMDOWN_RATIO": 0.5 * (point["FINAL_LR_FRAC"] - 0.045),
    }


@dataclass(frozen=True)
class Surrogate:
    """What programs are worth on one kind of card.

    Attributes:
        card: Name of the GPU.
        memory_mb: Of the GPU.
        sigma: Standard deviation of val_bpb between seeds, of the best programs.
        rough: How many times noisier the published baseline is; see `sigma_of`.
        budget_s: Training seconds of a trial.
        around_s: Seconds of a trial before and after training.
        device_tokens: Tokens that the card works on at once: what fills its memory, and what a batch has to hold.
        law: Of shape and batch; None leaves them to bowls.
        halfway_gap: How much higher the metric is at half of the budget.
    """

    card: str
    memory_mb: int
    sigma: float
    budget_s: float
    around_s: float
    device_tokens: int
    bowls: tuple[Bowl, ...]
    law: Law | None = None
    offset: float = 0.0
    halfway_gap: float = 0.05
    rough: float = 1.0

    @cached_property
    def hardware(self) -> Hardware:
        """What a slot with this card says of itself."""
        return Hardware("cuda", self.card, self.memory_mb, "", "", "", 8, "simulated")

    @cached_property
    def slug(self) -> str:
        """Of the profile that a slot with this card gets."""
        return base_slug(self.hardware)

    def value(self, values: Mapping[str, Value]) -> float:
        """The true metric of a program that runs."""
        return self.value_at(point_of(values))

    def value_at(self, point: Mapping[str, float]) -> float:
        """The same for numbers that need not be values of the program."""
        loss = self.offset + (self.law.loss(point, self.budget_s) if self.law else 0.0)
        shifts = _interactions(point)
        for bowl in self.bowls:
            name = bowl.name
            place = math.log(point[name]) if _DIALS[name].log else point[name]
            loss += bowl.loss(place - shifts[name] if name in shifts else place)
        return loss

    def sigma_of(self, value: float) -> float:
        """Standard deviation between seeds of a program with this true metric.

        From the baseline to the best it falls by `rough`, most of it on the first half of the way: as on the CPU
        preset, where it was 0.05 for the first program and 0.01 after two wins (docs/LOG.md). A program that is worse
        than the baseline is as noisy as that.
        """
        if self.rough == 1.0:
            return self.sigma
        first, best = self._range
        way = min(max((value - best) / (first - best), 0.0), 1.0)
        return self.sigma * self.rough ** (way * way)

    @cached_property
    def _range(self) -> tuple[float, float]:
        """True metric of the baseline and of the best program."""
        return self.value(BASELINE), self.value(_optimum(self))

    def tokens_per_s(self, values: Mapping[str, Value]) -> float:
        """Throughput in training; without a law for it, that of 1,000 steps in the budget."""
        point = point_of(values)
        steps = self.law.steps(point, self.budget_s) - FREE_STEPS if self.law else 1000.0
        return steps * point["TOTAL_BATCH_SIZE"] / self.budget_s

    def vram_mb(self, values: Mapping[str, Value]) -> float:
        """Memory of a run: activations of the baseline's shape, as measured, and what a model takes."""
        point = point_of(values)
        mlp = 1 + 0.1 * (point["MLP_RATIO"] - 4)  # published: 57.4, 60.2 and 63.1 GB for 3.5, 4 and 4.5
        activations = 39.8 * point["DEPTH"] * point["MODEL_DIM"] * mlp + 2.07 * VOCABULARY
        embeddings = VOCABULARY * point["MODEL_DIM"] * (2 + math.ceil(point["DEPTH"] / 2)) / 1e6
        return self.device_tokens * activations / 2**20 + MODEL_MIB * (_layers_m(point) + embeddings)

    def failure(self, values: Mapping[str, Value]) -> tuple[Outcome, str] | None:
        """How a program fails, if it does."""
        point = point_of(values)
        if point["MODEL_DIM"] % point["HEAD_DIM"]:
            return Outcome.CRASHED, "AssertionError: MODEL_DIM is no multiple of HEAD_DIM"
        if point["TOTAL_BATCH_SIZE"] < self.device_tokens:
            return Outcome.CRASHED, f"AssertionError: TOTAL_BATCH_SIZE is no multiple of {self.device_tokens}"
        needed = self.vram_mb(values)
        if needed > USABLE * self.memory_mb:
            return Outcome.OUT_OF_MEMORY, f"out of memory: {needed:,.0f} MiB of {self.memory_mb:,}"
        if point["MATRIX_LR"] * point["INIT_SCALE"] ** 0.5 > 0.25 or point["UNEMBEDDING_LR"] > 0.04:
            return Outcome.CRASHED, "the loss is not finite"
        return None


@lru_cache(maxsize=65536)
def _point(values: tuple[tuple[str, Value], ...]) -> Mapping[str, float]:
    return {name: _DIALS[name].number(value) for name, value in values if name in _DIALS}


def point_of(values: Mapping[str, Value]) -> Mapping[str, float]:
    """The numbers that the model computes with."""
    return _point(tuple(values.items()))


def _layers_m(point: Mapping[str, float]) -> float:
    return point["DEPTH"] * (4 + 2 * point["MLP_RATIO"]) * point["MODEL_DIM"] ** 2 / 1e6


def _matrices_m(point: Mapping[str, float]) -> float:
    return _layers_m(point) + point["MODEL_DIM"] * VOCABULARY / 1e6


# ---- the two published cards ----


def _bowls(table: Mapping[str, tuple[float, float]], *, factor: float = 1.0) -> tuple[Bowl, ...]:
    """Bowls of (best value, weight) by knob, each weight times a factor."""
    return tuple(
        Bowl(name, _DIALS[name].place(best), factor * weight, _DIALS[name].span / REACH)
        for name, (best, weight) in table.items()
    )


_H100_LAW = Law(
    token_us=0.01987,
    layer_us=0.00298,
    floor=0.0,
    capacity=(0.0832, 0.792),
    learning=(0.0781, 0.93),
    batch=0.0576,
    aspect=(0.1033, 66.5),
)
_H100_BOWLS = {
    "HEAD_DIM": (110.0, 0.004),
    "MLP_RATIO": (4.48, 0.0368),
    "WINDOW_PATTERN": (4.66, 0.0512),
    "SHORT_WINDOW": (8.69, 0.000588),
    "MATRIX_LR": (0.0402, 0.0383),
    "EMBEDDING_LR": (0.851, 0.0265),
    "UNEMBEDDING_LR": (0.00561, 0.00785),
    "SCALAR_LR": (0.434, 0.00281),
    "WEIGHT_DECAY": (0.1775, 0.1011),
    "EMBEDDING_DECAY": (0.001, 27.9),
    "UNEMBEDDING_DECAY": (0.0137, 0.557),
    "VALUE_DECAY": (0.00368, 119.5),
    "MOMENTUM_WARMUP": (205.0, 0.00189),
    "WARMUP_RATIO": (-0.0203, 0.236),
    "WARMDOWN_RATIO": (0.7126, 0.0219),
    "FINAL_LR_FRAC": (0.0403, 0.309),
    "SOFT_CAP": (15.15, 0.00756),
    "X0_INIT": (0.0642, 0.893),
    "ROPE_BASE": (172_800.0, 0.000169),
    "INIT_SCALE": (0.708, 0.00707),
}
_RTX3060_LAW = Law(
    token_us=0.3631,
    layer_us=0.2263,
    floor=1.0677,
    capacity=(0.00745, 0.577),
    learning=(0.02615, 0.938),
    batch=0.0536,
    aspect=(0.015, 32.0),
)
# The article names the walk of a learning rate, full attention and the narrower MLP; where the others are best there is
# assumed: shifted in the sense of few steps, decays halved.
_RTX3060_BOWLS = _H100_BOWLS | {
    "MLP_RATIO": (2.0, 0.0368),
    "WINDOW_PATTERN": (1.2, 0.0051),
    "MATRIX_LR": (0.10, 0.0383),
    "EMBEDDING_LR": (1.2, 0.0265),
    "UNEMBEDDING_LR": (0.009, 0.00785),
    "WEIGHT_DECAY": (0.22, 0.1011),
    "EMBEDDING_DECAY": (0.0005, 27.9),
    "UNEMBEDDING_DECAY": (0.007, 0.557),
    "VALUE_DECAY": (0.002, 119.5),
    "MOMENTUM_WARMUP": (80.0, 0.00189),
    "WARMDOWN_RATIO": (0.6, 0.0219),
    "ROPE_BASE": (40_000.0, 0.000169),
    "INIT_SCALE": (0.8, 0.00707),
}


@cache
def h100(*, sigma: float = 6e-4, rough: float = 1.0) -> Surrogate:
    """An H100 with 80 GB; `rough` makes its first programs noisier than its best ones."""
    raw = Surrogate(
        card="NVIDIA H100 80GB HBM3",
        memory_mb=81559,
        sigma=sigma,
        budget_s=300.0,
        around_s=50.0,
        device_tokens=128 * SEQ_LEN,
        bowls=_bowls(_H100_BOWLS),
        law=_H100_LAW,
        rough=rough,
    )
    return replace(raw, offset=published()["h100"]["rows"][0]["val_bpb"] - raw.value(BASELINE))


@cache
def rtx3060(*, sigma: float = 2e-3) -> Surrogate:
    """An RTX 3060 with 12 GB; a throttling one has a sigma of up to 0.01."""
    return Surrogate(
        card="NVIDIA GeForce RTX 3060",
        memory_mb=12288,
        sigma=sigma,
        budget_s=300.0,
        around_s=215.0,  # evaluation alone is 197 s
        device_tokens=16 * SEQ_LEN,
        bowls=_bowls(_RTX3060_BOWLS, factor=1.2),  # the baseline is then where it was published
        law=_RTX3060_LAW,
        halfway_gap=0.15,
    )


@cache
def published() -> dict[str, Any]:
    """The tables that the model is fitted to, with their sources."""
    return tomllib.loads(resources.files("raysearch.executors").joinpath("published.toml").read_text(encoding="utf-8"))


# ---- where a search starts ----

MOVED = {Regime.MID: 0.4, Regime.LATE: 0.65}  # of each knob's way to the optimum
GRID = 24  # steps in which a range is searched, three times: each time between the neighbours of the best


def starts(surrogate: Surrogate, regime: Regime) -> Values:
    """The program that a search of this regime starts with.

    EXHAUSTED is an optimum in each knob, and in depth, width, heads and batch together. MID and LATE have each
    knob part of the way there, but for those whose move would make the program fail.
    """
    if regime is Regime.EARLY:
        return dict(BASELINE)
    best = _optimum(surrogate)
    if regime is Regime.EXHAUSTED:
        return dict(best)
    values = dict(BASELINE)
    for dial in DIALS:
        here, there = (dial.number(one[dial.name]) for one in (BASELINE, best))
        place = dial.place(here) + MOVED[regime] * (dial.place(there) - dial.place(here))
        moved = values | {dial.name: dial.nearest(dial.number_at(place))}
        values = moved if is_sound(surrogate, moved) else values
    return values


def is_sound(surrogate: Surrogate, values: Mapping[str, Value]) -> bool:
    """Whether the program runs and keeps its rule."""
    return surrogate.failure(values) is None and float(values["WARMUP_RATIO"]) + float(values["WARMDOWN_RATIO"]) <= 1


@lru_cache(maxsize=64)
def _optimum(surrogate: Surrogate) -> Values:
    values = dict(BASELINE)
    value, before = surrogate.value(values), math.inf
    while before - value > surrogate.sigma / 1000:
        before = value
        values = min((one for one in _shapes(values) if is_sound(surrogate, one)), key=surrogate.value, default=values)
        for dial in DIALS:
            values = _best_of(surrogate, values, dial)
        value = surrogate.value(values)
    return values


def _shapes(values: Values) -> Iterator[Values]:
    """The program with any depth, width, heads and batch: these four belong together."""
    yield values
    others = product(*(_DIALS[name].choices for name in ("MODEL_DIM", "HEAD_DIM", "TOTAL_BATCH_SIZE")))
    for width, head, batch in others:
        for depth in range(2, 25):
            yield {**values, "DEPTH": depth, "MODEL_DIM": width, "HEAD_DIM": head, "TOTAL_BATCH_SIZE": batch}


def _best_of(surrogate: Surrogate, values: Values, dial: Dial) -> Values:
    """The program with the one knob at its best value."""
    if dial.choices:
        return _best(surrogate, values, dial, dial.choices)
    low, high = (dial.place(bound) for bound in dial.bounds)
    for _ in range(3):
        step = (high - low) / GRID
        values = _best(surrogate, values, dial, [dial.nearest(dial.number_at(low + step * i)) for i in range(GRID + 1)])
        here = dial.place(dial.number(values[dial.name]))
        low, high = max(low, here - step), min(high, here + step)
    return values


def _best(surrogate: Surrogate, values: Values, dial: Dial, choices: Iterable[Value]) -> Values:
    tried = [values, *({**values, dial.name: choice} for choice in choices)]
    return min((one for one in tried if is_sound(surrogate, one)), key=surrogate.value, default=values)


def random_move(values: Mapping[str, Value], chance: random.Random, *, reach: float = 0.1) -> Values:
    """The program with one or two knobs moved at random, up to `reach` of their range or to the next choice."""
    moved = dict(values)
    for dial in chance.sample(DIALS, chance.choice((1, 1, 2))):
        if dial.choices:
            near = dial.choices.index(values[dial.name]) + chance.choice((-1, 1))
            moved[dial.name] = dial.choices[min(max(near, 0), len(dial.choices) - 1)]
        else:
            place = dial.place(dial.number(values[dial.name]))
            goal = dial.number_at(place + chance.uniform(-reach, reach) * dial.span)
            moved[dial.name] = dial.nearest(goal)
    return moved


# ---- a second card that is more or less like the first ----

MOVE = 0.08  # of a knob's range, that a single move goes
PATIENCE = 200  # draws of a family's second member


def single_moves(values: Mapping[str, Value]) -> list[Values]:
    """Each knob by itself one step up and one step down, as far as its range goes."""
    moves: list[Values] = []
    for dial in DIALS:
        value = values[dial.name]
        if dial.choices:
            at = dial.choices.index(value)
            near = [*dial.choices[max(0, at - 1) : at], *dial.choices[at + 1 : at + 2]]
        else:
            here, step = dial.place(dial.number(value)), MOVE * dial.span
            near = [dial.nearest(dial.number_at(here + way * step)) for way in (-1, 1)]
        moves += [{dial.name: choice} for choice in near if choice != value]
    return moves


def effect_correlation(a: Surrogate, b: Surrogate, start: Mapping[str, Value], moves: Sequence[Values]) -> float:
    """Pearson's correlation of what the same moves do on two cards.

    Args:
        a: The one card.
        b: The other one.
        start: The program that the moves are made on.
        moves: Changed values of each.
    """
    effects = [
        [one.value({**start, **move}) - one.value(start) for move in moves if is_sound(a, {**start, **move})]
        for one in (a, b)
    ]
    return statistics.correlation(*effects)


def family(first: Surrogate, *, correlation: float, seed: int = 0) -> Surrogate:
    """A second card on which knobs act as they do on the first, to some degree.

    Below a correlation of 1, shape and batch have bowls too, and the best places of some knobs, drawn by chance, are
    moved towards the other side of the baseline: as far as it takes for the single moves on the baseline.

    Args:
        first: The first card.
        correlation: Of the effects of single moves on the baseline, see `effect_correlation`.
        seed: Of the choice of knobs.

    Raises:
        UserError: No choice of knobs gives that correlation.
    """
    second = replace(first, card=f"{first.card} B")
    if correlation >= 1:
        return second
    moves = single_moves(BASELINE)
    second = replace(second, law=None, offset=0.0, bowls=(*first.bowls, *_law_bowls(first)))
    chance = random.Random(f"{seed} {first.card}")
    for _ in range(PATIENCE):
        turned = [bowl.name for bowl in second.bowls if chance.random() < 0.5]
        low, high = 0.0, 1.0  # how far they are turned
        if effect_correlation(first, _turned(second, turned, high), BASELINE, moves) > correlation:
            continue
        for _ in range(20):
            middle = (low + high) / 2
            above = effect_correlation(first, _turned(second, turned, middle), BASELINE, moves) > correlation
            low, high = (middle, high) if above else (low, middle)
        found = _turned(second, turned, high)
        return replace(found, offset=first.value(BASELINE) - found.value(BASELINE))
    raise UserError(f"correlation {correlation}: no second card came near it in {PATIENCE} draws; take one from 0 to 1")


def _turned(surrogate: Surrogate, names: Sequence[str], part: float) -> Surrogate:
    """With the best places of these knobs part of the way to their mirror images at the baseline."""
    bowls: list[Bowl] = []
    for bowl in surrogate.bowls:
        here = _DIALS[bowl.name].place(_DIALS[bowl.name].number(BASELINE[bowl.name]))
        best = bowl.best + part * 2 * (here - bowl.best) if bowl.name in names else bowl.best
        bowls.append(replace(bowl, best=best))
    return replace(surrogate, bowls=tuple(bowls))


def _law_bowls(surrogate: Surrogate) -> list[Bowl]:
    """Bowls that do on the baseline what the law does: a parabola through three points for each of its knobs."""
    law = surrogate.law
    if law is None:
        return []
    point = dict(point_of(BASELINE))
    bowls: list[Bowl] = []
    for name in ("DEPTH", "MODEL_DIM", "TOTAL_BATCH_SIZE"):
        dial = _DIALS[name]
        here, step = dial.place(point[name]), 0.15 * dial.span
        losses = [
            law.loss({**point, name: dial.number_at(here + way * step)}, surrogate.budget_s) for way in (-1, 0, 1)
        ]
        slope, bend = (losses[2] - losses[0]) / (2 * step), (losses[0] - 2 * losses[1] + losses[2]) / step**2
        reach = dial.span / REACH
        weight = max(bend / 2, abs(slope) / (2 * reach))
        bowls.append(Bowl(name, here - slope / (2 * weight), weight, reach))
    return bowls
