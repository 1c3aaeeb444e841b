"""Tries here what won on other hardware: a step of another profile's ratchet, as a change of this profile's program.

Knobs travel as a ratio or a difference, other lines as they are; what does not fit is left alone, not bent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from raysearch.model import Direction, Operator
from raysearch.proposers import Idea, Proposer, Request, Step, Told
from raysearch.proposers.moves import Attempt, Change, Part, Sieve, carry, described, parts, travelled


class TransferProposer(Proposer):
    """Proposes steps of other ratchets, new ones and large gains first; their parts once the whole was tried."""

    name = "transfer"

    def __init__(self) -> None:
        self._sieve = Sieve(self.name, Operator.TRANSFER)
        self._parts: dict[str, list[Part]] = {}

    def ask(self, request: Request) -> list[Idea]:
        """Up to `request.count` programs that are `request.files` with a step, or a part of one, made to them."""
        return self._sieve.ideas(request, self._attempts(request))

    def tell(self, told: Told) -> None:
        """Learns nothing: the steps are in the request."""

    def _attempts(self, request: Request) -> Iterator[Attempt]:
        steps = by_promise(request.elsewhere, request.direction)
        tried = [step for step in steps if self._sieve.is_done(request, _source(step))]
        for step in steps:
            yield Attempt(_source(step), lambda step=step: _carried(step, step.after, request.files))
        for step in tried:  # the whole comes first
            changes = self._parts_of(step)
            for part in changes if len(changes) > 1 else []:
                after = {**step.before, part.path: part.text}
                yield Attempt(
                    f"{_source(step)} {part.key}",
                    lambda step=step, part=part, after=after: _carried(step, after, request.files, part=part),
                )

    def _parts_of(self, step: Step) -> list[Part]:
        if step.candidate not in self._parts:
            self._parts[step.candidate] = parts(step.before, step.after)
        return self._parts[step.candidate]


def by_promise(steps: Sequence[Step], direction: Direction) -> list[Step]:
    """New steps and large gains first: by the sum of a step's ranks in age and in gain, the newer one if equal."""
    sign = 1.0 if direction is Direction.MINIMIZE else -1.0
    newest = list(reversed(steps))
    best = sorted(range(len(newest)), key=lambda age: sign * newest[age].delta)
    rank = {age: place for place, age in enumerate(best)}
    return [newest[age] for age in sorted(range(len(newest)), key=lambda age: (age + rank[age], age))]


def _source(step: Step) -> str:
    return f"transfer {step.candidate}"


def _carried(
    step: Step, after: Mapping[str, str], files: Mapping[str, str], *, part: Part | None = None
) -> Change | None:
    changed = carry(step.before, after, files, travelled)
    if not changed:
        return None
    moves = described(files, changed)
    what = f", of it {part.title}" if part is not None else ""
    here = f" (here {moves})" if moves else ""
    delta = step.delta if part is None else None
    return Change(changed, f"Won on {step.profile}: {step.hypothesis}{what}{here}", predicted_delta=delta)
