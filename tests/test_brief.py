"""What a mind is told of a study, as facts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from histories import GPU, cpu_profile, gpu_profile, long_history, realistic
from told import Told, ready
from toy import Toy

from raysearch import brief as briefs
from raysearch import tally
from raysearch.brief import Brief, Fate, Stage, brief
from raysearch.model import Dropped, Judged, Operator, Outcome, Refused, TrialFinished, TrialStarted, Verdict
from raysearch.plan import Ask
from raysearch.proposers import Idea, Request
from raysearch.proposers import Told as ToldRun
from raysearch.proposers.tune import TuneProposer
from raysearch.schedule import Slot
from raysearch.study import Settings, Study


@pytest.fixture(scope="module")
def study() -> Study:
    return realistic().study


def test_the_card_is_told_with_its_headroom_its_speed_and_where_a_trials_seconds_go(study: Study):
    found = brief(study, GPU.profile.slug)
    use = found.use
    assert use is not None
    assert (found.profile.memory_mb, use.peak_mb, found.headroom_mb) == (12288, 9830.0, 2458.0)
    assert brief(study, "cpu").headroom_mb is None
    assert (use.steps, use.tokens, use.parameters, use.mfu_percent) == (412.0, 843776.0, 1052672.0, 31.2)
    assert use.tokens_per_s is None  # these programs do not tell it
    assert use.training == pytest.approx(60 / (use.trial_s or 0), rel=0.05)
    rest_s = (use.trial_s or 0) - 60
    assert (use.evaluation or 0) * (use.trial_s or 0) == pytest.approx(0.45 * rest_s, rel=0.1)
    assert (use.start or 0) * (use.trial_s or 0) == pytest.approx(0.5 * rest_s, rel=0.1)


def test_the_second_split_which_few_trials_measure_is_no_part_of_a_trials_seconds():
    told = ready()
    for name in told.lane.fresh_runs["cpu-base"]:
        run = told.study.trials[name]
        assert run.measurement is not None
        parts = {"train": 10.0, "eval": 5.0, "holdout": 100.0}
        run.measurement = replace(run.measurement, wall_s=120.0, training_s=10.0, parts_s=parts)
    use = brief(told.study, "cpu").use
    assert use is not None
    assert (use.trial_s, use.training, use.evaluation, use.start) == (20.0, 0.5, 0.25, None)


def test_before_any_run_there_are_no_figures():
    told = Told()
    told.begin()
    found = brief(told.study, "cpu")
    assert (found.use, found.value, found.sigma, found.wins, found.flight) == (None, None, None, (), ())
    assert found.head == found.champion == "cpu-base"


def test_value_noise_and_lineage_are_those_of_the_report(study: Study):
    found, at = brief(study, "cpu"), tally.standing(study, "cpu")
    assert at.noise is not None
    assert (found.value, found.value_se, found.runs) == (at.value, at.value_se, at.runs)
    assert (found.sigma, found.baseline) == (at.noise.sigma, at.baseline)
    assert [(win.candidate, win.delta, win.delta_se, win.pairs) for win in found.wins] == [
        (state.id, state.delta, state.delta_se, state.pairs) for state in at.steps
    ]
    assert len(found.wins) == 5


def test_tries_and_failures_are_the_discarded_candidates_that_ran(study: Study):
    found = brief(study, "cpu")
    own = [line for line in tally.lines(study) if line.state.candidate.profile == "cpu" and line.runs]
    discarded = {line.state.id for line in own if line.fate is tally.Fate.DISCARD}
    failed = {line.state.id: line.outcome for line in own if line.fate is tally.Fate.FAILED}
    assert {one.candidate for one in found.tries} == discarded
    assert {one.candidate: one.outcome for one in found.failures} == failed
    assert set(failed.values()) == {Outcome.CRASHED, Outcome.OUT_OF_MEMORY, Outcome.INVALID}
    crash = next(one for one in found.failures if "activation" in one.hypothesis)
    assert crash.log_tail.endswith("NameError: name 'gelu2' is not defined")
    names = [one.candidate for one in found.tries]
    assert names == sorted(names)  # oldest first


def test_a_trial_that_was_stopped_half_way_is_a_try_and_no_failure():
    told = ready()
    name = told.candidate()
    told.run(f"{name}-screen", outcome=Outcome.FUTILE)
    told.conclude()
    found = brief(told.study, "cpu")
    assert [one.candidate for one in found.tries] == [name]
    assert "futile" in found.tries[0].why
    assert not found.failures


def test_a_log_is_bounded_to_its_last_lines():
    told = ready()
    name = told.candidate()
    told.start(f"{name}-screen")
    log = "\n".join(f"line {number} {'x' * 30}" for number in range(500))
    told.add(TrialFinished(f"{name}-screen", 1, Outcome.CRASHED, "exit code 1", log_tail=log))
    told.conclude()
    (failure,) = brief(told.study, "cpu").failures
    assert failure.log_tail.splitlines() == log.splitlines()[-briefs.TAIL_LINES :]
    assert len(failure.log_tail) <= briefs.TAIL


def test_refusals_and_answers_without_a_proposal_are_counted_by_reason_whichever_candidate_they_name():
    told = ready()
    for other in ("c0001", "c0002", "c12345"):
        told.add(Refused(told.propose(), f"the same program as {other}"))
    told.add(Refused(told.propose(), "it touches score.py"))
    told.add(*[Dropped("cpu", "chat", "no block matches", model="m")] * 2)
    found = brief(told.study, "cpu")
    assert found.refusals == (("the same program as another candidate", 3), ("it touches score.py", 1))
    assert found.dropped == (("no block matches", 2),)


def test_what_is_in_flight_is_told_by_its_stage():
    told = ready(slots=tuple(Slot(name, "cpu") for name in "abcd"))
    raced, running, waiting = told.candidate(), told.candidate(), told.candidate()
    told.promise(raced)
    told.start(f"{running}-screen", slot="b")
    found = brief(told.study, "cpu")
    assert {one.candidate: one.stage for one in found.flight} == {
        running: Stage.RUNNING,
        raced: Stage.RACED,
        waiting: Stage.IN_LINE,
    }
    assert found.in_flight == 3


def test_the_head_is_what_the_plan_builds_proposals_on():
    told = ready()
    raced = told.candidate()
    told.promise(raced, value=0.2)
    found = brief(told.study, "cpu")
    bases = {command.base for command in told.commands() if isinstance(command, Ask)}
    assert bases == {found.head_commit}
    assert (found.head, found.champion) == (raced, "cpu-base")
    assert found.champion_commit != found.head_commit


def test_steps_of_other_ratchets_say_what_became_of_them_here():
    told = Told(slots=(Slot("a", "cpu"), Slot("g", "rtx3060-12gb")))
    told.begin(cpu_profile(), gpu_profile())
    told.warm()
    told.baselines()
    told.baselines("rtx3060-12gb")
    there = told.candidate(slug="rtx3060-12gb", hypothesis="longer rows")
    told.run(f"{there}-screen", 0.5, slot="g")
    told.conclude()
    while told.state(there).verdict is not Verdict.KEEP:
        number = len(told.state(there).races) + 1
        rival = told.could("rtx3060-12gb")[f"{there}-pair{number}"].rival
        assert rival is not None
        if rival not in told.study.trials:
            told.run(rival, 1.0, slot="g")
        told.run(f"{there}-pair{number}", 0.7, slot="g")
        told.conclude()
    told.move()

    def fate() -> Fate:
        (step,) = brief(told.study, "cpu").travelled
        assert (step.candidate, step.profile, step.hypothesis) == (there, "rtx3060-12gb", "longer rows")
        return step.fate

    assert fate() is Fate.NOT_TRIED
    assert not brief(told.study, "rtx3060-12gb").travelled
    here = told.propose(operator=Operator.TRANSFER, proposer="transfer", source=f"transfer {there}")
    assert fate() is Fate.OPEN
    told.materialise(here)
    assert fate() is Fate.OPEN
    told.run(f"{here}-screen", 0.5)
    told.conclude()
    told.confirm(here)
    told.move()
    assert fate() is Fate.KEPT
    assert not brief(told.study, "rtx3060-12gb").travelled  # it came from there


def test_a_step_that_did_not_help_here_says_so():
    told = Told(slots=(Slot("a", "cpu"), Slot("g", "rtx3060-12gb")))
    told.begin(cpu_profile(), gpu_profile())
    told.warm()
    told.baselines()
    there = told.candidate(slug="rtx3060-12gb")
    lane = told.study.lane("rtx3060-12gb")
    told.add(
        TrialStarted(told.could("rtx3060-12gb")["rtx3060-12gb-base-1"], 1, "g"),
        Judged(there, Verdict.KEEP, "better", -0.1, 0.01, pairs=2, gain=0.1),
    )
    told.slots = (Slot("a", "cpu"),)
    told.move()
    assert lane.wins
    here = told.candidate(operator=Operator.TRANSFER, source=f"transfer {there}")
    told.run(f"{here}-screen", 3.0)
    told.conclude()
    (step,) = brief(told.study, "cpu").travelled
    assert step.fate is Fate.NOT_KEPT


def test_the_same_journal_gives_the_same_brief():
    history = realistic()
    again = Study(Settings(max_trials=200, noise_share=0.02))
    for record in history.records:
        again.apply(record)
    for slug in again.lanes:
        assert brief(again, slug) == brief(history.study, slug)


def test_a_brief_does_not_change_when_the_study_goes_on():
    told = ready()
    name = told.candidate()
    before = brief(told.study, "cpu")
    kept = repr(before)
    told.run(f"{name}-screen", 2.0)
    told.conclude()
    assert repr(before) == kept
    assert brief(told.study, "cpu") != before


def test_a_brief_of_a_long_study_is_bounded_and_made_at_once():
    study = long_history(3000).study
    found = brief(study, "cpu")
    assert len(found.tries) == briefs.TRIES
    assert len(found.failures) == briefs.FAILURES
    assert len(found.wins) <= briefs.WINS
    seconds: list[float] = []
    for _ in range(5):
        begin = time.process_time()
        brief(study, "cpu")
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.02  # under 2 ms on an idle machine


# ---- in the coordinator ----


class Curious(TuneProposer):
    """Tunes, and keeps what it was asked and told."""

    wants_brief = True

    def __init__(self) -> None:
        super().__init__(seed=1)
        self.requests: list[Request] = []
        self.told: list[ToldRun] = []

    def ask(self, request: Request) -> list[Idea]:
        self.requests.append(request)
        return super().ask(request)

    def tell(self, told: ToldRun) -> None:
        self.told.append(told)
        super().tell(told)


def test_who_wants_a_brief_gets_one_of_the_moment_of_the_ask(tmp_path: Path):
    proposer = Curious()
    toy = Toy(tmp_path / "study", proposer=proposer)
    toy.drive(trials=16)
    found = [request.brief for request in proposer.requests]
    assert all(isinstance(one, Brief) for one in found)
    for request, one in zip(proposer.requests, found, strict=True):
        assert one is not None
        assert (request.profile, request.base) == (one.profile.slug, one.head_commit)
        assert "`score`: lower is better" in request.task
        assert "never run" in request.task
    assert max(one.runs for one in found if one is not None) >= 3
    told = {run.trial: run.is_replicate for run in proposer.told}
    ended = {name: run.trial.purpose.value for name, run in toy.study.trials.items() if run.outcome is not None}
    assert told.keys() <= ended.keys()
    assert all(told[name] == (ended[name] in ("race", "reference")) for name in told)
    assert set(told.values()) == {True, False}
    assert len(ended.keys() - told) <= 2  # the end of a study waits for nobody who has yet to hear of the last runs


def test_who_does_not_want_a_brief_gets_none(tmp_path: Path):
    proposer = Curious()
    proposer.wants_brief = False
    Toy(tmp_path / "study", proposer=proposer).drive(trials=4)
    assert proposer.requests
    assert all(request.brief is None for request in proposer.requests)
