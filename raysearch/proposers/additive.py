"""Moves the knobs that help most by what each of them does, from a model that learns from every run.

Thompson sampling: of those that are asked for together each follows another draw of the model. A quarter of them moves
at once all that the model is sure of. What the model is stands in `knob_model`; docs/adr/0029 to 0031 say what it is
worth.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from raysearch.knobs import Values, skeleton
from raysearch.model import Direction
from raysearch.proposers import Idea, Proposer, Request, Told
from raysearch.proposers.knob_model import HERE, KnobModel, Moves
from raysearch.proposers.reach import within_reach
from raysearch.proposers.sieve import MOVED_KNOBS, Found, Known, Run, Sieve, movable, near

MODELLED_KNOBS = (1, 2, 4, 8)  # how many knobs one proposal moves, once there is a run or more for each of them
SURE_SHARE = 0.25  # of the proposals, that move at once all knobs of which the model is sure (docs/adr/0031)
CAUTIONS = (0.5, 1.0)  # posterior standard deviations that such a move may disappoint by and still help
DRAWS = 30  # of the model, looked at for one proposal; then the neighbourhood is tried at random


@dataclass
class _Space:
    """What was told for one profile, and the model of it; None before the first ask."""

    known: Known = field(default_factory=Known)
    model: KnobModel | None = None


class AdditiveProposer(Proposer):
    """Proposes knob values for one file of the program.

    Args:
        seed: Of the draws.
        path: The file whose knobs are changed.
        elsewhere: Whether the model of a profile learns from runs on the other ones too.
    """

    name = "additive"

    def __init__(self, *, seed: int = 0, path: str = "train.py", elsewhere: bool = True) -> None:
        self._seed = seed
        self._elsewhere = elsewhere
        self._path = path
        self._random = random.Random(seed)
        self._spaces: dict[str, _Space] = {}

    def ask(self, request: Request) -> list[Idea]:
        """Up to `request.count` programs that are the champion with a few knobs moved.

        Raises:
            UserError: A rule of the program cannot be computed.
        """
        space = self._spaces.setdefault(request.profile, _Space())
        knobs = movable(request, self._path)
        if not knobs:
            return []
        sign = 1.0 if request.direction is Direction.MINIMIZE else -1.0
        if not space.known.look(knobs) or space.model is None:
            # The seed goes on with the study: after a restart it must not draw all over what was run.
            self._random = random.Random(f"{self._seed} {request.profile} {len(space.known.told)}")
            space.model = KnobModel(knobs, sign)
            for profile, other in self._spaces.items():
                for run in other.known.told:
                    self._learn(request.profile, profile, run)
        sieve = Sieve(request, self._path, space.known)
        options = {name: within_reach(knob, self._random.random) for name, knob in knobs.items()}
        moves = space.model.moves(sieve.champion, options)
        counts = MODELLED_KNOBS if len(space.model) >= len(knobs) else MOVED_KNOBS
        return sieve.ideas(self.name, lambda: self._found(sieve, moves, counts, sign=sign))

    def tell(self, told: Told) -> None:
        """Adds a run to what is known of the profile, whoever proposed it."""
        space = self._spaces.setdefault(told.profile, _Space())
        run = Run.of(told, self._path, code=skeleton(told.files, self._path)[0])
        space.known.add(run)
        for profile in self._spaces:
            self._learn(profile, told.profile, run)

    def _learn(self, profile: str, ran_on: str, run: Run) -> None:
        """Tells the model of a profile, if there is one, of a run on that profile or on another one."""
        model = self._spaces[profile].model
        if model is not None and run.value is not None and (profile == ran_on or self._elsewhere):
            model.add(run.values, run.value, code=run.code, where=HERE if profile == ran_on else ran_on)

    def _found(self, sieve: Sieve, moves: Moves | None, counts: tuple[int, ...], *, sign: float) -> Found | None:
        """What the model thinks best and passes; anything near the champion as long as too little is known."""
        for moved, expected in self._wanted(sieve, moves, counts) if moves is not None else ():
            values = sieve.champion | moved
            if sieve.passes(values):
                return values, -sign * expected
        values = near(sieve, self._random)
        return None if values is None else (values, None)

    def _wanted(self, sieve: Sieve, moves: Moves, counts: tuple[int, ...]) -> Iterator[tuple[Values, float]]:
        """New values, and what they are expected to improve: now and then what is sure first, then draws."""

        def fits(moved: Values) -> bool:
            return sieve.fits(sieve.champion | moved)

        if self._random.random() < SURE_SHARE:
            yield moves.sure(self._random.choice(CAUTIONS), fits)
        rng = np.random.default_rng(self._random.getrandbits(64))
        for _ in range(DRAWS):
            yield moves.drawn(rng, self._random.choice(counts), fits)
