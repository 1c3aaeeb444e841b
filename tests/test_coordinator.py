"""The coordinator with everything real but the machine: progress, faults, restarts, people."""

import itertools
import math
import random
import re
import subprocess
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from toy import PROGRAM, SIGMA, Toy, audit, cpu, gpu, true_score

from raysearch import folder as folders
from raysearch import objective
from raysearch.errors import UserError
from raysearch.executors import RunEnded
from raysearch.journal import Journal
from raysearch.knobs import Value, read_knobs
from raysearch.model import Directed, Event, Measurement, Operator, Outcome, Purpose, Record, Verdict
from raysearch.patches import unified_diff
from raysearch.proposers import Idea, Proposer, Request, SpentUp, Told, inbox
from raysearch.runner import RunResult, RunSpec
from raysearch.study import Study


def champion_score(toy: Toy, slug: str = "cpu") -> float:
    source = toy.repo().read(toy.study.lanes[slug].champion_commit, "train.py")
    return true_score({name: knob.value for name, knob in read_knobs(source).items()})


START = true_score({name: knob.value for name, knob in read_knobs(PROGRAM).items()})


def test_a_study_ends_with_a_program_that_is_really_better(tmp_path: Path):
    toy = Toy(tmp_path / "s")
    assert toy.drive(trials=40) == "all 40 trials are done"
    assert champion_score(toy) < START - 0.3
    assert toy.study.lanes["cpu"].wins
    assert toy.study.lanes["cpu"].screens == 40
    audit(toy)


def test_first_parent_history_reads_as_the_list_of_wins(tmp_path: Path):
    toy = Toy(tmp_path / "s")
    toy.drive(trials=15)
    log = ["git", "-C", str(toy.folder.repo), "log", "--first-parent", "--format=%H%x00%B%x01", "ratchet/cpu"]
    entries = subprocess.run(log, capture_output=True, text=True, check=True).stdout.strip("\x01\n").split("\x01\n")
    wins = [entry.split("\0") for entry in entries if "Delta:" in entry]
    assert [sha for sha, _ in wins] == [win.commit for win in reversed(toy.study.lanes["cpu"].wins)]
    for _, message in wins:
        parse = ["git", "interpret-trailers", "--parse"]
        trailers = subprocess.run(parse, input=message, capture_output=True, text=True, check=True).stdout
        keys = [line.split(":")[0] for line in trailers.splitlines()]
        assert keys == ["Trial", "Profile", "Score", "Delta", "Proposer", "Cost-Usd"]


class Killed(BaseException):
    """SIGKILL, as far as one process can do it to itself."""


def killing_journal(after: int, *, written: bool) -> type[Journal]:
    class KillingJournal(Journal):
        count = 0

        def append(self, event: Event, *, seq: int, at: float) -> Record:
            self.count += 1
            if self.count <= after:
                return super().append(event, seq=seq, at=at)
            if written:
                super().append(event, seq=seq, at=at)
            raise Killed

    return KillingJournal


@pytest.mark.parametrize("written", [False, True], ids=["before the write", "after the write"])
def test_killed_at_any_event_nothing_finished_is_lost_and_nothing_counts_twice(tmp_path: Path, written: bool):
    toy = Toy(tmp_path / "s")
    finished: set[str] = set()
    kills = 0
    while True:
        try:
            toy.drive(trials=8, journal_type=killing_journal(3 + kills % 7, written=written))
            break
        except Killed:
            kills += 1
        replayed = toy.replayed()
        now_finished = {name for name, state in replayed.trials.items() if state.outcome}
        assert finished <= now_finished
        finished = now_finished
    assert kills > 10
    fresh = toy.study.lanes["cpu"].fresh
    assert sum(len(fresh.values(name)) for name in toy.study.candidates) == len(
        [s for s in toy.study.trials.values() if s.outcome is Outcome.MEASURED and s.trial.purpose.value != "screen"]
    )
    audit(toy)


def test_two_profiles_in_one_study_never_share_a_champion(tmp_path: Path):
    cards = (gpu("NVIDIA H100 80GB HBM3", 81559), gpu("NVIDIA GeForce RTX 3060", 12288))
    toy = Toy(tmp_path / "s", hardware=cards)
    toy.drive(trials=24)
    assert set(toy.study.lanes) == {"h100-80gb", "rtx3060-12gb"}
    for slug, lane in toy.study.lanes.items():
        for win in lane.wins:
            assert toy.study.candidates[win.candidate].candidate.profile == slug
    audit(toy)


def test_a_change_of_the_budget_starts_another_ratchet(tmp_path: Path):
    toy = Toy(tmp_path / "s")
    toy.drive(trials=6)
    toy.options = {"budget": {"seconds": 99.0}}
    toy.drive(trials=12)
    assert len(toy.study.lanes) == 2
    audit(toy)


def test_out_of_memory_is_a_constraint_and_not_a_score(tmp_path: Path):
    def small_card(spec: RunSpec, values: dict[str, Value]) -> RunResult | None:
        if int(values["WIDTH"]) * int(values["DEPTH"]) > 400:
            return RunResult(Outcome.OUT_OF_MEMORY, "out of memory")
        return None

    toy = Toy(tmp_path / "s", behaviour=small_card)
    toy.drive(trials=60)
    screens = [s for s in toy.study.trials.values() if s.trial.purpose.value == "screen"]
    failed = [state.outcome is Outcome.OUT_OF_MEMORY for state in screens]
    assert sum(failed[30:]) <= sum(failed[:30]) + 3  # the best program lies at the border of what fits
    assert sum(failed) < 15
    assert champion_score(toy) < START
    audit(toy)


def test_no_program_is_run_twice_on_a_profile_but_for_replicates(tmp_path: Path):
    toy = Toy(tmp_path / "s")
    toy.drive(trials=40)
    states = [state.candidate for state in toy.study.candidates.values() if not state.candidate.proposal.carries]
    assert len({candidate.fingerprint for candidate in states}) == len(states)


def test_a_lost_slot_requeues_its_trial_without_a_new_one(tmp_path: Path):
    lost: list[str] = []

    def lose_one(toy: Toy) -> None:
        running = toy.executor.slots.get("slot1")
        if not lost and running and running.running and "screen" in running.running.trial_id:
            lost.append(running.running.trial_id)
            toy.executor.lose("slot1")

    toy = Toy(tmp_path / "s")
    toy.drive(trials=6, meanwhile=lose_one)
    state = toy.study.trials[lost[0]]
    assert state.attempt == 2
    assert state.outcome is Outcome.MEASURED
    audit(toy)


def test_a_result_that_comes_after_its_run_was_given_up_is_left_out_and_lies_in_a_folder_of_its_own(tmp_path: Path):
    stale: list[RunSpec] = []

    def freeze_one(toy: Toy) -> None:
        running = toy.executor.slots.get("slot1")
        if not stale and running and running.running and "screen" in running.running.trial_id:
            stale.append(running.running)
            toy.executor.lose("slot1")
        again = [spec for spec in toy.executor.started if stale and spec.trial_id == stale[0].trial_id]
        if len(again) == 2 and len(stale) == 1:  # the second attempt is under way
            stale.append(again[1])
            toy.executor.say(RunEnded(stale[0].trial_id, 1, RunResult(Outcome.MEASURED, "", Measurement(-1.0, 1.0))))

    toy = Toy(tmp_path / "s")
    toy.drive(trials=6, meanwhile=freeze_one)
    first, second = stale
    state = toy.study.trials[first.trial_id]
    assert (state.attempt, state.outcome) == (2, Outcome.MEASURED)
    assert state.measurement is not None
    assert state.measurement.value > 0
    assert f"a result of {first.trial_id}, attempt 1, came too late" in toy.said.getvalue()
    assert Path(first.out).parent == Path(second.out).parent
    assert first.out != second.out
    audit(toy)


def test_draining_lets_the_runs_in_flight_end_and_starts_nothing(tmp_path: Path):
    started: list[int] = []

    def interrupt(toy: Toy) -> None:
        if len(toy.executor.started) == 6 and not started:
            started.append(len(toy.executor.started))
            toy.coordinator.interrupt()

    toy = Toy(tmp_path / "s")
    assert toy.drive(trials=20, meanwhile=interrupt).startswith("stopped: the runs in flight")
    assert len(toy.executor.started) == 6
    assert not toy.study.running
    toy.drive(trials=20)
    assert toy.study.lanes["cpu"].screens == 20
    audit(toy)


def test_a_second_interrupt_stops_at_once_and_the_runs_are_run_again(tmp_path: Path):
    def interrupt(toy: Toy) -> None:
        if len(toy.executor.started) == 6:
            toy.coordinator.interrupt()
            toy.coordinator.interrupt()

    toy = Toy(tmp_path / "s")
    assert toy.drive(trials=20, meanwhile=interrupt).startswith("stopped at once")
    in_flight = {spec.trial_id for spec in toy.executor.started} - {
        name for name, state in toy.replayed().trials.items() if state.outcome
    }
    assert in_flight
    toy.drive(trials=20)
    assert all(toy.study.trials[name].attempt == 2 for name in in_flight)
    audit(toy)


def test_a_baseline_that_crashes_ends_the_study_and_says_why(tmp_path: Path):
    toy = Toy(tmp_path / "s", behaviour=lambda *_: RunResult(Outcome.CRASHED, "ImportError: no torch"))
    reason = toy.drive()
    assert "cpu is blocked" in reason
    assert "ImportError: no torch" in reason


PATCH = unified_diff("train.py", PROGRAM, PROGRAM.replace('MODE = "slow"', 'MODE = "fast"'))


def test_a_patch_from_the_inbox_is_run_and_wins(tmp_path: Path):
    toy = Toy(tmp_path / "s", proposer=Silent())

    def drop(toy: Toy) -> None:
        if toy.study.lanes and not toy.folder.inbox.exists():
            inbox.drop(toy.folder.inbox, patch=PATCH, why="fast is better", by="ada", profiles=["cpu"], at=toy.clock())

    toy.drive(trials=None, meanwhile=drop)
    (win,) = toy.study.lanes["cpu"].wins
    proposal = toy.study.candidates[win.candidate].candidate.proposal
    assert (proposal.proposer, proposal.hypothesis) == ("ada", "fast is better")
    assert not list(toy.folder.inbox.glob("*.json"))
    audit(toy)


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (PATCH.replace("slow", "slaw"), "does not fit commit"),
        (unified_diff("prepare.py", None, "cheat = 1\n"), "prepare.py"),
        (unified_diff("train.py", PROGRAM, PROGRAM.replace("return None", "return (")), "was never closed"),
        (unified_diff("train.py", PROGRAM, PROGRAM.replace("def train", "# a comment\ndef train")), "same program as"),
        (unified_diff("train.py", PROGRAM, PROGRAM.replace("DEPTH = 6", "DEPTH = 60")), "not in its own range"),
    ],
)
def test_a_patch_that_cannot_be_a_candidate_is_refused_with_its_reason(tmp_path: Path, patch: str, reason: str):
    toy = Toy(tmp_path / "s", proposer=Silent())

    def drop(toy: Toy) -> None:
        if toy.study.lanes and not toy.folder.inbox.exists():
            inbox.drop(toy.folder.inbox, patch=patch, why="?", by="eve", profiles=["cpu"], at=toy.clock())

    toy.drive(trials=None, meanwhile=drop)
    ((_, said),) = toy.study.refused
    assert reason in said
    audit(toy)


class Silent(Proposer):
    """A proposer without ideas."""

    name = "silent"

    def ask(self, request: Request) -> list[Idea]:
        return []

    def tell(self, told: Told) -> None:
        pass


def test_a_search_without_ideas_ends(tmp_path: Path):
    toy = Toy(tmp_path / "s", proposer=Silent())
    assert toy.drive() == "no proposer has anything new to try"


class Failing(Silent):
    """A proposer that breaks every other time."""

    calls = 0

    def ask(self, request: Request) -> list[Idea]:
        self.calls += 1
        if self.calls % 2:
            raise RuntimeError("no connection")
        source = request.files["train.py"]
        program = re.sub("DEPTH = [0-9]+", f"DEPTH = {self.calls // 2}", source)
        return [Idea(unified_diff("train.py", source, program), Operator.DRAFT, "depth", "failing")]


def test_a_failing_proposer_does_not_stop_the_study(tmp_path: Path):
    toy = Toy(tmp_path / "s", proposer=Failing())
    toy.drive(trials=3)
    assert toy.study.lanes["cpu"].screens >= 3


class Stubborn(Silent):
    """Has one and the same idea for ever, and it changes nothing."""

    def ask(self, request: Request) -> list[Idea]:
        return [Idea("", Operator.DRAFT, "nothing", "stubborn")]


def test_a_proposer_whose_ideas_are_all_refused_does_not_keep_the_study_busy_for_ever(tmp_path: Path):
    toy = Toy(tmp_path / "s", proposer=Stubborn())
    assert toy.drive() == "the last 10 proposals for cpu were all refused; the last one: the patch is empty; " + (
        "write a unified diff"
    )
    assert len(toy.study.refused) < 50


class AllAtOnce(Silent):
    """Has three ideas on the first program, each of them good, and no others."""

    asked = False

    def ask(self, request: Request) -> list[Idea]:
        if self.asked:
            return []
        self.asked = True
        source = request.files["train.py"]
        programs = [
            source.replace(*change)
            for change in (('= "slow"', '= "fast"'), ("= 0.003", "= 0.1"), ("DEPTH = 6", "DEPTH = 3"))
        ]
        return [Idea(unified_diff("train.py", source, text), Operator.DRAFT, "good", "sure") for text in programs]


def test_wins_on_an_old_champion_are_carried_onto_the_new_one_and_measured_there(tmp_path: Path):
    toy = Toy(tmp_path / "s", hardware=tuple(cpu() for _ in range(8)), proposer=AllAtOnce())
    toy.drive(trials=3)
    carried = [state for state in toy.study.candidates.values() if state.candidate.proposal.carries]
    assert carried
    assert all(state.candidate.proposal.operator is Operator.COMBINE for state in carried)
    wins = [toy.study.candidates[win.candidate].candidate.proposal for win in toy.study.lanes["cpu"].wins]
    assert len({root.id for win in wins for root in toy.study.roots(win)}) == 3
    champion = toy.repo().read(toy.study.lanes["cpu"].champion_commit, "train.py")
    assert all(text in champion for text in ('MODE = "fast"', "LR = 0.1", "DEPTH = 3"))
    lost = [
        state
        for state in toy.study.candidates.values()
        if state.verdict is Verdict.KEEP and not state.ratchet_commit and not state.carried_by
    ]
    assert not lost
    audit(toy)


class Overlapping(AllAtOnce):
    """Has two ideas at once, and the first holds the second."""

    def ask(self, request: Request) -> list[Idea]:
        if self.asked:
            return []
        self.asked = True
        source = request.files["train.py"]
        less = source.replace('= "slow"', '= "fast"')
        both = (less.replace("= 0.003", "= 0.1"), less)
        return [Idea(unified_diff("train.py", source, text), Operator.DRAFT, "good", "sure") for text in both]


def test_a_change_that_holds_the_new_step_already_is_not_taken_for_one_that_was_tried(tmp_path: Path):
    options = {"search": {"frontier": False}}  # else the smaller win would wait for the other one
    toy = Toy(tmp_path / "s", hardware=tuple(cpu() for _ in range(8)), proposer=Overlapping(), options=options)
    toy.drive(trials=2)
    first, *_, last = toy.study.lanes["cpu"].wins
    assert first.candidate == "c0002"  # and the other one was in its race
    assert toy.study.candidates[last.candidate].candidate.proposal.carries == ("c0001",)
    prints = [toy.study.candidates[name].candidate.fingerprint for name in ("c0001", last.candidate)]
    assert prints[0] == prints[1]
    champion = toy.repo().read(toy.study.lanes["cpu"].champion_commit, "train.py")
    assert all(text in champion for text in ('MODE = "fast"', "LR = 0.1"))
    audit(toy)


class Thinker(Silent):
    """Has three ideas on the first program; two of them come when another one has won."""

    name = "thinker"
    parallel = 3
    limit_s = math.inf

    def __init__(self) -> None:
        self.moved = threading.Event()
        self.numbers = itertools.count()
        self.changes = [("DEPTH = 6", "DEPTH = 3"), ("= 0.003", "= 0.1"), ("DEPTH = 6", "DEPTH = 4")]

    def ask(self, request: Request) -> list[Idea]:
        number = next(self.numbers)
        if number >= len(self.changes):
            return []
        if number:
            self.moved.wait()
        old, new = self.changes[number]
        source = request.files["train.py"]
        patch = unified_diff("train.py", source, source.replace(old, new))
        return [Idea(patch, Operator.DRAFT, new, "thinker", cost_usd=0.5)]

    def close(self) -> None:
        self.moved.set()


def test_an_idea_that_was_asked_for_on_an_old_champion_is_carried_onto_the_new_one_or_dropped_with_the_reason(
    tmp_path: Path,
):
    thinker = Thinker()

    def wait_for_the_win(toy: Toy) -> None:
        if toy.study.lanes and toy.study.lanes["cpu"].wins:
            thinker.moved.set()

    toy = Toy(tmp_path / "s", proposer=thinker)
    assert toy.drive(trials=None, meanwhile=wait_for_the_win) == "no proposer has anything new to try"
    states = list(toy.study.candidates.values())
    (win, *_) = toy.study.lanes["cpu"].wins
    first = toy.study.candidates[win.candidate].candidate
    base = first.proposal.base
    late = [state for state in states if state.candidate.proposal.base == base and state.id != first.id]
    ((forward,), (conflict,)) = (
        [state for state in late if state.candidate.proposal.hypothesis == change] for change in ("= 0.1", "DEPTH = 4")
    )
    carried = toy.study.candidates[forward.carried_by or ""]
    assert carried.base == first.id
    program = toy.repo().read(carried.candidate.commit, "train.py")
    assert "DEPTH = 3" in program
    assert "LR = 0.1" in program
    assert f"{carried.id}-screen" in toy.study.trials
    assert f"{forward.id}-screen" not in toy.study.trials  # never run on what it was asked on
    assert conflict.verdict is Verdict.DISCARD
    assert conflict.reason.startswith(f"it conflicts with {first.id}: ")
    assert f"{conflict.id}-screen" not in toy.study.trials
    assert toy.study.spent_usd == 1.5
    audit(toy)


class Spender(Silent):
    """Has ideas as long as there is money."""

    name = "spender"
    parallel = 2

    def __init__(self, ideas: int) -> None:
        self.numbers = itertools.count(1)
        self.ideas = ideas

    def ask(self, request: Request) -> list[Idea]:
        number = next(self.numbers)
        if number > self.ideas:
            raise SpentUp("$1.50 of $1.50 are spent; raise --max-usd")
        source = request.files["train.py"]
        patch = unified_diff("train.py", source, re.sub("DEPTH = [0-9]+", f"DEPTH = {number}", source))
        return [Idea(patch, Operator.DRAFT, f"depth {number}", "spender", cost_usd=0.5)]


def test_when_all_money_is_spent_the_runs_in_flight_end_and_the_study_says_why_it_ends(tmp_path: Path):
    toy = Toy(tmp_path / "s", proposer=Spender(3))
    reason = toy.drive(trials=None)
    assert reason == "no proposer has anything new to try; spender: $1.50 of $1.50 are spent; raise --max-usd"
    assert toy.said.getvalue().count("proposer spender is not asked any more: $1.50 of $1.50") == 1
    assert toy.study.spent_usd == 1.5
    assert toy.study.trials["c0001-screen"].outcome is Outcome.MEASURED
    assert not toy.study.running
    audit(toy)


class Down(Silent):
    """A service that cannot be reached for a while."""

    name = "down"
    parallel = 4

    def __init__(self, failures: float) -> None:
        self.numbers = itertools.count()
        self.failures = failures

    def ask(self, request: Request) -> list[Idea]:
        number = next(self.numbers)
        if number < self.failures:
            raise ConnectionError(f"no route, {number}")
        source = request.files["train.py"]
        patch = unified_diff("train.py", source, re.sub("LR = [0-9.]+", f"LR = {0.004 + number / 1000}", source))
        return [Idea(patch, Operator.DRAFT, "another step size", "down")]


def test_a_service_that_is_down_for_minutes_is_waited_for_and_the_console_is_not_flooded(tmp_path: Path):
    toy = Toy(tmp_path / "s", proposer=Down(5))
    assert toy.drive(trials=3) == "all 3 trials are done"
    lines = [line for line in toy.said.getvalue().splitlines() if "proposer down" in line]
    assert [line.partition("proposer down ")[2][:25] for line in lines] == [
        "failed and is asked again",
        "failed 3 times in a row, ",
        "works again",
    ]


def test_a_service_that_stays_down_ends_a_study_that_has_nobody_else(tmp_path: Path):
    toy = Toy(tmp_path / "s", proposer=Down(math.inf))
    began = toy.clock()
    reason = toy.drive(trials=3)
    assert re.fullmatch(r"no proposer has anything new to try; down: ConnectionError: no route, \d+", reason)
    assert 10 * 60 < toy.clock() - began < 60 * 60


class Misfit(Silent):
    """Cannot work with the program that it is given."""

    name = "misfit"

    def ask(self, request: Request) -> list[Idea]:
        raise UserError("searcher 'x' does not know knobs that are words; take another one with --searcher")


def test_a_proposer_that_can_do_nothing_with_the_program_ends_the_study_soon_and_says_why(tmp_path: Path):
    toy = Toy(tmp_path / "s", proposer=Misfit())
    began = toy.clock()
    assert toy.drive() == (
        "no proposer has anything new to try; misfit: "
        "searcher 'x' does not know knobs that are words; take another one with --searcher"
    )
    assert toy.clock() - began < 5 * 60


# ---- the human's directions ----


def direct(toy: Toy, block: str, *, file: str = "program.md") -> None:
    toy.path.mkdir(parents=True, exist_ok=True)
    (toy.path / file).write_text(f"Please.\n\n```raysearch\n{block}\n```\n")


def directed(toy: Toy) -> list[tuple[int, str]]:
    """Number and file of each change of the directions in the journal."""
    with closing(Journal(toy.folder.journal, writer=False)) as journal:
        return [(record.seq, record.event.file) for record in journal.read() if isinstance(record.event, Directed)]


def new_toy(tmp_path: Path, block: str | None = None, **options: Any) -> Toy:
    toy = Toy(tmp_path / "s", **options)
    folders.make(toy.folder, toy.config(), {"train.py": toy.program}, at=toy.clock())
    if block is not None:
        direct(toy, block)
    return toy


def moved(toy: Toy, name: str) -> list[bool]:
    """Whether each candidate that was proposed has another value of a knob than what it was built on, in order."""
    found: list[bool] = []
    for state in toy.study.candidates.values():
        proposal = state.candidate.proposal
        if proposal.patch and not proposal.carries:
            before, after = (
                read_knobs(toy.repo().read(commit, "train.py"))[name].value
                for commit in (proposal.base, state.candidate.commit)
            )
            found.append(before != after)
    return found


def test_directions_that_change_during_a_study_are_journalled_and_followed(tmp_path: Path):
    before: list[int] = []

    def freeze(toy: Toy) -> None:
        if not before and len(toy.study.candidates) > 12:
            before.append(len(moved(toy, "LR")))
            direct(toy, "frozen = ['LR']")

    toy = new_toy(tmp_path, "")
    toy.drive(trials=30, meanwhile=freeze)
    assert [file for _, file in directed(toy)] == ["program.md", "program.md"]
    assert any(moved(toy, "LR")[: before[0]])
    late = 4  # those that were made before the second in which the change was seen
    assert len(moved(toy, "LR")) > before[0] + late + 10
    assert not any(moved(toy, "LR")[before[0] + late :])
    assert toy.replayed().directed == toy.study.directed
    assert "directions, program.md: LR frozen" in toy.said.getvalue()
    audit(toy)


def test_a_broken_file_keeps_the_directions_and_is_complained_of_once_a_version(tmp_path: Path):
    steps = iter(["frozen = ['LR'", "frozen = ['LR'", "frozn = []", "frozen = ['DEPTH']"])

    def rewrite_it(toy: Toy) -> None:
        if toy.clock() > written[-1] + 30.0 and (text := next(steps, None)):
            written.append(toy.clock())
            direct(toy, text)

    toy = new_toy(tmp_path, "frozen = ['LR']")
    written = [toy.clock()]
    toy.drive(trials=12, meanwhile=rewrite_it)
    assert len(written) == 5
    said = toy.said.getvalue()
    assert said.count("must be TOML: mend that line; until then the directions stay as they are") == 1
    assert said.count("key 'frozn' is not known") == 1
    assert len(directed(toy)) == 2
    assert toy.study.directions(toy.study.lanes["cpu"]).frozen == {"DEPTH"}


def test_a_broken_file_at_the_start_is_one_line_and_nothing_is_journalled(tmp_path: Path):
    toy = new_toy(tmp_path, "budget.hours = -1")
    with pytest.raises(UserError, match=re.escape("program.md: budget.hours = -1: it must be a number above 0")):
        toy.drive(trials=1)
    assert toy.replayed().seq == 0


def test_a_restart_keeps_the_directions_and_puts_a_lost_file_back(tmp_path: Path):
    toy = new_toy(tmp_path, "frozen = ['LR']")
    toy.drive(trials=5)
    toy.drive(trials=10)
    text = (toy.path / "program.md").read_text()
    (toy.path / "program.md").unlink()
    toy.drive(trials=15)
    assert len(directed(toy)) == 1
    assert (toy.path / "program.md").read_text() == text
    before = len(moved(toy, "LR"))
    direct(toy, "frozen = ['DEPTH']")
    toy.drive(trials=20)
    assert len(directed(toy)) == 2
    assert not any(moved(toy, "LR")[:before])
    assert not any(moved(toy, "DEPTH")[before:])


def test_proposals_against_the_directions_are_refused_with_the_reason(tmp_path: Path):
    toy = new_toy(tmp_path, "frozen = ['MODE']\nranges.DEPTH = [4, 9]", proposer=AllAtOnce())
    toy.drive(trials=None)
    assert sorted(reason for _, reason in toy.study.refused) == [
        "against program.md: DEPTH has the range [4, 9], and 6 became 3",
        "against program.md: MODE is frozen, and 'slow' became 'fast'",
    ]
    assert moved(toy, "LR") == [True]
    audit(toy)


def test_a_forbidden_operator_is_refused_but_for_a_persons_own_patch(tmp_path: Path):
    toy = new_toy(tmp_path, "forbidden = ['draft']\nfrozen = ['DEPTH']", proposer=AllAtOnce())
    deep = unified_diff("train.py", PROGRAM, PROGRAM.replace("DEPTH = 6", "DEPTH = 5"))

    def drop(toy: Toy) -> None:
        if toy.study.lanes and not toy.folder.inbox.exists():
            for why, patch in (("fast", PATCH), ("shallow", deep)):
                inbox.drop(toy.folder.inbox, patch=patch, why=why, by="sure", profiles=["cpu"], at=toy.clock())

    toy.drive(trials=None, meanwhile=drop)
    reasons = {proposal.hypothesis: reason for proposal, reason in toy.study.refused}
    assert reasons == {
        "good": "against program.md: draft is forbidden",
        "shallow": "against program.md: DEPTH is frozen, and 6 became 5",
    }
    (win,) = toy.study.lanes["cpu"].wins
    assert toy.study.candidates[win.candidate].candidate.proposal.hypothesis == "fast"


@pytest.mark.parametrize("killed", [False, True], ids=["", "killed in between"])
def test_what_waits_for_its_first_run_against_new_directions_is_dropped(tmp_path: Path, killed: bool):
    class KilledAfterDirected(Journal):
        def append(self, event: Event, *, seq: int, at: float) -> Record:
            record = super().append(event, seq=seq, at=at)
            if isinstance(event, Directed):
                raise Killed
            return record

    def freeze(toy: Toy) -> None:
        if len(toy.study.candidates) == 4 and not toy.study.directed:
            direct(toy, "frozen = ['LR', 'DEPTH', 'MODE']")

    toy = new_toy(tmp_path, None, hardware=(cpu(),), proposer=AllAtOnce())
    if killed:
        with pytest.raises(Killed):
            toy.drive(trials=3, meanwhile=freeze, journal_type=KilledAfterDirected)
    toy.drive(trials=3, meanwhile=freeze)
    dropped = [state for state in toy.study.candidates.values() if state.reason.startswith("against program.md")]
    assert dropped
    assert all(state.verdict is Verdict.DISCARD and not state.seconds for state in dropped)
    screened = {run.trial.candidate for run in toy.study.trials.values() if run.trial.purpose is Purpose.SCREEN}
    assert len(dropped) + len(screened) == 3
    audit(toy)


def test_names_that_the_program_does_not_have_are_said_once(tmp_path: Path):
    toy = new_toy(tmp_path, "frozen = ['DROPOUT', 'LR']")
    toy.drive(trials=3)
    said = "program.md: the directions name DROPOUT, which the program of cpu does not set"
    assert toy.said.getvalue().count(said) == 1


def test_the_budget_of_the_directions_limits_a_study_and_may_change(tmp_path: Path):
    def grow(toy: Toy) -> None:
        if toy.study.lanes["cpu"].screens == 4 if toy.study.lanes else False:
            direct(toy, "budget.trials = 9")

    toy = new_toy(tmp_path, "budget.trials = 5")
    assert toy.drive(trials=None, meanwhile=grow) == "all 9 trials are done"
    assert toy.study.lanes["cpu"].screens == 9
    assert toy.drive(trials=7) == "all 7 trials are done"
    direct(toy, "budget.hours = 0.1")
    started = toy.clock()
    assert toy.drive(trials=None) == "the time limit has passed"
    assert 360 <= toy.clock() - started < 600
    audit(toy)


def test_a_study_whose_only_proposer_is_forbidden_ends(tmp_path: Path):
    toy = new_toy(tmp_path, "forbidden = ['tune']")
    assert toy.drive(trials=9) == "no proposer has anything new to try"
    assert not toy.study.proposals


def test_a_preset_brings_its_directions_and_both_files_hold(tmp_path: Path):
    options = {"objective": {"kind": "trainer"}}
    toy = new_toy(tmp_path, "frozen = ['LR']", preset="cpu", options=options)
    toy.drive(trials=6)
    assert [file for _, file in directed(toy)] == ["program.md", "program-cpu.md"]
    text = (toy.path / "program-cpu.md").read_text()
    assert text == objective.preset_directions("cpu") == toy.study.directed["program-cpu.md"]
    wanted = toy.study.directions(toy.study.lanes["cpu"])
    assert wanted.where == "program.md and program-cpu.md"
    assert "DEPTH" in wanted.ranges
    assert wanted.prose.startswith("Please.\n\n# What is known of CPU slots")
    assert not any(moved(toy, "LR"))
    direct(toy, "ranges.DEPTH = [30, 40]")
    with pytest.raises(
        UserError, match=r"DEPTH is to be in \[30, 40\] by program.md and in \[1, 8\] by program-cpu.md"
    ):
        toy.drive(trials=7)


def test_false_keeps_are_rare(tmp_path: Path):
    """Nothing that a proposal changes matters here: whatever is kept is luck."""

    def luck(spec: RunSpec, values: dict[str, Value]) -> RunResult | None:
        value = 1.0 + random.Random(spec.trial_id).gauss(0, SIGMA)
        return RunResult(Outcome.MEASURED, "", Measurement(value, wall_s=20.0))

    toy = Toy(tmp_path / "s", behaviour=luck)
    toy.drive(trials=60)
    assert len(toy.study.lanes["cpu"].wins) <= 3


def test_replay_gives_the_same_state(tmp_path: Path):
    toy = Toy(tmp_path / "s")
    toy.drive(trials=12)
    live, replayed = toy.study, toy.replayed()
    for name in ("lanes", "candidates", "trials", "refused", "proposals"):
        assert getattr(live, name) == getattr(replayed, name), name
    assert isinstance(replayed, Study)


# ---- slots that a cluster starts ----


def test_slots_are_wanted_while_there_is_work_for_them_and_no_longer(tmp_path: Path):
    toy = Toy(tmp_path / "s", wanted={"h100-80gb": 2})

    def meanwhile(toy: Toy) -> None:
        if len(toy.executor.started) == 4 and toy.executor.wanted == [{"h100-80gb": 2}]:
            toy.coordinator.interrupt()

    toy.drive(trials=8, meanwhile=meanwhile)
    assert toy.executor.wanted == [{"h100-80gb": 2}, {}]


def test_what_nobody_wanted_is_never_asked_for(tmp_path: Path):
    toy = Toy(tmp_path / "s")
    toy.drive(trials=3)
    assert toy.executor.wanted == []
