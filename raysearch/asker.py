"""Asks and tells a proposer in threads of its own, so that a slow, hanging or failing one never holds up the loop.

It keeps no ideas and judges none; when and for how many a proposer is asked is the plan's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Protocol

from raysearch.errors import UserError
from raysearch.pace import Pace, Standing
from raysearch.proposers import Idea, NoIdea, Proposer, Request, SpentUp, Told

CLOSE_S = 10.0  # what a proposer may take to end what is in flight, when the study ends

Result = Sequence[Idea | NoIdea] | BaseException
"""What an ask came to: what the proposer gave, or raised."""


@dataclass(frozen=True)
class Answer:
    """What came of an ask; `failure` is a line when the proposer raised, or gave no answer in time."""

    request: Request
    ideas: Sequence[Idea | NoIdea]
    seconds: float
    failure: str = ""


class Asking(Protocol):
    """How the coordinator asks and tells one proposer without waiting for it; see `Asker`."""

    name: str
    wants_brief: bool

    def pace(self, profile: str) -> Pace:
        """How the proposer stands to a profile."""
        ...

    def in_flight(self) -> bool:
        """Whether an answer may come at any moment."""
        ...

    def ask(self, request: Request) -> None:
        """Asks; the answers come by `answers`."""
        ...

    def tell(self, told: Callable[[], Told]) -> None:
        """Tells how a program did."""
        ...

    def answers(self) -> list[Answer]:
        """What has come since the last call."""
        ...

    def revive(self) -> None:
        """Asks one again that had spent all that it may."""
        ...

    def notes(self) -> list[str]:
        """Lines for the console since the last call."""
        ...

    def retry(self, profile: str) -> None:
        """Ends a pause: something new is known."""
        ...

    def close(self) -> None:
        """Ends what is in flight, and waits for no ask."""
        ...


class AnyAsker:
    """What askers have in common, whatever time they live in: what an answer means for the asks to come.

    Args:
        proposer: Who is asked.
        clock: Unix time in seconds.
    """

    def __init__(self, proposer: Proposer, clock: Callable[[], float]) -> None:
        self.name = proposer.name
        self.wants_brief = proposer.wants_brief
        self.proposer = proposer
        self.one_by_one = proposer.one_by_one or proposer.parallel > 1  # whether each ask is for one proposal
        self.standing = Standing(proposer.name, proposer.parallel, one_by_one=self.one_by_one)
        self._clock = clock

    def pace(self, profile: str) -> Pace:
        """How the proposer stands to a profile."""
        return self.standing.pace(profile, self._clock())

    def retry(self, profile: str) -> None:
        """Ends a pause: something new is known."""
        self.standing.retry(profile)

    def revive(self) -> None:
        """Asks one again that had spent all that it may."""
        self.standing.revive()

    def notes(self) -> list[str]:
        """Lines for the console since the last call."""
        return self.standing.notes()

    def parts(self, request: Request) -> list[Request]:
        """A request as it is asked: one by one where an answer takes long. It counts as asked."""
        parts = [replace(request, count=1)] * request.count if self.one_by_one else [request]
        for part in parts:
            self.standing.asked(part.profile, part.count)
        return parts

    def came(self, request: Request, result: Result, seconds: float) -> Answer:
        """An ask gave this."""
        if isinstance(result, SpentUp):
            self.standing.retire(line_of(result))
        if isinstance(result, BaseException):
            hopeless = isinstance(result, UserError)
            return self._settled(Answer(request, [], seconds, line_of(result)), is_hopeless=hopeless)
        return self._settled(Answer(request, result, seconds))

    def gave_up(self, request: Request) -> Answer:
        """An ask has given nothing for as long as it may take."""
        limit_s = self.proposer.limit_s
        return self._settled(Answer(request, [], limit_s, f"no answer within {limit_s:g} s"))

    def came_late(self, request: Request, result: Result, seconds: float) -> list[Answer]:
        """An ask that was given up has come to something after all: what it cost is counted, and nothing else."""
        ideas = [] if isinstance(result, BaseException) else [_late(idea, seconds) for idea in result if idea.cost_usd]
        return [Answer(request, ideas, seconds)] if ideas else []

    def _settled(self, answer: Answer, *, is_hopeless: bool = False) -> Answer:
        ideas = sum(isinstance(idea, Idea) for idea in answer.ideas)
        self.standing.answered(
            answer.request.profile,
            count=answer.request.count,
            ideas=ideas,
            useless=len(answer.ideas) - ideas,
            seconds=answer.seconds,
            now=self._clock(),
            failure=answer.failure,
            is_hopeless=is_hopeless,
        )
        return answer


def _late(idea: Idea | NoIdea, seconds: float) -> NoIdea:
    if isinstance(idea, NoIdea):
        return idea
    return NoIdea(
        f"it came too late, after {seconds:.0f} s",
        idea.proposer,
        model=idea.model,
        cost_usd=idea.cost_usd,
        tokens_in=idea.tokens_in,
        tokens_out=idea.tokens_out,
    )


def line_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = str(error).splitlines()
    if lines and isinstance(error, SpentUp | UserError):
        return lines[0]  # it is written for people
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# ---- threads ----


class _Threads:
    """Daemon threads that share a queue: the program's end waits for none of them, whatever it hangs in."""

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._count = count
        self._started = 0
        self._work: SimpleQueue[Callable[[], bool] | None] = SimpleQueue()

    def submit(self, work: Callable[[], bool]) -> None:
        """Does it as soon as a thread is free, in the order of the calls; a thread ends after work that gives False."""
        self._work.put(work)
        if self._started < self._count:
            self._start()

    def replace_one(self) -> None:
        """One more thread, in place of one that hangs: that one ends when it wakes."""
        self._count += 1
        self._start()

    def close(self) -> None:
        """Forgets what has not begun, and lets the threads end."""
        try:
            while True:
                self._work.get_nowait()
        except Empty:
            pass
        for _ in range(self._started):
            self._work.put(None)

    def _start(self) -> None:
        self._started += 1
        threading.Thread(target=self._serve, name=f"{self._name}-{self._started}", daemon=True).start()

    def _serve(self) -> None:
        while (work := self._work.get()) is not None and work():
            pass


@dataclass(eq=False)
class _Ask:
    """An ask that waits for a thread, is with the proposer, or has come to something.

    Attributes:
        started_at: Unix time at which it came to the proposer.
        result: What the proposer gave or raised.
        given_up: Whether nobody waits for it any more.
        is_poor: Whether it was asked when less could be spent.
    """

    request: Request
    started_at: float | None = None
    ended_at: float | None = None
    result: Result = ()
    given_up: bool = False
    is_poor: bool = False


class Asker(AnyAsker):
    """The threads of one proposer: one that asks and tells in turn, or several that ask and one that tells.

    Args:
        proposer: Who is asked.
        clock: Unix time in seconds.
    """

    def __init__(self, proposer: Proposer, clock: Callable[[], float]) -> None:
        super().__init__(proposer, clock)
        self._asks: list[_Ask] = []
        self._ended: SimpleQueue[_Ask] = SimpleQueue()
        self._broken: SimpleQueue[str] = SimpleQueue()
        self._lock = threading.Lock()  # an ask ends or is given up, never both
        self._threads = _Threads(self.name, proposer.parallel)
        self._tells = _Threads(f"{self.name}-tell", 1) if self.one_by_one else self._threads

    def in_flight(self) -> bool:
        """Whether an answer may come at any moment; of one who takes minutes nobody expects that."""
        return bool(self._asks) and not self.standing.is_slow

    def ask(self, request: Request) -> None:
        """Asks; the answers come by `answers`."""
        for part in self.parts(request):
            ask = _Ask(part)
            self._asks.append(ask)
            self._threads.submit(lambda ask=ask: self._ask(ask))

    def revive(self) -> None:
        """Asks it again; that the money was spent is no news from an ask of before."""
        for ask in self._asks:
            ask.is_poor = True
        super().revive()

    def tell(self, told: Callable[[], Told]) -> None:
        """Tells; a proposer with one thread, after what it was asked before.

        Args:
            told: Made in the proposer's thread, since reading files takes time.
        """
        self._tells.submit(lambda: self._tell(told))

    def answers(self) -> list[Answer]:
        """What has come since the last call, and what is waited for no longer."""
        answers: list[Answer] = []
        while not self._ended.empty():
            ask = self._ended.get()
            seconds = (ask.ended_at or 0.0) - (ask.started_at or 0.0)
            if ask.given_up:
                answers += self.came_late(ask.request, ask.result, seconds)
            else:
                self._asks.remove(ask)
                outdated = ask.is_poor and isinstance(ask.result, SpentUp)
                answers.append(self.came(ask.request, [] if outdated else ask.result, seconds))
        for ask in [ask for ask in self._asks if self._is_overdue(ask)]:
            with self._lock:
                ask.given_up = ask.ended_at is None
            if ask.given_up:
                self._asks.remove(ask)
                self._threads.replace_one()
                answers.append(self.gave_up(ask.request))
        return answers

    def notes(self) -> list[str]:
        """Lines for the console since the last call."""
        while not self._broken.empty():
            self.standing.note(self._broken.get())
        return super().notes()

    def close(self) -> None:
        """Ends what is in flight, as far as the proposer can, and waits for no ask."""
        self._threads.close()
        self._tells.close()
        closing = threading.Thread(target=self._close, name=f"{self.name}-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            self.standing.note(f"did not end within {CLOSE_S:g} s; what it has started may still run")

    def _is_overdue(self, ask: _Ask) -> bool:
        return ask.started_at is not None and self._clock() - ask.started_at > self.proposer.limit_s

    # ---- in the proposer's threads ----

    def _ask(self, ask: _Ask) -> bool:
        ask.started_at = self._clock()
        try:
            ask.result = list(self.proposer.ask(ask.request))
        except BaseException as error:  # noqa: BLE001 - a proposer's own code may fail in any way
            ask.result = error
        with self._lock:
            ask.ended_at = self._clock()
        self._ended.put(ask)
        return not ask.given_up  # its place was given to another thread

    def _tell(self, told: Callable[[], Told]) -> bool:
        try:
            self.proposer.tell(told())
        except BaseException as error:  # noqa: BLE001 - likewise
            self._broken.put(f"could not be told of a run: {line_of(error)}")
        return True

    def _close(self) -> None:
        try:
            self.proposer.close()
        except BaseException as error:  # noqa: BLE001 - likewise
            self._broken.put(f"could not end what was in flight: {line_of(error)}")
