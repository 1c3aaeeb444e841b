"""What a study exports as metrics: their names, and its figures at a moment. Pure; `exporter` sets them.

It counts nothing that the study does not hold already, so that asking once a second takes no time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from raysearch import schedule
from raysearch.model import Dropped, Proposed, Record, TrialFinished
from raysearch.schedule import Slot
from raysearch.study import Study

STUDY = "study"  # a label of every metric: several studies may use one cluster, one after the other


class Kind(Enum):
    """What a metric does over time."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: As it is given to Ray.
        text: What it is, with its unit.
        labels: Their names, beside the study's.
        boundaries: Of a histogram's buckets.
    """

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def series(self) -> str:
        """Its name in Prometheus, after what Ray puts before and behind it."""
        endings = {Kind.GAUGE: "", Kind.COUNTER: "_total", Kind.HISTOGRAM: "_bucket"}
        return f"ray_{self.name}{endings[self.kind]}"


SLOTS = Metric("raysearch_slots", Kind.GAUGE, "Slots that are there", ("profile",))
BUSY = Metric("raysearch_slots_busy", Kind.GAUGE, "Slots with a trial on them", ("profile",))
QUEUED = Metric("raysearch_queued", Kind.GAUGE, "Trials that wait for a slot", ("profile",))
TRIALS = Metric("raysearch_trials", Kind.COUNTER, "Trials that ended", ("profile", "outcome"))
CHAMPION = Metric("raysearch_champion", Kind.GAUGE, "The champion's value of the metric", ("profile", "metric"))
BASELINE = Metric("raysearch_baseline", Kind.GAUGE, "The first program's value of the metric", ("profile", "metric"))
WINS = Metric("raysearch_wins", Kind.GAUGE, "Confirmed wins on the ratchet", ("profile",))
SPENT = Metric("raysearch_spent_usd", Kind.GAUGE, "Spent on models and agents, US dollars")
PROPOSAL = Metric(
    "raysearch_proposal_seconds",
    Kind.HISTOGRAM,
    "Seconds that a proposer took for an answer",
    ("proposer",),
    (0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200),
)
METRICS = (SLOTS, BUSY, QUEUED, TRIALS, CHAMPION, BASELINE, WINS, SPENT, PROPOSAL)


@dataclass(frozen=True)
class Sample:
    """A figure: a gauge's value, what a counter grows by, or what a histogram observes.

    Attributes:
        labels: Values of the metric's labels, in their order.
    """

    metric: Metric
    labels: tuple[str, ...]
    value: float


def figures(study: Study, slots: Sequence[Slot], *, metric: str) -> list[Sample]:
    """All gauges as they are now; what is not measured yet is left out.

    Args:
        study: What is told of.
        slots: Those that are there.
        metric: Name of the objective's metric.
    """
    there = Counter(slot.profile for slot in slots)
    busy = Counter(slot.profile for slot in slots if slot.id in study.busy)
    found = [Sample(SPENT, (), study.spent_usd)]
    for slug, lane in study.lanes.items():
        found += [
            Sample(SLOTS, (slug,), there[slug]),
            Sample(BUSY, (slug,), busy[slug]),
            Sample(QUEUED, (slug,), schedule.queue_length(study, lane)),
            Sample(WINS, (slug,), len(lane.wins)),
        ]
        for what, candidate in ((CHAMPION, lane.champion), (BASELINE, lane.base)):
            value = study.value(candidate)
            if value is not None:
                found.append(Sample(what, (slug, metric), value))
    return found


def news(study: Study, record: Record) -> Iterator[Sample]:
    """What an event that was just applied to the study adds to counters and histograms, which count from zero in each
    session: Ray's agent still shows those of a process that has ended, so that their sum is the whole.
    """
    match record.event:
        case TrialFinished(trial_id=trial_id, outcome=outcome):
            yield Sample(TRIALS, (study.trials[trial_id].trial.profile, outcome.value), 1)
        case Proposed(proposal) if not proposal.carries and proposal.proposal_s > 0:  # else nobody was asked
            yield Sample(PROPOSAL, (proposal.proposer,), proposal.proposal_s)
        case Dropped(proposer=proposer, proposal_s=seconds) if seconds > 0:
            yield Sample(PROPOSAL, (proposer,), seconds)
        case _:
            pass
