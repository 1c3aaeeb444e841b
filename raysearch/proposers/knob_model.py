"""What each knob does to the metric, as an additive Gaussian process; and draws from what is known of it.

The metric is taken to be a sum of one smooth function of each knob, of an offset for each text of the program's code,
and of noise (additive Gaussian processes: Duvenaud, Nickisch and Rasmussen, NeurIPS 2011). A search moves a few knobs
at a time, so that every run says something about the functions of some knobs, wherever the champion was by then: a sum
needs no two runs at one place to be compared. How much each function varies is learned from the runs.

Most moves from a champion harm, all the more the further they go: the functions have a common mean, a parabola about
the champion's place, whose bend is learned too (docs/adr/0034).

Runs on other hardware tell of the same functions, but that each may differ here by a function of its own. How much they
differ, as a share of how much they vary, is learned as well (multi-task Gaussian processes: Bonilla, Chai and Williams,
NeurIPS 2007).

It knows no champion but the one that it is asked about, and chooses nothing: `additive` does.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from raysearch.knobs import Knob, Value, Values
from raysearch.proposers.reach import place, places_of

Array = NDArray[Any]  # of floats
Fits = Callable[[Values], bool]

SCALES = ((1.0, 4), (0.3, 7))  # length of each kernel, in ranges of a knob, and how many features stand for it
GRID = np.linspace(0.0, 1.0, 25)  # places between which the features interpolate
MODELLED = 1000  # runs, the latest ones; as many of all other profiles together
HERE = ""  # the profile that a model is of, among those that runs are from
GROUPS = 32  # texts of the code that have an offset of their own; those of the others are noise
MENDED = 3  # moves of one proposal that break a rule and for which a move of a tied knob is looked for
LEAST = 4  # runs, before which nothing is said
FIRST_ITERATIONS, ITERATIONS, GROWTH = 20, 5, 1.1  # variances are learned anew after so many times as many runs
HARMS = 2  # columns for what any move does, see `_harms`
HARM = 1e4  # variance of their weights
OFFSET = 100.0  # variance of the level, and of each weight below its prior: (weight of it, mode)
WEIGHTS_PRIOR = (0.3, 1.0)
OWN_PRIOR = (1.0, 0.5)  # of that by which the functions differ here, as a share of their variances
NOISE_PRIOR = (1.0, 0.02)
MISFIT_PRIOR = (3.0, 0.04)  # a fifth of the distance to the best runs is not what a sum can say
CURVE, LEAST_CURVE = 1 / 3, 3.0  # of what was gained since the first runs; in spreads, at least: see `_bent`
FIRST_RUNS = 3
LOWEST = 0.9  # of the curve below the best runs: as good as a run can be
STEEPEST = 20.0  # times as much as near the best runs is a change worth at most to a worse program
FAR = 100.0  # spreads above the best runs beyond which a run tells no more


def matern(places: Array, others: Array, length: float) -> Array:
    """Matérn's kernel with ν = 5/2 and variance 1 (Rasmussen and Williams, 2006, equation 4.17), (n, m)."""
    apart = math.sqrt(5) * np.abs(places[:, None] - others[None, :]) / length
    return (1 + apart + apart**2 / 3) * np.exp(-apart)


class _Features:
    """The function of one knob as a weighted sum of features, each weight with a prior variance of its block.

    Ordered values have the leading eigenfunctions of two kernels on a grid (Nyström: Williams and Seeger, NeurIPS
    2000); words and switches have one feature each. A value that the knob does not know has none: it adds nothing.
    """

    def __init__(self, knob: Knob) -> None:
        self._knob = knob
        self._known: dict[Value | None, Array] = {}
        self._kernels: list[tuple[float, Array]] = []
        self.sizes = [len(knob.choices)]
        if knob.is_ordered:
            self.sizes = [rank for _, rank in SCALES]
            for length, rank in SCALES:
                values, vectors = np.linalg.eigh(matern(GRID, GRID, length))
                self._kernels.append((length, vectors[:, -rank:] / np.sqrt(values[-rank:])))

    def harms(self, here: Value, there: Value) -> Array:
        """What a move is in the columns for any move, (2,)."""
        if not self._kernels:
            return np.array([0.0, 1.0])
        return np.array([np.nan_to_num(place(self._knob, there) - place(self._knob, here)) ** 2, 0.0])

    def at(self, value: Value | None) -> Array:
        """The features of one value, (features,)."""
        if value not in self._known:
            self._known[value] = self._computed(value)
        return self._known[value]

    def _computed(self, value: Value | None) -> Array:
        where = place(self._knob, value)
        if math.isnan(where):
            return np.zeros(sum(self.sizes))
        if not self._kernels:
            return np.array([float(value == choice) for choice in self._knob.choices])
        return np.concatenate([(matern(np.array([where]), GRID, length) @ basis)[0] for length, basis in self._kernels])


@dataclass(frozen=True)
class Moves:
    """Moves of single knobs of one program, and what is known of the improvement by each.

    Attributes:
        names: Of the knobs, one a move.
        values: The new values.
        mean: Posterior mean of the improvement, in units of the metric, (moves,).
        spread: Improvement for each of several independent standard normal numbers, (moves, numbers).
        tied: By knob, those that a rule of the program ties it to.
    """

    names: list[str]
    values: list[Value]
    mean: Array
    spread: Array
    tied: Mapping[str, Set[str]] = field(default_factory=dict[str, Set[str]])

    def sure(self, caution: float, fits: Fits) -> tuple[Values, float]:
        """All knobs that some move of improves even by a lower confidence bound, each by its best move that fits.

        Args:
            caution: How many posterior standard deviations the bound lies below the mean.
            fits: See `drawn`.

        Returns:
            As from `drawn`; no values where no move is that sure.
        """
        return self._best(self.mean - caution * np.sqrt((self.spread**2).sum(axis=1)), len(self.names), fits)

    def drawn(self, rng: np.random.Generator, count: int, fits: Fits, *, boldness: float = 1.0) -> tuple[Values, float]:
        """The best move of each of up to `count` knobs by one draw of the functions, the best knobs first.

        Args:
            rng: What is drawn by.
            count: Most knobs that are moved; one more where a rule ties the last one to another.
            boldness: Times the posterior's spread with which it is drawn.
            fits: Whether a program with these new values can be run. A move that does not fit with the better ones
                takes a move of a tied knob along that mends it, if both together improve; else it is passed over:
                what would be best and cannot be had must not stand in the way of all else.

        Returns:
            New values, and the posterior mean of what they improve together. Knobs that no move of improves by
            this draw are left out, but for the first.
        """
        gains = self.mean + boldness * self.spread @ cast("Array", rng.standard_normal(self.spread.shape[1]))
        return self._best(gains, count, fits, least=1)

    def _best(self, gains: Array, count: int, fits: Fits, *, least: int = 0) -> tuple[Values, float]:
        moved: Values = {}
        expected, mended = 0.0, 0
        order: list[int] = np.argsort(-gains).tolist()
        for move in order:
            if len(moved) >= count or (len(moved) >= least and gains[move] <= 0):
                break
            if self.names[move] in moved:
                continue
            taken = (move,) if fits(moved | self._values_of(move)) else ()
            if not taken and mended < MENDED and self.tied.get(self.names[move]):
                mended += 1
                taken = self._mended(move, order, gains, moved, fits)
            moved |= self._values_of(*taken)
            expected += float(sum(self.mean[one] for one in taken))
        return moved, expected

    def _mended(self, move: int, order: Sequence[int], gains: Array, moved: Values, fits: Fits) -> tuple[int, ...]:
        """The move with the best one of a tied knob with which it fits; nothing if they do not improve together."""
        partners = self.tied[self.names[move]] - moved.keys()
        for other in order:
            if gains[move] + gains[other] <= 0:
                break
            if self.names[other] in partners and fits(moved | self._values_of(move, other)):
                return move, other
        return ()

    def _values_of(self, *moves: int) -> Values:
        return {self.names[move]: self.values[move] for move in moves}


class KnobModel:
    """The model of one profile: told of runs, asked for what moves are worth.

    Args:
        knobs: Whose values make the program; their ranges stay.
        sign: 1 where lower is better, -1 where higher is.
    """

    def __init__(self, knobs: Mapping[str, Knob], sign: float) -> None:
        self._knobs, self._sign = knobs, sign
        self._features = {name: _Features(knob) for name, knob in knobs.items()}
        self._columns: dict[str, slice] = {}
        self._blocks: list[slice] = []  # of columns that share their prior variance; the first column is the level
        end = 1 + HARMS
        for name, features in self._features.items():
            start = end
            for size in features.sizes:
                self._blocks.append(slice(end, end + size))
                end += size
            self._columns[name] = slice(start, end)
        self._width = end
        self._runs: dict[str, deque[_Seen]] = {HERE: deque(maxlen=MODELLED)}
        self._variances = np.full(len(self._blocks), WEIGHTS_PRIOR[1])  # in units of the spread, as all of them
        self._centre = np.zeros(len(knobs))  # where the champion lies
        self._is_ordered = np.array([knob.is_ordered for knob in knobs.values()])
        self._own = OWN_PRIOR[1]
        self._of_code = WEIGHTS_PRIOR[1]
        self._noise, self._misfit = 0.1, MISFIT_PRIOR[1]
        self._learned = 0  # runs that the variances are learned from
        self._fit: _Fit | None = None

    def __len__(self) -> int:
        return sum(map(len, self._runs.values()))

    @property
    def is_shared(self) -> bool:
        """Whether it was told of runs elsewhere."""
        return len(self._runs) > 1

    def add(
        self, values: Values, value: float, *, code: str = "", where: str = HERE, is_replicate: bool = False
    ) -> None:
        """Takes in a run.

        Args:
            values: By knob; those that are missing add nothing.
            value: The metric, finite.
            code: What the program is but for its knobs.
            where: The profile that it was run on, if it is not the model's.
            is_replicate: Whether it was run for a race: where runs lie is said by first runs alone.
        """
        runs = self._runs.setdefault(where, deque(maxlen=MODELLED))
        runs.append(
            _Seen(self._row(values), np.array(places_of(self._knobs, values)), code, self._sign * value, is_replicate)
        )
        self._fit = None

    def _row(self, values: Values) -> Array:
        row = np.zeros(self._width)
        row[0] = 1.0
        for name, features in self._features.items():
            row[self._columns[name]] = features.at(values.get(name))
        return row

    def moves(
        self,
        champion: Values,
        options: Mapping[str, Sequence[Value]],
        *,
        tied: Mapping[str, Set[str]] | None = None,
    ) -> Moves | None:
        """What moves of single knobs of a program are worth; None where too little is known, or there are none.

        Args:
            champion: Values of all knobs.
            options: New values, by knob.
            tied: See `Moves`.
        """
        moves = [(name, value) for name, values in options.items() for value in values]
        if len(self._runs[HERE]) < LEAST or not moves:
            return None
        centre = np.array(places_of(self._knobs, champion))
        if not np.array_equal(centre, self._centre, equal_nan=True):
            self._centre, self._fit = centre, None
        fit, here = self._fitted(), self._row(champion)
        change = np.zeros((len(moves), self._width))
        for row, (name, value) in zip(change, moves, strict=True):
            row[1 : 1 + HARMS] = -self._features[name].harms(champion[name], value)
            columns = self._columns[name]
            row[columns] = here[columns] - self._features[name].at(value)
        unit = fit.scale * fit.steepness(here)
        mean, spread = unit * change @ fit.weights, unit * change @ fit.root
        return Moves([name for name, _ in moves], [value for _, value in moves], mean, spread, tied or {})

    def _fitted(self) -> _Fit:
        if self._fit is None:
            most = MODELLED // max(1, len(self._runs) - 1)
            seen = {where: runs if where == HERE else list(runs)[-most:] for where, runs in self._runs.items()}
            data = _Data(seen, self._blocks, self._harms)
            if len(self) >= GROWTH * self._learned:
                for _ in range(ITERATIONS if self._learned else FIRST_ITERATIONS):
                    self._learn(data)
                self._learned = len(self)
            now = self._posterior(data)
            weights = np.linalg.solve(now.precision, now.right)
            root = np.linalg.inv(np.linalg.cholesky(now.precision)).T
            self._fit = _Fit(data.acting(weights), data.acting(root), data.scale, data.curve)
        return self._fit

    def _harms(self, places: Array) -> Array:
        """Squared distance of ordered knobs from the champion, and how many others differ, (runs, 2)."""
        apart = np.nan_to_num(places - self._centre)
        return np.stack([(apart[:, self._is_ordered] ** 2).sum(1), (apart[:, ~self._is_ordered] != 0).sum(1)], axis=1)

    def _prior(self, data: _Data) -> Array:
        """Prior variance of each weight."""
        prior = np.full(data.rows.shape[1], OFFSET)
        prior[1 : 1 + HARMS] = HARM
        prior[data.codes] = self._of_code
        for block, variance in zip(data.blocks, [*self._variances, *(self._own * self._variances)], strict=False):
            prior[block] = variance
        return prior

    def _posterior(self, data: _Data) -> _Posterior:
        """Of the weights, with the variances as they are (Bayesian linear regression)."""
        around = self._noise + self._misfit * data.above**2 + self._of_code * data.alone
        weighted = data.rows / around[:, None]
        gram = weighted.T @ data.rows
        return _Posterior(around, weighted, gram, gram + np.diag(1 / self._prior(data)), weighted.T @ data.values)

    def _learn(self, data: _Data) -> None:
        """One step of all variances towards their maximum a posteriori; none of them makes it less likely.

        The step is that of the minorise-maximise algorithm for variance components (Zhou, Hu, Zhou and Lange, Journal
        of Computational and Graphical Statistics 28, 2019), with inverse gamma priors.
        """
        now = self._posterior(data)
        inverse = np.linalg.inv(now.precision)
        residual = (data.values - data.rows @ (inverse @ now.right)) / now.around  # V⁻¹ y
        squares = (data.rows.T @ residual) ** 2
        traces = np.diag(now.gram) - np.einsum("ij,ji->i", now.gram @ inverse, now.gram)  # diagonal of Xᵀ V⁻¹ X
        diagonal = 1 / now.around - np.einsum("ij,ij->i", now.weighted @ inverse, now.weighted)  # of V⁻¹
        of_blocks = np.array([[traces[block].sum(), squares[block].sum()] for block in data.blocks])
        functions, *own_functions = of_blocks.reshape(-1, len(self._blocks), 2)
        of_functions, old = functions + sum(self._own * some for some in own_functions), self._variances
        self._variances = np.array(
            [
                _step(variance, trace, square, WEIGHTS_PRIOR)
                for variance, (trace, square) in zip(old, of_functions, strict=True)
            ]
        )
        for some in own_functions:  # that of here alone, if there are runs elsewhere
            found = float(some[:, 0] @ self._variances), float(some[:, 1] @ (old**2 / self._variances))
            self._own = _step(self._own, *found, OWN_PRIOR)
        code = data.codes
        found = float(traces[code].sum() + diagonal @ data.alone), float(squares[code].sum() + residual**2 @ data.alone)
        self._of_code = _step(self._of_code, *found, WEIGHTS_PRIOR)
        far = data.above**2
        self._noise = _step(self._noise, float(diagonal.sum()), float(residual @ residual), NOISE_PRIOR)
        self._misfit = _step(self._misfit, float(diagonal @ far), float(residual**2 @ far), MISFIT_PRIOR)


def _step(variance: float, trace: float, square: float, prior: tuple[float, float]) -> float:
    """The maximum of -(trace v + square variance² / v) / 2 - weight (log v + mode / v) over v."""
    weight, mode = prior
    pull = square * variance**2 / 2 + weight * mode
    return (math.sqrt(weight**2 + 2 * trace * pull) - weight) / trace if trace > 0 else pull / weight


class _Posterior(NamedTuple):
    """Of the weights, and what it is made of.

    Attributes:
        around: Variance of each run around the sum, (runs,).
        weighted: Features over that, (runs, features).
        gram: Their product with the features, (features, features).
        precision: Inverse of the weights' covariance, likewise.
        right: Its product with their mean, (features,).
    """

    around: Array
    weighted: Array
    gram: Array
    precision: Array
    right: Array


@dataclass(frozen=True)
class _Fit:
    """The weights' posterior: `weights` + `root` z for standard normal z, in units of `scale`, of what is `_bent`."""

    weights: Array
    root: Array
    scale: float
    curve: float

    def steepness(self, row: Array) -> float:
        """How much the metric changes with what is bent, about a program."""
        above = self.scale * float(row @ self.weights[: len(row)])
        return math.exp(min(max(above / self.curve, math.log(1 - LOWEST)), math.log(STEEPEST)))


class _Seen(NamedTuple):
    """A run: the level and the features of its knobs, its code, and the metric with lower for better."""

    row: Array
    places: Array
    code: str
    value: float
    is_replicate: bool


class _Data:
    """Runs as the fit has them, those of here and of elsewhere.

    Attributes:
        rows: Features, of runs of here once more, which profile of elsewhere a run is of, and which of the codes that
            have an offset it has, (runs, columns).
        blocks: Of columns that share their prior variance: of the functions, then of what they differ by here.
        codes: The columns of codes.
        values: The metric over the best runs of the profile, in units of the spread, `_bent`.
        scale: That unit.
        curve: How far the floor lies below the best runs of here, in units of the metric.
        above: How far above the best tenth of its profile a run is, at most `FAR`.
        alone: 1 for runs whose code has no offset of its own among the features.
    """

    def __init__(
        self, seen: Mapping[str, Sequence[_Seen]], blocks: Sequence[slice], harms: Callable[[Array], Array]
    ) -> None:
        runs = [run for some in seen.values() for run in some]
        raws = [np.array([run.value for run in some]) for some in seen.values()]
        firsts = [
            np.array([run.value for run in some if not run.is_replicate] or raw)
            for some, raw in zip(seen.values(), raws, strict=True)
        ]
        apart = np.concatenate([first - np.median(first) for first in firsts])
        self.scale = float(np.median(np.abs(apart))) or float(apart.std()) or 1.0
        self._above = [_Above(raw, first, self.scale) for raw, first in zip(raws, firsts, strict=True)]
        self.curve = self._above[0].curve
        self.values = np.concatenate([above.values for above in self._above])
        self.above = np.maximum(self.values, 0.0)
        counts = Counter(run.code for run in runs)
        several = [code for code, count in counts.most_common(GROUPS) if count > 1] if len(counts) > 1 else []
        codes = np.array([[run.code == one for one in several] for run in runs], dtype=float)
        self.alone = 1.0 - codes.sum(axis=1) if len(counts) > 1 else np.zeros(len(runs))
        rows = np.array([run.row for run in runs])
        rows[:, 1 : 1 + HARMS] = harms(np.array([run.places for run in runs]))
        self._width = rows.shape[1]
        self.blocks = list(blocks)
        parts = [rows]
        if len(seen) > 1:
            where = np.repeat(np.arange(len(raws)), [len(raw) for raw in raws])
            self.blocks += [slice(one.start + self._width - 1, one.stop + self._width - 1) for one in blocks]
            parts += [rows[:, 1:] * (where == 0)[:, None], np.eye(len(raws))[where][:, 1:]]
        self.rows = np.concatenate([*parts, codes], axis=1)
        self.codes = slice(self.rows.shape[1] - len(several), None)

    def acting(self, columns: Array) -> Array:
        """Of something for each column, what acts on a program here: of the functions and of what they differ by."""
        acting = columns[: self._width].copy()
        if len(self._above) > 1:
            acting[1:] += columns[self._width : 2 * self._width - 1]
        return acting


class _Above:
    """How far runs of one profile are above the best ones of the first runs.

    Attributes:
        curve: How far the floor lies below the best runs, in units of the metric.
        values: `_bent`, in units of the spread, at most `FAR`, (runs,).
    """

    def __init__(self, raw: Array, first: Array, spread: float) -> None:
        best = float(np.quantile(first, 0.1))
        gained = float(first[:FIRST_RUNS].mean()) - best
        self.curve = max(CURVE * gained, LEAST_CURVE * spread)
        self.values = np.minimum(_bent(raw - best, self.curve) / spread, FAR)


def _bent(above: Array, curve: float) -> Array:
    """How far runs are above the best ones, with what is far above drawn in.

    A change is worth less when there is less to gain: what halves the distance to what can be reached gives 0.1 bits
    per byte at first and 0.01 later. The logarithm of the distance to a floor, `curve` below the best runs, is more of
    a sum than the metric is. Near the best runs it is their distance.
    """
    return curve * np.log1p(np.maximum(above, -LOWEST * curve) / curve)
