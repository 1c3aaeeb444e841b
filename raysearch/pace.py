"""How asking a proposer goes: what is on its way, how long a proposal takes, and when the proposer is left alone. Pure.

It asks nobody and has no clock: an asker tells it what came of each ask, and when.
"""

from __future__ import annotations

from dataclasses import dataclass

PAUSE_S = (1.0, 60.0)  # after an ask that gave nothing: the first pause of the profile and the longest
NO_IDEAS_AFTER = 4  # asks in a row without any answer, after which a proposer is taken to have none
NO_USE_AFTER = 10  # rounds of asks in a row whose answers were of no use, likewise
BREAK_AFTER = 3  # failures in a row, over all profiles, after which a proposer is left alone
BREAK_S = (120.0, 900.0)  # for so long: the first time and at most
PATIENCE = 4  # breaks in a row after which nothing is expected of it
RECENT = 0.2  # of a new ask in the running means
LEAST_YIELD = 0.05  # ideas an ask, however few have come
SLOW_S = 5.0  # that an ask takes on average: it is no matter of moments


@dataclass(frozen=True)
class Pace:
    """How a proposer stands to a profile; what the plan sizes its asks by.

    Attributes:
        asked: Proposals that are on their way.
        parallel: Asks that it works on at once, for all profiles together.
        one_by_one: Whether each ask is for one proposal.
        places: How many may be on their way: as many, or one to see whether it has recovered.
        proposal_s: Seconds of asking for one proposal, what came to nothing included; 0 before anything came.
        rests: Whether it is not to be asked now.
        is_out: Whether no idea is expected of it.
        trouble: One line that says why, if it fails again and again or may spend no more.
    """

    asked: int = 0
    parallel: int = 1
    one_by_one: bool = False
    places: int = 1
    proposal_s: float = 0.0
    rests: bool = False
    is_out: bool = False
    trouble: str = ""


@dataclass(frozen=True)
class Breaker:
    """Leaves alone what fails again and again: for minutes, and for longer each time that it has not recovered.

    Attributes:
        failures: In a row.
        breaks: Times in a row that it was left alone.
        until: Unix time until which it is.
    """

    failures: int = 0
    breaks: int = 0
    until: float = 0.0

    def failed(self, now: float) -> Breaker:
        """After one more failure; while it is left alone, those that were asked before say nothing new."""
        if now < self.until:
            return self
        failures = self.failures + 1
        if failures < BREAK_AFTER:
            return Breaker(failures)
        return Breaker(failures, self.breaks + 1, now + min(BREAK_S[1], BREAK_S[0] * 2 ** min(10, self.breaks)))


@dataclass
class _Line:
    """One profile's asks: proposals on their way, asks in a row that gave nothing, and the pause after the last."""

    asked: int = 0
    fruitless: int = 0
    empty: int = 0  # of these, those without any answer
    not_before: float = 0.0


class Standing:
    """How one proposer does.

    Args:
        name: Its name.
        parallel: Asks that it works on at once.
        one_by_one: Whether each ask is for one proposal.
    """

    def __init__(self, name: str, parallel: int, *, one_by_one: bool = False) -> None:
        self._name = name
        self._parallel = parallel
        self._one_by_one = one_by_one
        self._lines: dict[str, _Line] = {}
        self._breaker = Breaker()
        self._retired = ""
        self._failure = ""  # of the last ask, if it failed
        self._said = ""  # the failure that the console heard of last
        self._seconds: float | None = None  # of an ask, and ideas that came of it: running means
        self._ideas = 0.0
        self._notes: list[str] = []

    # ---- what it is told ----

    def asked(self, profile: str, count: int) -> None:
        """So many proposals are asked for."""
        self._line(profile).asked += count

    def answered(
        self,
        profile: str,
        *,
        count: int,
        ideas: int,
        useless: int,
        seconds: float,
        now: float,
        failure: str = "",
        is_hopeless: bool = False,
    ) -> None:
        """What came of an ask.

        Args:
            profile: That it was for.
            count: Proposals that were asked for.
            ideas: Those that came.
            useless: Answers that are none.
            seconds: That it took.
            now: Unix time.
            failure: One line if the proposer failed, else empty.
            is_hopeless: Whether time mends no such failure.
        """
        line = self._line(profile)
        line.asked -= count
        if self._retired:
            return
        weight = 1.0 if self._seconds is None else RECENT
        self._seconds = (1 - weight) * (self._seconds or 0.0) + weight * seconds
        self._ideas = (1 - weight) * self._ideas + weight * ideas
        self._failure = failure
        if failure and not is_hopeless:
            self._fail(failure, now)
        else:
            self._work()
        if is_hopeless:
            self._say(failure)
        if ideas:
            line.fruitless, line.empty, line.not_before = 0, 0, 0.0
            return
        line.fruitless += 1
        line.empty = 0 if useless else line.empty + 1
        line.not_before = now + min(PAUSE_S[1], PAUSE_S[0] * 2 ** min(10, line.fruitless - 1))

    def retire(self, reason: str) -> None:
        """It is not asked again in this session; the reason is one line."""
        if not self._retired:
            self._retired = reason
            self.note(f"is not asked any more: {reason}")

    def revive(self) -> None:
        """It may be asked again: why it was retired is mended."""
        if self._retired:
            self._retired = ""
            self.note("is asked again")

    def retry(self, profile: str) -> None:
        """Ends the profile's pause: something new is known. That a proposer is left alone does not end by that."""
        line = self._line(profile)
        line.not_before, line.fruitless, line.empty = 0.0, 0, 0

    def note(self, text: str) -> None:
        """One more line for the console."""
        self._notes.append(f"proposer {self._name} {text}")

    def _fail(self, failure: str, now: float) -> None:
        before, self._breaker = self._breaker, self._breaker.failed(now)
        if not before.failures:
            self._say(failure)
        elif self._breaker.breaks == 1 and not before.breaks:
            minutes = round(BREAK_S[0] / 60)
            times = self._breaker.failures
            self.note(f"failed {times} times in a row, the last: {failure}; it is asked again in {minutes} min")

    def _say(self, failure: str) -> None:
        if failure != self._said:
            self.note(f"failed and is asked again later: {failure}")
        self._said = failure

    def _work(self) -> None:
        if self._breaker.breaks:
            self.note("works again")
        self._breaker = Breaker()

    # ---- what it knows ----

    def pace(self, profile: str, now: float) -> Pace:
        """How it stands to a profile."""
        line, breaks = self._line(profile), self._breaker.breaks
        # after a break one ask is let through, and what comes of it decides
        tried = bool(breaks) and any(other.asked for other in self._lines.values())
        useless = line.empty >= NO_IDEAS_AFTER or line.fruitless >= NO_USE_AFTER * self._parallel
        return Pace(
            asked=line.asked,
            parallel=self._parallel,
            one_by_one=self._one_by_one,
            places=1 if breaks else self._parallel,
            proposal_s=(self._seconds or 0.0) / max(LEAST_YIELD, self._ideas),
            rests=bool(self._retired) or tried or now < self.ready_at(profile),
            is_out=bool(self._retired) or breaks >= PATIENCE or (useless and not breaks),
            trouble=self._retired or (self._failure if breaks or useless else ""),
        )

    def ready_at(self, profile: str) -> float:
        """Unix time from which it may be asked for a profile."""
        return max(self._line(profile).not_before, self._breaker.until)

    @property
    def is_slow(self) -> bool:
        """Whether answers take so long that nobody has to look for them often."""
        return self._seconds is not None and self._seconds > SLOW_S

    def notes(self) -> list[str]:
        """Lines for the console since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def _line(self, profile: str) -> _Line:
        return self._lines.setdefault(profile, _Line())
