"""What to do next: verdicts, the ratchet, the frontier, wins that have to be carried, asking, slots, the end."""

import math
from dataclasses import replace
from typing import Any

import pytest
from histories import commit_of, gpu_profile
from told import BASE, CPU, TRIAL_S, TWO, Told, ready

from raysearch import judge
from raysearch.bandit import Arm, Tally
from raysearch.model import (
    Directed,
    Event,
    Judged,
    Operator,
    Outcome,
    ProfileAdded,
    Purpose,
    Refused,
    SessionStarted,
    SlotRestored,
    SlotSetAside,
    Verdict,
)
from raysearch.pace import Pace
from raysearch.plan import (
    ASIDE_TRIALS,
    MOST_REFUSALS,
    Ask,
    Carry,
    Conclude,
    Finish,
    Materialise,
    MoveRatchet,
    out_of_ideas,
)
from raysearch.schedule import Slot
from raysearch.study import Study

GPU = gpu_profile()
FOUR = tuple(Slot(name, "cpu") for name in "abcd")


# ---- verdicts ----


@pytest.mark.parametrize(
    "outcome", [one for one in Outcome if one is not Outcome.MEASURED and not one.is_infrastructure]
)
def test_a_first_run_that_failed_is_discarded_without_another(outcome: Outcome):
    told = ready()
    name = told.candidate()
    told.run(f"{name}-screen", outcome=outcome)
    (event,) = told.conclude()
    assert (event.verdict, event.reason, event.delta) == (Verdict.DISCARD, f"{outcome.value}: why", None)


def test_what_is_not_promising_is_discarded_after_one_run():
    told = ready()
    name = told.candidate()
    told.run(f"{name}-screen", 1.2)
    (event,) = told.conclude()
    assert (event.verdict, event.pairs) == (Verdict.DISCARD, 0)
    assert event.delta == pytest.approx(0.2)
    assert told.lane.open == {}


@pytest.mark.parametrize(
    ("operator", "size", "verdict"),
    [
        (Operator.SIMPLIFY, 90, Verdict.RETEST),
        (Operator.ABLATE, 90, Verdict.RETEST),
        (Operator.SIMPLIFY, 110, Verdict.DISCARD),
        (Operator.TUNE, 90, Verdict.DISCARD),
    ],
)
def test_a_program_that_was_made_smaller_and_is_only_has_to_be_no_worse(
    operator: Operator, size: int, verdict: Verdict
):
    told = ready()
    value = told.crown(size=100)
    name = told.candidate(operator=operator, size=size)
    told.run(f"{name}-screen", value + 0.009)
    (event,) = told.conclude()
    assert event.verdict is verdict


def test_the_first_run_is_believed_for_no_effect():
    told = ready()
    name = told.candidate()
    told.promise(name, value=0.1)
    event = told.pair(name, gain=0.3)
    assert event.delta == pytest.approx(-0.3)


def test_greedy_keeps_what_looks_better_once_and_compares_with_the_run_that_the_champion_was_kept_for():
    told = ready(rules=judge.Rules(greedy=True))
    one = told.candidate()
    told.run(f"{one}-screen", 0.999)
    (event,) = told.conclude()
    assert (event.verdict, event.pairs) == (Verdict.KEEP, 0)
    told.move()
    for value, verdict in ((0.9995, Verdict.DISCARD), (0.998, Verdict.KEEP)):
        name = told.candidate()
        told.run(f"{name}-screen", value)
        assert [event.verdict for event in told.conclude()] == [verdict]


def test_a_win_over_a_run_that_no_other_run_of_the_champion_agrees_with_is_no_win_yet():
    told = ready(noise_share=0.0)
    name = told.candidate()
    told.promise(name, value=0.5)
    told.wait(1000.0)  # the baselines are too old for a pair
    told.run("cpu-base-reference1", 1.5, slot="b")
    told.run(f"{name}-pair1", 1.0)
    (event,) = told.conclude()
    assert event.verdict is Verdict.RETEST
    assert event.reason.endswith("but no other run of what it was built on agrees with that one")
    told.run("cpu-base-reference2", 1.0, slot="b")
    told.run(f"{name}-pair2", 0.6)
    (event,) = told.conclude()
    assert event.delta == pytest.approx(-0.4)  # of the pair that is believed


def test_a_program_is_judged_by_the_noise_around_it():
    told = ready()
    for value in (1.0, 0.7, 0.4):
        name = told.candidate()
        told.promise(name, value=value - 0.3)
        told.win(name, than=value)
    assert told.state(name).step == 3
    for number in range(8):
        told.lane.fresh.add(name, 0.1 + 0.001 * (-1) ** number, step=3)
    late, early = (told.study.judge(told.lane, base) for base in (name, "cpu-base"))
    assert late is not None
    assert early is not None
    assert 0.001 < late.noise.sigma < 0.004
    assert 0.005 < early.noise.sigma < 0.02
    assert late.prior.unit == pytest.approx(late.noise.sigma, rel=0.3)
    assert early.prior.unit == pytest.approx(early.noise.sigma, rel=0.3)


# ---- the ratchet ----


def test_a_win_moves_the_ratchet_before_anything_else_is_decided():
    told = ready()
    one, other = told.candidate(), told.candidate()
    told.promise(one)
    told.confirm(one)
    told.run(f"{other}-screen", 2.0)
    (command,) = told.commands()
    assert command == MoveRatchet("cpu", told.state(one).candidate, BASE)
    told.move()
    assert (told.lane.champion, told.lane.champion_commit) == (one, commit_of(f"step {one}"))


def test_of_two_wins_at_once_the_better_moves_the_ratchet_and_the_other_is_carried():
    told = ready()
    less, more = told.candidate(), told.candidate()
    told.promise(less, more)
    told.run_pair(less, gain=0.2)
    told.run_pair(more, gain=0.4)
    assert [event.verdict for event in told.conclude()] == [Verdict.KEEP, Verdict.KEEP]
    told.move()
    assert told.lane.champion == more
    (command,) = (command for command in told.commands() if isinstance(command, Carry))
    assert command == Carry((told.state(less).candidate,), commit_of(f"step {more}"), more)


def with_a_smaller_win() -> tuple[Told, str, str]:
    """A small win, confirmed while what others are built on promises more and is still raced."""
    told = ready(slots=FOUR)
    small, great = told.candidate(), told.candidate()
    told.promise(small, value=0.8)
    told.promise(great, value=0.2)
    told.confirm(small, gain=0.2)
    assert small in told.lane.confirmed
    return told, small, great


def test_a_small_win_does_not_move_the_ratchet_away_from_a_head_that_promises_more():
    told, small, great = with_a_smaller_win()
    assert not any(isinstance(command, MoveRatchet | Carry) for command in told.commands())
    above = told.candidate(on=great)
    told.confirm(great, gain=0.8)
    told.move()
    assert told.lane.champion == great
    assert f"{above}-screen" in told.could()  # what was built on the head needed no merge
    assert told.carries() == (small,)


def test_a_small_win_moves_the_ratchet_once_the_head_is_refuted():
    told, small, great = with_a_smaller_win()
    told.refute(great)
    told.move()
    assert told.lane.champion == small


def test_a_study_that_is_stopped_takes_the_wins_that_it_has():
    told, small, _ = with_a_smaller_win()
    (command,) = told.commands(draining=True)
    assert command == MoveRatchet("cpu", told.state(small).candidate, BASE)


# ---- the frontier ----


def test_proposals_are_built_on_the_best_promising_candidate_at_once():
    told = ready()
    good, better = told.candidate(), told.candidate()
    assert [command.base for command in told.commands() if isinstance(command, Ask)] == [BASE]
    told.run(f"{good}-screen", 0.8)
    told.run(f"{better}-screen", 0.5)
    told.conclude()
    assert [command.base for command in told.commands() if isinstance(command, Ask)] == [commit_of(better)]


def test_a_candidate_that_is_hardly_promising_is_raced_but_not_built_on():
    told = ready()
    name = told.candidate()
    told.run(f"{name}-screen", 0.975)
    (event,) = told.conclude()
    assert event.verdict is Verdict.RETEST
    assert 0.3 <= (event.p_better or 0.0) < 0.8
    assert [command.base for command in told.commands() if isinstance(command, Ask)] == [BASE]


def test_without_a_frontier_all_is_built_on_the_champion():
    told = ready(frontier=False)
    name = told.candidate()
    told.promise(name)
    assert [command.base for command in told.commands() if isinstance(command, Ask)] == [BASE]


def test_what_is_built_on_a_frontier_candidate_is_run_and_judged_against_it():
    told = ready(slots=FOUR)
    one = told.candidate()
    told.promise(one)
    other = told.candidate(on=one)
    assert f"{other}-screen" in told.could()
    told.run(f"{other}-screen", 0.6)  # better than the champion, worse than what it was built on
    assert told.conclude() == []  # of that nothing fresh is known yet
    told.run_pair(one, gain=0.5)
    verdicts = {event.candidate: event.verdict for event in told.conclude()}
    assert verdicts == {one: Verdict.KEEP, other: Verdict.DISCARD}


def test_a_win_on_a_frontier_candidate_waits_for_it_and_follows_it():
    told = ready(slots=FOUR)
    one = told.candidate()
    told.promise(one)
    other = told.candidate(on=one)
    told.start(f"{one}-pair1")
    told.end(f"{one}-pair1", 0.5)
    told.run(f"{other}-screen", 0.2)
    told.conclude()
    assert told.state(one).verdict is Verdict.KEEP
    told.move()
    assert told.state(other).verdict is Verdict.RETEST
    told.confirm(other)
    (command,) = told.commands()
    assert command == MoveRatchet("cpu", told.state(other).candidate, commit_of(f"step {one}"))  # no merge was needed
    told.move()
    assert [win.candidate for win in told.lane.wins] == [one, other]


def test_when_a_frontier_candidate_wins_what_was_built_on_it_stays_as_it_is():
    told = ready()
    one = told.candidate()
    told.promise(one)
    other = told.candidate(on=one)
    told.win(one)
    assert told.carries() == ()
    assert f"{other}-screen" in told.could()


def test_when_a_frontier_candidate_is_refuted_what_was_built_on_it_is_carried_to_the_champion_without_credit():
    told = ready()
    one = told.candidate()
    told.promise(one)
    waiting, promising = told.candidate(on=one), told.candidate(on=one)
    told.start(f"{one}-pair1")
    told.end(f"{one}-pair1", 0.5)  # a fresh run to compare with
    told.run(f"{promising}-screen", 0.2)
    told.add(Judged(one, Verdict.DISCARD, "refuted"))
    told.conclude()
    assert told.state(promising).verdict is Verdict.RETEST
    names = set[str]()
    for _ in range(2):
        (carried,) = told.carries()
        names.add(carried)
        new = told.carry()
        assert told.state(new).candidate.proposal.base == BASE
        assert told.state(new).verdict is None
        assert f"{new}-screen" in told.could()
    assert names == {waiting, promising}
    assert told.lane.screens == 3  # what is carried is no new trial


def test_what_was_confirmed_on_a_frontier_candidate_that_is_refuted_keeps_its_credit():
    told = ready(slots=FOUR)
    one = told.candidate()
    told.promise(one)
    other = told.candidate(on=one)
    told.start(f"{one}-pair1")
    told.end(f"{one}-pair1", 0.5)
    told.run(f"{other}-screen", 0.2)
    told.add(Judged(other, Verdict.RETEST, "promising", gain=0.3, p_better=0.99))
    told.run(f"{other}-pair1", 0.2)
    told.add(Judged(other, Verdict.KEEP, "better", -0.3, 0.01, pairs=1, p_better=0.99, gain=0.3))
    told.add(Judged(one, Verdict.DISCARD, "refuted"))
    assert told.carries() == (other,)
    new = told.carry()
    assert (told.state(new).verdict, told.state(new).gain) == (Verdict.RETEST, 0.3)
    assert new in told.lane.racing
    assert f"{new}-screen" not in told.could()


# ---- wins on a champion that was replaced ----


def with_wins(count: int, **options: object) -> tuple[Told, list[str]]:
    """A champion, and so many wins over the program before it."""
    told = ready(slots=FOUR, **options)
    winner, *others = (told.candidate() for _ in range(count + 1))
    told.promise(winner, *others)
    told.run_pair(winner, gain=0.6)
    for name in others:
        told.run_pair(name, gain=0.3)
    told.conclude()
    told.move()
    assert told.lane.champion == winner
    assert set(told.lane.confirmed) == set(others)
    return told, others


def test_several_wins_on_an_earlier_champion_are_carried_as_one_union_and_raced_without_a_first_run():
    told, wins = with_wins(3)
    assert told.carries() == tuple(wins)
    union = told.carry()
    state = told.state(union)
    assert state.verdict is Verdict.RETEST
    assert state.gain == pytest.approx(sum(told.state(name).gain or 0.0 for name in wins))
    assert all(told.state(name).carried_by == union for name in wins)
    assert told.could()[f"{union}-pair1"].purpose is Purpose.RACE
    assert f"{union}-screen" not in told.could()
    told.win(union, than=0.4)
    assert told.lane.champion == union
    assert told.lane.open == {}


def test_a_union_that_falls_short_is_split_in_halves_down_to_single_changes():
    told, wins = with_wins(3)
    told.refute(told.carry())
    assert told.carries() == tuple(wins[:2])
    half = told.carry()
    assert told.carries() == (wins[2],)
    single = told.carry()
    told.refute(half)
    assert told.carries() == (wins[0],)
    first = told.carry()
    assert told.carries() == (wins[1],)
    second = told.carry()
    for name in (single, first, second):
        told.refute(name)
    assert told.carries() == ()
    assert told.lane.open == {}
    assert all(told.state(name).carried_by for name in wins)


def test_a_union_that_is_no_program_is_split_as_well():
    told, wins = with_wins(2)
    told.add(Refused(told.propose(carries=told.carries()), "the same program as c0001"))
    for name in wins:
        assert told.carries() == (name,)
        told.carry()


def test_a_union_that_had_to_be_carried_once_more_is_split_into_its_own_changes():
    told, wins = with_wins(2)
    faster = told.candidate()
    union = told.carry()
    told.promise(faster, value=-0.5)
    told.win(faster, gain=0.9, than=0.4)  # more than the union promises
    assert told.carries() == (union,)
    again = told.carry()
    assert told.state(again).verdict is Verdict.RETEST
    told.refute(again)
    for name in wins:
        assert told.carries() == (name,)
        told.refute(told.carry())
    assert told.lane.open == {}


def test_a_part_that_loses_a_member_to_a_conflict_is_not_tried_for_ever():
    told, wins = with_wins(4)
    told.refute(told.carry())
    assert told.carries() == tuple(wins[:2])
    told.add(Judged(wins[1], Verdict.DISCARD, "it conflicts", conflict=True))
    assert told.carries() == (wins[0],)
    told.refute(told.carry())
    assert told.carries() == tuple(wins[2:])
    told.refute(told.carry())
    for name in wins[2:]:
        assert told.carries() == (name,)
        told.refute(told.carry())
    assert told.carries() == ()
    assert told.lane.open == {}
    assert told.lane.unmerged == [wins[1]]


def test_a_win_that_is_merged_goes_on_to_what_was_won_meanwhile():
    told, (one,) = with_wins(1)
    carried = told.carry()
    faster = told.candidate()
    told.promise(faster, value=-0.2)
    told.start(f"{carried}-pair1", slot="c")
    told.win(faster, gain=0.6, than=0.4)
    told.end(f"{carried}-pair1", 0.2)
    told.conclude()
    if told.state(carried).verdict is Verdict.RETEST:  # it was raced against the champion that it was made for
        told.confirm(carried, gain=0.2, than=0.4)
    assert told.state(carried).verdict is Verdict.KEEP
    assert told.carries() == (carried,)
    again = told.carry()
    assert told.state(again).verdict is Verdict.RETEST
    told.win(again, gain=0.5, than=-0.2)
    assert [proposal.id for proposal in told.study.roots(told.state(again).candidate.proposal)] == [one]


def test_a_race_that_has_begun_ends_where_it_began():
    told = ready(slots=FOUR)
    one, other = told.candidate(), told.candidate()
    told.promise(one, value=0.2)
    told.promise(other)
    told.start(f"{other}-pair1", slot="c")
    told.win(one, gain=0.8)
    assert told.carries() == ()
    told.end(f"{other}-pair1", 0.9)
    (event,) = told.conclude()
    assert event.verdict is Verdict.KEEP  # though it is worse than the new champion
    assert told.carries() == (other,)


def test_a_race_that_has_not_begun_is_carried_first_and_needs_no_second_first_run():
    told = ready()
    one, other = told.candidate(), told.candidate()
    told.promise(one, value=0.2)
    told.promise(other)
    told.win(one, gain=0.8)
    assert told.carries() == (other,)
    new = told.carry()
    assert told.state(new).verdict is Verdict.RETEST
    assert f"{new}-pair1" in told.could()


def test_changes_in_line_are_carried_one_at_a_time_behind_what_can_start():
    told = ready(max_trials=9, noise_share=0.0)
    winner, one, other = (told.candidate() for _ in range(3))
    told.promise(winner)
    told.win(winner)
    assert told.carries() == (one,)
    carried = told.carry()
    assert told.ids() == [f"{carried}-screen@a"]
    assert told.carries() == (other,)
    again = told.carry()
    assert told.ids() == [f"{carried}-screen@a", f"{again}-screen@b"]
    assert told.lane.screens == 3


def test_a_first_run_that_was_lost_stays_with_what_it_was_built_on():
    told = ready()
    one, other = told.candidate(), told.candidate()
    told.run(f"{other}-screen", outcome=Outcome.LOST)
    told.promise(one)
    told.win(one)
    assert f"{other}-screen@a" in told.ids()
    assert told.carries() == ()


def test_a_win_in_conflict_with_the_champion_is_recorded_for_those_who_can_merge_it_otherwise():
    told, (one,) = with_wins(1)
    told.add(Judged(one, Verdict.DISCARD, "it conflicts with the champion", -0.3, 0.01, pairs=1, conflict=True))
    assert told.lane.unmerged == [one]
    assert told.lane.open == {}


def test_a_win_whose_merge_is_refused_is_over_and_the_study_goes_on():
    told, (one,) = with_wins(1, max_trials=2)
    told.add(Refused(told.propose(carries=(one,)), "the same program as c0001"))
    assert told.lane.open == {}
    assert told.lane.screens == 2
    assert told.commands() == [Finish("all 2 trials are done")]


@pytest.mark.parametrize("refused", [False, True], ids=["in conflict", "refused"])
def test_what_never_came_to_its_first_run_is_not_counted_as_a_trial(refused: bool):
    told = ready(max_trials=2)
    one, other = told.candidate(), told.candidate()
    told.promise(one)
    told.win(one)
    if refused:
        told.add(Refused(told.propose(carries=(other,)), "the same program as c0001"))
    else:
        told.add(Judged(other, Verdict.DISCARD, "it conflicts with the champion", conflict=True))
    assert told.lane.screens == 1
    assert told.lane.unmerged == []
    assert told.commands() == [Ask("cpu", "tune", 1, commit_of(f"step {one}"))]


# ---- asking ----


def test_as_many_are_asked_for_as_slots_are_free_and_one_in_line_for_every_eighth():
    told = ready(noise_share=0.0)
    assert told.commands() == [Ask("cpu", "tune", 3, BASE)]
    told.candidate()
    assert told.commands()[-1] == Ask("cpu", "tune", 2, BASE)
    told.start("c0001-screen")
    assert told.commands() == [Ask("cpu", "tune", 2, BASE)]
    told.candidate()
    told.start("c0002-screen", slot="b")
    assert told.commands() == [Ask("cpu", "tune", 1, BASE)]
    told.candidate()
    assert told.commands() == []


@pytest.mark.parametrize(("share", "line"), [(0.0, 2), (0.001, 2), (0.004, 4), (0.005, 6), (0.0125, 12), (0.06, 16)])
def test_the_line_is_as_long_as_slots_would_wait_for_answers_if_all_trials_ended_together(share: float, line: int):
    told = ready(slots=SIXTEEN, noise_share=0.0)
    all_busy(told)
    told.asking = {("cpu", "tune"): slow(share * TRIAL_S, parallel=1)}  # of a trial, for each proposal
    assert counts(told) == {"tune": line}


def test_whoever_stands_beside_the_first_proposer_has_a_small_line_of_their_own():
    told = ready(slots=tuple(Slot(str(number), "cpu") for number in range(8)), proposers=("tune", "transfer"))
    assert told.commands() == [Ask("cpu", "tune", 9, BASE), Ask("cpu", "transfer", 2, BASE)]
    told.candidate(proposer="transfer")
    told.candidate(proposer="transfer")
    assert [(ask.proposer, ask.count) for ask in told.commands() if isinstance(ask, Ask)] == [("tune", 7)]


def test_what_others_have_in_line_leaves_those_who_keep_it_a_place():
    """On one slot two changes that only tidy were all there was to choose from, until both had had their races."""
    told = ready(slots=(Slot("a", "cpu"),), proposers=("tune", "additive", "ablate", "simplify"), noise_share=0.0)
    all_busy(told)
    told.candidate(proposer="ablate")
    told.candidate(proposer="simplify")
    assert counts(told) == {"tune": 1, "additive": 1}
    told.candidate(proposer="agent")
    told.candidate(proposer="agent")
    assert counts(told) == {"tune": 1, "additive": 1}
    told = ready(slots=SIXTEEN, proposers=("tune", "ablate"), noise_share=0.0)
    for proposer in ("ablate", "ablate", "agent"):
        told.candidate(proposer=proposer)
    assert counts(told)["tune"] == 16 + 2 - 1  # the agent's is one of those that the slots are waiting for


def test_those_who_move_knobs_share_the_line_as_the_bandit_names_them_first():
    told = ready(slots=SIXTEEN, proposers=("additive", "tune", "transfer"), noise_share=0.0)
    asked = counts(told)
    assert 18 <= asked["additive"] + asked["tune"] <= 19
    assert min(asked["additive"], asked["tune"]) > 4  # nothing is known of them yet
    assert asked["transfer"] == 4
    told.candidate(proposer="additive")
    told.candidate(proposer="transfer")
    told.candidate(proposer="transfer")
    assert 15 <= counts(told)["additive"] + counts(told)["tune"] <= 16  # of what is left for both
    told.asking = {("cpu", "tune"): Pace(rests=True, is_out=True)}
    assert counts(told) == {"additive": 15, "transfer": 2}
    told = ready(slots=(Slot("a", "cpu"),), proposers=("tune", "additive"), noise_share=0.0)
    all_busy(told)
    assert counts(told) == {"tune": 1, "additive": 1}  # one of each: there is a choice
    told = ready(slots=SIXTEEN, proposers=("mind", "tune", "additive"))
    told.asking = {("cpu", "mind"): slow(TRIAL_S, asked=32)}
    assert set(counts(told)) == {"tune", "additive"}
    told = ready(slots=SIXTEEN, proposers=("combine", "tune", "additive"))
    assert counts(told) == {"combine": 18, "tune": 4, "additive": 4}  # they are not at its head


def test_the_line_goes_to_the_one_whose_tries_are_promising_where_none_has_won():
    """Slots that get free together take all of the line: a half of it would be a half of the slots."""
    told = ready(slots=SIXTEEN, proposers=("additive", "tune"), noise_share=0.0)
    tallies = told.study.lanes["cpu"].tallies
    tallies[Arm("additive", Operator.TUNE)] = Tally(tries=60, seconds=60 * 300, hopes=15.0)
    tallies[Arm("tune", Operator.TUNE)] = Tally(tries=60, seconds=60 * 300, hopes=1.0)
    asked = counts(told)
    assert asked["additive"] >= 15
    assert 1 <= asked["tune"] <= 4


def test_nobody_is_asked_again_while_their_answer_is_due_and_others_are():
    told = ready(proposers=("tune", "transfer"))
    told.asking = {("cpu", "tune"): Pace(asked=1)}  # even when fewer were asked for than are wanted now
    assert told.commands() == [Ask("cpu", "transfer", 1, BASE)]
    told.asking = {("cpu", "tune"): Pace(), (GPU.slug, "tune"): Pace(asked=5)}
    assert [ask.proposer for ask in told.commands() if isinstance(ask, Ask)] == ["tune", "transfer"]


def test_a_profile_without_slots_is_not_asked_for():
    told = Told(slots=TWO)
    told.begin(CPU, GPU)
    told.baselines("cpu")
    told.baselines(GPU.slug)
    assert told.commands() == [Ask("cpu", "tune", 3, BASE)]


def test_the_limit_of_trials_is_one_of_each_profile_and_refusals_do_not_count():
    told = ready(max_trials=2)
    assert told.commands() == [Ask("cpu", "tune", 2, BASE)]
    told.add(Refused(told.propose(), "does not apply"))
    told.candidate()
    assert told.commands()[-1] == Ask("cpu", "tune", 1, BASE)
    told.run("c0002-screen", 2.0)
    told.conclude()
    told.run(f"{told.candidate()}-screen", 2.0)
    told.conclude()
    assert told.commands() == [Finish("all 2 trials are done")]


def test_no_more_is_asked_for_than_the_limit_leaves_of_what_others_were_asked_for():
    told = ready(max_trials=3, proposers=("tune", "ablate"))
    told.asking = {("cpu", "tune"): Pace(asked=3)}
    assert told.commands() == []


# ---- asking those who take their time ----

SIXTEEN = tuple(Slot(str(number), "cpu") for number in range(16))
MIND = ("mind", "tune")


def slow(proposal_s: float = 0.0, *, asked: int = 0, parallel: int = 32, **others: Any) -> Pace:
    others = {"one_by_one": parallel > 1, **others}
    return Pace(asked=asked, parallel=parallel, places=parallel, proposal_s=proposal_s, **others)


def counts(told: Told) -> dict[str, int]:
    """What each proposer is asked for now."""
    return {command.proposer: command.count for command in told.commands() if isinstance(command, Ask)}


def all_busy(told: Told) -> None:
    """Puts a run on every slot, and none of them ends."""
    for slot in told.slots:
        told.start(f"{told.candidate()}-screen", slot=slot.id)


@pytest.mark.parametrize("trials", [0.0, 0.25, 0.9, 1.5])
def test_a_slow_proposer_is_asked_for_a_line_and_for_what_the_slots_take_meanwhile(trials: float):
    told = ready(slots=SIXTEEN, proposers=MIND, noise_share=0.0)
    all_busy(told)
    told.asking = {("cpu", "mind"): slow(trials * TRIAL_S, parallel=99)}
    assert counts(told)["mind"] == 16 + math.ceil(16 * trials)
    told.asking = {("cpu", "mind"): slow(trials * TRIAL_S, parallel=99, asked=9)}
    told.candidate(proposer="mind")
    assert counts(told)["mind"] == 16 + math.ceil(16 * trials) - 9 - 1


def test_a_slow_proposer_is_asked_for_no_more_at_once_than_it_works_on():
    told = ready(slots=SIXTEEN, proposers=MIND)
    told.asking = {("cpu", "mind"): slow(TRIAL_S, parallel=8)}
    assert counts(told) == {"mind": 8, "tune": 18}
    told.asking = {("cpu", "mind"): slow(TRIAL_S, parallel=8, asked=5)}
    assert counts(told)["mind"] == 3
    told.asking = {("cpu", "mind"): replace(slow(TRIAL_S, parallel=8), places=1)}
    assert counts(told)["mind"] == 1  # to see whether it works again


def test_profiles_share_what_a_slow_proposer_works_on_by_their_slots():
    told = Told(slots=(*SIXTEEN[:12], *(Slot(f"g{number}", GPU.slug) for number in range(4))), proposers=MIND)
    told.begin(CPU, GPU)
    told.asking = {(slug, "mind"): slow(parallel=8) for slug in ("cpu", GPU.slug)}
    asked = {(ask.profile, ask.count) for ask in told.commands() if isinstance(ask, Ask) and ask.proposer == "mind"}
    assert asked == {("cpu", 6), (GPU.slug, 2)}


def test_a_quick_proposer_fills_the_line_while_a_slow_one_in_front_thinks_and_starves_nobody():
    told = ready(slots=SIXTEEN, proposers=MIND, noise_share=0.0)
    told.asking = {("cpu", "mind"): slow(TRIAL_S, asked=32)}
    assert counts(told) == {"tune": 18}
    all_busy(told)
    told.candidate()
    told.candidate()
    told.asking = {("cpu", "mind"): slow(TRIAL_S)}
    assert counts(told) == {"mind": 32}  # the line is full, but not of its own
    told.asking = {("cpu", "mind"): slow(TRIAL_S, asked=32)}
    assert counts(told) == {}


def test_a_slow_proposer_beside_others_is_asked_for_its_share():
    told = ready(slots=SIXTEEN, proposers=("tune", "mind"))
    told.asking = {("cpu", "mind"): slow(TRIAL_S)}
    assert counts(told) == {"tune": 18, "mind": 8}


def test_who_answers_one_by_one_and_late_is_slow_as_well():
    told = ready(slots=SIXTEEN, proposers=("local", "tune"))
    told.asking = {("cpu", "local"): slow(TRIAL_S / 4, parallel=1)}
    assert counts(told) == {"local": 36, "tune": 18}
    told.asking = {("cpu", "local"): slow(TRIAL_S / 4, parallel=1, asked=1)}
    assert counts(told) == {"tune": 18}
    told.asking = {("cpu", "local"): slow(TRIAL_S / 99, parallel=1, asked=1)}
    assert counts(told) == {"tune": 4}  # the first one keeps the line


def test_who_is_asked_one_by_one_is_asked_for_one_however_many_are_wanted():
    told = ready(slots=SIXTEEN, proposers=("local", "tune"))
    told.asking = {("cpu", "local"): slow(TRIAL_S, parallel=1, one_by_one=True)}
    assert counts(told) == {"local": 1, "tune": 18}
    told.asking = {("cpu", "local"): slow(TRIAL_S, parallel=1, asked=1, one_by_one=True)}
    assert counts(told) == {"tune": 18}


@pytest.mark.parametrize("failing", [{"trouble": "no connection"}, {"is_out": True}])
def test_when_the_first_proposer_rests_others_take_its_place(failing: dict[str, Any]):
    told = ready(slots=SIXTEEN, proposers=("tune", "mind", "transfer"))
    told.asking = {("cpu", "tune"): Pace(rests=True, **failing), ("cpu", "mind"): slow()}
    assert counts(told) == {"mind": 32, "transfer": 18}
    told.asking = {("cpu", "tune"): Pace(rests=True), ("cpu", "mind"): slow()}
    assert counts(told) == {"mind": 4, "transfer": 18}  # a pause of a moment is no matter for a slow one


def test_what_is_left_of_a_limit_goes_to_slow_proposers_in_part_while_slots_need_work():
    told = ready(slots=SIXTEEN, proposers=MIND, max_trials=8)
    told.asking = {("cpu", "mind"): slow()}
    assert counts(told) == {"mind": 4, "tune": 4}
    told.asking = {("cpu", "mind"): slow(), ("cpu", "tune"): Pace(rests=True)}
    assert counts(told) == {"mind": 8}


def test_a_slow_answer_is_not_waited_for_after_the_time_limit():
    told = ready(proposers=MIND)
    told.asking = {("cpu", "mind"): slow(asked=2)}
    assert told.commands(accepting=False) == [Finish("the time limit has passed")]


def test_a_search_without_ideas_ends_with_what_kept_its_proposers_from_having_any():
    told = ready(proposers=MIND)
    asking = {("cpu", "mind"): slow(is_out=True, trouble="$5.00 of $5.00 are spent; raise --max-usd")}
    assert out_of_ideas(told.study, ["cpu"], asking) is None
    finish = out_of_ideas(told.study, ["cpu"], {**asking, ("cpu", "tune"): Pace(is_out=True)})
    assert finish == Finish(
        "no proposer has anything new to try; mind: $5.00 of $5.00 are spent; raise --max-usd",
    )


def test_proposals_are_made_commits_before_anything_else():
    told = ready()
    name = told.propose()
    assert told.commands() == [Materialise(told.study.waiting[name])]


def test_after_ten_refusals_in_a_row_nobody_is_asked_until_something_new_is_known():
    told = ready()
    waiting = told.candidate()
    told.start(f"{waiting}-screen")
    for _ in range(MOST_REFUSALS):
        told.add(Refused(told.propose(), "the patch is empty"))
    assert told.commands() == []  # a run is in flight: it may teach the proposer
    told.end(f"{waiting}-screen", 2.0)
    told.conclude()
    assert told.commands() == [Ask("cpu", "tune", 3, BASE)]
    for _ in range(MOST_REFUSALS):
        told.add(Refused(told.propose(), "the patch is empty"))
    (command,) = told.commands()
    assert command == Finish("the last 10 proposals for cpu were all refused; the last one: the patch is empty")
    told.add(SessionStarted("host", 2, "0"))
    assert told.commands() == [Ask("cpu", "tune", 3, BASE)]


# ---- the human's directions ----


def direct(told: Told, block: str) -> None:
    told.add(Directed("program.md", f"```raysearch\n{block}\n```"))


def test_other_directions_are_something_new_for_proposers_whose_ideas_were_refused():
    told = ready()
    for _ in range(MOST_REFUSALS):
        told.add(Refused(told.propose(), "the patch is empty"))
    assert isinstance(told.commands()[0], Finish)
    direct(told, "frozen = ['LR']")
    assert told.commands() == [Ask("cpu", "tune", 3, BASE)]


def test_the_smaller_of_both_limits_holds_and_the_directions_may_change():
    told = ready(max_trials=3)
    direct(told, "budget.trials = 1")
    assert told.commands() == [Ask("cpu", "tune", 1, BASE)]
    told.run(f"{told.candidate()}-screen", 2.0)
    told.conclude()
    assert told.commands() == [Finish("all 1 trials are done")]
    direct(told, "budget.trials = 9")
    assert told.commands() == [Ask("cpu", "tune", 2, BASE)]


def test_who_is_called_by_a_forbidden_operator_is_not_asked_and_the_next_has_most_of_the_line():
    told = ready(proposers=("tune", "additive", "combine", "transfer"))
    direct(told, "forbidden = ['tune']")
    assert told.commands() == [Ask("cpu", "combine", 3, BASE), Ask("cpu", "transfer", 1, BASE)]
    direct(told, "forbidden = ['tune', 'combine', 'transfer']")
    silent = {("cpu", name): Pace(is_out=True) for name in told.study.settings.proposers}
    assert out_of_ideas(told.study, ["cpu"], silent)


def test_a_profile_whose_hours_are_over_is_asked_no_more_and_others_are():
    told = ready(slots=(*TWO, Slot("g", GPU.slug)), noise_share=0.0)
    told.add(ProfileAdded(GPU, BASE, "gpu program"))
    told.baselines(GPU.slug)
    told.slots = (*TWO, Slot("g", GPU.slug))
    late = {"cpu"}
    assert [command.profile for command in told.commands(late=late) if isinstance(command, Ask)] == [GPU.slug]
    served = ["cpu", GPU.slug]
    assert out_of_ideas(told.study, served, {}, late=late) is None
    assert out_of_ideas(told.study, served, {(GPU.slug, "tune"): Pace(is_out=True)}, late=late)
    assert told.commands(late={"cpu", GPU.slug}) == [Finish("the time limit has passed")]


# ---- slots that are set aside ----


THREE = tuple(Slot(name, "cpu") for name in "abc")


def drifting(*, drift: float = 0.0, speed: float = 0.7) -> tuple[Told, SlotSetAside]:
    """A study of which slot `c` is slow or gives other numbers, and what is to be done about it now."""
    told, references = ready(slots=THREE, noise_share=0.5), 0
    for number in range(400):
        for event in events(told):
            if isinstance(event, SlotSetAside):
                return told, event
            told.add(event)
        if not told.lane.line:
            told.candidate()
        trial = told.starts()[0]
        noise = 0.01 * ((number * 7) % 5 - 2)
        slot = "abc"[references % 3] if trial.purpose is Purpose.REFERENCE else "a"
        references += trial.purpose is Purpose.REFERENCE
        bad = slot == "c"
        told.start(trial.id, slot=slot)
        value = 1.0 + noise + drift * bad if trial.purpose is Purpose.REFERENCE else 2.0
        told.end(trial.id, value, speed=1000.0 * (speed if bad else 1.0) * (1 + noise))
    raise AssertionError("it is not noticed")


def events(told: Told) -> list[Event]:
    """What is to be written down now."""
    return [command.event for command in told.commands() if isinstance(command, Conclude)]


def set_aside(**options: float) -> Told:
    """The same, after it was done."""
    told, event = drifting(**options)
    told.add(event)
    return told


def test_a_slow_slot_is_set_aside_with_its_reason_and_gets_nothing():
    told, event = drifting()
    assert (event.slot, event.profile) == ("c", "cpu")
    assert "% slower than the others" in event.reason
    told.add(event)
    for _ in range(5):
        told.candidate()
    assert {name.partition("@")[2] for name in told.ids()} == {"a", "b"}


def test_a_slot_whose_numbers_drift_is_set_aside():
    _, event = drifting(drift=0.3, speed=1.0)
    assert event.slot == "c"
    assert event.reason.startswith("it drifts: the same programs are +0.")


def test_a_slot_that_was_set_aside_comes_back_after_a_while():
    told = set_aside()
    for _ in range(int(ASIDE_TRIALS) - 1):
        told.run(f"{told.candidate()}-screen", 2.0)
        told.conclude()
        assert events(told) == []
    for _ in range(2):
        told.run(f"{told.candidate()}-screen", 2.0)
        told.conclude()
    assert events(told) == [SlotRestored("c", "cpu")]
    told.conclude()
    for _ in range(9):
        told.candidate()
    assert "c" in {name.partition("@")[2] for name in told.ids()}


def test_the_last_slot_of_a_profile_is_never_set_aside():
    told, _ = drifting()
    told.lane.health.changed.add("c")  # to ask is to be told once
    told.slots = (Slot("c", "cpu"), Slot("g", GPU.slug))
    assert events(told) == []


@pytest.mark.parametrize("slots", [THREE, THREE[2:]], ids=["beside others", "alone"])
def test_a_slot_that_is_throttled_again_and_again_is_set_aside_unless_it_is_the_only_one(slots: tuple[Slot, ...]):
    told = ready(slots=slots, noise_share=0.0)
    for _ in range(3):
        for slot in slots:
            name = f"{told.candidate()}-screen"
            hot = {"throttled_share": 0.6, "throttled": 1.0} if slot.id == "c" else {"throttled_share": 0.0}
            told.start(name, slot=slot.id)
            told.end(name, 2.0, facts=hot)
            told.conclude()  # the verdict
            told.conclude()  # and what becomes of the slot
    assert set(told.study.aside) == ({"c"} if len(slots) > 1 else set())
    for event in told.study.aside.values():
        assert event.reason.startswith("its clock was throttled by heat or the power brake in 3 of its last 3 trials")
    counted = {slot: (heat.trials, len(heat.throttled)) for slot, heat in told.lane.heat.items() if heat.trials}
    assert counted == {slot.id: (3, 3 if slot.id == "c" else 0) for slot in slots}


def test_when_only_a_slot_that_was_set_aside_is_left_it_is_used():
    told = set_aside()
    told.slots = (Slot("c", "cpu"),)
    assert told.commands() == [Conclude(SlotRestored("c", "cpu"))]
    told.conclude()
    told.candidate()
    assert told.ids()


def test_another_session_looks_at_the_slots_anew():
    told = set_aside()
    told.add(SessionStarted("host", 2, "0"))
    assert told.study.aside == {}


@pytest.mark.parametrize("both", [False, True], ids=["its own run", "both sides"])
def test_what_an_undecided_trial_said_on_a_slot_that_is_set_aside_is_taken_back_and_run_again(both: bool):
    told = ready(slots=FOUR, noise_share=0.0, rules=judge.Rules(keep_probability=1.0, max_pairs=9))
    name = told.candidate()
    told.promise(name)
    told.wait(1000.0)
    ours, theirs = f"{name}-pair1", "cpu-base-reference1"
    fresh, pairs = told.study.noise(told.lane), told.lane.differences.noise()
    values = list(told.lane.fresh.values("cpu-base"))
    told.start(theirs, slot="c")
    told.start(ours, slot="c")
    told.end(theirs, 1.3)
    told.end(ours, 0.9)
    told.conclude()
    assert told.state(name).pairs == 1
    repeat = (ours, theirs) if both else (ours,)
    told.add(SlotSetAside("c", "cpu", "it drifts", repeat))
    if both:
        noise = told.study.noise(told.lane)
        assert noise is not None
        assert fresh is not None
        assert (noise.sigma, noise.dof) == (pytest.approx(fresh.sigma), fresh.dof)
        assert list(told.lane.fresh.values("cpu-base")) == values
    assert not told.lane.fresh.values(name)
    assert told.lane.differences.noise() == pairs
    assert set(repeat) <= {name.partition("@")[0] for name in told.ids()}
    assert "c" not in {name.partition("@")[2] for name in told.ids()}
    for trial in repeat:
        told.run(trial, 1.0 if trial == theirs else 0.9, slot="a")
    assert told.study.trials[ours].attempt == 2
    assert len(told.study.race_pairs(told.state(name))) == 1


def test_a_verdict_comes_before_a_slot_is_set_aside():
    """A first run that was judged is not to be run again, and a verdict may close what a trial was for."""
    told, _ = drifting()
    told.lane.health.changed.add("c")
    name = told.candidate()
    told.start(f"{name}-screen", slot="c")
    told.end(f"{name}-screen", 2.0)
    assert [event.candidate for event in told.conclude()] == [name]
    (event,) = events(told)
    assert isinstance(event, SlotSetAside)
    assert f"{name}-screen" not in event.repeat


def test_a_baseline_that_is_run_again_holds_no_verdict_back_for_ever():
    told = ready(slots=FOUR, noise_share=0.0)
    one = told.candidate()
    told.promise(one)
    told.start(f"{one}-pair1")
    told.add(SlotSetAside("d", "cpu", "it drifts", ("cpu-base-3",)))
    other = told.candidate()
    told.run(f"{other}-screen", 2.0, slot="b")
    assert told.conclude() == []
    told.run("cpu-base-3", 1.0, slot="c")
    assert [event.candidate for event in told.conclude()] == [other]


# ---- blocked, draining, the end ----


def test_a_baseline_that_failed_blocks_its_profile_and_no_other():
    told = Told(slots=(Slot("a", "cpu"), Slot("g", GPU.slug)))
    told.begin(CPU, GPU)
    told.run("cpu-base-1", outcome=Outcome.CRASHED)
    assert told.lane.blocked == "its baseline cpu-base-1 crashed: why"
    assert told.ids() == [f"{GPU.slug}-base-1@g"]
    for number in (2, 3):
        told.run(f"{GPU.slug}-base-{number}", 1.0, slot="g")
    assert [command.profile for command in told.commands() if isinstance(command, Ask)] == [GPU.slug]
    told.run(f"{GPU.slug}-base-1", outcome=Outcome.OUT_OF_MEMORY, slot="g")
    assert told.commands() == [
        Finish(
            "cpu is blocked, its baseline cpu-base-1 crashed: why; "
            f"{GPU.slug} is blocked, its baseline {GPU.slug}-base-1 out_of_memory: why"
        )
    ]


def test_a_candidate_of_a_blocked_profile_waits_and_does_not_keep_the_study_from_ending():
    told = Told()
    told.begin()
    told.candidate()
    told.run("cpu-base-1", outcome=Outcome.CRASHED)
    (command,) = told.commands()
    assert isinstance(command, Finish)


def test_a_profile_without_slots_does_not_keep_a_study_from_ending_but_is_named():
    told = ready(max_trials=1)
    told.add(ProfileAdded(GPU, BASE, "gpu program"))
    told.run(f"{told.candidate()}-screen", 2.0)
    told.conclude()
    (command,) = told.commands()
    assert command == Finish(
        f"all 1 trials are done; not those of {GPU.slug}, which has no slot now: start the study again when it has"
    )
    told.slots = (*TWO, Slot("g", GPU.slug))
    assert told.ids() == [f"{GPU.slug}-base-1@g"]


def test_without_any_slot_the_study_waits():
    told = Told(slots=())
    told.begin()
    assert told.commands() == []
    assert told.commands(accepting=False) == []


def test_after_the_time_limit_what_is_in_line_is_run_and_nothing_is_asked_for():
    told = ready(noise_share=0.0)
    name = told.candidate()
    assert told.ids(accepting=False) == [f"{name}-screen@a"]
    told.promise(name)
    assert told.ids(accepting=False)[0] == f"{name}-pair1@a"
    told.refute(name)
    assert told.commands(accepting=False) == [Finish("the time limit has passed")]


def test_draining_waits_for_the_runs_in_flight_and_still_decides():
    told = ready()
    name = told.candidate()
    told.start(f"{name}-screen")
    assert told.commands(draining=True) == []
    told.end(f"{name}-screen", 0.5)
    (command,) = told.commands(draining=True)
    assert isinstance(command, Conclude)
    told.conclude()
    assert told.commands(draining=True) == [Finish("stopped: the runs in flight have ended")]
    assert told.ids()  # they wait for the next session


def test_the_answer_to_an_ask_is_waited_for():
    told = ready(max_trials=1)
    told.asking = {("cpu", "tune"): Pace(asked=1)}
    assert told.commands(accepting=False) == []
    told.asking = {}
    assert told.commands(accepting=False) == [Finish("the time limit has passed")]


def test_asking_what_to_do_changes_nothing_that_is_answered():
    told = ready()
    told.candidate()
    told.run("c0001-screen", 0.5)
    assert told.commands() == told.commands()
    replayed = Study(told.study.settings)
    for record in told.records:
        replayed.apply(record)
        replayed.warm |= told.study.warm
    assert vars(replayed) == vars(told.study)


# ---- who is asked ----


def test_nobody_tidies_a_ratchet_of_a_few_steps():
    told = ready(proposers=("tune", "ablate", "simplify", "transfer"))

    def asked() -> set[str]:
        return {command.proposer for command in told.commands() if isinstance(command, Ask)}

    assert asked() == {"tune", "transfer"}
    for value in (1.0, 0.7, 0.4, 0.1, -0.2):
        name = told.candidate()
        told.promise(name, value=value - 0.3)
        told.win(name, than=value)
    assert asked() == {"tune", "ablate", "simplify", "transfer"}


def test_a_search_ends_when_those_that_may_be_asked_have_no_ideas():
    told = ready(proposers=("tune", "ablate"))
    assert out_of_ideas(told.study, ["cpu"], {("cpu", "ablate"): Pace(is_out=True)}) is None
    finish = out_of_ideas(told.study, ["cpu"], {("cpu", "tune"): Pace(is_out=True)})
    assert finish == Finish("no proposer has anything new to try")
    assert out_of_ideas(told.study, ["cpu"], {("cpu", "tune"): Pace(asked=1, is_out=True)}) is None
