"""Where and what germinates."""

from typing import Any

import pytest

from esper.leyline import (
    AdaptationCommand,
    FieldReport,
    Offer,
    Planting,
    SeedCommand,
    SeedOperation,
    SeedState,
    Stage,
)
from esper.tamiyo import RiskLimits, RuleLimits, RulesPolicy
from tamiyo.making import CONV, GOOD, UNSURE, dormant, seed, state

SMALL, MIDDLE, LARGE = Offer(40, 100.0), Offer(2000, 4000.0), Offer(60_000, 120_000.0)


def grow(
    seeds: dict[str, SeedState], policy: RulesPolicy | None = None, **more: Any
) -> AdaptationCommand:
    policy = policy or RulesPolicy()
    policy.decide(state(0, {}, loss=2.0))
    return policy.decide(state(1, seeds, loss=1.5, **more))


def chosen(command: AdaptationCommand) -> tuple[str, str]:
    assert isinstance(command, SeedCommand), command
    assert command.operation is SeedOperation.GERMINATE
    return command.seed, command.blueprint


def obstacle(command: AdaptationCommand) -> str:
    assert not isinstance(command, SeedCommand), command
    assert command.explanation is not None
    return f"{command.explanation.reason} | {command.explanation.otherwise}"


def test_the_slot_with_the_largest_residual_is_first() -> None:
    seeds = {"a": dormant(1.0), "b": dormant(3.0), "c": dormant(None), "d": dormant(float("nan"))}
    assert chosen(grow(seeds)) == ("b", "conv")


def test_a_seed_of_middle_size_promises_more_than_a_tiny_or_a_huge_one() -> None:
    assert chosen(grow({"a": dormant(1.0, small=SMALL, middle=MIDDLE, large=LARGE)})) == (
        "a",
        "middle",
    )


def test_where_little_pulls_a_better_blueprint_may_still_promise_more() -> None:
    seeds = {"early": dormant(3.0, small=SMALL), "late": dormant(1.0, middle=MIDDLE)}
    assert chosen(grow(seeds)) == ("late", "middle")
    seeds = {"early": dormant(300.0, small=SMALL), "late": dormant(1.0, middle=MIDDLE)}
    assert chosen(grow(seeds)) == ("early", "small")


def test_of_two_alike_the_untried_one_is_tried() -> None:
    policy = RulesPolicy(RuleLimits(window_epochs=1))
    offers = {"first": CONV, "second": CONV}
    assert chosen(grow({"a": dormant(**offers)}, policy)) == ("a", "first")
    told = [FieldReport("seed", True, "", seed="a", operation="germinate", step=2 * 188)]
    seeds = {"a": seed(Stage.TRAINING, UNSURE), "b": dormant(**offers)}
    answer = policy.decide(state(2, seeds, loss=1.2, version=1, reports=told))
    assert chosen(answer) == ("b", "second")


def test_what_a_blueprint_has_gained_before_is_expected_of_it_again() -> None:
    policy = RulesPolicy(RuleLimits(window_epochs=1))
    grow({"a": dormant(first=CONV)}, policy)
    told = [
        FieldReport("seed", True, "", seed="a", operation=operation, step=step)
        for operation, step in (("germinate", 2 * 188), ("advance", 3 * 188))
    ]
    grown = {"a": seed(Stage.HOLDING, GOOD, blueprint="first")}
    answer = policy.decide(state(2, grown, loss=1.0, version=1, reports=told[:1]))
    assert isinstance(answer, SeedCommand)
    assert answer.operation is SeedOperation.ADVANCE
    seeds = {"b": dormant(first=CONV, second=CONV)}
    answer = policy.decide(state(4, seeds, loss=0.9, version=2, reports=told))
    assert chosen(answer) == ("b", "first"), "tried, but it gained four times what was expected"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"budget": 4799}, "a budget of 4,800 parameters, 1 more"),
        ({"steps_left": 900}, "would not pay back in time"),
        ({"steps_left": 0}, "would not pay back in time"),
    ],
)
def test_what_costs_too_much_or_comes_too_late_does_not_germinate(
    more: dict[str, Any], words: str
) -> None:
    assert words in obstacle(grow({"a": dormant()}, **more))


@pytest.mark.parametrize("more", [{"budget": 4800}, {"steps_left": 1000}, {"steps_left": None}])
def test_what_is_just_within_its_limits_germinates(more: dict[str, Any]) -> None:
    assert chosen(grow({"a": dormant()}, **more)) == ("a", "conv")


def test_a_slot_under_embargo_is_passed_over() -> None:
    barred = SeedState(Stage.DORMANT, residual=9.0, embargo_left=5, offers={"conv": CONV})
    assert chosen(grow({"a": barred, "b": dormant()})) == ("b", "conv")
    assert "5 steps more" in obstacle(grow({"a": barred}))


def test_what_led_to_a_rollback_is_in_quarantine_where_it_did() -> None:
    back = FieldReport(
        "rollback", True, "", seed="a", blueprint="conv", before=Stage.BLENDING, step=100
    )
    seeds = {"a": dormant(5.0, conv=CONV, mlp=CONV), "b": dormant(1.0)}
    forgetful = RuleLimits(risk=RiskLimits(half_life_steps=20.0))
    answer = grow(seeds, RulesPolicy(forgetful), reports=[back])
    assert chosen(answer) == ("a", "mlp"), "the penalty has faded, the quarantine has not"
    assert "training diverged with it" in obstacle(grow({"a": dormant()}, reports=[back]))
    assert "costs more than it can gain" in obstacle(grow({"b": dormant()}, reports=[back]))


def test_after_many_mishaps_nothing_germinates() -> None:
    culls = [
        FieldReport("seed", True, "", seed=f"s{n}", after=Stage.CULLED, step=300) for n in range(5)
    ]
    assert "too much went wrong" in obstacle(grow({"a": dormant()}, reports=culls))


def test_not_more_seeds_grow_at_a_time_than_are_allowed() -> None:
    busy = {"a": seed(Stage.TRAINING, UNSURE), "b": dormant()}
    assert "'a' trains on" in obstacle(grow(busy, RulesPolicy(RuleLimits(most_live=1))))
    assert chosen(grow(busy)) == ("b", "conv")


def test_nothing_germinates_while_a_blended_seed_is_judged() -> None:
    busy = {"a": seed(Stage.HOLDING, UNSURE), "b": dormant()}
    assert "'a' is about to be judged" in obstacle(grow(busy))


def test_it_is_planted_as_was_asked_and_for_the_architecture_that_was_seen() -> None:
    planting = Planting({"rank": 2}, training="insert")
    answer = grow({"a": dormant()}, RulesPolicy(planting=planting), version=0)
    assert isinstance(answer, SeedCommand)
    assert answer.planting == planting
    assert answer.version == 0


def test_without_slots_or_held_out_data_it_says_what_is_missing() -> None:
    assert "no slot is dormant" in obstacle(grow({}))
    policy = RulesPolicy()
    bare = state(0, {"a": dormant()})
    assert bare.growth is not None
    unmeasured = bare.__class__(
        0, 188, 0, 0.0, {"a": 1.0}, growth=bare.growth.__class__(0, bare.growth.seeds, 4000)
    )
    assert "validation data" in obstacle(policy.decide(unmeasured))
