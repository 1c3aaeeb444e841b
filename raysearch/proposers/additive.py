"""Moves the knobs that help most by what each of them does, from a model that learns from every run.

Thompson sampling, bold or tempered: of those that are asked for together each follows another draw of the model. Others
move at once all that the model is sure of. A model knows what was run on other profiles too. What it is stands in
`knob_model`; docs/adr/0029 to 0035 say what it is worth.
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

MODELLED_KNOBS = (4, 8, 16)  # how many knobs one proposal moves at most, once there is a run for each of them
SURE_SHARE = 0.25  # of the proposals, that move at once all knobs of which the model is sure (docs/adr/0031)
SHARED_SURE_SHARE = 0.5  # of them, if the model knows runs on other profiles (docs/adr/0032)
CAUTIONS = (0.5, 1.0)  # posterior standard deviations that such a move may disappoint by and still help
BOLDNESS = (0.1, 0.3, 0.6)  # times the posterior's spread, of draws: one of these each (docs/adr/0032)
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
        sieve = Sieve(request, self._path, space.known, self._random)
        options = {name: within_reach(knob, self._random.random) for name, knob in knobs.items()}
        moves = space.model.moves(sieve.champion, options, tied=sieve.tied)
        counts = MODELLED_KNOBS if len(space.model) >= len(knobs) else MOVED_KNOBS
        sure = SHARED_SURE_SHARE if space.model.is_shared else SURE_SHARE
        return sieve.ideas(self.name, lambda: self._found(sieve, moves, counts, sure, sign=sign))

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
            where = HERE if profile == ran_on else ran_on
            model.add(run.values, run.value, code=run.code, where=where, is_replicate=run.is_replicate)

    def _found(
        self, sieve: Sieve, moves: Moves | None, counts: tuple[int, ...], sure: float, *, sign: float
    ) -> Found | None:
        """What the model thinks best and passes; anything near the champion as long as too little is known."""
        for moved, expected in self._wanted(sieve, moves, counts, sure) if moves is not None else ():
            values = sieve.champion | moved
            if sieve.passes(values):
                return values, -sign * expected
        values = near(sieve, self._random)
        return None if values is None else (values, None)

    def _wanted(
        self, sieve: Sieve, moves: Moves, counts: tuple[int, ...], sure: float
    ) -> Iterator[tuple[Values, float]]:
        """New values, and what they are expected to improve: now and then what is sure first, then draws.

        Where none of these are new, as with few knobs, then of fewer knobs.
        """

        def fits(moved: Values) -> bool:
            return sieve.fits(sieve.champion | moved)

        if self._random.random() < sure:
            yield moves.sure(self._random.choice(CAUTIONS), fits)
        rng = np.random.default_rng(self._random.getrandbits(64))
        for some in (counts, MOVED_KNOBS):
            for _ in range(DRAWS):
                yield moves.drawn(rng, self._random.choice(some), fits, boldness=self._random.choice(BOLDNESS))
