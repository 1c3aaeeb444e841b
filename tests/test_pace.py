"""When a proposer is asked: pauses, the breaker, what a proposal takes, and what the console hears of it."""

from typing import Any

import pytest

from raysearch.pace import (
    BREAK_AFTER,
    BREAK_S,
    NO_IDEAS_AFTER,
    NO_USE_AFTER,
    PAUSE_S,
    Breaker,
    Pace,
    Standing,
)


class Desk:
    """A proposer's standing on a clock of its own."""

    def __init__(self, parallel: int = 1) -> None:
        self.standing = Standing("chat", parallel)
        self.now = 1000.0

    def pace(self, profile: str = "cpu") -> Pace:
        return self.standing.pace(profile, self.now)

    def ask(self, profile: str = "cpu", **result: Any) -> None:
        """Asks for one proposal, which comes to something at once."""
        self.standing.asked(profile, 1)
        self.answer(profile, **result)

    def answer(
        self, profile: str = "cpu", *, ideas: int = 0, useless: int = 0, seconds: float = 1.0, **failed: Any
    ) -> None:
        self.standing.answered(profile, count=1, ideas=ideas, useless=useless, seconds=seconds, now=self.now, **failed)

    def rest(self, profile: str = "cpu") -> float:
        """Waits until it may be asked again; gives the seconds."""
        ready_at = self.standing.ready_at(profile)
        assert self.pace(profile).rests == (self.now < ready_at)
        waited = max(0.0, ready_at - self.now)
        self.now += waited
        return waited


# ---- the breaker ----


def test_what_fails_again_and_again_is_left_alone_for_minutes_and_then_for_longer():
    breaker, now = Breaker(), 0.0
    waits: list[float] = []
    for _ in range(BREAK_AFTER + 5):
        breaker = breaker.failed(now)
        waits.append(max(0.0, breaker.until - now))
        now = max(now, breaker.until)
    assert waits == [0.0] * (BREAK_AFTER - 1) + [120.0, 240.0, 480.0, *[BREAK_S[1]] * 3]


def test_what_was_asked_before_a_break_and_fails_in_it_makes_it_no_longer():
    breaker = Breaker()
    for _ in range(BREAK_AFTER + 8):
        breaker = breaker.failed(0.0)
    assert (breaker.breaks, breaker.until) == (1, BREAK_S[0])


def test_failures_count_over_all_profiles_and_an_answer_without_an_idea_is_none():
    desk = Desk()
    for profile in ("cpu", "gpu"):
        desk.ask(profile, failure="no connection")
    desk.ask("cpu", useless=1)
    for profile in ("cpu", "gpu"):
        desk.ask(profile, failure="no connection")
    assert not desk.pace("other").rests
    desk.ask("cpu", failure="no connection")
    assert all(desk.pace(profile).rests for profile in ("cpu", "gpu", "other"))
    desk.standing.retry("other")
    assert desk.pace("other").rests  # a new champion does not mend a service


def test_after_a_break_one_ask_is_let_through_and_what_comes_of_it_decides():
    desk = Desk(parallel=8)
    for _ in range(BREAK_AFTER):
        desk.ask(failure="no connection")
    assert desk.rest() == BREAK_S[0]
    assert (desk.pace().places, desk.pace().parallel) == (1, 8)
    desk.standing.asked("cpu", 1)
    assert desk.pace("gpu").rests
    desk.answer(failure="no connection")
    assert desk.rest() == 2 * BREAK_S[0]
    desk.ask("gpu", ideas=1)
    assert (desk.pace("gpu").places, desk.pace("gpu").rests) == (8, False)
    desk.ask("gpu", failure="no connection")
    assert desk.rest("gpu") == PAUSE_S[0]  # it has to fail again and again once more


def test_the_console_hears_of_the_first_failure_of_a_break_and_of_its_end():
    desk = Desk()
    for number in range(BREAK_AFTER + 6):
        desk.ask(failure=f"no connection, {number}")
        desk.rest()
    desk.ask(ideas=1)
    desk.ask(ideas=1)
    assert desk.standing.notes() == [
        "proposer chat failed and is asked again later: no connection, 0",
        "proposer chat failed 3 times in a row, the last: no connection, 2; it is asked again in 2 min",
        "proposer chat works again",
    ]
    assert desk.standing.notes() == []


def test_a_failure_that_comes_and_goes_is_said_once():
    desk = Desk()
    for _ in range(5):
        desk.ask("cpu", failure="KeyError: 'LR'")
        desk.ask("gpu", ideas=1)
    assert len(desk.standing.notes()) == 1


def test_a_failure_that_time_does_not_mend_is_not_waited_for():
    desk = Desk()
    for _ in range(NO_IDEAS_AFTER):
        desk.ask(failure="no such model", is_hopeless=True)
    assert desk.pace().is_out
    assert desk.pace().trouble == "no such model"
    assert desk.rest() < BREAK_S[0]
    assert desk.standing.notes() == ["proposer chat failed and is asked again later: no such model"]


# ---- who is out of ideas ----


def test_who_gives_no_answer_four_times_in_a_row_has_no_ideas_for_that_profile():
    desk = Desk()
    for number in range(NO_IDEAS_AFTER):
        assert not desk.pace().is_out, number
        desk.ask()
    assert desk.pace().is_out
    assert not desk.pace("gpu").is_out
    desk.ask(ideas=1)
    assert not desk.pace().is_out


@pytest.mark.parametrize("parallel", [1, 8])
def test_answers_of_no_use_are_borne_for_longer_than_none(parallel: int):
    desk = Desk(parallel)
    for number in range(NO_USE_AFTER * parallel):
        assert not desk.pace().is_out, number
        desk.ask(useless=1)
    assert desk.pace().is_out
    assert not desk.pace().trouble


def test_who_fails_is_waited_for_until_several_breaks_have_not_helped():
    desk = Desk()
    began = desk.now
    while not desk.pace().is_out:
        desk.ask(failure="no connection")
        if not desk.pace().is_out:
            desk.rest()
    assert 10 * 60 < desk.now - began < 60 * 60
    assert desk.standing.pace("cpu", desk.now).trouble == "no connection"


def test_who_may_spend_no_more_is_never_asked_again_and_that_is_said_once():
    desk = Desk(parallel=2)
    desk.standing.asked("cpu", 1)
    desk.standing.asked("cpu", 1)
    for _ in range(2):
        desk.standing.retire("$5.00 of $5.00 are spent; raise --max-usd")
        desk.answer(failure="$5.00 of $5.00 are spent; raise --max-usd")
    desk.standing.retry("cpu")
    desk.now += 1e9
    pace = desk.pace()
    assert (pace.asked, pace.rests, pace.is_out) == (0, True, True)
    assert pace.trouble == "$5.00 of $5.00 are spent; raise --max-usd"
    assert desk.standing.notes() == ["proposer chat is not asked any more: $5.00 of $5.00 are spent; raise --max-usd"]


# ---- what a proposal takes ----


def test_what_came_to_nothing_is_part_of_what_a_proposal_takes():
    desk = Desk(parallel=4)
    assert desk.pace().proposal_s == 0.0
    desk.ask(ideas=1, seconds=30.0)
    assert desk.pace().proposal_s == pytest.approx(30.0)
    for number in range(60):
        desk.ask(ideas=number % 2, useless=1 - number % 2, seconds=30.0)
    assert desk.pace().proposal_s == pytest.approx(60.0, rel=0.15)
    assert desk.standing.is_slow


def test_a_searcher_that_gives_many_at_once_takes_little_for_each():
    desk = Desk()
    desk.ask(ideas=16, seconds=1.6)
    assert desk.pace().proposal_s == pytest.approx(0.1)
    assert not desk.standing.is_slow
