"""Sets Ray's metrics to a study's figures, which Ray's agent on this node shows to Prometheus. It decides nothing.

Ray has to be running in this process. What happens is counted at once; gauges follow at most once a second.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (Ray's own annotations are partial)

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from raysearch import metrics
from raysearch.metrics import METRICS, STUDY, Kind, Metric, Sample
from raysearch.model import Record
from raysearch.schedule import Slot
from raysearch.study import Study

EVERY_S = 1.0


class Exporter:
    """Shows one study to Prometheus.

    Args:
        study: The state, which the caller changes.
        name: Of the study.
        metric: Of the objective.
    """

    def __init__(self, study: Study, *, name: str, metric: str) -> None:
        self._study = study
        self._metric = metric
        self._set_at = -math.inf
        self._shown: tuple[int, Sequence[Slot]] = (-1, ())
        self._series = {one: _made(one) for one in METRICS}
        for series in self._series.values():
            series.set_default_tags({STUDY: name})

    def record(self, record: Record) -> None:
        """Counts an event that was just applied to the study."""
        self._put(metrics.news(self._study, record))

    def refresh(self, now: float, slots: Sequence[Slot]) -> None:
        """Sets the gauges if anything has changed.

        Args:
            now: Unix time in seconds.
            slots: Those that are there; another list whenever they change.
        """
        seq, shown = self._shown
        if now - self._set_at < EVERY_S or (seq == self._study.seq and shown is slots):
            return
        self._set_at = now
        self._shown = self._study.seq, slots
        self._put(metrics.figures(self._study, slots, metric=self._metric))

    def _put(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            series = self._series[sample.metric]
            tags = dict(zip(sample.metric.labels, sample.labels, strict=True))
            match series:
                case Gauge():
                    series.set(sample.value, tags=tags)
                case Counter():
                    series.inc(sample.value, tags=tags)
                case Histogram():
                    series.observe(sample.value, tags=tags)


def _made(one: Metric) -> Gauge | Counter | Histogram:
    keys = (STUDY, *one.labels)
    match one.kind:
        case Kind.GAUGE:
            return Gauge(one.name, one.text, tag_keys=keys)
        case Kind.COUNTER:
            return Counter(one.name, one.text, tag_keys=keys)
        case Kind.HISTOGRAM:
            return Histogram(one.name, one.text, boundaries=list(one.boundaries), tag_keys=keys)
