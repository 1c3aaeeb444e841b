"""The simulator: a surrogate that agrees with published runs, virtual time, whole studies whose truth is known."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.slow_minds import Task
from raysearch.asker import Answer
from raysearch.errors import UserError
from raysearch.executors import RunEnded, SlotJoined, SlotLeft
from raysearch.executors.simulated import (
    CONTENDED,
    PER_DOUBLING,
    Faults,
    MemoryRatchet,
    SimulatedExecutor,
    SimulatedSlot,
    VirtualAsker,
    VirtualClock,
)
from raysearch.executors.surrogate import (
    BASELINE,
    PATH,
    Regime,
    Surrogate,
    effect_correlation,
    family,
    h100,
    is_sound,
    program,
    published,
    random_move,
    rtx3060,
    single_moves,
    starts,
    values_of,
)
from raysearch.model import Direction, Operator, Outcome, Purpose
from raysearch.pace import BREAK_S
from raysearch.patches import Conflict, Empty, PatchError, unified_diff
from raysearch.proposers import Idea, NoIdea, Proposer, Request, Told
from raysearch.ratchet import Moved, Ratchet
from raysearch.runner import RunResult, RunSpec
from raysearch.simulate import Simulated, fleet, simulate

CARDS = {"h100": h100, "rtx3060": rtx3060}


class Nudge(Proposer):
    """Moves one or two knobs by chance: cheap, and good enough to gain."""

    name = "nudge"

    def __init__(self, seed: int = 0) -> None:
        self.chance = random.Random(seed)
        self.told: list[Told] = []

    def ask(self, request: Request) -> list[Idea]:
        text = request.files[PATH]
        moved = [program(random_move(values_of(text), self.chance)) for _ in range(request.count)]
        patches = [unified_diff(PATH, text, new) for new in moved if new != text]
        return [Idea(patch, Operator.TUNE, "a knob moved by chance", self.name) for patch in patches]

    def tell(self, told: Told) -> None:
        self.told.append(told)


# ---- the surrogate ----


def with_batch(bits: int) -> float:
    return rtx3060().value({**BASELINE, "TOTAL_BATCH_SIZE": 2**bits})


def test_batches_of_an_rtx3060_are_ordered_as_published():
    rows = sorted(published()["rtx3060"]["batches"], key=lambda row: row["val_bpb"])
    bits = [row["set"]["TOTAL_BATCH_SIZE"].bit_length() - 1 for row in rows]
    assert sorted(bits, key=with_batch) == bits
    assert min(range(15, 21), key=with_batch) == bits[0] == 17


def test_an_h100_gains_what_was_published_from_its_batch_and_its_depth():
    card = h100()
    halved = {**BASELINE, "TOTAL_BATCH_SIZE": 2**18}
    assert card.value(BASELINE) == pytest.approx(0.9979)
    assert card.value(halved) - card.value(BASELINE) == pytest.approx(-0.0119, abs=0.001)
    deeper = {**halved, "DEPTH": 9, "MODEL_DIM": 640}
    assert card.value(deeper) - card.value(halved) == pytest.approx(-0.0043, abs=0.001)
    assert card.failure({**BASELINE, "TOTAL_BATCH_SIZE": 2**17}) is not None


def ranks(numbers: list[float]) -> list[int]:
    order = sorted(numbers)
    return [order.index(number) for number in numbers]


def test_the_published_h100_runs_are_near_their_surrogate():
    card, champion = h100(), dict(BASELINE)
    computed: list[float] = []
    measured: list[float] = []
    for row in published()["h100"]["rows"]:
        if row["status"] == "crash" or not ("set" in row or row["commit"] == "baseline"):
            continue
        values = champion | row.get("set", {})
        computed.append(card.value(values))
        measured.append(row["val_bpb"])
        champion = values if row["status"] == "keep" else champion
    assert len(measured) == 79
    assert math.sqrt(statistics.fmean((a - b) ** 2 for a, b in zip(computed, measured, strict=True))) < 1.2e-3
    assert statistics.correlation(ranks(computed), ranks(measured)) > 0.9


@pytest.mark.parametrize("card", CARDS)
def test_neither_one_move_nor_two_help_an_exhausted_program(card: str):
    surrogate = CARDS[card]()
    best = starts(surrogate, Regime.EXHAUSTED)
    assert surrogate.failure(best) is None
    moves = single_moves(best)
    pairs = [one | two for one, two in itertools.combinations(moves, 2)]
    sound = [move for move in moves + pairs if is_sound(surrogate, {**best, **move})]
    assert sum(move in moves for move in sound) > 30
    assert len(sound) > 500
    assert min(surrogate.value({**best, **move}) for move in sound) > surrogate.value(best) - surrogate.sigma / 10


@pytest.mark.parametrize("card", CARDS)
def test_regimes_start_one_after_the_other(card: str):
    surrogate = CARDS[card]()
    values = [surrogate.value(starts(surrogate, regime)) for regime in Regime]
    assert all(before - after > surrogate.sigma for before, after in itertools.pairwise(values))
    assert all(surrogate.failure(starts(surrogate, regime)) is None for regime in Regime)
    assert starts(surrogate, Regime.EARLY) == BASELINE


@pytest.mark.parametrize("correlation", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_knobs_act_alike_in_a_family_as_far_as_asked_for(correlation: float, seed: int):
    second = family(h100(), correlation=correlation, seed=seed)
    assert second.slug != h100().slug
    assert effect_correlation(h100(), second, BASELINE, single_moves(BASELINE)) == pytest.approx(correlation, abs=0.05)
    assert second.value(BASELINE) == pytest.approx(h100().value(BASELINE))
    assert second.value(starts(second, Regime.EXHAUSTED)) < second.value(BASELINE) - 5 * second.sigma


def test_a_correlation_that_no_family_has_is_refused():
    with pytest.raises(UserError, match=r"correlation -2.*take one from 0 to 1"):
        family(h100(), correlation=-2.0)


# ---- time, slots and runs ----


def spec(values: dict[str, object] | None = None, *, trial: str = "t1", seed: int = 1, **more: float) -> RunSpec:
    files = {PATH: program(BASELINE | (values or {}))}  # pyright: ignore[reportArgumentType]
    return RunSpec(trial, 1, "s", "s", files, (), "val_bpb", seed, 0.0, 0.0, 0, 0, "", more.get("futile_above"))


def results(executor: SimulatedExecutor) -> list[RunResult]:
    """Of all runs in flight."""
    found: list[RunResult] = []
    while not found:
        found = [report.result for report in executor.poll(1.0) if isinstance(report, RunEnded)]
    return found


def ready(
    *slots: SimulatedSlot, faults: Faults | None = None, **options: float
) -> tuple[VirtualClock, SimulatedExecutor]:
    clock = VirtualClock()
    executor = SimulatedExecutor(clock, slots or [SimulatedSlot("a", h100())], faults=faults, **options)  # pyright: ignore[reportArgumentType]
    executor.poll(0.0)
    return clock, executor


def test_time_goes_from_event_to_event_in_order():
    clock, seen = VirtualClock(100.0), list[tuple[str, float]]()
    for name, when in (("b", 130.0), ("a", 110.0), ("c", 130.0)):
        clock.at(when, lambda name=name: seen.append((name, clock())))
    assert clock.advance()
    assert seen == [("a", 110.0)]
    assert not clock.advance(until=120.0)
    assert clock.advance()
    assert seen == [("a", 110.0), ("b", 130.0), ("c", 130.0)]
    assert not clock.advance()
    assert clock() == 130.0


def test_a_poll_jumps_to_the_end_of_a_run_and_reports_it():
    clock, executor = ready()
    began = clock()
    executor.start("a", spec())
    assert executor.poll(0.0) == []
    [report] = executor.poll(0.25)
    assert isinstance(report, RunEnded)
    assert 345 < clock() - began < 355
    measured = report.result.measurement
    assert measured is not None
    assert measured.value == pytest.approx(h100().value(BASELINE), abs=5 * h100().sigma)
    assert sum(measured.parts_s.values()) == pytest.approx(measured.wall_s)
    assert measured.facts["num_steps"] == pytest.approx(953, rel=0.2)  # published: 953 steps of the baseline's
    assert executor.busy_s(clock()) == pytest.approx(measured.wall_s)


def test_a_poll_with_nothing_to_come_takes_its_time():
    clock, executor = ready()
    began = clock()
    assert executor.poll(5.0) == []
    assert clock() == began + 5.0


def test_a_hopeless_run_ends_at_half_of_its_budget():
    clock, executor = ready()
    began = clock()
    executor.start("a", spec({"MATRIX_LR": 0.2}, futile_above=1.0))
    [result] = results(executor)
    assert result.outcome is Outcome.FUTILE
    assert result.halfway is not None
    assert result.halfway > 1.0
    assert 165 < clock() - began < 175


def test_a_program_that_does_not_fit_fails_soon():
    _, executor = ready(SimulatedSlot("a", rtx3060()))
    executor.start("a", spec({"DEPTH": 24, "MODEL_DIM": 1024}))
    [result] = results(executor)
    assert result.outcome is Outcome.OUT_OF_MEMORY
    assert "MiB" in result.reason


def values_with(executor: SimulatedExecutor, program_values: dict[str, object], seeds: range) -> list[float]:
    found: list[float] = []
    for seed in seeds:
        executor.start("a", spec(program_values, trial=f"{program_values} {seed}", seed=seed))
        [result] = results(executor)
        assert result.measurement is not None
        found.append(result.measurement.value)
    return found


def test_programs_share_a_part_of_their_noise_in_runs_with_one_seed():
    _, executor = ready(paired=0.3)
    ours = values_with(executor, {}, range(600))
    theirs = values_with(executor, {"SOFT_CAP": 16.0}, range(600))
    assert statistics.stdev(ours) == pytest.approx(h100().sigma, rel=0.1)
    assert statistics.correlation(ours, theirs) == pytest.approx(0.3, abs=0.1)


def test_a_first_program_may_be_noisier_than_what_a_search_arrives_at():
    uneven = h100(sigma=4e-4, rough=5.0)
    _, executor = ready(SimulatedSlot("a", uneven), paired=0.0)
    spreads = [
        statistics.stdev(values_with(executor, dict(starts(uneven, regime)), range(300)))
        for regime in (Regime.EARLY, Regime.MID, Regime.LATE)
    ]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] == pytest.approx(5 * 4e-4, rel=0.15)
    assert spreads[2] == pytest.approx(4e-4, rel=0.2)
    assert uneven.sigma_of(2.0) == pytest.approx(5 * 4e-4)  # whatever is worse than the baseline
    assert h100().sigma_of(2.0) == h100().sigma_of(0.97) == h100().sigma


def test_a_machine_that_has_just_started_and_one_that_is_shared_now_and_then_cost_some_runs_something():
    calm = h100(sigma=0.0)
    true = calm.value(BASELINE)
    most = PER_DOUBLING * math.log2(CONTENDED)
    _, executor = ready(SimulatedSlot("a", calm), faults=Faults(contended_rate=0.1, cold_start=True))
    values = values_with(executor, {}, range(400))
    lost = [value - true for value in values if value != pytest.approx(true, abs=1e-12)]
    assert values[0] > true  # the slot's first run
    assert 20 < len(lost) < 65
    assert min(lost) > 0
    assert most / 2 < max(lost) <= most


def test_a_drifting_slot_and_a_slow_one_show_in_their_results():
    plain, bad = SimulatedSlot("a", h100()), SimulatedSlot("b", h100(), drift=0.01, slowness=1.25)
    _, executor = ready(plain, bad)
    executor.start("a", spec())
    executor.start("b", spec())
    good, slow = [result.measurement for result in (*results(executor), *results(executor))]
    assert good is not None
    assert slow is not None
    assert slow.value > good.value + 0.01
    assert slow.facts["tokens_per_s"] == pytest.approx(good.facts["tokens_per_s"] / 1.25)
    assert slow.wall_s > good.wall_s


def test_a_slot_that_leaves_takes_its_run_along():
    _, executor = ready(SimulatedSlot("a", h100(), leaves_at=100.0), SimulatedSlot("b", h100(), joins_at=50.0))
    executor.start("a", spec())
    [joined] = executor.poll(1.0)
    assert isinstance(joined, SlotJoined)
    lost, left = executor.poll(1.0)
    assert isinstance(lost, RunEnded)
    assert lost.result.outcome is Outcome.LOST
    assert isinstance(left, SlotLeft)
    with pytest.raises(UserError, match="not there"):
        executor.start("a", spec())
    assert executor.poll(1000.0) == []  # the end of the lost run is no event for anybody


def test_a_run_that_is_cancelled_says_so_once():
    _, executor = ready()
    executor.start("a", spec())
    executor.cancel("t1")
    [result] = results(executor)
    assert result.outcome is Outcome.CANCELLED
    assert executor.poll(1000.0) == []


# ---- slow proposers ----


def request(files: dict[str, str] | None = None) -> Request:
    return Request("h100-80gb", "base", files or {PATH: program({})}, 2, frozenset(), Direction.MINIMIZE)


def test_an_answer_comes_when_its_time_has():
    clock = VirtualClock()
    asker = VirtualAsker(Nudge(), clock, latency_s=60.0)
    asker.ask(request())
    assert asker.answers() == []
    assert asker.in_flight()
    assert asker.pace("h100-80gb").asked == 2
    clock.advance()
    [answer] = asker.answers()
    assert 30.0 <= answer.seconds <= 90.0
    assert answer.ideas
    assert not asker.in_flight()
    assert asker.pace("h100-80gb").asked == 0


def test_a_proposer_without_latency_answers_at_once_and_its_failures_are_said():
    clock = VirtualClock()
    asker = VirtualAsker(Nudge(), clock)
    asker.ask(request({"other.py": ""}))
    [answer] = asker.answers()
    assert answer.failure == "KeyError: 'train.py'"
    assert asker.notes() == ["proposer nudge failed and is asked again later: KeyError: 'train.py'"]
    assert asker.pace("h100-80gb").rests
    clock.advance()
    assert not asker.pace("h100-80gb").rests
    asker.tell(lambda: Told("h100-80gb", {}["gone"], Outcome.CRASHED, None))
    assert asker.notes() == ["proposer nudge could not be told of a run: KeyError: 'gone'"]


class Several(Nudge):
    """A proposer that works on three asks at once; what an idea costs is known."""

    name = "several"
    parallel = 3
    limit_s = 600.0

    def ask(self, request: Request) -> list[Idea]:
        return [replace(idea, cost_usd=0.5) for idea in super().ask(request)]


def seconds_of(asker: VirtualAsker, clock: VirtualClock) -> list[tuple[float, int]]:
    """When answers come, in seconds from now, and for how many proposals each."""
    began, found = clock(), list[tuple[float, int]]()
    while asker.in_flight():
        found += [(clock() - began, answer.request.count) for answer in asker.answers()]
        clock.advance()
    return found


def test_several_asks_at_once_take_as_long_as_one_and_more_than_that_wait():
    clock = VirtualClock()
    asker = VirtualAsker(Several(), clock, latency_s=100.0)
    asker.ask(replace(request(), count=7))
    assert asker.pace("h100-80gb").asked == 7
    found = seconds_of(asker, clock)
    assert [count for _, count in found] == [1] * 7
    assert found[2][0] <= 150.0
    assert 150.0 <= found[-1][0] <= 450.0
    assert asker.pace("h100-80gb").proposal_s == pytest.approx(100.0, rel=0.5)


def test_an_ask_that_hangs_is_given_up_on_the_virtual_clock_as_well():
    clock = VirtualClock()
    asker = VirtualAsker(Several(), clock, latency_s=100.0, hang_rate=1.0)
    asker.ask(replace(request(), count=3))
    clock.advance()
    assert clock() == pytest.approx(VirtualClock()() + 600.0)
    assert [answer.failure for answer in asker.answers()] == ["no answer within 600 s"] * 3
    assert not asker.in_flight()
    assert asker.pace("h100-80gb").rests
    clock.advance()  # to the end of the profile's pause
    clock.advance()  # to the end of the break
    assert clock() == pytest.approx(VirtualClock()() + 600.0 + BREAK_S[0])
    assert asker.pace("h100-80gb").places == 1


def test_an_answer_that_comes_after_its_limit_costs_what_it_cost():
    clock = VirtualClock()
    asker = VirtualAsker(Several(), clock, latency_s=2000.0)
    asker.ask(replace(request(), count=3))
    answers: list[Answer] = []
    while clock.advance():
        answers += asker.answers()
    assert [answer.failure for answer in answers[:3]] == ["no answer within 600 s"] * 3
    late = [idea for answer in answers[3:] for idea in answer.ideas]
    assert late
    for dropped in late:
        assert isinstance(dropped, NoIdea)
        assert (dropped.cost_usd, dropped.reason.partition(",")[0]) == (0.5, "it came too late")


# ---- the repository in memory ----

CODE = """\
LR = 0.04  # in [0.001, 1.0] log: step size
DEPTH = 8  # in [1, 24]: layers


def one():
    return 1


def two():
    return 2


def three():
    return 3
"""


def git(path: Path) -> Ratchet:
    return Ratchet.create(path / "git", {"train.py": CODE, "notes.md": "by hand\n"}, message="base\n", at=1.0)


def memory(path: Path) -> Ratchet:
    return MemoryRatchet(path / "memory", {"train.py": CODE, "notes.md": "by hand\n"}, at=1.0)


@pytest.fixture(params=[git, memory], ids=["git", "memory"])
def repo(request: pytest.FixtureRequest, tmp_path: Path) -> Ratchet:
    make: Callable[[Path], Ratchet] = request.param
    return make(tmp_path)


def edited(repo: Ratchet, base: str, *edits: tuple[str, str], at: float = 2.0) -> str:
    old = repo.read(base, "train.py")
    new = old
    for before, after in edits:
        assert before in new
        new = new.replace(before, after)
    patch = unified_diff("train.py", old, new)
    return repo.commit_patch(base, patch, editable=["train.py"], message=str(edits), at=at)


def test_programs_become_commits_and_ratchets_move_alike_in_git_and_in_memory(repo: Ratchet):
    main = repo.resolve("main")
    repo.start("h100", main)
    repo.start("h100", main)
    assert repo.head("h100") == main
    assert repo.head("other") is None
    one = edited(repo, main, ("LR = 0.04", "LR = 0.05"))
    assert edited(repo, main, ("LR = 0.04", "LR = 0.05")) == one
    repo.keep("c0001", one)
    assert repo.resolve("c0001") == one
    assert repo.parents(one) == [main]
    assert repo.changed(main, one) == ["train.py"]
    assert repo.files(one, ["notes.md"]) == {"notes.md": "by hand\n"}
    step = repo.step("h100", expected=main, candidate_commit=one, message="win", at=3.0)
    assert repo.step("h100", expected=main, candidate_commit=one, message="win", at=3.0) == step
    assert repo.head("h100") == repo.resolve("ratchet/h100") == step
    assert repo.parents(step) == [main, one]
    assert repo.changed(one, step) == []
    again = repo.commit_patch(main, repo.diff(main, one), editable=["train.py"], message="again", at=2.0)
    assert repo.read(again, "train.py") == repo.read(one, "train.py")
    texts = {"notes.md": "new\n", "more/deep.txt": "x"}
    files = repo.commit_files(main, texts, message="files", at=4.0)
    assert repo.changed(main, files) == ["more/deep.txt", "notes.md"]
    assert repo.files(files, ["more/deep.txt", "train.py"]) == {"more/deep.txt": "x", "train.py": CODE}


def test_what_git_refuses_is_refused_in_memory(repo: Ratchet):
    main = repo.resolve("main")
    one = edited(repo, main, ("LR = 0.04", "LR = 0.05"))
    two = edited(repo, main, ("DEPTH = 8", "DEPTH = 9"))
    repo.start("h100", main)
    repo.keep("c0001", one)
    with pytest.raises(Moved, match="stands at"):
        repo.start("h100", one)
    with pytest.raises(Moved, match="stands at"):
        repo.keep("c0001", two)
    with pytest.raises(Empty, match="a step must change something"):
        repo.step("h100", expected=main, candidate_commit=main, message="none", at=3.0)
    repo.step("h100", expected=main, candidate_commit=one, message="win", at=3.0)
    with pytest.raises(Moved, match="stands at"):
        repo.step("h100", expected=main, candidate_commit=two, message="win", at=3.0)
    with pytest.raises(UserError, match="no commit"):
        repo.resolve("c0002")
    with pytest.raises(UserError, match="no file"):
        repo.read(main, "missing.py")
    with pytest.raises(UserError, match="cannot name a ref"):
        repo.start("../x", main)


NEW_FILE = "--- /dev/null\n+++ b/other.py\n@@ -0,0 +1 @@\n+x = 1\n"


@pytest.mark.parametrize(
    ("patch", "error"),
    [
        ("", Empty),
        ("no patch at all\n", PatchError),
        (unified_diff("train.py", CODE.replace("8", "7"), CODE.replace("8", "6")), PatchError),  # another context
        (unified_diff("notes.md", "by hand\n", "by machine\n"), PatchError),  # not editable
        (NEW_FILE, PatchError),
        ("--- a/train.py\n+++ b/train.py\n@@ -1 +1 @@\n LR = 0.04  # in [0.001, 1.0] log: step size\n", PatchError),
        ("--- a/notes.md\n+++ /dev/null\n@@ -1 +0,0 @@\n-by hand\n", PatchError),
        ("--- a/train.py\n+++ b/train.py\n@@ -1,9 +1 @@\n-LR = 0.04\n", PatchError),  # fewer lines than it says
        (f"diff --git a/x b/x\nGIT binary patch\n{NEW_FILE}", PatchError),
    ],
)
def test_patches_that_do_not_fit_are_refused_alike(repo: Ratchet, patch: str, error: type[Exception]):
    with pytest.raises(error):
        repo.commit_patch("main", patch, editable=["train.py"], message="m", at=2.0)


def test_a_patch_of_several_hunks_applies_where_its_lines_have_moved_to(repo: Ratchet):
    main = repo.resolve("main")
    patch = unified_diff("train.py", CODE, CODE.replace("LR = 0.04", "LR = 0.05").replace("return 3", "return 4"))
    longer = edited(repo, main, ("def two", "# a comment\n# of two lines\ndef two"))
    both = repo.commit_patch(longer, patch, editable=["train.py"], message="m", at=3.0)
    text = repo.read(both, "train.py")
    assert text == repo.read(longer, "train.py").replace("LR = 0.04", "LR = 0.05").replace("return 3", "return 4")


def test_random_edits_apply_alike_in_git_and_in_memory(tmp_path: Path):
    chance = random.Random(3)
    both = (git(tmp_path), memory(tmp_path))
    lines = [f"line {number % 4}\n" for number in range(40)]
    for number in range(25):
        before = "".join(lines)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(lines))
            lines[place : place + chance.randint(0, 2)] = [f"line {chance.randrange(9)}\n"] * chance.randint(0, 3)
        after = "".join(lines).removesuffix("\n" if chance.random() < 0.3 else "")
        lines = after.splitlines(keepends=True)
        patch = unified_diff("code.txt", before, after)
        if before == after:
            continue
        texts: list[str] = []
        for one in both:
            base = one.commit_files("main", {"code.txt": before}, message="b", at=float(number))
            commit = one.commit_patch(base, patch, editable=["code.txt"], message="m", at=float(number))
            texts.append(one.read(commit, "code.txt"))
        assert texts == [after, after]


def test_changes_are_carried_alike_in_git_and_in_memory(repo: Ratchet):
    main = repo.resolve("main")
    knob = edited(repo, main, ("LR = 0.04", "LR = 0.05"))
    code = edited(repo, main, ("return 3", "return 30"))

    def carried(candidate: str, onto: str) -> str:
        patch = repo.carry(candidate, base=main, onto=onto, editable=["train.py"])
        return repo.read(repo.commit_patch(onto, patch, editable=["train.py"], message="m", at=5.0), "train.py")

    depth = edited(repo, main, ("DEPTH = 8", "DEPTH = 9"))
    assert "LR = 0.05" in carried(knob, depth)
    assert "DEPTH = 9" in carried(knob, depth)
    first = edited(repo, main, ("return 1", "return 10"))
    assert "return 10" in carried(code, first)
    assert "return 30" in carried(code, first)
    with pytest.raises(Conflict, match=r"LR was 0\.04"):
        carried(knob, edited(repo, main, ("LR = 0.04", "LR = 0.06")))
    with pytest.raises(Conflict, match="both sides changed"):
        carried(code, edited(repo, main, ("return 3", "return 31")))
    with pytest.raises(Empty):
        carried(knob, edited(repo, main, ("LR = 0.04", "LR = 0.05"), ("DEPTH = 8", "DEPTH = 9")))


# ---- whole studies ----


def told(done: Simulated) -> tuple[object, ...]:
    return done.reason, done.seconds, done.profiles, done.trials, done.outcomes, done.idle, done.aside


def study(hours: float = 3.0, slots: list[SimulatedSlot] | None = None, **options: object) -> Simulated:
    more: dict[str, object] = {"proposers": [Nudge()], **options}
    return simulate(slots or fleet(h100(), 8), hours=hours, **more)  # pyright: ignore[reportArgumentType]


def test_a_simulated_study_gains_and_knows_what_it_gained():
    done = study(4.0)
    found = done.profiles["h100-80gb"]
    assert done.reason.startswith("stopped at once")
    assert done.seconds == 4 * 3600
    assert found.slot_hours == 32.0
    assert found.gain > 0.01
    assert found.start == pytest.approx(0.9979)
    assert found.end == found.champion(done.seconds) == found.moves[-1].after
    assert found.champion(0.0) == found.start
    assert found.false_keeps == sum(move.after >= move.before for move in found.moves)
    assert all(one.after == other.before for one, other in itertools.pairwise(found.moves))
    assert found.moves[0].slot_hours == pytest.approx(8 * found.moves[0].at_s / 3600)
    assert done.idle < 0.05
    assert done.trials[Purpose.BASELINE] == 3
    assert sum(done.trials.values()) == sum(done.outcomes.values()) > 300


def test_the_same_seed_gives_the_same_study_and_another_one_another():
    assert told(study(1.5, seed=5)) == told(study(1.5, seed=5))
    assert told(study(1.5, seed=5)) != told(study(1.5, seed=6))


def test_a_study_ends_by_its_number_of_trials_as_well():
    done = study(max_trials=12)
    assert done.reason == "all 12 trials are done"
    assert done.seconds < 3 * 3600
    assert done.trials[Purpose.SCREEN] >= 12


def test_settings_reach_the_study():
    assert study(0.5, options={"judge": {"rule": "greedy"}}).trials.get(Purpose.RACE, 0) == 0
    assert study(0.5, options={"judge": {"baseline_runs": 5}}).trials[Purpose.BASELINE] == 5


def test_slots_that_come_and_go_cost_their_runs_and_nothing_else():
    steady = [SimulatedSlot("steady", h100())]
    moody = [SimulatedSlot(f"m{i}", h100(), joins_at=300.0 * i, leaves_at=4000.0 + 500 * i) for i in range(6)]
    done = study(3.0, [*steady, *moody])
    assert done.outcomes[Outcome.MEASURED] > 50
    assert done.idle < 0.1
    assert done.profiles["h100-80gb"].slot_hours == pytest.approx(3 + sum(4000 + 200 * i for i in range(6)) / 3600)
    lost = [state for state in done.study.trials.values() if state.losses]
    assert 0 < len(lost) <= 6


def test_a_slow_proposer_leaves_slots_idle_and_time_does_not_creep():
    quick, slow = study(2.0), study(2.0, latency_s=1500.0)
    assert quick.idle < 0.05 < slow.idle
    assert sum(slow.trials.values()) < sum(quick.trials.values())


@pytest.mark.parametrize(
    ("parallel", "failing", "hanging"), [(8, 0.0, 0.0), (8, 0.5, 0.0), (8, 0.0, 0.5), (32, 0.0, 0.0)]
)
def test_no_slot_waits_for_a_proposer_that_takes_minutes_fails_or_hangs(parallel: int, failing: float, hanging: float):
    found = Task(parallel, failing=failing, hanging=hanging, hours=1.5).run()
    assert found.idle < 0.01
    assert found.idle_later < 0.01
    assert found.share > 0.05  # and its ideas are tried


@pytest.mark.parametrize(("failing", "hanging"), [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_no_slot_waits_for_a_proposer_that_gives_nothing_or_little(failing: float, hanging: float):
    found = Task(8, failing=failing, hanging=hanging, hours=1.5).run()
    assert found.idle < 0.01
    assert (found.share > 0) == (failing < 1 and hanging < 1)


def test_a_proposer_that_takes_minutes_feeds_the_slots_alone_when_it_works_on_enough_at_once():
    found = Task(16, alone=True, hours=1.0).run()
    assert found.idle_later < 0.01 < found.idle  # before it has answered for the first time there is nothing to run
    assert Task(4, alone=True, hours=1.0).run().idle_later > 0.3


def test_crashes_and_losses_are_survived():
    done = study(3.0, faults=Faults(crash_rate=0.3, loss_rate=0.1))
    crashed, measured = done.outcomes[Outcome.CRASHED], done.outcomes[Outcome.MEASURED]
    assert 0.15 < crashed / (crashed + measured) < 0.5
    assert any(state.losses for state in done.study.trials.values())
    assert done.profiles["h100-80gb"].gain > 0


def test_a_drifting_slot_is_set_aside():
    done = study(6.0, [*fleet(h100(), 6), SimulatedSlot("bad", h100(), drift=0.02)])
    runs = Counter(state.slot for state in done.study.trials.values())
    usual = min(count for slot, count in runs.items() if slot != "bad")
    assert runs["bad"] < 0.8 * usual
    assert max(runs.values()) < 1.2 * usual
    assert set(done.aside) <= {"bad"}


def test_two_profiles_keep_ratchets_of_their_own():
    done = study(2.0, [*fleet(h100(), 4), *fleet(family(h100(), correlation=0.0), 4)])
    assert set(done.profiles) == {"h100-80gb", "h100-b-80gb"}
    assert all(found.slot_hours == 8.0 for found in done.profiles.values())


def test_an_exhausted_program_gains_nothing_that_matters():
    card: Surrogate = h100()
    done = study(2.0, start=starts(card, Regime.EXHAUSTED))
    assert abs(done.profiles["h100-80gb"].gain) < card.sigma
