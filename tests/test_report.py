"""What is written of a study: results.tsv, the summary, progress.png and the status."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

import histories
import pandas as pd
import pytest
from histories import CPU, CPU_IDEAS, GPU, History, Idea, Simulation, realistic
from PIL import Image
from told import TRIAL_S, Told, ready

from raysearch import judge, report, schedule, tally, yields
from raysearch.model import (
    Direction,
    Dropped,
    Measurement,
    Operator,
    Outcome,
    Purpose,
    Refused,
    Trial,
    TrialFinished,
    TrialStarted,
    Verdict,
)
from raysearch.study import Settings, Study
from raysearch.tally import Fate
from raysearch.yields import Author, Worth, Yield

HOSTILE = (
    '"quoted\tand\nbroken\x1b[2J\x1b]0;owned\x07 [bold]| `code` <script> $\\frac{ 深い \u202e \ud800 ' + "long " * 200
)


@pytest.fixture(scope="module")
def study() -> Study:
    return realistic().study


def with_ideas(*ideas: Idea, direction: Direction = Direction.MINIMIZE, trials: int = 50) -> Study:
    history = History(Settings(max_trials=trials, direction=direction))
    history.start(CPU)
    Simulation(history, {CPU.profile.slug: ideas}, CPU).run()
    return history.study


def rows_of(study: Study) -> list[dict[str, str]]:
    return report.results_rows(study, metric="val_bpb")


# ---- results.tsv ----


def test_the_history_has_all_that_is_to_be_told(study: Study) -> None:
    fates = {line.fate for line in tally.lines(study)}
    assert fates == set(Fate)
    outcomes = {run.outcome for run in study.trials.values()}
    assert {Outcome.CRASHED, Outcome.OUT_OF_MEMORY, Outcome.INVALID, Outcome.MEASURED} <= outcomes
    assert study.refused
    assert len(study.running) == 3


def test_results_begin_with_the_five_columns_of_autoresearch(study: Study, tmp_path: Path) -> None:
    report.write_results(study, tmp_path / "results.tsv", metric="val_bpb")
    lines = (tmp_path / "results.tsv").read_text().splitlines()
    assert lines[0].split("\t")[:5] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    for line in lines[1:]:
        commit, value, memory_gb, status, description = line.split("\t")[:5]
        assert len(commit) == 7
        assert int(commit, 16) >= 0
        assert len(value.split(".")[1]) == 6
        assert len(memory_gb.split(".")[1]) == 1
        assert status in ("keep", "discard", "crash")
        assert (value == "0.000000") == (status == "crash")
        assert description


def test_every_line_of_results_has_the_columns_of_the_header(study: Study, tmp_path: Path) -> None:
    report.write_results(study, tmp_path / "results.tsv", metric="val_bpb")
    lines = (tmp_path / "results.tsv").read_text().split("\n")
    assert lines.pop() == ""
    assert len({line.count("\t") for line in lines}) == 1
    assert len(lines) == 1 + len(rows_of(study))


def test_results_hold_the_baselines_and_every_settled_candidate_that_was_run_once(study: Study) -> None:
    names = [row["candidate"] for row in rows_of(study)]
    settled = [line.state.candidate.id for line in tally.lines(study) if line.fate.is_settled and line.runs]
    assert names == settled
    assert len(names) == len(set(names))
    assert {"cpu-base", "rtx3060-12gb-base"} <= set(names)
    assert len({row["profile"] for row in rows_of(study)}) == 2


def test_a_candidate_is_kept_when_its_tree_is_on_the_ratchet_and_only_then(study: Study) -> None:
    kept = {row["candidate"]: row["commit"] for row in rows_of(study) if row["status"] == "keep"}
    on_ratchets = {
        name: commit[:7]
        for lane in study.lanes.values()
        for name, commit in [
            (lane.base, study.candidate(lane.base).candidate.commit),
            *((win.candidate, win.commit) for win in lane.wins),
        ]
    }
    assert kept == on_ratchets


def test_a_confirmed_candidate_that_was_carried_says_by_which(study: Study) -> None:
    carried = [row for row in rows_of(study) if row["carried_by"]]
    assert carried
    for row in carried:
        assert row["status"] == "discard"
        assert row["verdict"] in ("keep", "retest")
        assert row["candidate"] in study.candidate(row["carried_by"]).candidate.proposal.carries


def test_a_failed_candidate_says_how_and_why(study: Study) -> None:
    row = next(row for row in rows_of(study) if row["outcome"] == "out_of_memory")
    assert row["status"] == "crash"
    assert "out of memory while building the model" in row["reason"]


def test_a_hostile_description_stays_in_its_cell(tmp_path: Path) -> None:
    study = with_ideas(Idea(HOSTILE, 0.3), Idea("plain", 0.3), Idea(HOSTILE, outcome=Outcome.CRASHED, reason=HOSTILE))
    report.write_results(study, tmp_path / "results.tsv", metric="val_bpb")
    text = (tmp_path / "results.tsv").read_text()
    assert not any(char in text for char in "\x1b\x07\u202e")
    table = pd.read_csv(io.StringIO(text), sep="\t")
    assert list(table["candidate"]) == [row["candidate"] for row in rows_of(study)]
    assert len(list(csv.reader(io.StringIO(text), delimiter="\t"))) == len(table) + 1
    assert table["description"].str.len().max() <= 300


def test_results_of_an_empty_study_are_a_header(tmp_path: Path) -> None:
    report.write_results(Study(Settings()), tmp_path / "results.tsv", metric="accuracy")
    (line,) = (tmp_path / "results.tsv").read_text().splitlines()
    assert line.startswith("commit\taccuracy\tmemory_gb\tstatus\tdescription\tprofile\t")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(study: Study, tmp_path: Path) -> None:
    blocked = tmp_path / "results.tsv"
    blocked.mkdir()  # a file cannot replace a folder
    with pytest.raises(OSError, match=r"results\.tsv"):
        report.write_results(study, blocked, metric="val_bpb")
    assert list(tmp_path.iterdir()) == [blocked]


# ---- the summary ----


def part(text: str, heading: str) -> str:
    return text.partition(f"\n{heading}\n")[2].split("\n## ", maxsplit=1)[0]


def test_the_summary_names_champion_noise_and_every_step(study: Study) -> None:
    text = report.summary_markdown(study, name="demo", metric="val_bpb")
    cpu = part(text, "## cpu")
    at = tally.standing(study, "cpu")
    assert at.noise is not None
    assert f"σ = {at.noise.sigma:.4f} from run to run ({round(at.noise.dof)} degrees of freedom)" in cpu
    assert f"Baseline: val_bpb {at.baseline:.4f} (mean of {at.baseline_runs} runs)" in cpu
    assert f"Champion: val_bpb {at.value:.4f}" in cpu
    assert "better (±" in cpu
    assert f"{abs(at.delta or 0) / at.noise.sigma:.1f} σ" in cpu
    assert f"Second held-out split (reported, never used to decide): {at.holdout:.4f}, baseline" in cpu
    assert "Whole evaluation set" not in cpu  # every trial is scored on it
    gpu = part(text, "## rtx3060-12gb")
    assert (
        f"Whole evaluation set (reported; a part of it decides): {tally.standing(study, 'rtx3060-12gb').whole:.4f}"
        in gpu
    )
    for step, win in enumerate(study.lane("cpu").wins, start=1):
        assert f"| {step} | `{win.commit[:7]}` | {win.candidate} | -" in cpu


def test_the_summary_counts_outcomes_fates_refusals_and_shows_the_last_line_of_a_failure(study: Study) -> None:
    text = report.summary_markdown(study, name="demo", metric="val_bpb")
    cpu = part(text, "## cpu")
    assert "1 out of memory" in cpu
    assert "3 baseline" in cpu
    assert "of the carried ones before any run" in cpu
    assert "Last line: NameError: name 'gelu2' is not defined" in cpu
    assert "- 1 × the same program as c0001" in part(text, "## Refused proposals")


def test_the_shares_of_slot_time_add_up(study: Study) -> None:
    use = tally.time_use(study, "cpu")
    known = use.training_s + use.evaluation_s + use.start_s + use.other_s + use.failed_s + use.running_s + use.idle_s
    assert known == pytest.approx(use.slot_s)
    assert use.slot_s == pytest.approx(2 * use.active_s, rel=0.01)
    measured = [run for run in study.trials.values() if run.trial.profile == "cpu" and run.measurement is not None]
    assert use.training_s == pytest.approx(20.0 * len(measured))
    assert max(use.gaps_s) < 0.1
    text = report.summary_markdown(study, name="s", metric="m").partition("## Proposers")[0]
    shares = [line for line in text.splitlines() if " % |" in line]
    assert sum(float(line.split("|")[2].rstrip("% ")) for line in shares) == pytest.approx(200.0, abs=1.0)


def test_the_time_between_a_kill_and_the_next_session_is_neither_idle_nor_a_gap() -> None:
    history = History(Settings(max_trials=12))
    history.start(CPU)
    simulation = Simulation(history, {"cpu": CPU_IDEAS}, CPU)
    simulation.run(100.0)
    known_at = history.records[-1].at
    before = tally.time_use(history.study, "cpu")
    simulation.kill(away_s=36_000)
    simulation.run()
    after = tally.time_use(history.study, "cpu")
    first, second = tally.sessions(history.study)
    assert first == pytest.approx((histories.START, known_at), abs=0.5)
    assert second[0] - first[1] >= 36_000
    assert max(after.gaps_s) < 0.2
    assert after.idle_s < before.slot_s + 60
    assert after.active_s < 1000


def test_an_idea_that_was_carried_is_one_proposal_and_one_win_of_its_proposer(study: Study) -> None:
    found = {one.proposer: one.total for one in tally.proposers(study)}
    assert set(found) == {"tune", "inbox"}
    wins = [study.candidate(win.candidate).candidate.proposal for lane in study.lanes.values() for win in lane.wins]
    assert sum(one.confirmed for one in found.values()) == len({root.id for win in wins for root in study.roots(win)})
    assert found["inbox"].proposals == 2
    assert found["inbox"].confirmed == 1
    assert all(one.confirmed <= one.screened <= one.proposals - one.refused for one in found.values())
    not_carried = [state for state in study.candidates.values() if not state.candidate.proposal.carries]
    asked = len(not_carried) - len(study.lanes) + len(study.refused) + len(study.waiting)
    assert sum(one.proposals for one in found.values()) == asked


# ---- economics ----


def paid(told: Told) -> None:
    """A win and a discard of a model that is paid for, two answers of it that came to nothing, a discard of tune."""
    win = told.propose(proposer="chat", model="m", operator=Operator.DRAFT, **PRICE)
    told.materialise(win)
    told.promise(win)
    told.win(win)
    lost = told.propose(proposer="chat", model="m", **PRICE)
    told.materialise(lost)
    told.run(f"{lost}-screen", 2.0)
    told.add(Refused(told.propose(proposer="chat", model="m", **PRICE), "it does not apply"))
    told.add(Dropped("cpu", "chat", "no JSON", "m", cost_usd=0.25, tokens_in=100, tokens_out=0, proposal_s=10.0))
    own = told.candidate()
    told.run(f"{own}-screen", 2.0)
    told.conclude()


PRICE = {"cost_usd": 0.25, "tokens_in": 100, "tokens_out": 20, "proposal_s": 30.0}


def test_what_a_models_ideas_cost_and_gave_can_be_counted_by_hand() -> None:
    told = ready()
    paid(told)
    chat, tune = tally.proposers(told.study)
    (win,) = told.lane.wins
    gain = told.state(win.candidate).gain
    assert gain is not None
    assert (chat.proposer, tune.proposer) == ("chat", "tune")
    pairs = told.state(win.candidate).pairs
    assert chat.total == Yield(
        proposals=3,
        refused=1,
        dropped=1,
        tried=2,
        screened=1,
        confirmed=1,
        gain=gain,
        gain_squares=gain**2,
        seconds=TRIAL_S * (2 + pairs),
        cost_usd=1.0,
        tokens_in=400,
        tokens_out=60,
        proposal_s=100.0,
    )
    assert chat.total.gain_per_hour == pytest.approx(3600 * gain / (TRIAL_S * (2 + pairs)))
    assert chat.total.gain_per_usd == pytest.approx(gain)
    assert chat.total.mean_proposal_s == 25.0
    assert tune.total == Yield(proposals=1, tried=1, seconds=TRIAL_S)
    assert {author: one.proposals for author, one in chat.parts} == {
        Author("chat", "m", Operator.DRAFT): 1,
        Author("chat", "m", Operator.TUNE): 2,
        Author("chat", "m", None): 0,
    }
    assert told.study.spent_usd == 1.0


def test_status_and_summary_show_what_was_paid_and_that_it_is_too_early_to_say() -> None:
    told = ready()
    paid(told)
    found = report.status(told.study, name="s", metric="val_bpb", now=told.at, running=False)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    chat, tune = found["proposers"]
    assert (chat["total"]["proposals"], chat["total"]["cost_usd"], tune["total"]["cost_usd"]) == (3, 1.0, 0.0)
    assert {part["operator"] for part in chat["parts"]} == {"draft", "tune", None}
    assert {part["model"] for part in chat["parts"]} == {"m"}
    assert found["spent_usd"] == 1.0
    (worth,) = found["worth"]
    assert (worth["author"], worth["worth"], worth["tried"], worth["tune_tried"]) == ("chat (m)", "too_early", 2, 1)
    text = report.status_text(found)
    counts = "chat: 3 proposals, 1 refused, 1 answer without a proposal, 50 % usable, 1 promising, 1 confirmed; gain 0."
    assert counts in text
    assert "1.00 USD, 0." in text
    assert "25.0 s an answer" in text
    assert "  m draft: 1 proposal, 1 promising, 1 confirmed; gain" in text
    assert "spent on models: 1.00 USD" in text
    said = "cpu: chat (m): too early to say whether it pays for itself against tuning: "
    assert said in text
    summary = part(report.summary_markdown(told.study, name="s", metric="val_bpb"), "## Proposers")
    assert "| chat |  | 3 | 1 | 1 | 50 % | 1 | 1 | 0." in summary
    assert "| – chat (m) | draft | 1 | 0 | 0 | 100 % | 1 | 1 | 0." in summary
    assert "Spent on models in all: 1.00 USD." in summary
    assert f"- {said}" in summary


def test_models_are_compared_with_all_that_moves_knobs_together() -> None:
    told = ready(proposers=("chat", "tune", "additive"))
    paid(told)
    other = told.candidate(proposer="additive")
    told.run(f"{other}-screen", 2.0)
    told.conclude()
    (one,) = tally.models(told.study)
    assert (one.ours.tried, one.theirs.tried) == (2, 2)


def test_a_change_that_was_carried_is_one_try_and_all_of_its_runs_are_counted() -> None:
    told = ready()
    first, second = told.candidate(proposer="chat", model="m"), told.candidate()
    told.promise(first, second)
    told.confirm(first, second)
    told.move()
    carrier = told.carry()
    told.win(carrier, than=0.7)
    found = {one.proposer: one.total for one in tally.proposers(told.study)}
    assert {name: (one.proposals, one.tried, one.screened, one.confirmed) for name, one in found.items()} == {
        "chat": (1, 1, 1, 1),
        "tune": (1, 1, 1, 1),
    }
    (carried,) = [name for name in (first, second) if told.state(name).carried_by]
    seconds = sum(told.state(name).seconds for name in (carried, carrier))
    whose = told.state(carried).candidate.proposal.proposer
    assert found[whose].seconds == seconds > told.state(carrier).seconds
    assert found[whose].gain == told.state(carrier).gain


def test_a_union_is_a_try_and_a_win_of_each_of_its_members_in_equal_parts() -> None:
    told = ready()
    names = [told.candidate(proposer=proposer) for proposer in ("tune", "chat", "inbox")]
    told.promise(*names)
    told.confirm(*names)
    told.move()
    first = told.lane.champion
    union = told.carry()
    assert len(told.state(union).candidate.proposal.carries) == 2
    told.win(union, than=0.7)
    gain = told.state(union).gain
    assert gain is not None
    members = {told.state(name).candidate.proposal.proposer for name in names if name != first}
    found = {one.proposer: one.total for one in tally.proposers(told.study)}
    for proposer in members:
        assert (found[proposer].tried, found[proposer].confirmed) == (1, 1)
        assert found[proposer].gain == pytest.approx(gain / 2)


def test_what_is_counted_with_the_events_is_what_a_recount_finds(study: Study) -> None:
    raced = {run.trial.candidate for run in study.trials.values() if run.trial.purpose is Purpose.RACE}
    bases = {lane.base for lane in study.lanes.values()}
    screened, confirmed = Counter[str](), Counter[str]()
    seconds: dict[str, float] = defaultdict(float)
    for name, state in study.candidates.items():
        proposal = state.candidate.proposal
        roots = [root.proposer for root in study.roots(proposal)]
        for root in roots:
            seconds[root] += state.seconds / len(roots)
        if name in bases or proposal.carries:
            continue
        chain = list(tally.chain(study, state))
        promising = (one.verdict in (Verdict.KEEP, Verdict.RETEST) or one.id in raced for one in chain)
        screened[proposal.proposer] += any(promising)
        confirmed[proposal.proposer] += any(one.ratchet_commit is not None for one in chain)
    for one in tally.proposers(study):
        assert one.total.screened == screened[one.proposer]
        assert one.total.confirmed == confirmed[one.proposer]
        assert one.total.seconds == pytest.approx(seconds[one.proposer])


def ended(tried: int, wins: int, *, gain: float = 0.01, hours: float = 1.0) -> Yield:
    return Yield(
        tried=tried,
        confirmed=wins,
        gain=wins * gain,
        gain_squares=wins * gain**2,
        seconds=3600 * hours,
        proposals=tried,
    )


def test_a_model_pays_or_not_when_both_have_enough_tries_and_the_interval_leaves_zero_out() -> None:
    # six wins of 0.01 against none in an hour each: se = √(6 + 1 + 1) · 0.01 = 0.0283, and 1.645 · 0.0283 < 0.06
    found = yields.compare(ended(8, 0), ended(40, 6))
    assert (found.worth, found.ours) == (Worth.DOES_NOT_PAY, 0.0)
    assert (found.theirs, found.se) == (pytest.approx(0.06), pytest.approx(0.01 * 8**0.5))
    assert yields.compare(ended(40, 6), ended(8, 0)).worth is Worth.PAYS
    assert yields.compare(ended(7, 0), ended(40, 6)).worth is Worth.TOO_EARLY  # too few tries
    assert yields.compare(ended(8, 0), ended(40, 3)).worth is Worth.TOO_EARLY  # within chance
    assert yields.compare(ended(8, 0), ended(40, 0)) == yields.Comparison(Worth.TOO_EARLY, 0.0, 0.0, None)
    assert yields.compare(ended(8, 0, hours=0), ended(40, 6)).worth is Worth.TOO_EARLY


def test_equal_proposers_are_rarely_told_apart_and_unequal_ones_are() -> None:
    draw = random.Random(3)

    def searched(rate: float, tries: int) -> Yield:
        found = Yield(tried=tries, seconds=400.0 * tries)
        for _ in range(tries):
            if draw.random() < rate:
                found.win(draw.expovariate(1 / 0.002))
        return found

    def told_apart(ours: float, theirs: float) -> float:
        verdicts = [yields.compare(searched(ours, 60), searched(theirs, 150)).worth for _ in range(400)]
        return sum(one is not Worth.TOO_EARLY for one in verdicts) / len(verdicts)

    assert told_apart(0.1, 0.1) < 0.1
    assert told_apart(0.0, 0.15) > 0.8


def test_the_verdict_on_a_model_is_one_sentence_of_its_profile() -> None:
    told = ready()
    told.lane.yields[Author("chat", "m", Operator.DRAFT)] = ended(12, 0)
    told.lane.yields[Author("tune", "", Operator.TUNE)] = ended(40, 6)
    found = report.status(told.study, name="s", metric="val_bpb", now=told.at, running=False)
    assert report.status_text(found).splitlines()[-1] == (
        "cpu: chat (m): does not pay for itself against tuning: 0.00000 confirmed gain a slot-hour against 0.06000, "
        "difference ± 0.04653 (90 %); 12 and 40 ideas judged"
    )


def test_nobody_is_compared_where_tune_had_no_idea_or_there_is_no_model(study: Study) -> None:
    assert not tally.models(study)
    told = ready()
    told.candidate(proposer="chat", model="m")
    assert not tally.models(told.study)


def test_the_summary_of_a_maximised_metric_speaks_of_better_and_not_of_lower() -> None:
    study = with_ideas(Idea("wider", 0.4), Idea("narrower", -0.4), direction=Direction.MAXIMIZE)
    text = report.summary_markdown(study, name="up", metric="accuracy")
    assert "accuracy: higher is better" in text
    assert "better (±" in text
    assert "lower" not in text
    (win,) = study.lane("cpu").wins
    assert study.candidate(win.candidate).candidate.proposal.hypothesis == "wider"


def test_the_summary_of_an_empty_study_says_that_there_is_nothing() -> None:
    text = report.summary_markdown(Study(Settings()), name="new", metric="val_bpb")
    assert "No trial has finished yet" in text
    assert "progress.png" not in text


def test_the_summary_before_any_win_says_so() -> None:
    text = report.summary_markdown(with_ideas(Idea("worse", 0.3)), name="new", metric="val_bpb")
    assert "No win has been confirmed yet" in text
    assert "### Ratchet" not in text


def test_a_blocked_profile_says_why() -> None:
    history = History()
    history.start(CPU)
    trial = Trial("cpu-base-1", "cpu-base", "cpu", histories.commit_of("cpu"), Purpose.BASELINE, 1)
    history.add(TrialStarted(trial, 1, "cpu-0"))
    history.add(TrialFinished(trial.id, 1, Outcome.CRASHED, "exit code 1", log_tail="boom"))
    text = report.summary_markdown(history.study, name="s", metric="val_bpb")
    assert "Nothing more can be run here: its baseline cpu-base-1 crashed: exit code 1" in text
    assert "Last line: boom" in text
    found = report.status(history.study, name="s", metric="val_bpb", now=history.at, running=False)
    assert "cpu: blocked, its baseline" in report.status_text(found)


def test_hostile_text_breaks_no_table_of_the_summary() -> None:
    study = with_ideas(Idea(HOSTILE, -0.3), Idea(HOSTILE, outcome=Outcome.CRASHED, reason=HOSTILE, log_tail=HOSTILE))
    text = report.summary_markdown(study, name=HOSTILE, metric="val_bpb")
    assert text.encode()
    assert not any(char in text for char in "\x1b\x07\u202e")
    assert "<script>" not in text.replace("\\<", "")
    (row,) = [line for line in text.splitlines() if line.startswith("| 1 |")]
    assert row.replace("\\|", "").count("|") == 8


# ---- the card ----


class Carded(Simulation):
    """Trials that tell of their card: slot gpu-1 is throttled, and the idea `faster` has 10% more tokens a second."""

    def _measurement(self, trial: Trial, started_at: float) -> Measurement:
        found = super()._measurement(trial, started_at)
        hot = self.history.study.trials[trial.id].slot == "gpu-1"
        tokens_per_s = 14_000.0 * (1.1 if trial.candidate == "c0001" else 1.0)
        told = {
            "tokens_per_s": tokens_per_s,
            "total_tokens": 60 * tokens_per_s,
            "mfu_measured_percent": 44.4,
            "matmul_tflops": 20.4,
            "energy_j": 12_500.0,
            "power_w": 168.0,
            "sm_clock_mhz": 1500.0 if hot else 1800.0,
            "sm_clock_max_mhz": 2100.0,
            "temperature_c": 88.0 if hot else 71.0,
            "power_capped_share": 0.25,
            "throttled_share": 0.6 if hot else 0.0,
            **({"throttled": 1.0} if hot else {}),
        }
        return dataclasses.replace(found, facts=found.facts | told)


@pytest.fixture(scope="module")
def carded() -> Study:
    history = History(Settings(max_trials=12))
    three = dataclasses.replace(GPU, slots=("gpu-0", "gpu-1", "gpu-2"))
    history.start(three)
    ideas = [Idea("faster", -0.011), *(Idea(f"worse {number}", 0.02) for number in range(11))]
    Carded(history, {GPU.profile.slug: ideas}, three).run()
    return history.study


def test_the_summary_tells_how_well_the_card_was_used_what_that_took_and_what_was_throttled(carded: Study) -> None:
    card = part(report.summary_markdown(carded, name="s", metric="val_bpb"), "### Card")
    assert (
        "- MFU: 31.2 % of the card's peak by the table, 44.4 % of a matmul measured at the slot's start (20.4 TFLOPS)."
        in card
    )
    count = sum(run.measurement is not None for run in carded.trials.values())
    assert f"- Energy: 12.5 kJ a trial, 168 W while training; {count * 12.5 / 3600:.2f} kWh in all." in card
    assert "- Clock: 1800 of 2100 MHz, held by the power limit for 25 % of the training." in card
    assert "- Temperature: 71 °C at a trial's hottest, 88 °C at most." in card
    assert f"- These are medians of {count} measured trials." in card
    (heat,) = [one for one in carded.lane(GPU.profile.slug).heat.values() if one.throttled]
    assert len(heat.throttled) >= 3
    assert f"- Throttled, by heat or the power brake: {len(heat.throttled)} trials (" in card
    assert heat.throttled[-1] in card
    assert f"  - gpu-1: {heat.trials} of {heat.trials} trials, 60 % of their training." in card


def test_a_slot_that_was_throttled_again_and_again_was_set_aside(carded: Study) -> None:
    assert set(carded.aside) == {"gpu-1"}
    assert "see to its cooling and power" in report.summary_markdown(carded, name="s", metric="val_bpb")


def test_a_win_is_taken_apart_into_speed_and_learning(carded: Study) -> None:
    (win,) = carded.lane(GPU.profile.slug).wins
    state = carded.candidate(win.candidate)
    found = tally.gains(carded, state)
    assert state.delta is not None
    assert found is not None
    assert found.speed == pytest.approx(1.1)
    assert found.learning == pytest.approx(state.delta + 0.04 * math.log2(1.1))
    ratchet = part(report.summary_markdown(carded, name="s", metric="val_bpb"), "### Ratchet")
    assert "| delta ± se | speed | learning | pairs |" in ratchet
    assert f"| +10.0 % | ≈ {found.learning:+.4f} |" in ratchet
    assert "an estimate of what is left of the delta at equal tokens" in ratchet
    other = part(report.summary_markdown(carded, name="s", metric="loss"), "### Ratchet")
    assert "learning" not in other


def test_what_is_learned_at_equal_tokens_is_not_estimated_for_a_cpu_nor_for_programs_that_tell_no_tokens(
    study: Study,
) -> None:
    history = History(Settings(max_trials=4))
    history.start(CPU)
    Carded(history, {"cpu": [Idea("faster", -0.5)]}, CPU).run()
    (win,) = history.study.lane("cpu").wins
    found = tally.gains(history.study, history.study.candidate(win.candidate))
    assert found is not None
    assert (found.speed, found.learning) == (pytest.approx(1.1), None)
    assert "| +10.0 % | – |" in report.summary_markdown(history.study, name="s", metric="val_bpb")
    assert all(tally.gains(study, study.candidate(win.candidate)) is None for win in study.lane("cpu").wins)
    assert "learning is" not in report.summary_markdown(study, name="s", metric="val_bpb").lower()


def test_a_greedy_win_without_pairs_is_taken_apart_by_all_runs_of_both_sides() -> None:
    history = History(Settings(max_trials=4, rules=judge.Rules(greedy=True)))
    history.start(GPU)
    Carded(history, {GPU.profile.slug: [Idea("faster", -0.011)]}, GPU).run()
    (win,) = history.study.lane(GPU.profile.slug).wins
    found = tally.gains(history.study, history.study.candidate(win.candidate))
    assert found is not None
    assert found.speed == pytest.approx(1.1)


def test_the_status_and_the_results_name_throttled_trials(carded: Study) -> None:
    found = report.status(carded, name="s", metric="val_bpb", now=carded.last_at, running=False)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    (profile,) = found["profiles"]
    (slot,) = profile["throttled_slots"]
    assert (slot["slot"], slot["share"], slot["trials"]) == ("gpu-1", 0.6, len(slot["throttled"]))
    assert (profile["mfu_percent"], profile["mfu_measured_percent"]) == (31.2, 44.4)
    assert (profile["energy_kj"], profile["temperature_c"]) == (12.5, 71.0)
    text = report.status_text(found)
    figures = "MFU 31.2 % of the table's peak, MFU 44.4 % of the measured matmul, 12.5 kJ a trial, 71 °C"
    assert f"{GPU.profile.slug}: {figures}" in text
    assert f"gpu-1: throttled in {slot['trials']} of {slot['trials']} trials, 60 % of their training; last: " in text
    assert slot["throttled"][-1] in text
    rows = rows_of(carded)
    assert {row["energy_kj"] for row in rows} == {"12.5"}
    marked = {run.trial.candidate for run in carded.trials.values() if run.slot == "gpu-1" and run.measurement}
    assert {row["candidate"] for row in rows if row["throttled"] != "0"} <= marked


def test_of_programs_that_tell_nothing_of_a_card_there_is_no_such_part(tmp_path: Path) -> None:
    class Bare(Simulation):
        def _measurement(self, trial: Trial, started_at: float) -> Measurement:
            return dataclasses.replace(super()._measurement(trial, started_at), facts={})

    history = History(Settings(max_trials=2))
    history.start(CPU)
    Bare(history, {"cpu": [Idea("worse", 0.3)]}, CPU).run()
    assert tally.card_use(history.study, "cpu") is None
    assert "### Card" not in report.summary_markdown(history.study, name="s", metric="score")
    found = report.status(history.study, name="s", metric="score", now=history.at, running=False)
    assert "MFU" not in report.status_text(found)


# ---- progress.png ----


def picture(study: Study, path: Path, *, metric: str = "val_bpb") -> Image.Image:
    report.write_progress(study, path, metric=metric)
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image


def test_progress_has_a_panel_for_each_profile(study: Study, tmp_path: Path) -> None:
    two = picture(study, tmp_path / "two.png")
    one = picture(with_ideas(Idea("worse", 0.3)), tmp_path / "one.png")
    assert two.width == one.width == 1320
    assert two.height == 2 * one.height
    assert (tmp_path / "two.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 10_000


def test_progress_of_an_empty_study_is_a_small_figure_that_says_so(tmp_path: Path) -> None:
    assert picture(Study(Settings()), tmp_path / "empty.png").height < 200
    history = History()
    history.start(CPU, GPU)
    assert picture(history.study, tmp_path / "idle.png").height < 400


@pytest.mark.parametrize("direction", Direction)
def test_progress_can_be_drawn_with_hostile_labels_and_runs_far_off_the_scale(
    direction: Direction, tmp_path: Path
) -> None:
    good = -0.3 if direction is Direction.MINIMIZE else 0.3
    ideas = [Idea(HOSTILE, good), Idea("$x^", good), Idea("far off", -1000 * good), Idea("\x00", good)]
    picture(with_ideas(*ideas, direction=direction), tmp_path / "hostile.png", metric="$\\frac")


def test_progress_can_be_drawn_of_equal_values(tmp_path: Path) -> None:
    still = dataclasses.replace(CPU, sigma=0.0)
    history = History(Settings(max_trials=2))
    history.start(still)
    Simulation(history, {"cpu": [Idea("nothing"), Idea("nothing either")]}, still).run()
    picture(history.study, tmp_path / "flat.png")
    assert "equal" not in report.summary_markdown(history.study, name="flat", metric="m")


# ---- status ----


def test_the_status_is_json_and_tells_champion_noise_queue_and_runs(study: Study) -> None:
    found = report.status(study, name="demo", metric="val_bpb", now=study.last_at + 5, running=True)
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    cpu = found["profiles"][0]
    lane = study.lane("cpu")
    assert (cpu["champion"], cpu["champion_commit"]) == (lane.champion, lane.champion_commit)
    assert cpu["delta"] is not None
    assert cpu["gain"] == -cpu["delta"] > 0
    assert {run["trial"] for run in found["running_trials"]} == set(study.running)
    assert found["queued"] == sum(schedule.queue_length(study, lane) for lane in study.lanes.values())
    assert found["candidates_tried"] <= found["trials_finished"]
    assert found["last_verdicts"][-1]["verdict"] in [verdict.value for verdict in Verdict]


def test_the_status_text_tells_a_run_in_flight_from_one_that_was_lost(study: Study) -> None:
    at = study.last_at + 5
    running = report.status_text(report.status(study, name="demo", metric="val_bpb", now=at, running=True))
    assert "demo: running, last event 0:05 ago" in running
    assert f"better than the baseline after {len(study.lane('cpu').wins)} wins" in running
    stopped = report.status_text(report.status(study, name="demo", metric="val_bpb", now=at, running=False))
    assert "not running" in stopped
    assert "will be run again" in stopped
    assert "will be run again" not in running


def test_the_status_of_an_empty_study_says_that_nothing_was_run() -> None:
    found = report.status(Study(Settings()), name="new", metric="val_bpb", now=0.0, running=False)
    json.dumps(found, allow_nan=False)
    assert "nothing has been run" in report.status_text(found)


# ---- all together ----


def test_write_all_writes_three_files_and_returns_them(study: Study, tmp_path: Path) -> None:
    written = report.write_all(study, tmp_path / "new folder", name="demo", metric="val_bpb")
    assert [path.name for path in written] == ["results.tsv", "report.md", "progress.png"]
    assert sorted(path.name for path in (tmp_path / "new folder").iterdir()) == sorted(p.name for p in written)
    assert all(path.stat().st_mode & 0o044 for path in written)


def test_three_thousand_trials_are_reported_in_no_time(tmp_path: Path) -> None:
    study = histories.long_history(3000).study
    assert len(study.trials) > 2500
    begin = time.process_time()
    report.write_results(study, tmp_path / "results.tsv", metric="val_bpb")
    report.write_summary(study, tmp_path / "report.md", name="long", metric="val_bpb")
    report.status(study, name="long", metric="val_bpb", now=study.last_at, running=False)
    assert time.process_time() - begin < 2.0
    picture(study, tmp_path / "progress.png")
