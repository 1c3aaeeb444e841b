"""Metrics: figures that agree with the study, a dashboard that agrees with them, and Ray's port that shows them."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from histories import realistic
from session_kit import OBJECTIVE, PROGRAM, Bench
from told import Told

from raysearch import metrics
from raysearch.metrics import METRICS, Kind, Sample
from raysearch.model import Dropped, Outcome, Record, TrialFinished
from raysearch.schedule import Slot, queue_length
from raysearch.study import Study

ROOT = Path(__file__).parent.parent
SLOTS = [Slot("cpu-0", "cpu"), Slot("cpu-1", "cpu"), Slot("gpu-0", "rtx3060-12gb"), Slot("idle", "rtx3060-12gb")]


@pytest.fixture(scope="module")
def study() -> Study:
    return realistic().study


def told(samples: list[Sample]) -> dict[tuple[str, ...], float]:
    found = {(sample.metric.name, *sample.labels): sample.value for sample in samples}
    assert len(found) == len(samples), "no series twice"
    return found


def test_gauges_say_what_the_study_says(study: Study):
    found = told(metrics.figures(study, SLOTS, metric="val_bpb"))
    for slug, lane in study.lanes.items():
        assert found["raysearch_slots", slug] == 2
        assert found["raysearch_slots_busy", slug] == sum(
            slot.id in study.busy for slot in SLOTS if slot.profile == slug
        )
        assert found["raysearch_queued", slug] == queue_length(study, lane)
        assert found["raysearch_wins", slug] == len(lane.wins)
        assert found["raysearch_champion", slug, "val_bpb"] == study.value(lane.champion)
        assert found["raysearch_baseline", slug, "val_bpb"] == study.value(lane.base)
    assert found["raysearch_spent_usd",] == study.spent_usd
    assert any(lane.wins for lane in study.lanes.values())


def test_slots_that_left_are_none_and_what_is_not_measured_is_left_out():
    fresh = Told()
    fresh.begin()
    found = told(metrics.figures(fresh.study, [], metric="m"))
    assert found["raysearch_slots", "cpu"] == 0
    assert not [key for key in found if key[0] in ("raysearch_champion", "raysearch_baseline")]


def test_counters_add_up_to_what_the_journal_has():
    events: list[Record] = []
    history = realistic(events.append)
    counted: dict[tuple[str, ...], float] = {}
    for record in events:
        for sample in metrics.news(history.study, record):
            if sample.metric.kind is Kind.COUNTER:
                counted[sample.labels] = counted.get(sample.labels, 0) + sample.value
    ends = [record.event for record in events if isinstance(record.event, TrialFinished)]
    assert sum(counted.values()) == len(ends)
    for (profile, outcome), count in counted.items():
        assert count == sum(
            end.outcome is Outcome(outcome) and history.study.trials[end.trial_id].trial.profile == profile
            for end in ends
        )


def test_an_answer_that_somebody_waited_for_is_observed_once(study: Study):
    def seen(event: Dropped) -> list[float]:
        return [sample.value for sample in metrics.news(study, Record(1, 0.0, event))]

    dropped = Dropped("cpu", "chat", "no block matches", proposal_s=4.0)
    assert seen(dropped) == [4.0]
    assert seen(replace(dropped, proposal_s=0.0)) == []


def test_names_and_labels_are_what_prometheus_takes():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"raysearch_[a-z_]+", metric.name)
        assert not metric.name.endswith(("_total", "_bucket", "_count", "_sum"))  # Ray and Prometheus add these
        assert all(re.fullmatch(r"[a-z]+", label) for label in metric.labels)
        assert list(metric.boundaries) == sorted(metric.boundaries)
        assert bool(metric.boundaries) == (metric.kind is Kind.HISTOGRAM)


# ---- the dashboard ----


def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "dashboards/grafana.json").read_text())


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def test_the_dashboard_shows_every_metric_and_no_other():
    shown = {name for text in expressions() for name in re.findall(r"\bray_\w+", text)}
    assert shown == {metric.series for metric in METRICS}


def test_the_dashboard_selects_and_groups_by_labels_that_its_metrics_have():
    labels = {metric.series: {metrics.STUDY, *metric.labels} for metric in METRICS}
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            text = target["expr"]
            (had, *others) = [labels[name] for name in re.findall(r"\bray_\w+", text)]
            known = had.intersection(*others) | {"le"}
            grouped = [word for group in re.findall(r"by \(([^)]*)\)", text) for word in re.split(r",\s*", group)]
            used = {*re.findall(r"(\w+)=~", text), *grouped, *re.findall(r"{{(\w+)}}", target["legendFormat"])}
            assert used <= known, (panel["title"], used - known)
            assert text.count("(") == text.count(")")


def test_the_dashboard_can_be_imported_for_any_prometheus():
    found = dashboard()
    variables = {one["name"]: one for one in found["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert set(variables) == {"datasource", "study", "profile"}
    assert "id" not in found  # Grafana gives it one
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(found))) - {"__all", "__rate_interval"}
    assert used == set(variables)
    for panel in found["panels"]:
        for place in (panel, *panel["targets"]):
            assert place["datasource"]["uid"] == "${datasource}"


# ---- Ray's port ----


def test_a_study_s_figures_come_out_of_the_port_of_a_ray_that_was_started_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")  # 10 s otherwise
    (tmp_path / "objective.toml").write_text(OBJECTIVE)
    (tmp_path / "score.py").write_text(PROGRAM)
    bench, port = Bench(tmp_path, []), free_port()
    session = bench.quick("--metrics-port", str(port), "--trials", "1000")
    try:
        series = scraped(port, {metric.series for metric in METRICS})
    finally:
        session.process.send_signal(signal.SIGTERM)
        session.ends()
    study = bench.study("quick").replayed()
    (slots,) = series["ray_raysearch_slots"]
    assert slots == ({"study": "quick", "profile": "cpu"}, 2.0)
    ((labels, champion),) = series["ray_raysearch_champion"]
    assert labels == {"study": "quick", "profile": "cpu", "metric": "score"}
    values = [state.measurement.value for state in study.trials.values() if state.measurement]
    assert min(values) <= champion <= max(values)
    (measured,) = series["ray_raysearch_trials_total"]
    assert measured[0] == {"study": "quick", "profile": "cpu", "outcome": "measured"}
    assert 1 <= measured[1] <= len(values)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def scraped(port: int, wanted: set[str], limit_s: float = 60.0) -> dict[str, list[tuple[dict[str, str], float]]]:
    """What the port shows of ours, with our labels, as soon as all that is wanted is there."""
    deadline = time.monotonic() + limit_s
    ours = {metrics.STUDY, *(label for metric in METRICS for label in metric.labels)}
    while True:
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        try:
            lines = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text.splitlines()
        except httpx.HTTPError:
            lines = []
        for line in lines:
            match = re.fullmatch(r"(ray_raysearch_\w+)\{(.*)\} (\S+)", line)
            if match:
                labels = {key: value for key, value in re.findall(r'(\w+)="([^"]*)"', match[2]) if key in ours}
                found.setdefault(match[1], []).append((labels, float(match[3])))
        if wanted <= set(found):
            return found
        assert time.monotonic() < deadline, f"missing: {wanted - set(found)}"
        time.sleep(0.2)
