"""Puts a win and a champion together that moved the same knobs, where a merge by text and by name cannot decide.

It moves knobs only: two changes of the same lines of code are left to an agent.
"""

from __future__ import annotations

from collections.abc import Iterator

from raysearch.errors import UserError
from raysearch.knobs import Knob, Value, read_knobs, same_value
from raysearch.model import Operator
from raysearch.proposers import Idea, Proposer, Request, Step, Told
from raysearch.proposers.moves import Attempt, Change, Sieve, Travel, carry, described, middle, travelled


class CombineProposer(Proposer):
    """Proposes, for a win that conflicts with the champion in knobs, its ratio on top of it and the middle of both."""

    name = "combine"

    def __init__(self) -> None:
        self._sieve = Sieve(self.name, Operator.COMBINE)

    def ask(self, request: Request) -> list[Idea]:
        """Up to `request.count` programs that are `request.files` with a win of `request.unmerged`, newest first."""
        return self._sieve.ideas(request, self._attempts(request))

    def tell(self, told: Told) -> None:
        """Learns nothing: the wins are in the request."""

    def _attempts(self, request: Request) -> Iterator[Attempt]:
        ways: dict[str, tuple[Travel, str]] = {
            "on top": (_on_top, "its change on top of the champion's"),
            "middle": (_between, "the middle of both"),
        }
        for win in reversed(request.unmerged):
            for way, (travel, said) in ways.items():
                yield Attempt(
                    f"combine {win.candidate} {way}",
                    lambda win=win, travel=travel, said=said: _combined(request, win, travel, said),
                )


def _combined(request: Request, win: Step, travel: Travel, said: str) -> Change | None:
    if not any(_clashes(path, win, request) for path in win.after if path.endswith(".py")):
        return None
    changed = carry(win.before, win.after, request.files, travel)
    if not changed:
        return None
    return Change(changed, f"{win.hypothesis}, {said}: {described(request.files, changed)}")


def _clashes(path: str, win: Step, request: Request) -> bool:
    """Whether both sides gave a knob another value."""
    try:
        ours, before, after = (
            read_knobs(files.get(path, ""), path=path) for files in (request.files, win.before, win.after)
        )
    except UserError:
        return False
    return any(
        name in before
        and name in after
        and not same_value(before[name].value, after[name].value)
        # the champion is where neither side of the win is
        and not any(same_value(knob.value, side[name].value) for side in (before, after))
        for name, knob in ours.items()
    )


def _on_top(here: Knob, before: Value, after: Value) -> Value:
    return here.value if same_value(here.value, after) else travelled(here, before, after)


def _between(here: Knob, before: Value, after: Value) -> Value | None:
    if same_value(here.value, before) or same_value(here.value, after):
        return after
    return middle(here, after)
