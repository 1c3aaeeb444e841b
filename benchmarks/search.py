"""How much each way of searching gains in equal GPU-hours, on a surrogate that knows the truth. It trains nothing.

`python benchmarks/search.py` prints a table for each regime (how far the search has come when it starts): true gain,
false wins and idle share, with confidence intervals over seeds. `--scaling` compares numbers of slots with sequential
greedy search on one, `--transfer` two profiles with and without transfer.
"""

from __future__ import annotations

import argparse
import heapq
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context

import optuna

from raysearch import knobs
from raysearch.executors.simulated import CONTENDED, PER_DOUBLING, Faults, apply_patch
from raysearch.executors.surrogate import PATH, Regime, Surrogate, family, h100, program, starts, values_of
from raysearch.knobs import Values
from raysearch.model import Direction, Outcome
from raysearch.proposers import Idea, Proposer, Request, Told
from raysearch.proposers.additive import AdditiveProposer
from raysearch.proposers.transfer import TransferProposer
from raysearch.proposers.tune import TuneProposer
from raysearch.simulate import Ratcheted, Simulated, fleet, simulate

ARMS = ("sequential greedy", "parallel greedy", "always 3 seeds", "random", "TPE alone", "ours, 1 slot", "ours")
FAILED_SHARE = 0.2  # of a trial's seconds that a failed one takes


@dataclass(frozen=True)
class World:
    """How noisy runs are.

    Attributes:
        card: With its σ.
        faults: What goes wrong beside.
    """

    card: Surrogate
    faults: Faults


WORLDS = {
    # every program has the σ of seven published H100 runs
    "steady": World(h100(), Faults()),
    # what there is to gain is 17 σ of the first program and 85 of the last ones, as on the CPU preset (docs/LOG.md);
    # the slots have just started, and now and then somebody else works on the machine
    "uneven": World(h100(sigma=3.3e-4, rough=5.0), Faults(contended_rate=0.02, cold_start=True)),
}


def made(movers: Iterable[str], seed: int, *, elsewhere: bool = True) -> list[Proposer]:
    """Proposers that move knobs: `additive`, learning from runs elsewhere or not, or `tune` with that searcher."""
    return [
        AdditiveProposer(seed=seed, elsewhere=elsewhere)
        if name == "additive"
        else TuneProposer(searcher=name, seed=seed)
        for name in movers
    ]


@dataclass(frozen=True)
class Found:
    """What one arm came to with one seed.

    Attributes:
        gain: True improvement over the start of what it calls its best.
        keeps: Programs that it took for better than the one before; `false` of them were not.
        wall_h: Hours that passed.
        idle: Share of the slots' time without a trial.
    """

    gain: float
    keeps: int
    false: int
    wall_h: float
    idle: float


@dataclass(frozen=True)
class Task:
    """One arm with one seed in one regime."""

    arm: str
    regime: Regime
    seed: int
    slots: int
    gpu_h: float
    movers: tuple[str, ...]
    world: str = "steady"

    def run(self) -> Found:
        """Searches until the GPU-hours are spent."""
        if self.arm in ("random", "TPE alone", "always 3 seeds"):
            world = WORLDS[self.world]
            start = starts(world.card, self.regime)
            return Classic(world, start, self.slots, self.hours, self.seed, self.movers, self.arm).run()
        found = self.simulated()
        (lane,) = found.profiles.values()
        return Found(lane.gain, len(lane.moves), lane.false_keeps, self.hours, found.idle)

    @property
    def hours(self) -> float:
        """That the arm's slots have."""
        return self.gpu_h / self._slots

    @property
    def _slots(self) -> int:
        return 1 if self.arm in ("sequential greedy", "ours, 1 slot") else self.slots

    def simulated(self) -> Simulated:
        """The study of an arm that has a coordinator."""
        world = WORLDS[self.world]
        return simulate(
            fleet(world.card, self._slots),
            proposers=made(self.movers, self.seed),
            hours=self.hours,
            seed=self.seed,
            start=starts(world.card, self.regime),
            options={"judge": {"rule": "greedy" if "greedy" in self.arm else "race"}},
            faults=world.faults,
        )

    def lane(self) -> Ratcheted:
        """What came of that study's one profile."""
        (lane,) = self.simulated().profiles.values()
        return lane


# ---- arms without a coordinator, on the same programs, noise and durations ----


@dataclass
class Classic:
    """Slots run programs, and one of them is called the best: by one run, or by the mean of three."""

    world: World
    start: Values
    slots: int
    hours: float
    seed: int
    movers: tuple[str, ...]
    arm: str
    truth: float = field(init=False)
    told: Callable[[Values, float | None], None] = field(init=False)

    @property
    def card(self) -> Surrogate:
        """What the programs run on."""
        return self.world.card

    def run(self) -> Found:
        """Searches until the time is over; no slot is ever idle."""
        self.noise = random.Random(f"{self.arm} {self.seed}")
        self.runs_each = 3 if self.arm == "always 3 seeds" else 1
        self.best, self.best_value = self.start, self._measured(self.start)
        first = self.truth = self.card.value(self.start)
        self.keeps = self.false = 0
        propose = self._near() if self.arm == "always 3 seeds" else self._anywhere()
        trial_s = self.card.budget_s + self.card.around_s
        ends: list[tuple[float, int, Values | None]] = [(0.0, slot, None) for slot in range(self.slots)]
        while ends:
            at, slot, values = heapq.heappop(ends)
            if at > self.hours * 3600:
                continue
            if values is not None:
                self._end(values)
            following = propose()
            seconds = trial_s * (FAILED_SHARE if self.card.failure(following) else self.runs_each)
            heapq.heappush(ends, (at + seconds, slot, following))
        return Found(first - self.truth, self.keeps, self.false, self.hours, 0.0)

    def _measured(self, values: Values) -> float:
        true = self.card.value(values)
        sigma = self.card.sigma_of(true)
        return statistics.fmean(true + self._contention() + self.noise.gauss(0, sigma) for _ in range(self.runs_each))

    def _contention(self) -> float:
        if self.noise.random() >= self.world.faults.contended_rate:
            return 0.0
        return PER_DOUBLING * math.log2(self.noise.uniform(1, CONTENDED))

    def _end(self, values: Values) -> None:
        value = None if self.card.failure(values) else self._measured(values)
        self.told(values, value)
        if value is None or value >= self.best_value:
            return
        truth = self.card.value(values)
        self.keeps += 1
        self.false += truth >= self.truth
        self.best, self.best_value, self.truth = values, value, truth

    def _near(self) -> Callable[[], Values]:
        movers = made(self.movers, self.seed)
        known: set[str] = set()

        def told(values: Values, value: float | None) -> None:
            outcome = Outcome.CRASHED if value is None else Outcome.MEASURED
            for mover in movers:
                mover.tell(Told("card", {PATH: program(values)}, outcome, value))

        def propose() -> Values:
            text = program(self.best)
            movers.append(movers.pop(0))  # in turn
            (idea,) = movers[0].ask(Request("card", text, {PATH: text}, 1, known, Direction.MINIMIZE))
            assert isinstance(idea, Idea)
            changed = apply_patch(idea.patch, {PATH: text})
            known.add(knobs.fingerprint(changed))
            return dict(values_of(changed[PATH]))

        self.told = told
        return propose

    def _anywhere(self) -> Callable[[], Values]:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        samplers = optuna.samplers
        sampler = samplers.TPESampler(seed=self.seed) if self.arm == "TPE alone" else samplers.RandomSampler(self.seed)
        study = optuna.create_study(sampler=sampler)
        found = knobs.read_knobs(program(self.start))
        first = {name: knob.choices.index(knob.value) if knob.choices else knob.value for name, knob in found.items()}
        study.enqueue_trial(first)
        opened: dict[int, optuna.Trial] = {}

        def propose() -> Values:
            trial = study.ask()
            values: Values = {}
            for name, knob in found.items():
                low, high = knob.low or 0.0, knob.high or 0.0
                if knob.choices:
                    place = trial.suggest_categorical(name, range(len(knob.choices)))
                    values[name] = knob.choices[int(place or 0)]
                elif knob.is_int:
                    values[name] = trial.suggest_int(name, int(low), int(high), log=knob.log)
                else:
                    values[name] = trial.suggest_float(name, low, high, log=knob.log)
            opened[id(values)] = trial
            return values

        def told(values: Values, value: float | None) -> None:
            state = optuna.trial.TrialState.FAIL if value is None else None
            study.tell(opened.pop(id(values)), value, state=state)

        self.told = told
        return propose


# ---- tables ----


def mean_ci(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95% interval (normal approximation)."""
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), half


def wilson(hits: int, total: int) -> str:
    """A share in per cent with its 95% interval (Wilson 1927)."""
    if not total:
        return "none"
    z, p = 1.96, hits / total
    centre, root = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    low, high = ((centre + side * root) / (1 + z * z / total) for side in (-1, 1))
    return f"{100 * p:.1f}% ({100 * max(0.0, low):.1f} to {100 * high:.1f})"


def compare(arms: Iterable[str], regimes: Iterable[Regime], arguments: argparse.Namespace) -> None:
    """Prints the table of arms for each regime."""
    for regime in regimes:
        print(f"\n{regime.value}, {arguments.world}: {arguments.gpu_h:g} GPU-hours an arm, {arguments.seeds} seeds")
        print(f"{'arm':<18} {'true gain (milli-bpb)':>22} {'a GPU-hour':>11} {'an hour':>8} {'idle':>6}   false keeps")
        for arm in arms:
            task = [
                Task(arm, regime, seed, arguments.slots, arguments.gpu_h, tuple(arguments.movers), arguments.world)
                for seed in range(arguments.seeds)
            ]
            found = list(POOL.map(Task.run, task)) if POOL else [one.run() for one in task]
            gain, half = mean_ci([1000 * one.gain for one in found])
            false, keeps = sum(one.false for one in found), sum(one.keeps for one in found)
            a_gpu_h, an_hour = gain / arguments.gpu_h, gain / found[0].wall_h
            idle = 100 * statistics.fmean(one.idle for one in found)
            print(
                f"{arm:<18} {gain:>14.2f} ± {half:<5.2f} {a_gpu_h:>11.4f} {an_hour:>8.3f} {idle:>5.1f}%"
                f"   {false} of {keeps}: {wilson(false, keeps)}",
                flush=True,
            )


def scaling(arguments: argparse.Namespace) -> None:
    """Prints in how many hours slots reach what sequential greedy search does on one, in the median over seeds."""
    seeds, movers, hours = range(arguments.seeds), tuple(arguments.movers), arguments.hours
    pool = POOL.map if POOL else map
    greedy = [Task("sequential greedy", Regime.EARLY, seed, 1, hours, movers) for seed in seeds]
    gains = [lane.gain for lane in pool(Task.lane, greedy)]
    target = statistics.median(gains)
    mean, half = mean_ci([1000 * gain for gain in gains])
    print(
        f"\nsequential greedy, {hours:g} h: true gain {1000 * target:.2f} milli-bpb (median; {mean:.2f} ± {half:.2f})"
    )
    for slots in arguments.scaling:
        ours = [Task("ours", Regime.EARLY, seed, slots, 2 * hours, movers) for seed in seeds]
        lanes = list(pool(Task.lane, ours))
        took = [
            next((move.at_s for move in lane.moves if lane.start - move.after >= target), math.inf) for lane in lanes
        ]
        median_h = statistics.median(took) / 3600
        print(f"{slots:>3} slots: {median_h:.2f} h, efficiency {hours / slots / median_h:.2f}", end="")
        print(
            f" ({sum(one == math.inf for one in took)} of {len(took)} not in {2 * hours / slots:.2f} h); gain after",
            end="",
        )
        for efficiency in (1.0, 0.88, 0.7):
            by = hours / slots / efficiency
            mean, half = mean_ci([1000 * (lane.start - lane.champion(3600 * by)) for lane in lanes])
            print(f" {by:.2f} h {mean:.2f} ± {half:.2f}", end="")
        print(flush=True)


@dataclass(frozen=True)
class Pair:
    """Two profiles in one study: 16 slots of one card, and 4 of another on which knobs do alike to some degree.

    Attributes:
        correlation: Of the effects of single moves.
        is_on: Whether steps are carried over, and whether the model of a profile knows the runs on the other one.
        hours: That the second profile has.
        joins_h: Hours after the first one that it comes.
    """

    correlation: float
    is_on: bool
    seed: int
    hours: float
    joins_h: float
    movers: tuple[str, ...]

    def run(self) -> Ratcheted:
        """The second profile's ratchet."""
        card = h100()
        other = family(card, correlation=self.correlation, seed=self.seed)
        late = [replace(slot, joins_at=3600 * self.joins_h) for slot in fleet(other, 4)]
        found = simulate(
            [*fleet(card, 16), *late],
            proposers=[*made(self.movers, self.seed, elsewhere=self.is_on), *[TransferProposer()] * self.is_on],
            hours=self.joins_h + self.hours,
            seed=self.seed,
            start=starts(card, Regime.EARLY),
        )
        return found.profiles[other.slug]


def transfer(arguments: argparse.Namespace) -> None:
    """Prints the GPU-hours in which the second profile reaches its target, with and without transfer."""
    pool = POOL.map if POOL else map
    hours, joins_h, movers = arguments.hours / 8, arguments.joins_h, tuple(arguments.movers)
    for correlation in (0.7, 0.0):
        pairs = [
            Pair(correlation, is_on, seed, hours, joins_h, movers)
            for seed in range(arguments.seeds)
            for is_on in (False, True)
        ]
        found = list(pool(Pair.run, pairs))
        without, with_ = found[::2], found[1::2]
        both = list(zip(without, with_, strict=True))
        shares = [reached(on, 0.8 * off.gain) / reached(off, 0.8 * off.gain) for off, on in both]
        more, half = mean_ci([1000 * (on.gain - off.gain) for off, on in both])
        gain = 1000 * statistics.fmean(one.gain for one in without)
        false, keeps = sum(one.false_keeps for one in with_), sum(len(one.moves) for one in with_)
        print(
            f"correlation {correlation}, {hours:g} h, joins after {joins_h:g} h: GPU-hours to 80% of the gain without "
            f"transfer: {statistics.median(shares):.2f} of those without (geometric mean "
            f"{statistics.geometric_mean(shares):.2f}); gain {gain:.2f} without, {more:+.2f} ± {half:.2f} with; "
            f"false keeps {false} of {keeps}",
            flush=True,
        )


def reached(lane: Ratcheted, gain: float) -> float:
    """Slot-hours after which a ratchet has gained so much; all that it had if it never did."""
    return next((move.slot_hours for move in lane.moves if lane.start - move.after >= gain), lane.slot_hours)


def main() -> None:
    """Prints the tables that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--gpu-h", type=float, default=24.0, help="GPU-hours of each arm.")
    parser.add_argument("--world", default="steady", choices=WORLDS, help="How noisy runs are, in the table of arms.")
    known = "additive, or searchers of tune; random is the cheapest by far"
    parser.add_argument("--movers", nargs="+", default=["random"], help=f"Who moves knobs, in all arms: {known}.")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--regimes", nargs="+", default=[one.value for one in Regime])
    parser.add_argument("--scaling", type=int, nargs="+", help="Numbers of slots.")
    parser.add_argument("--transfer", action="store_true")
    parser.add_argument(
        "--joins-h", type=float, default=0.0, help="Hours after the first profile that the second comes."
    )
    parser.add_argument("--hours", type=float, default=72.0, help="Of the one slot in --scaling; a share of it else.")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    global POOL
    started = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of several studies get in each other's way
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as POOL:
        if arguments.scaling:
            scaling(arguments)
        elif arguments.transfer:
            transfer(arguments)
        else:
            compare(arguments.arms, [Regime(name) for name in arguments.regimes], arguments)
    print(f"\n{(time.monotonic() - started) / 60:.1f} min")


POOL: ProcessPoolExecutor | None = None

if __name__ == "__main__":
    main()
