"""The threads that ask and tell one proposer: several asks at once, limits, late answers, the end of a study."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from toy import Clock

from raysearch.asker import Answer, Asker
from raysearch.model import Direction, Operator, Outcome
from raysearch.pace import BREAK_AFTER, BREAK_S, NO_IDEAS_AFTER, PAUSE_S
from raysearch.proposers import Idea, NoIdea, Proposer, Request, SpentUp, Told

WAIT_S = 60.0  # for what another thread does: on a machine that is busy this takes its time

# ---- one thread ----


class Scripted(Proposer):
    """A proposer that answers as it is told to."""

    name = "scripted"

    def __init__(self, *answers: list[Idea] | Exception) -> None:
        self.answers: Iterator[list[Idea] | Exception] = iter(answers)
        self.told: list[Told] = []

    def ask(self, request: Request) -> list[Idea]:
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def tell(self, told: Told) -> None:
        if told.outcome is Outcome.CRASHED:
            raise ValueError("cannot learn\nfrom that")
        self.told.append(told)


IDEA = Idea("p", Operator.TUNE, "h", "scripted")
REQUEST = Request("cpu", "x", {}, 2, frozenset(), Direction.MINIMIZE)


def answered(asker: Asker) -> Answer:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if answers := asker.answers():
            (answer,) = answers
            return answer
        time.sleep(0.001)
    raise AssertionError("no answer")


@pytest.fixture
def ask_of() -> Iterator[Callable[..., tuple[Asker, Clock]]]:
    askers: list[Asker] = []

    def make(*answers: list[Idea] | Exception) -> tuple[Asker, Clock]:
        clock = Clock(1000.0)
        askers.append(Asker(Scripted(*answers), clock))
        return askers[-1], clock

    yield make
    for asker in askers:
        asker.close()


AskOf = Callable[..., tuple[Asker, Clock]]


def test_an_answer_comes_with_its_request_and_is_outstanding_until_then(ask_of: AskOf):
    asker, _ = ask_of([IDEA, IDEA])
    asker.ask(REQUEST)
    assert asker.pace("cpu").asked == 2
    answer = answered(asker)
    assert (answer.request, answer.ideas, answer.failure) == (REQUEST, [IDEA, IDEA], "")
    assert asker.pace("cpu").asked == 0
    assert not asker.in_flight()
    assert asker.answers() == []


def test_asks_that_give_nothing_are_repeated_ever_more_rarely(ask_of: AskOf):
    asker, clock = ask_of([], RuntimeError("no connection\nto anything"), *[[]] * 8, [IDEA])
    pauses: list[float] = []
    for number in range(10):
        asker.ask(REQUEST)
        answer = answered(asker)
        assert answer.failure == ("RuntimeError: no connection" if number == 1 else "")
        assert asker.pace("cpu").is_out == (number >= NO_IDEAS_AFTER - 1)
        before = clock.now
        while asker.pace("cpu").rests:
            assert not asker.in_flight()
            clock.now += 0.5
        pauses.append(clock.now - before)
    assert pauses[:4] == [1.0, 2.0, 4.0, 8.0]
    assert pauses[-1] == PAUSE_S[1]
    asker.ask(REQUEST)
    assert answered(asker).ideas == [IDEA]
    assert asker.pace("cpu") == replace(asker.pace("cpu"), asked=0, rests=False, is_out=False)


class Lazy(Scripted):
    """Works only when somebody looks at its answer."""

    def ask(self, request: Request) -> Iterator[Idea]:  # pyright: ignore[reportIncompatibleMethodOverride]
        yield from super().ask(request)


def test_an_answer_is_read_in_the_proposers_thread_so_that_no_answer_breaks_the_loop():
    for result, failure in ((RuntimeError("half an answer"), "RuntimeError: half an answer"), (None, "TypeError: ")):
        asker = Asker(Lazy(result), Clock())  # pyright: ignore[reportArgumentType]
        asker.ask(REQUEST)
        answer = answered(asker)
        assert answer.ideas == []
        assert answer.failure.startswith(failure)
        asker.close()


def test_something_new_ends_a_pause(ask_of: AskOf):
    asker, _ = ask_of([])
    asker.ask(REQUEST)
    answered(asker)
    assert asker.pace("cpu").rests
    asker.retry("cpu")
    asker.retry("gpu")
    assert not asker.pace("cpu").rests


def test_what_goes_wrong_in_telling_is_said_and_does_no_harm(ask_of: AskOf):
    asker, _ = ask_of([IDEA])
    asker.tell(lambda: Told("cpu", {}, Outcome.CRASHED, None))
    asker.tell(lambda: {}["gone"])
    asker.ask(REQUEST)  # one thread: what was told before has been heard by the time that this is answered
    assert answered(asker).ideas == [IDEA]
    assert asker.notes() == [
        "proposer scripted could not be told of a run: ValueError: cannot learn",
        "proposer scripted could not be told of a run: KeyError: 'gone'",
    ]
    assert asker.notes() == []


# ---- several asks at once ----


class Pondering(Proposer):
    """Asks wait, each for its own gate; what it gives is said beforehand, ask by ask."""

    name = "mind"
    limit_s = 600.0

    def __init__(self, *results: Sequence[Idea | NoIdea] | Exception, parallel: int = 4) -> None:
        self.parallel = parallel
        self.results = results
        self.gates = [threading.Event() for _ in results]
        self.begun = [threading.Event() for _ in results]
        self.heard = threading.Event()
        self.is_closed = threading.Event()
        self.requests: list[Request] = []
        self._numbers = itertools.count()

    def ask(self, request: Request) -> Sequence[Idea | NoIdea]:
        number = next(self._numbers)
        self.requests.append(request)
        self.begun[number].set()
        self.gates[number].wait()
        result = self.results[number]
        if isinstance(result, Exception):
            raise result
        return result

    def tell(self, told: Told) -> None:
        self.heard.set()

    def close(self) -> None:
        self.is_closed.set()
        for gate in self.gates:
            gate.set()


@pytest.fixture
def ponder() -> Iterator[Callable[..., tuple[Asker, Pondering, Clock]]]:
    made: list[Pondering] = []

    def make(*results: Sequence[Idea | NoIdea] | Exception, parallel: int = 4) -> tuple[Asker, Pondering, Clock]:
        clock, proposer = Clock(1000.0), Pondering(*results, parallel=parallel)
        made.append(proposer)
        return Asker(proposer, clock), proposer, clock

    yield make
    for proposer in made:
        proposer.close()


Ponder = Callable[..., tuple[Asker, Pondering, Clock]]


def begun(proposer: Pondering, *numbers: int) -> None:
    for number in numbers:
        assert proposer.begun[number].wait(WAIT_S)


def test_several_proposals_are_asked_for_one_by_one_and_at_once(ponder: Ponder):
    asker, proposer, _ = ponder([IDEA], [IDEA], [IDEA])
    asker.ask(replace(REQUEST, count=3))
    begun(proposer, 0, 1, 2)
    assert proposer.requests == [replace(REQUEST, count=1)] * 3
    assert asker.pace("cpu").asked == 3
    proposer.gates[1].set()  # whichever is ready comes first
    assert answered(asker).ideas == [IDEA]
    assert asker.pace("cpu").asked == 2
    assert asker.answers() == []


def test_what_is_more_than_a_proposer_works_on_waits_and_comes_to_all_profiles_in_turn(ponder: Ponder):
    asker, proposer, _ = ponder(*[[IDEA]] * 4, parallel=2)
    asker.ask(REQUEST)
    begun(proposer, 0, 1)
    asker.ask(replace(REQUEST, profile="gpu"))
    assert not proposer.begun[2].is_set()
    for number in range(2):
        proposer.gates[number].set()
        assert answered(asker).request.profile == "cpu"
    begun(proposer, 2, 3)
    assert [request.profile for request in proposer.requests] == ["cpu", "cpu", "gpu", "gpu"]


def test_a_tell_does_not_wait_behind_asks_that_take_their_time(ponder: Ponder):
    asker, proposer, _ = ponder([IDEA], [IDEA], parallel=2)
    asker.ask(REQUEST)
    begun(proposer, 0, 1)
    asker.tell(lambda: Told("cpu", {}, Outcome.MEASURED, 1.0))
    assert proposer.heard.wait(WAIT_S)
    assert asker.answers() == []


def test_the_first_of_several_does_not_wait_for_the_others_where_one_is_worked_on_at_a_time(ponder: Ponder):
    _, proposer, _ = ponder([IDEA], [IDEA], parallel=1)
    proposer.one_by_one = True
    asker = Asker(proposer, Clock(1000.0))
    asker.ask(replace(REQUEST, count=2))
    begun(proposer, 0)
    asker.tell(lambda: Told("cpu", {}, Outcome.MEASURED, 1.0))
    assert proposer.heard.wait(WAIT_S)
    proposer.gates[0].set()
    assert answered(asker).ideas == [IDEA]
    begun(proposer, 1)
    assert proposer.requests == [replace(REQUEST, count=1)] * 2
    assert asker.pace("cpu").one_by_one


# ---- asks that hang ----


@pytest.mark.parametrize("parallel", [1, 2])
def test_an_ask_past_its_limit_is_given_up_and_others_go_on(ponder: Ponder, parallel: int):
    asker, proposer, clock = ponder([IDEA], [IDEA], [IDEA], parallel=parallel)
    asker.ask(replace(REQUEST, count=1))
    begun(proposer, 0)
    clock.now += 600.0
    assert asker.answers() == []
    clock.now += 0.1
    (answer,) = asker.answers()
    assert (answer.ideas, answer.failure) == ([], "no answer within 600 s")
    assert asker.pace("cpu").asked == 0
    assert asker.notes() == ["proposer mind failed and is asked again later: no answer within 600 s"]
    asker.ask(replace(REQUEST, count=parallel))  # as many at once as before
    begun(proposer, *range(1, parallel + 1))
    proposer.gates[1].set()
    assert answered(asker).ideas == [IDEA]


def test_time_in_line_is_no_part_of_the_limit(ponder: Ponder):
    asker, proposer, clock = ponder([IDEA], [IDEA], parallel=1)
    asker.ask(REQUEST)
    begun(proposer, 0)
    asker.ask(replace(REQUEST, profile="gpu"))
    clock.now += 500.0
    proposer.gates[0].set()
    assert answered(asker).seconds == 500.0
    begun(proposer, 1)
    clock.now += 500.0
    assert asker.answers() == []
    proposer.gates[1].set()
    assert answered(asker).seconds == 500.0


PAID = replace(IDEA, cost_usd=0.25, model="large", tokens_in=900, tokens_out=30)


@pytest.mark.parametrize(
    ("late", "counted"),
    [
        ([IDEA], []),
        ([IDEA, PAID], [NoIdea("it came too late, after 700 s", "scripted", "large", 0.25, 900, 30)]),
        ([NoIdea("no patch", "mind", cost_usd=0.5)], [NoIdea("no patch", "mind", cost_usd=0.5)]),
        (RuntimeError("gone"), []),
    ],
)
def test_of_an_answer_that_comes_too_late_only_what_it_cost_is_counted(
    ponder: Ponder, late: list[Idea | NoIdea] | Exception, counted: list[NoIdea]
):
    asker, proposer, clock = ponder(late, [PAID], parallel=1)
    asker.ask(REQUEST)
    begun(proposer, 0)
    clock.now += 700.0
    assert answered(asker).failure
    pace = asker.pace("cpu")
    proposer.gates[0].set()
    if counted:
        answer = answered(asker)
        assert (answer.ideas, answer.failure, answer.seconds) == (counted, "", 700.0)
    clock.now += 1000.0
    asker.ask(REQUEST)  # by the other thread: the first one has ended
    begun(proposer, 1)
    assert asker.answers() == []
    assert replace(asker.pace("cpu"), asked=0, rests=pace.rests) == pace
    proposer.gates[1].set()
    assert answered(asker).ideas == [PAID]


def test_a_proposer_that_hangs_in_every_ask_is_left_alone_and_asked_again(ponder: Ponder):
    asker, proposer, clock = ponder(*[[IDEA]] * (BREAK_AFTER + 1))
    asker.ask(replace(REQUEST, count=BREAK_AFTER))
    begun(proposer, *range(BREAK_AFTER))
    clock.now += 601.0
    assert len(asker.answers()) == BREAK_AFTER
    assert asker.notes()[-1] == (
        "proposer mind failed 3 times in a row, the last: no answer within 600 s; it is asked again in 2 min"
    )
    assert asker.pace("gpu").rests
    clock.now += BREAK_S[0]
    assert asker.pace("gpu").places == 1
    asker.ask(replace(REQUEST, count=1))
    proposer.gates[BREAK_AFTER].set()
    assert answered(asker).ideas == [IDEA]
    assert asker.notes() == ["proposer mind works again"]
    assert asker.pace("gpu").places == 4


def test_a_proposer_that_may_spend_no_more_is_not_asked_again(ponder: Ponder):
    asker, proposer, clock = ponder(SpentUp("$5.00 of $5.00 are spent; raise --max-usd"), [PAID])
    asker.ask(REQUEST)
    begun(proposer, 0, 1)
    proposer.gates[0].set()
    assert answered(asker).ideas == []
    proposer.gates[1].set()
    assert answered(asker).ideas == [PAID]  # it was asked before, and is paid for
    clock.now += 1e6
    assert asker.pace("cpu").rests
    assert asker.pace("gpu").is_out
    assert asker.notes() == ["proposer mind is not asked any more: $5.00 of $5.00 are spent; raise --max-usd"]


def test_that_the_money_is_spent_is_no_news_from_before_there_was_more_of_it(ponder: Ponder):
    spent, more = SpentUp("$5.00 of $5.00 are spent; raise --max-usd"), SpentUp("$9.00 of $9.00 are spent; raise it")
    asker, proposer, clock = ponder(spent, spent, more)
    asker.ask(REQUEST)
    begun(proposer, 0, 1)
    proposer.gates[0].set()
    assert answered(asker).ideas == []
    asker.revive()
    proposer.gates[1].set()
    answer = answered(asker)
    assert (answer.ideas, answer.failure) == ([], "")
    clock.now += PAUSE_S[1]
    assert not asker.pace("cpu").rests
    asker.ask(replace(REQUEST, count=1))
    proposer.gates[2].set()
    assert answered(asker).ideas == []
    assert asker.pace("cpu").rests
    assert asker.notes() == [
        "proposer mind is not asked any more: $5.00 of $5.00 are spent; raise --max-usd",
        "proposer mind is asked again",
        "proposer mind is not asked any more: $9.00 of $9.00 are spent; raise it",
    ]


# ---- the end ----


def test_the_end_of_a_study_ends_what_is_in_flight_and_forgets_what_has_not_begun(ponder: Ponder):
    asker, proposer, _ = ponder([IDEA], [IDEA], parallel=1)
    asker.ask(REQUEST)
    begun(proposer, 0)
    asker.ask(replace(REQUEST, profile="gpu"))
    asker.close()
    assert proposer.is_closed.is_set()
    assert answered(asker).request.profile == "cpu"
    assert not proposer.begun[1].is_set()


class Unclosable(Scripted):
    def close(self) -> None:
        raise OSError("the process does not end\nat all")


def test_a_proposer_that_cannot_be_ended_is_said():
    asker = Asker(Unclosable(), Clock())
    asker.close()
    assert asker.notes() == ["proposer scripted could not end what was in flight: OSError: the process does not end"]


HANGING = """
import sys, threading
from raysearch.asker import Asker
from raysearch.model import Direction, Outcome
from raysearch.proposers import Proposer, Request, Told

begun = threading.Event()

class Hanging(Proposer):
    name = "hanging"
    parallel = int(sys.argv[1])

    def ask(self, request):
        begun.set()
        threading.Event().wait()

    def tell(self, told):
        threading.Event().wait()

asker = Asker(Hanging(), lambda: 0.0)
asker.ask(Request("cpu", "x", {}, 4, frozenset(), Direction.MINIMIZE))
asker.tell(lambda: Told("cpu", {}, Outcome.MEASURED, 1.0))
assert begun.wait(60)
if sys.argv[2] == "closed":
    asker.close()
print("the end")
"""


@pytest.mark.parametrize("how", ["closed", "left open"])
@pytest.mark.parametrize("parallel", [1, 4])
def test_the_program_ends_while_a_proposer_hangs(parallel: int, how: str):
    command = [sys.executable, "-c", HANGING, str(parallel), how]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")
