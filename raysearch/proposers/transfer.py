"""Tries here what won on other hardware: a step of another profile's ratchet, as a change of this profile's program.

Knobs travel as a ratio or a difference, other lines as they are; what does not fit is left alone, not bent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from raysearch.model import Direction, Operator
from raysearch.proposers import Idea, Proposer, Request, Step, Told
from raysearch.proposers.moves import Attempt, Change, Part, Sieve, carry, described, parts, travelled

T = TypeVar("T")


class TransferProposer(Proposer):
    """Proposes steps of other ratchets, new ones and large gains first; once the whole was tried its halves and theirs.

    One change of many that is wrong here spoils a whole step, and of single changes each takes a run. Steps that move
    values alone are not taken apart: `additive` learns from the runs elsewhere which of them help (docs/adr/0032).
    """

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
            if all(part.is_value for part in changes):
                continue
            for some in halved(changes):
                yield Attempt(
                    f"{_source(step)} {' + '.join(part.key for part in some)}",
                    lambda step=step, some=some: _carried_parts(step, some, request.files),
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


def halved(changes: Sequence[T]) -> Iterator[Sequence[T]]:
    """Both halves of what there is, then theirs, and so on down to the single ones."""
    level = [changes]
    while level := [
        half for some in level if len(some) > 1 for half in (some[: len(some) // 2], some[len(some) // 2 :])
    ]:
        yield from level


def _carried(step: Step, after: Mapping[str, str], files: Mapping[str, str]) -> Change | None:
    changed = carry(step.before, after, files, travelled)
    return _change(step, changed, files, step.delta) if changed else None


def _carried_parts(step: Step, some: Sequence[Part], files: Mapping[str, str]) -> Change | None:
    """Those of a step's parts, one upon the other; None if one of them cannot be made, or none changes anything."""
    made = dict(files)
    for part in some:
        changed = carry(step.before, {**step.before, part.path: part.text}, made, travelled)
        if changed is None:
            return None
        made |= changed
    changed = {path: text for path, text in made.items() if text != files.get(path)}
    what = ", ".join(part.title for part in some)
    return _change(step, changed, files, None, what=what) if changed else None


def _change(
    step: Step, changed: Mapping[str, str], files: Mapping[str, str], delta: float | None, *, what: str = ""
) -> Change:
    moves = described(files, changed)
    of_it = f", of it {what}" if what else ""
    here = f" (here {moves})" if moves else ""
    return Change(changed, f"Won on {step.profile}: {step.hypothesis}{of_it}{here}", predicted_delta=delta)
