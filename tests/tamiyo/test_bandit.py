"""The bandit: what it may choose, what it logs, and that it learns."""

import json
from dataclasses import replace

import numpy as np
import pytest

from esper.leyline import (
    NoChange,
    Offer,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
    Stage,
)
from esper.tamiyo import BanditLimits, BanditPolicy, RuleLimits
from esper.tamiyo.posterior import Posterior
from tamiyo.making import GOOD, dormant, seed, state
from tamiyo.simulated import GrowthProcess, Slot, follow


def test_a_posterior_finds_the_weights_behind_rewards() -> None:
    random = np.random.default_rng(0)
    true = np.asarray([0.5, -0.3, 0.2])
    posterior = Posterior.prior(3, 1.0)
    assert posterior.predict(np.ones(3)) == (0.0, pytest.approx(np.sqrt(3)))
    for _ in range(500):
        context = random.normal(size=3)
        posterior.update(context, float(context @ true + random.normal(0, 0.1)), 0.1)
    mean, deviation = posterior.predict(np.asarray([1.0, 1.0, 1.0]))
    assert mean == pytest.approx(0.4, abs=0.05)
    assert deviation < 0.05


def test_living_seeds_are_left_to_the_rules() -> None:
    answer = BanditPolicy().decide(state(0, {"a": seed(Stage.TRAINING, GOOD)}))
    assert isinstance(answer, SeedCommand)
    assert answer.operation is SeedOperation.ADVANCE
    assert answer.explanation is not None
    assert answer.explanation.rule == "blend"


def test_a_choice_is_logged_with_its_probability_among_what_is_allowed() -> None:
    policy = BanditPolicy()
    seeds = {"a": dormant(), "b": dormant(2.0)}
    first = policy.decide(state(0, seeds, loss=2.0))
    second = policy.decide(state(1, seeds, loss=1.5))
    assert isinstance(first, NoChange)
    assert policy.log[0].propensity == 1.0
    assert second.explanation is not None
    values = second.explanation.values
    shares = {name: value for name, value in values.items() if name.startswith("propensity.")}
    assert set(shares) == {
        "propensity.wait", "propensity.germinate a conv", "propensity.germinate b conv",
    }  # fmt: skip
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares.values()) >= BanditLimits().floor
    entry = policy.log[-1]
    assert shares[f"propensity.{entry.arm}"] == entry.propensity


@pytest.mark.parametrize(
    "more",
    [{"budget": 4100}, {"steps_left": 10}, {"held_out": 9.0}],
    ids=["budget", "payback", "over-fitting"],
)
def test_what_the_rules_forbid_is_no_arm(more: dict[str, float]) -> None:
    for number in range(20):
        policy = BanditPolicy(bandit=BanditLimits(seed=number))
        policy.decide(state(0, {}, loss=2.0, held_out=18.0 if "held_out" in more else None))
        answer = policy.decide(state(1, {"a": dormant()}, loss=1.5, **more))  # type: ignore[arg-type]
        assert not isinstance(answer, SeedCommand)
        assert answer.explanation is not None
        assert "propensity.germinate a conv" not in answer.explanation.values


def test_the_rate_is_cut_only_where_the_model_does_not_under_fit_and_a_few_times() -> None:
    cuts = 0
    policy = BanditPolicy(bandit=BanditLimits(seed=1))
    for epoch in range(40):
        gap = 0.0 if epoch < 20 else 0.8
        answer = policy.decide(state(epoch, {}, loss=(1 - gap), held_out=1.0))
        cuts += isinstance(answer, ScaleLearningRate)
        assert epoch >= 20 or cuts == 0
    assert 1 <= cuts <= RuleLimits().most_cuts


def test_over_many_runs_it_learns_which_of_two_seeds_gains() -> None:
    limits = RuleLimits(training_evaluations=2, rung_evaluations=1)
    policy, chosen = BanditPolicy(limits, BanditLimits(noise=0.05)), []
    for run in range(24):
        offer = Offer(800, 20_000.0)
        process = GrowthProcess({"a": Slot({"good": 0.4, "bad": -0.2})}, seed=run, offer=offer)
        saved = policy.state_dict()
        policy = BanditPolicy(limits, policy.bandit)
        policy.load_state_dict({**saved, "observer": BanditPolicy().state_dict()["observer"]})
        follow(process, policy)
        chosen.append([b for _, what, _, b in process.applied if what == "germinate"])
    late = [blueprint for run in chosen[12:] for blueprint in run[:1]]
    assert late.count("good") >= 2 * late.count("bad")
    log = policy.log
    assert all(
        entry.reward is not None for entry in log if entry.evaluation < log[-1].evaluation - 3
    )


def test_the_same_states_give_the_same_decisions_also_after_a_round_trip() -> None:
    first, second = BanditPolicy(), BanditPolicy()
    process = GrowthProcess({"a": Slot({"x": 0.2, "y": -0.1}), "b": Slot({"x": -0.1})})
    for _ in range(15):
        shown = process.train()
        restored = BanditPolicy()
        restored.load_state_dict(json.loads(json.dumps(second.state_dict())))
        second = restored
        one, two = first.decide(shown), second.decide(shown)
        assert one == two
        process.apply(one, shown)
    assert first.log == second.log


def test_a_question_that_is_asked_again_is_answered_and_logged_once() -> None:
    policy = BanditPolicy()
    seeds = {"a": dormant(), "b": dormant()}
    policy.decide(state(0, seeds, loss=2.0))
    once = policy.decide(state(1, seeds, loss=1.5))
    log = policy.log
    assert policy.decide(state(1, seeds, loss=1.5)) == once
    assert policy.log == log


def test_another_seed_draws_differently() -> None:
    def course(number: int) -> list[str]:
        policy = BanditPolicy(bandit=replace(BanditLimits(), seed=number))
        process = GrowthProcess({"a": Slot({"x": 0.2}), "b": Slot({"x": 0.1})})
        follow(process, policy)
        return [entry.arm for entry in policy.log]

    assert len({tuple(course(number)) for number in range(6)}) > 1


def test_decisions_that_a_rollback_took_back_are_not_rewarded() -> None:
    policy = BanditPolicy()
    for epoch in range(4):
        policy.decide(state(epoch, {}, loss=2.0 - 0.1 * epoch))
    assert [entry.epoch for entry in policy.log if entry.reward is None] == [1, 2, 3]
    policy.decide(state(1, {}, loss=1.9, attempt=1))
    assert [entry.epoch for entry in policy.log if entry.reward is None] == [1]
