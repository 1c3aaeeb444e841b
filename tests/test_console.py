"""The live view and the plain lines: rendered for real, into strings and into a pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import histories
import pytest
from histories import CPU, History, Idea, Simulation, realistic
from rich.cells import cell_len
from rich.console import Console as RichConsole

from raysearch import tally
from raysearch.console import Console, Frame, share_rows, snapshot, told, view
from raysearch.model import Direction, Dropped, Measurement, Outcome, Record, TrialFinished
from raysearch.schedule import Slot
from raysearch.study import Settings, Study

HOSTILE = (
    "[bold red]markup[/] :smile: \x1b[2J\x1b[1;1H\x1b]0;owned\x07 tab\tline\nbreak \u202e \x9b31m 深い学習 "
    + "long " * 60
)
SLOTS = [Slot("cpu-0", "cpu"), Slot("cpu-1", "cpu"), Slot("gpu-0", "rtx3060-12gb")]


@dataclass(frozen=True)
class Progress:
    """What an executor reports of a slot."""

    phase: str
    progress: float
    seconds_left: float | None


PROGRESS = {"cpu-0": Progress("train", 0.5, 12.0), "gpu-0": Progress("first_step", 0.0, None)}


@pytest.fixture(scope="module")
def study() -> Study:
    return realistic().study


def test_an_answer_that_is_no_proposal_is_told_in_a_line():
    study = Study(Settings())
    dropped = Dropped("cpu", "chat", "no block matches the file", model="a-model")
    assert told(study, Record(1, 0.0, dropped), "m") == "chat (a-model): no proposal: no block matches the file"
    assert told(study, Record(1, 0.0, Dropped("cpu", "agent", "why")), "m") == "agent: no proposal: why"


def test_a_throttled_trial_is_marked_where_it_ends():
    measured = Measurement(1.0, wall_s=26.0, training_s=20.0, facts={"throttled_share": 0.42, "throttled": 1.0})
    ended = Record(1, 0.0, TrialFinished("c0001-screen", 1, Outcome.MEASURED, measurement=measured))
    line = told(Study(Settings()), ended, "val_bpb")
    assert line == (
        "done c0001-screen: val_bpb 1.0000, 20.0 s of training in 26.0 s, throttled for 42 % of the training"
    )


def drawn(
    study: Study, *, width: int = 80, height: int = 24, slots: Sequence[Slot] = tuple(SLOTS), draining: bool = False
) -> str:
    """The live view as plain text."""
    frame = Frame(study.last_at + 5, list(slots), dict(PROGRESS), draining)
    terminal = RichConsole(file=io.StringIO(), width=width, height=height, color_system=None, force_terminal=False)
    with terminal.capture() as captured:
        terminal.print(view(snapshot(study, name="demo", metric="val_bpb"), frame, width=width, height=height))
    return captured.get()


def lead(study: Study) -> str:
    """What the view says of the CPU's champion, in four decimals."""
    at = tally.standing(study, "cpu")
    assert at.value is not None
    assert at.baseline is not None
    assert at.noise is not None
    better = f"{at.baseline - at.value:.4f} better than the baseline {at.baseline:.4f}"
    return f"cpu  {at.value:.4f} ± {at.noise.sigma:.4f}, {better}, {len(at.steps)} wins"


def replayed(records: Sequence[Record], settings: Settings, stream: io.StringIO) -> None:
    """Shows a history on a stream, event by event, as a coordinator would."""
    study = Study(settings)
    console = Console(study, name="demo", metric="val_bpb", stream=stream, clock=lambda: histories.START)
    for record in records:
        study.apply(record)
        console.record(record)
        console.refresh(record.at, slots=SLOTS, progress={})
    console.close()


# ---- plain lines ----


@pytest.fixture(scope="module")
def lines() -> list[str]:
    history = realistic()
    stream = io.StringIO()
    replayed(history.records, history.settings, stream)
    return stream.getvalue().splitlines()


def test_without_a_terminal_each_event_is_a_line_with_its_time(lines: list[str]) -> None:
    assert all(re.match(r"\+\d\d:\d\d:\d\d \S", line) for line in lines)
    assert "\x1b" not in "".join(lines)
    kinds = {line.split(" ")[1] for line in lines}
    assert {"session", "profile", "start", "done", "verdict", "ratchet", "refused", "crashed", "out"} <= kinds


def test_a_line_tells_what_started_where_and_why(lines: list[str]) -> None:
    said = "MATRIX_LR 0.005 → 0.02: the learning rate of the matrices looks timid"
    assert any(f"start c0001-screen on cpu-1 (screen): {said}" in line for line in lines)


def test_a_failed_trial_shows_its_reason_and_the_last_line_of_its_log(lines: list[str]) -> None:
    (line,) = [line for line in lines if "gelu2" in line]
    assert line.endswith("exit code 1; last line: NameError: name 'gelu2' is not defined")


def test_a_move_of_the_ratchet_says_how_much_better_it_is(lines: list[str], study: Study) -> None:
    moves = [line for line in lines if " ratchet cpu moved to " in line]
    assert len(moves) == len(study.lane("cpu").wins) >= 3
    assert all(re.search(r"val_bpb \d\.\d{4}, 0\.\d{4} better than the baseline: ", line) for line in moves)


def test_a_note_is_a_line_too() -> None:
    stream = io.StringIO()
    times = iter([1000.0, 1083.0])
    console = Console(Study(Settings()), name="s", metric="m", stream=stream, clock=lambda: next(times))
    console.note("slot gpu-1 left:\nits node is gone")
    assert stream.getvalue() == "+00:01:23 slot gpu-1 left: its node is gone\n"


def hostile_history() -> History:
    history = History(Settings(max_trials=6))
    history.start(CPU)
    ideas = [
        Idea(HOSTILE, -0.3),
        Idea(HOSTILE, outcome=Outcome.CRASHED, reason=HOSTILE, log_tail=HOSTILE),
        Idea(HOSTILE, refused=HOSTILE),
        Idea(HOSTILE, 0.3),
    ]
    Simulation(history, {"cpu": ideas}, CPU).run(120.0)
    return history


def test_hostile_text_stays_on_its_line_without_control_characters() -> None:
    history = hostile_history()
    stream = io.StringIO()
    replayed(history.records, history.settings, stream)
    text = stream.getvalue()
    assert "[bold red]markup[/] :smile:" in text
    assert not any(char in text for char in "\x1b\x07\x9b\u202e\t")
    assert all(line.startswith("+00:") for line in text.splitlines())


def test_nothing_is_shown_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    history = History()
    console = Console(history.study, name="s", metric="m", clock=lambda: 0.0)
    history.listener = console.record
    history.start(CPU)
    console.note("hello")
    console.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 3


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def write(self, s: str, /) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_stream_that_is_gone_ends_the_show_and_not_the_study() -> None:
    history = realistic(until_s=60)
    replayed(history.records, history.settings, Gone())


# ---- the live view ----


def test_the_view_fits_a_terminal_of_80_by_24_with_all_its_parts(study: Study) -> None:
    text = drawn(study)
    lines = text.splitlines()
    assert 20 <= len(lines) <= 23
    assert max(cell_len(line) for line in lines) <= 80
    assert [line.split()[0] for line in lines if "──" in line] == ["slots", "champions", "last"]
    assert lines[0].startswith("raysearch demo  val_bpb, lower is better")
    assert re.search(r" 11:\d\d$", lines[0])
    assert lead(study) in lines
    assert re.search(r"^candidates \d+ of 200 · trials \d+ · queued \d · refused 1$", text, re.M)
    assert "Ctrl-C drains" in lines[-1]


def test_a_slot_shows_its_trial_phase_bar_and_time_left_or_that_it_is_idle(study: Study) -> None:
    lines = drawn(study, slots=[*SLOTS, Slot("gpu-1", "rtx3060-12gb")], width=120).splitlines()
    cpu, other, gpu, idle = lines[2:6]
    candidate = {state.slot: state.trial.candidate for state in study.running.values()}
    assert re.match(rf"cpu-0 {candidate['cpu-0']} screen\s+train\s+━+.*0:12\s+\S", cpu)
    assert re.match(rf"cpu-1 {candidate['cpu-1']} screen\s+starting", other)  # has not reported yet
    assert re.match(rf"gpu-0 {candidate['gpu-0']} race\s+first step", gpu)
    assert "DEPTH 8 → 6" in gpu
    assert re.match(r"gpu-1 idle$", idle.rstrip())


def test_the_last_trials_show_verdict_delta_and_hypothesis_newest_first(study: Study) -> None:
    lines = drawn(study, width=140, height=40).splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("last trials"))
    shown = lines[start + 1 : -2]
    states = [study.candidate(line.split()[0]) for line in shown]
    newest_first = [line.state.id for line in reversed(tally.lines(study)) if line.runs]
    assert [state.id for state in states] == newest_first[: len(states)]
    discarded = [(state, line) for state, line in zip(states, shown, strict=True) if " discard " in line]
    assert len(discarded) > 5
    for state, line in discarded:
        assert state.delta is not None
        assert f" {state.delta:+.4f} ± 0.0" in line
        assert line.rstrip().endswith(state.candidate.proposal.hypothesis)
    assert any(
        re.match(r"c\d{4} rtx3060-12gb\s+retest\s+1\.\d{4,5} -0\.00\d{2,3} ± 0\.00\d{2,3} DEPTH 8 → 6", line)
        for line in shown
    )
    assert any(re.match(r"c\d{4} cpu\s+crashed\s+–\s+exit code 1: TOTAL_BATCH_SIZE", line) for line in shown)


@pytest.mark.parametrize("width", [40, 60, 80, 140, 250])
@pytest.mark.parametrize("height", [12, 16, 24, 40, 60])
@pytest.mark.parametrize("slots", [0, 1, 3, 8, 40])
def test_the_view_fits_terminals_of_all_sizes(study: Study, width: int, height: int, slots: int) -> None:
    text = drawn(study, width=width, height=height, slots=[Slot(f"gpu-{n}", "rtx3060-12gb") for n in range(slots)])
    lines = text.splitlines()
    assert len(lines) <= height - 1
    assert max(cell_len(line) for line in lines) <= width


@pytest.mark.parametrize("profiles", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("slots", [0, 1, 4, 64])
def test_rows_are_shared_without_a_line_too_many(profiles: int, slots: int) -> None:
    for height in range(11, 80):
        rows = share_rows(height, slots=slots, profiles=profiles)
        champions = rows.champions * (1 + rows.wins)
        assert 6 + rows.slots + champions + rows.trials <= height - 1
        assert min(rows.slots, rows.champions, rows.trials) >= 1


def test_more_slots_than_lines_are_summed_up(study: Study) -> None:
    text = drawn(study, slots=[*SLOTS, *(Slot(f"gpu-{n}", "rtx3060-12gb") for n in range(1, 30))])
    assert "… 25 more slots: 0 busy, 25 idle" in text


def test_a_new_study_says_what_it_waits_for() -> None:
    text = drawn(Study(Settings()), slots=[])
    assert "no slot yet" in text
    assert "no profile yet" in text
    assert "no trial has finished yet" in text
    assert "baseline is being measured" in drawn(realistic(until_s=10).study)
    assert "the baseline (1 of 3 runs)" in drawn(realistic(until_s=27.0).study)


def test_draining_is_said(study: Study) -> None:
    assert "draining" in drawn(study, draining=True).splitlines()[-1]


def test_a_maximised_metric_gets_better_by_going_up() -> None:
    history = History(Settings(max_trials=2, direction=Direction.MAXIMIZE))
    history.start(CPU)
    Simulation(history, {"cpu": [Idea("wider", 0.4), Idea("narrower", -0.4)]}, CPU).run()
    text = drawn(history.study)
    assert "higher is better" in text
    assert re.search(r"better than the baseline 3\.\d+, 1 win$", text, re.M)
    found = snapshot(history.study, name="s", metric="m")
    styles = {cells[0].plain: str(cells[4].spans[0].style) for cells in found.trials if cells[4].plain}
    assert styles == {"c0001": "green", "c0002": "red"}


def test_hostile_text_is_neither_markup_nor_control_in_the_view() -> None:
    history = hostile_history()
    for width in (40, 80, 200):
        text = drawn(history.study, width=width)
        assert not any(char in text for char in "\x1b\x07\x9b\u202e\t")
        assert max(cell_len(line) for line in text.splitlines()) <= width
        assert len(text.splitlines()) <= 23
    assert "[bold red]markup[/] :smile:" in drawn(history.study, width=200)


# ---- on a pseudo-terminal ----


Play = Callable[[TextIO], None]


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Play], str]:
    """Calls a function with a stream on a terminal of 80 by 24 and gives what was written there."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")

    def shown(play: Play) -> str:
        ours, theirs = pty.openpty()
        chunks: list[bytes] = []

        def read() -> None:
            try:
                while chunk := os.read(ours, 65536):
                    chunks.append(chunk)
            except OSError:  # how Linux says that the other end was closed
                pass

        reader = threading.Thread(target=read)
        reader.start()
        with os.fdopen(theirs, "w", encoding="utf-8") as stream:
            play(stream)
        reader.join()
        os.close(ours)
        return b"".join(chunks).decode()

    return shown


def test_a_terminal_gets_a_live_view_that_stays_when_it_ends(on_terminal: Callable[[Play], str], study: Study) -> None:
    def play(stream: TextIO) -> None:
        with Console(study, name="demo", metric="val_bpb", stream=stream, clock=lambda: study.last_at) as console:
            assert console.is_live
            for tick in range(5):
                console.refresh(study.last_at + tick, slots=SLOTS, progress=PROGRESS)

    text = on_terminal(play)
    assert "\x1b[?1049h" not in text  # no second screen that would take the end with it
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back
    last = re.sub(r"\x1b\[[\d;]*m", "", text[text.rindex("raysearch demo") :])
    assert lead(study) in last
    assert "Ctrl-C drains" in last


def test_the_live_view_is_drawn_at_most_four_times_a_second(on_terminal: Callable[[Play], str], study: Study) -> None:
    def play(stream: TextIO) -> None:
        console = Console(study, name="demo", metric="val_bpb", stream=stream, clock=lambda: study.last_at)
        for tick in range(200):  # two seconds
            console.refresh(study.last_at + tick / 100, slots=SLOTS, progress=PROGRESS)
        console.close()
        console.close()

    assert 8 <= on_terminal(play).count("raysearch demo") <= 10


def test_notes_and_what_others_print_go_above_the_live_view(
    on_terminal: Callable[[Play], str], study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    def play(stream: TextIO) -> None:
        with Console(study, name="demo", metric="val_bpb", stream=stream, clock=lambda: study.last_at) as console:
            console.refresh(study.last_at, slots=SLOTS, progress=PROGRESS)
            console.note("slot gpu-1 left: [bold]its node is gone[/] \x1b[2J")
            sys.stderr.write("a warning of a library\n")
            sys.stdout.write("data\n")
            console.refresh(study.last_at + 1, slots=SLOTS, progress=PROGRESS)

    text = on_terminal(play)
    assert "+00:00:00 slot gpu-1 left: [bold]its node is gone[/]" in text
    assert "\x1b[2J" not in text
    assert text.index("its node is gone") < text.index("a warning of a library") < text.rindex("raysearch demo")
    assert capsys.readouterr() == ("data\n", "")


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    on_terminal: Callable[[Play], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")

    def play(stream: TextIO) -> None:
        console = Console(Study(Settings()), name="s", metric="m", stream=stream, clock=lambda: 0.0)
        assert not console.is_live
        console.note("hello")
        console.close()

    assert on_terminal(play) == "+00:00:00 hello\r\n"


def test_a_refresh_without_a_new_event_counts_nothing_again(on_terminal: Callable[[Play], str]) -> None:
    study = histories.long_history(3000).study
    calls: list[str] = []
    value = study.value

    def counted(candidate_id: str) -> float | None:
        calls.append(candidate_id)
        return value(candidate_id)

    study.value = counted

    def play(stream: TextIO) -> None:
        console = Console(study, name="demo", metric="val_bpb", stream=stream, clock=lambda: study.last_at)
        for tick in range(8):
            console.refresh(study.last_at + tick, slots=SLOTS, progress=PROGRESS)
        console.close()

    begin = time.process_time()
    on_terminal(play)
    assert time.process_time() - begin < 2.0
    assert len(calls) < 2 * len(study.candidates)
