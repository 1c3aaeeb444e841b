"""Asks and tells a proposer in a thread of its own, so that a slow or failing one never holds up the loop.

It keeps no ideas and judges none; what was asked for and has not come is known per profile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from raysearch.proposers import Idea, NoIdea, Proposer, Request, Told

PAUSE_S = (1.0, 60.0)  # after an ask that gave nothing: the first pause and the longest


@dataclass
class _Ask:
    """An ask in flight, or the pause after one that gave nothing."""

    future: Future[Sequence[Idea | NoIdea]] | None
    request: Request
    asked_at: float
    fruitless: int = 0
    not_before: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What came of an ask; `failure` is a line when the proposer raised."""

    request: Request
    ideas: Sequence[Idea | NoIdea]
    seconds: float
    failure: str = ""


class Asking(Protocol):
    """How the coordinator asks and tells one proposer without waiting for it; see `Asker`."""

    name: str
    wants_brief: bool

    def outstanding(self) -> dict[str, int]:
        """Proposals on their way, by profile; a profile in a pause counts as asked."""
        ...

    def in_flight(self) -> bool:
        """Whether an answer may come at any moment."""
        ...

    def fruitless(self, profile: str) -> int:
        """How many asks in a row have given nothing."""
        ...

    def ask(self, request: Request) -> None:
        """Asks; the answer comes by `answers`."""
        ...

    def tell(self, told: Callable[[], Told]) -> None:
        """Tells how a program did."""
        ...

    def answers(self) -> list[Answer]:
        """What has come since the last call."""
        ...

    def broken_tells(self) -> list[str]:
        """What went wrong in telling since the last call, a line each."""
        ...

    def retry(self, profile: str) -> None:
        """Ends a pause: something new is known."""
        ...

    def close(self) -> None:
        """Waits for nothing."""
        ...


class Asker:
    """The thread of one proposer."""

    def __init__(self, proposer: Proposer, clock: Callable[[], float]) -> None:
        self.name = proposer.name
        self.wants_brief = proposer.wants_brief
        self._proposer = proposer
        self._clock = clock
        self._asks: dict[str, _Ask] = {}
        self._tells: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=proposer.name)

    def outstanding(self) -> dict[str, int]:
        """Proposals that were asked for and have not come, by profile; a profile in its pause counts as asked."""
        now = self._clock()
        return {slug: ask.request.count for slug, ask in self._asks.items() if ask.future or now < ask.not_before}

    def in_flight(self) -> bool:
        """Whether an answer may come at any moment."""
        return any(ask.future for ask in self._asks.values())

    def fruitless(self, profile: str) -> int:
        """How many asks in a row have given nothing."""
        ask = self._asks.get(profile)
        return ask.fruitless if ask else 0

    def ask(self, request: Request) -> None:
        """Asks; the answer comes by `answers`."""
        before = self._asks.get(request.profile)
        future = self._thread.submit(self._proposer.ask, request)
        fruitless = before.fruitless if before else 0
        self._asks[request.profile] = _Ask(future, request, self._clock(), fruitless)

    def tell(self, told: Callable[[], Told]) -> None:
        """Tells, after whatever was asked before; `told` is made in the proposer's thread, reading files takes time."""
        self._tells.append(self._thread.submit(lambda: self._proposer.tell(told())))

    def answers(self) -> list[Answer]:
        """What has come since the last call."""
        now = self._clock()
        answers: list[Answer] = []
        for ask in self._asks.values():
            if ask.future is None or not ask.future.done():
                continue
            error = ask.future.exception()
            ideas: Sequence[Idea | NoIdea] = [] if error else ask.future.result()
            failure = f"{type(error).__name__}: {error}".splitlines()[0] if error else ""
            answers.append(Answer(ask.request, ideas, now - ask.asked_at, failure))
            ask.future = None
            ask.fruitless = 0 if ideas else ask.fruitless + 1
            ask.not_before = 0.0 if ideas else now + min(PAUSE_S[1], PAUSE_S[0] * 2 ** min(10, ask.fruitless - 1))
        return answers

    def broken_tells(self) -> list[str]:
        """What went wrong in telling since the last call, a line each."""
        done = [tell for tell in self._tells if tell.done()]
        self._tells = [tell for tell in self._tells if not tell.done()]
        return [f"{type(error).__name__}: {error}".splitlines()[0] for tell in done if (error := tell.exception())]

    def retry(self, profile: str) -> None:
        """Ends a pause: something new is known."""
        ask = self._asks.get(profile)
        if ask:
            ask.not_before, ask.fruitless = 0.0, 0

    def close(self) -> None:
        """Waits for nothing."""
        self._thread.shutdown(wait=False, cancel_futures=True)
