"""The default policy: whole trajectories, then rule by rule."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest

from esper.leyline import (
    AdaptationCommand,
    FieldReport,
    Gain,
    NoChange,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
    SeedState,
    Stage,
    SystemState,
)
from esper.tamiyo import RuleLimits, RulesPolicy
from tamiyo.making import BAD, CONV, GOOD, TINY, UNSURE, dormant, seed, state
from tamiyo.simulated import GrowthProcess, Slot, follow

OPEN = RuleLimits(window_epochs=1)


def asked(command: AdaptationCommand) -> tuple[str, str]:
    assert isinstance(command, SeedCommand), command
    return command.operation.value, command.seed


def rule(command: AdaptationCommand) -> str:
    assert command.explanation is not None
    return command.explanation.rule


def under_fitting(
    policy: RulesPolicy, seeds: dict[str, SeedState], **more: Any
) -> AdaptationCommand:
    """Show two states, the second of which may germinate something."""
    policy.decide(state(0, {}, loss=2.0))
    return policy.decide(state(1, seeds, loss=1.5, **more))


def test_the_good_seed_is_fossilised_early_and_the_bad_one_culled() -> None:
    process = GrowthProcess({"good": Slot({"conv": 0.25}, 2.0), "bad": Slot({"conv": -0.2}, 1.5)})
    answers = follow(process, RulesPolicy())
    assert process.applied == [
        (1, "germinate", "good", "conv"),
        (2, "advance", "good", "conv"),
        (3, "advance", "good", "conv"),
        (5, "germinate", "bad", "conv"),
        (7, "cull", "bad", "conv"),
    ]
    assert process.slots["good"].stage is Stage.FOSSILISED
    assert [rule(answer) for answer in answers[1:8]] == [
        "germinate", "blend", "fossilise", "window", "germinate", "no change", "cull in training",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_two_good_growths_are_finished_within_ten_epochs(seed: int) -> None:
    slots = {"a": Slot({"conv": 0.2}), "b": Slot({"conv": 0.15})}
    process = GrowthProcess(slots, seed=seed, noise=0.03)
    follow(process, RulesPolicy())
    kept = [when for when, _, name, _ in process.applied if slots[name].stage is Stage.FOSSILISED]
    assert len(kept) == 6
    assert max(kept) < 10


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_that_gains_less_than_its_price_does_not_stay(seed: int) -> None:
    process = GrowthProcess({"a": Slot({"conv": 0.004})}, seed=seed, noise=0.002)
    follow(process, RulesPolicy())
    assert ("cull", "a") in [(what, name) for _, what, name, _ in process.applied]
    assert process.slots["a"].stage is not Stage.FOSSILISED


def test_answers_that_come_a_boundary_late_lead_to_the_same_end() -> None:
    slots = {"good": Slot({"conv": 0.25}, 2.0), "bad": Slot({"conv": -0.2}, 1.5)}
    process = GrowthProcess(slots)
    follow(process, RulesPolicy(), late=True)
    assert slots["good"].stage is Stage.FOSSILISED
    assert ("cull", "bad") in [(what, name) for _, what, name, _ in process.applied]
    assert all(report.applied for report in process.reports)


def test_an_over_fitting_model_does_not_grow_but_its_rate_is_cut_a_few_times() -> None:
    process = GrowthProcess({"a": Slot({"conv": 0.2})}, gap=0.9, tau_epochs=0.5, epochs=30)
    follow(process, RulesPolicy())
    assert [what for _, what, _, _ in process.applied] == ["rate"] * 3
    epochs = [when for when, _, _, _ in process.applied]
    assert min(b - a for a, b in pairwise(epochs)) >= RuleLimits().cut_epochs


def test_it_grows_within_its_budget_only() -> None:
    process = GrowthProcess({"a": Slot({"conv": 0.2})}, budget=4700)
    answers = follow(process, RulesPolicy())
    assert process.applied == []
    told = answers[3].explanation
    assert told is not None
    assert "a budget of 4,800 parameters, 100 more" in told.otherwise


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"metrics": {"tolaria.mode.conservative": 1.0}}, "conservative"),
        ({"losses": {"a": math.nan}}, "unmeasured"),
        ({"losses": {}}, "unmeasured"),
        ({"held_out": math.inf}, "unmeasured"),
        ({"growth": None}, "not growing"),
        ({"attempt": -1}, "stale"),
    ],
)
def test_nothing_is_changed_where_care_is_called_for(change: dict[str, Any], expected: str) -> None:
    policy = RulesPolicy()
    policy.decide(state(0, {}))
    answer = policy.decide(state(1, {"a": seed(Stage.TRAINING, GOOD)}, **change))
    assert isinstance(answer, NoChange)
    assert rule(answer) == expected
    assert asked(policy.decide(state(2, {"a": seed(Stage.TRAINING, GOOD)}))) == ("advance", "a")


def test_values_that_are_not_finite_are_left_out_of_explanations() -> None:
    answer = RulesPolicy().decide(state(0, {}, losses={"a": math.nan, "b": 2.0}))
    assert answer.explanation is not None
    assert answer.explanation.values == {"loss.b": 2.0, "held_out.a": 1.0}
    assert "loss.a" in answer.explanation.otherwise


def test_a_seed_in_training_goes_on_when_its_gain_is_sure_and_it_is_old_enough() -> None:
    def answer(gain: Gain | None, age: int = 188) -> AdaptationCommand:
        return RulesPolicy().decide(state(0, {"a": seed(Stage.TRAINING, gain, age=age)}))

    assert asked(answer(GOOD)) == ("advance", "a")
    assert isinstance(answer(GOOD, age=99), NoChange)
    assert isinstance(answer(UNSURE), NoChange)
    assert isinstance(answer(None), NoChange)
    young = answer(GOOD, age=99).explanation
    assert young is not None
    assert "age of 'a' above 100 (it is 99, 1 away)" in young.otherwise


def test_a_seed_in_training_is_culled_when_it_harms_again_or_never_gains() -> None:
    policy = RulesPolicy()
    harmful = {"a": seed(Stage.TRAINING, BAD)}
    assert isinstance(policy.decide(state(0, harmful)), NoChange)
    assert asked(policy.decide(state(1, harmful))) == ("cull", "a")
    policy, slow = RulesPolicy(), {"a": seed(Stage.TRAINING, UNSURE)}
    answers = [policy.decide(state(epoch, slow)) for epoch in range(5)]
    assert [isinstance(answer, NoChange) for answer in answers] == [True] * 4 + [False]
    assert asked(answers[-1]) == ("cull", "a")


def test_one_bad_measurement_between_others_culls_nothing() -> None:
    policy = RulesPolicy()
    for epoch, gain in enumerate([BAD, UNSURE, BAD, UNSURE]):
        assert isinstance(policy.decide(state(epoch, {"a": seed(Stage.TRAINING, gain)})), NoChange)


def test_a_seed_that_harms_as_it_blends_is_held_faded_and_culled() -> None:
    policy = RulesPolicy(OPEN)
    course = [
        (seed(Stage.BLENDING, BAD, alpha=0.4), "hold"),
        (seed(Stage.HOLDING, BAD, alpha=0.4), "retarget"),
        (seed(Stage.BLENDING, BAD, alpha=0.2), None),
        (seed(Stage.HOLDING, None, alpha=0.0), "cull"),
        (seed(Stage.BLENDING, BAD, alpha=0.0, fading=True), None),
    ]
    reports: list[FieldReport] = []
    for epoch, (shown, expected) in enumerate(course):
        answer = policy.decide(state(epoch, {"a": shown}, reports=reports))
        if expected is None:
            assert isinstance(answer, NoChange)
        else:
            assert asked(answer) == (expected, "a")
            assert isinstance(answer, SeedCommand)
            assert answer.operation is not SeedOperation.RETARGET or answer.target == 0.0
            step = (epoch + 1) * 188
            reports = [FieldReport("seed", True, "", seed="a", operation=expected, step=step)]


def test_a_held_seed_that_recovers_blends_on() -> None:
    held = state(0, {"a": seed(Stage.HOLDING, GOOD, alpha=0.4)})
    answer = RulesPolicy().decide(held)
    assert asked(answer) == ("retarget", "a")
    assert isinstance(answer, SeedCommand)
    assert answer.target == 1.0


def test_a_blended_seed_stays_when_its_gain_is_sure_or_found_again_and_again() -> None:
    assert asked(RulesPolicy().decide(state(0, {"a": seed(Stage.HOLDING, GOOD)}))) == (
        "advance",
        "a",
    )
    policy, likely = RulesPolicy(), {"a": seed(Stage.HOLDING, Gain(0.1, -0.02, 0.22, 8))}
    answers = [policy.decide(state(epoch, likely)) for epoch in range(3)]
    assert [isinstance(answer, NoChange) for answer in answers] == [True, True, False]
    assert asked(answers[-1]) == ("advance", "a")


def test_a_blended_seed_that_is_not_worth_its_price_is_culled_in_the_end() -> None:
    policy, cheap = RulesPolicy(), {"a": seed(Stage.HOLDING, TINY)}
    answers = [policy.decide(state(epoch, cheap)) for epoch in range(5)]
    assert all(isinstance(answer, NoChange) for answer in answers[:4])
    assert asked(answers[4]) == ("cull", "a")
    told = answers[0].explanation
    assert told is not None
    assert told.thresholds["gain.mean"] > TINY.mean
    assert "culled in 4 evaluations" in told.otherwise


def test_between_two_structural_changes_lies_a_window() -> None:
    policy = RulesPolicy()
    grown = under_fitting(policy, {"a": dormant(), "b": dormant()})
    assert asked(grown) == ("germinate", "a")
    done = [FieldReport("seed", True, "", seed="a", operation="germinate", step=2 * 188)]
    seeds = {"a": seed(Stage.TRAINING, UNSURE), "b": dormant()}
    early = policy.decide(state(2, seeds, loss=1.2, version=1, reports=done))
    assert isinstance(early, NoChange)
    assert rule(early) == "window"
    assert early.explanation is not None
    assert "1 epoch more: germinate" in early.explanation.otherwise
    late = policy.decide(state(3, seeds, loss=1.1, version=1, reports=done))
    assert asked(late) == ("germinate", "b")


def test_a_structural_change_of_somebody_else_opens_a_window_too() -> None:
    policy = RulesPolicy()
    policy.decide(state(0, {}, loss=2.0, version=0))
    policy.decide(state(1, {}, loss=1.8, version=0))
    answer = policy.decide(state(2, {"a": dormant()}, loss=1.5, version=1))
    assert rule(answer) == "window"


def test_word_is_waited_for_of_what_was_asked_but_not_for_ever() -> None:
    policy = RulesPolicy(RuleLimits(window_epochs=1, pending_epochs=2))
    seeds = {"a": dormant()}
    assert asked(under_fitting(policy, seeds)) == ("germinate", "a")
    answers = [policy.decide(state(epoch, seeds, loss=1.4)) for epoch in range(2, 5)]
    assert [rule(answer) for answer in answers] == ["pending", "pending", "germinate"]


def test_a_slow_model_grows_although_it_does_not_under_fit() -> None:
    policy = RulesPolicy()
    answers = [
        policy.decide(state(epoch, {"a": dormant()}, loss=0.6, held_out=1.0 - 0.001 * epoch))
        for epoch in range(8)
    ]
    assert not any(isinstance(answer, SeedCommand) for answer in answers[:5])
    assert any(isinstance(answer, SeedCommand) for answer in answers[5:])


def test_over_fitting_ends_only_when_the_model_under_fits_again() -> None:
    policy = RulesPolicy()
    gaps = {0.7: None, 0.5: None, 0.45: None, 0.1: None, 0.05: "germinate"}
    for epoch, (gap, expected) in enumerate(gaps.items()):
        answer = policy.decide(state(epoch, {"a": dormant()}, loss=1 - gap, held_out=1.0))
        assert (rule(answer) == "germinate") == (expected is not None), gap


def test_a_question_that_is_asked_again_gets_the_same_answer() -> None:
    policy = RulesPolicy()
    first = under_fitting(policy, {"a": dormant()})
    again = policy.decide(state(1, {"a": dormant()}, loss=1.5))
    assert asked(first) == ("germinate", "a")
    assert again == first


def test_what_a_rollback_took_back_is_forgotten() -> None:
    policy = RulesPolicy()
    for epoch in range(6):
        policy.decide(state(epoch, {}, loss=2.0 - 0.2 * epoch))
    policy.decide(state(2, {}, loss=1.6, attempt=1))
    saved = json.loads(json.dumps(policy.state_dict()))
    assert [e["epoch"] for e in saved["memory"]["evaluations"]] == [0, 1, 2]


def test_an_observed_state_is_taken_in_without_a_decision() -> None:
    watching, deciding = RulesPolicy(), RulesPolicy()
    watching.observe(state(0, {}, loss=2.0))
    deciding.decide(state(0, {}, loss=2.0))
    next_state = state(1, {"a": dormant()}, loss=1.5)
    assert watching.decide(next_state) == deciding.decide(next_state)


def test_a_cut_is_of_the_factor_that_is_set() -> None:
    policy = RulesPolicy(RuleLimits(rate_factor=0.3))
    answers = [policy.decide(state(n, {}, loss=0.1, held_out=1.0)) for n in range(6)]
    cuts = [answer for answer in answers if isinstance(answer, ScaleLearningRate)]
    assert [cut.factor for cut in cuts] == [0.3]


def test_states_that_carry_a_price_no_gain_can_reach_are_answered() -> None:
    dear: SystemState = state(1, {"a": dormant(conv=CONV.__class__(10**9, math.inf))}, loss=1.5)
    policy = RulesPolicy()
    policy.decide(state(0, {}, loss=2.0))
    answer = policy.decide(dear)
    assert answer.explanation is not None
    assert "costs more than it can gain" in answer.explanation.reason


@pytest.mark.parametrize("stage", [Stage.BLENDING, Stage.HOLDING])
def test_nothing_is_decided_about_a_seed_that_fades_out(stage: Stage) -> None:
    policy = RulesPolicy()
    for epoch in range(6):
        shown = seed(stage, BAD, alpha=0.3, fading=True)
        assert isinstance(policy.decide(state(epoch, {"a": shown})), NoChange)
