"""How long slots idle when a proposer takes minutes for each proposal, as language models do. It trains nothing.

`python benchmarks/slow_minds.py` prints a table: the slow proposer beside a quick one and alone, with several asks at
once, sound, failing and hanging; idle shares of the whole study and from the end of its first baseline run on.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from raysearch.executors.surrogate import Regime, h100, starts
from raysearch.model import Operator
from raysearch.proposers import Idea, Proposer, Request, Told
from raysearch.proposers.tune import TuneProposer
from raysearch.simulate import fleet, simulate

LIMIT_S = 600.0


class SlowMind(Proposer):
    """A searcher that passes for a language model: asked for one proposal at a time, and failing now and then.

    Args:
        parallel: Asks that it works on at once.
        seed: Of its ideas and its failures.
        failing: Share of the asks that it fails in.
    """

    name = "mind"
    limit_s = LIMIT_S

    def __init__(self, *, parallel: int, seed: int, failing: float = 0.0) -> None:
        self.parallel = parallel
        self._failing = failing
        self._chance = random.Random(f"mind {seed}")
        self._tune = TuneProposer(searcher="random", seed=seed + 1000)
        self._lock = threading.Lock()  # a searcher is for one thread

    def ask(self, request: Request) -> list[Idea]:
        """What the searcher says, in its own name.

        Raises:
            ConnectionError: Now and then.
        """
        with self._lock:
            if self._chance.random() < self._failing:
                raise ConnectionError("the service is overloaded")
            ideas = self._tune.ask(request)
        return [replace(idea, proposer=self.name, operator=Operator.DRAFT) for idea in ideas]

    def tell(self, told: Told) -> None:
        """Learns as the searcher does."""
        with self._lock:
            self._tune.tell(told)


@dataclass(frozen=True)
class Task:
    """One study.

    Attributes:
        alone: Whether nobody else proposes.
        failing: Share of the slow proposer's asks that fail.
        hanging: Share of those that never end.
    """

    parallel: int
    alone: bool = False
    failing: float = 0.0
    hanging: float = 0.0
    slots: int = 16
    hours: float = 8.0
    latency_s: float = 300.0
    seed: int = 0

    def run(self) -> Found:
        """Runs the study on imagined slots."""
        mind = SlowMind(parallel=self.parallel, seed=self.seed, failing=self.failing)
        others: list[Proposer] = [] if self.alone else [TuneProposer(searcher="random", seed=self.seed)]
        card = h100()
        done = simulate(
            fleet(card, self.slots),
            proposers=[mind, *others],
            hours=self.hours,
            seed=self.seed,
            start=starts(card, Regime.EARLY),
            latency_s={mind.name: self.latency_s},
            hang_rate={mind.name: self.hanging},
        )
        made = Counter(
            root.proposer
            for state in done.study.candidates.values()
            if state.candidate.id + "-screen" in done.study.trials
            for root in done.study.roots(state.candidate.proposal)
        )
        return Found(done.idle, done.idle_later, made[mind.name] / max(1, made[mind.name] + made["tune"]))


@dataclass(frozen=True)
class Found:
    """What came of a study.

    Attributes:
        idle: Share of the slots' time without a trial.
        idle_later: The same from the end of the first baseline run on.
        share: Of the first runs, those of the slow proposer's ideas.
    """

    idle: float
    idle_later: float
    share: float


def tasks(arguments: argparse.Namespace) -> Iterator[Task]:
    """The rows of the table, with their first seed."""
    for alone in (False, True):
        for parallel in arguments.parallel:
            for failing, hanging in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
                yield Task(
                    parallel, alone, failing, hanging, arguments.slots, arguments.hours, latency_s=arguments.latency_s
                )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--latency-s", type=float, default=300.0, help="Mean seconds of a proposal.")
    parser.add_argument("--parallel", type=int, nargs="+", default=[8, 16, 32], help="Asks at once.")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    started = time.monotonic()
    print(f"{arguments.slots} slots, {arguments.hours:g} h, {arguments.latency_s:g} s a proposal")
    titles = f"{'idle':>7} {'after baseline':>15} {'its first runs':>15}"
    print(f"{'proposers':<12} {'parallel':>8} {'of its asks':<14} {titles}")
    with ProcessPoolExecutor(arguments.processes) as pool:
        for task in tasks(arguments):
            found = list(pool.map(Task.run, [replace(task, seed=seed) for seed in range(arguments.seeds)]))
            what = "half fail" if task.failing else "half hang" if task.hanging else "all are well"
            idle, later, share = (
                100 * statistics.fmean(values)
                for values in zip(*((one.idle, one.idle_later, one.share) for one in found), strict=True)
            )
            print(
                f"{'mind alone' if task.alone else 'mind, tune':<12} {task.parallel:>8} {what:<14}"
                f" {idle:>6.2f}% {later:>14.2f}% {share:>14.0f}%",
                flush=True,
            )
    print(f"\n{(time.monotonic() - started) / 60:.1f} min")


if __name__ == "__main__":
    main()
