"""No policy, and a schedule."""

import json

import pytest

from esper.leyline import (
    AdaptationCommand,
    ConfigError,
    NoChange,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
    Stage,
)
from esper.tamiyo import Entry, NoPolicy, SchedulePolicy, grow_periodically
from tamiyo.making import CONV, dormant, seed, state
from tamiyo.simulated import GrowthProcess, Slot, follow

ADVANCE = SeedCommand("a", SeedOperation.ADVANCE)
PLANT = SeedCommand("a", SeedOperation.GERMINATE, blueprint="conv")


def waits(answer: AdaptationCommand) -> str:
    assert isinstance(answer, NoChange)
    assert answer.explanation is not None
    return answer.explanation.otherwise


def test_no_policy_changes_nothing_and_says_so() -> None:
    answer = NoPolicy().decide(state(3, {"a": dormant()}))
    assert isinstance(answer, NoChange)
    assert answer.explanation is not None
    assert answer.explanation.reason


def test_each_slot_grows_at_its_time_and_goes_on_as_soon_as_it_may() -> None:
    process = GrowthProcess({"a": Slot({"conv": 0.2}), "b": Slot({"conv": 0.2})})
    policy = SchedulePolicy(grow_periodically(["a", "b"], "conv", 4, start=2))
    follow(process, policy)
    assert process.applied == [
        (2, "germinate", "a", "conv"),
        (3, "advance", "a", "conv"),
        (4, "advance", "a", "conv"),
        (6, "germinate", "b", "conv"),
        (7, "advance", "b", "conv"),
        (8, "advance", "b", "conv"),
    ]


def test_what_a_gate_refuses_is_asked_for_again_but_not_for_ever() -> None:
    process = GrowthProcess({"a": Slot({"conv": -0.2})})
    policy = SchedulePolicy(grow_periodically(["a"], "conv", 1), tries=3)
    follow(process, policy)
    refused = [report.operation for report in process.reports if not report.applied]
    assert refused == ["advance"] * 6, "three tries for each of its two entries"


def test_entries_fall_due_by_epoch_or_by_step() -> None:
    policy = SchedulePolicy([Entry(ScaleLearningRate(0.5), step=500), Entry(PLANT, epoch=1)])
    assert "step 500" in waits(policy.decide(state(0, {"a": dormant()})))
    planted = policy.decide(state(1, {"a": dormant()}))
    assert isinstance(planted, SeedCommand)
    assert isinstance(policy.decide(state(2, {"a": dormant()})), ScaleLearningRate)
    assert "no word" in waits(policy.decide(state(3, {"a": dormant()})))


def test_an_entry_waits_for_the_stage_that_allows_it_and_keeps_its_seeds_order() -> None:
    policy = SchedulePolicy([Entry(PLANT, 0), Entry(ADVANCE, 0)])
    assert "waits, since it is fossilised" in waits(
        policy.decide(state(0, {"a": seed(Stage.FOSSILISED)}))
    )
    assert "waits for a slot" in waits(policy.decide(state(1, {})))
    answer = policy.decide(state(2, {"a": dormant()}))
    assert isinstance(answer, SeedCommand)
    assert answer.operation is SeedOperation.GERMINATE


def test_it_waits_for_the_end_of_conservative_mode_and_for_a_budget() -> None:
    policy = SchedulePolicy([Entry(PLANT, 0)])
    careful = state(0, {"a": dormant()}, metrics={"tolaria.mode.conservative": 1.0})
    assert "conservative" in waits(policy.decide(careful))
    assert "4,800 parameters" in waits(policy.decide(state(1, {"a": dormant()}, budget=4500)))
    barred = dormant().__class__(Stage.DORMANT, embargo_left=3, offers={"conv": CONV})
    assert "embargo" in waits(policy.decide(state(2, {"a": barred})))
    assert isinstance(policy.decide(state(3, {"a": dormant()})), SeedCommand)


def test_what_there_is_never_word_of_is_asked_for_again() -> None:
    policy = SchedulePolicy([Entry(PLANT, 0)])
    answers = [policy.decide(state(epoch, {"a": dormant()})) for epoch in range(6)]
    assert [isinstance(answer, SeedCommand) for answer in answers] == [
        True, False, False, False, True, False,
    ]  # fmt: skip


def test_its_progress_is_saved() -> None:
    entries = grow_periodically(["a"], "conv", 1)
    first, second = SchedulePolicy(entries), SchedulePolicy(entries)
    first.decide(state(1, {"a": dormant()}))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert "no word" in waits(second.decide(state(2, {"a": dormant()})))
    with pytest.raises(ConfigError, match="3 entries, this one 0"):
        SchedulePolicy([]).load_state_dict(first.state_dict())


def test_entries_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="give one"):
        Entry(ADVANCE)
    with pytest.raises(ConfigError, match="give one"):
        Entry(ADVANCE, 1, 1)
    with pytest.raises(ConfigError, match="before training"):
        Entry(ADVANCE, step=-1)
    with pytest.raises(ConfigError, match="every is 0"):
        grow_periodically(["a"], "conv", 0)
