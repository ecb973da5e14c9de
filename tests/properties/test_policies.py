"""What is true of every growth policy, whatever it is shown."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from esper.leyline import (
    AdaptationCommand,
    FieldReport,
    Gain,
    Gate,
    GateResult,
    GrowthState,
    NoChange,
    Offer,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
    SeedState,
    Stage,
    SystemState,
)
from esper.tamiyo import (
    BanditPolicy,
    NoPolicy,
    RuleLimits,
    RulesPolicy,
    SchedulePolicy,
    grow_periodically,
)
from esper.tamiyo.wire import sendable

SLOTS = ("a", "b", "c")
BLUEPRINTS = ("conv", "mlp")
CONSERVATIVE = "tolaria.mode.conservative"
EAGER = RuleLimits(least_evaluations=1, steady_evaluations=1, training_steps=0)

wild = st.one_of(
    st.floats(-1e9, 1e9), st.floats(), st.sampled_from([0.0, math.nan, math.inf, -math.inf])
)
tame = st.floats(1e-3, 10.0)
counts = st.integers(0, 10**6)


def gains(number: st.SearchStrategy[float]) -> st.SearchStrategy[Gain]:
    if number is wild:
        return st.builds(Gain, number, number, number, st.integers(1, 16))
    return st.builds(
        lambda mean, reach: Gain(mean, mean - reach, mean + reach, 8),
        st.floats(-3, 3),
        st.floats(0.01, 1),
    )


def seeds(number: st.SearchStrategy[float]) -> st.SearchStrategy[SeedState]:
    usual = st.sampled_from([*[Stage.DORMANT] * 4, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING])
    return st.builds(
        SeedState,
        stage=st.sampled_from(Stage) if number is wild else usual,
        age=st.integers(0, 2000),
        blueprint=st.sampled_from(["", *BLUEPRINTS]),
        alpha=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
        parameters=st.integers(0, 5000),
        flops=st.none() | number,
        residual=st.none() | number,
        gain=st.none() | gains(number),
        fading=st.booleans() if number is wild else st.just(False),
        embargo_left=st.sampled_from([0, 0, 0, 7]),
        offers=st.dictionaries(
            st.sampled_from(BLUEPRINTS),
            st.builds(Offer, st.integers(0, 3000), number),
            min_size=0 if number is wild else 1,
        ),
    )


def losses(number: st.SearchStrategy[float]) -> st.SearchStrategy[dict[str, float]]:
    if number is wild:
        return st.dictionaries(st.sampled_from(["left", "right"]), number)
    return st.fixed_dictionaries({"left": st.floats(0.6, 1.4), "right": st.floats(0.01, 0.1)})


def growths(number: st.SearchStrategy[float]) -> st.SearchStrategy[GrowthState]:
    return st.builds(
        GrowthState,
        version=st.integers(0, 3),
        seeds=st.dictionaries(
            st.sampled_from(SLOTS), seeds(number), min_size=0 if number is wild else 1
        ),
        parameters=st.integers(0, 10_000),
        parameter_budget=st.none() | st.integers(0, 20_000),
        held_out=losses(number),
        steps_left=st.none() | counts,
    )


reports = st.builds(
    FieldReport,
    command=st.sampled_from(["seed", "rollback", "engine", "scale_learning_rate"]),
    applied=st.booleans(),
    detail=st.just(""),
    seed=st.sampled_from(["", *SLOTS]),
    operation=st.sampled_from(["", *(operation.value for operation in SeedOperation)]),
    blueprint=st.sampled_from(["", *BLUEPRINTS]),
    before=st.none() | st.sampled_from(Stage),
    after=st.none() | st.sampled_from(Stage),
    step=counts,
    gates=st.lists(st.builds(GateResult, st.sampled_from(Gate), st.booleans(), st.just(""))),
)


modes = st.sampled_from([{}, {}, {}, {}, {CONSERVATIVE: 0.0}, {CONSERVATIVE: 1.0}])


@st.composite
def courses(
    draw: st.DrawFn, number: st.SearchStrategy[float] = wild, rollbacks: bool = True
) -> list[SystemState]:
    """Draw the states of a run, with rollbacks in between or without."""
    found, epoch, attempt = [], -1, 0
    for _ in range(draw(st.integers(1, 8))):
        if rollbacks and draw(st.integers(0, 4)) == 0:
            attempt, epoch = attempt + 1, max(-1, epoch - 3)
        epoch += 1
        found.append(
            SystemState(
                epoch=epoch,
                step=(epoch + 1) * 188,
                attempt=attempt,
                time=0.0,
                losses=draw(losses(number)),
                metrics=draw(modes),
                conflict_share=draw(st.none() | number),
                growth=draw(st.none() | growths(number) if number is wild else growths(number)),
                reports=draw(st.lists(reports, max_size=4)) if number is wild else [],
            )
        )
    return found


def schedule() -> SchedulePolicy:
    return SchedulePolicy(grow_periodically(SLOTS, "conv", 1, start=0))


def rules() -> RulesPolicy:
    return RulesPolicy(EAGER)


def bandit() -> BanditPolicy:
    return BanditPolicy(EAGER)


every = pytest.mark.parametrize("make", [rules, RulesPolicy, bandit, schedule, NoPolicy])
ruled = pytest.mark.parametrize("make", [rules, RulesPolicy, bandit])
some = settings(max_examples=30)


def answers(policy: Any, course: list[SystemState]) -> list[AdaptationCommand]:
    return [policy.decide(state) for state in course]


def is_structural(command: AdaptationCommand, state: SystemState) -> bool:
    """Whether a command asks to germinate, fossilise or cull; told apart without the policies'."""
    if not isinstance(command, SeedCommand) or state.growth is None:
        return False
    held = state.growth.seeds[command.seed].stage is Stage.HOLDING
    return command.operation in ("germinate", "cull") or (command.operation == "advance" and held)


def check_explained(command: AdaptationCommand) -> None:
    assert isinstance(command, NoChange | ScaleLearningRate | SeedCommand)
    told = command.explanation
    assert told is not None
    assert told.rule
    assert told.reason
    assert told.otherwise
    assert all(map(math.isfinite, [*told.values.values(), *told.thresholds.values()]))
    assert msgspec.json.decode(msgspec.json.encode(command), type=type(command)) == command


def check_germination(command: SeedCommand, state: SystemState) -> None:
    assert state.growth is not None
    seed, budget = state.growth.seeds[command.seed], state.growth.parameter_budget
    assert seed.stage is Stage.DORMANT
    assert seed.embargo_left == 0
    if budget is not None and command.blueprint in seed.offers:
        assert state.growth.parameters + seed.offers[command.blueprint].parameters <= budget


@every
@some
@given(course=courses() | courses(tame))
def test_it_answers_whatever_it_is_shown_explains_itself_and_stays_within_its_limits(
    make: Callable[[], Any], course: list[SystemState]
) -> None:
    for command, state in zip(answers(make(), course), course, strict=True):
        check_explained(command)
        if state.metrics.get(CONSERVATIVE) == 1.0:
            assert isinstance(command, NoChange)
        if isinstance(command, ScaleLearningRate):
            assert 0 < command.factor < 1
        if isinstance(command, SeedCommand) and command.operation == "germinate":
            check_germination(command, state)


@ruled
@some
@given(course=courses(tame, rollbacks=False) | courses(rollbacks=False))
def test_between_structural_changes_lies_the_window_and_cuts_are_few(
    make: Callable[[], Any], course: list[SystemState]
) -> None:
    policy = make()
    told = list(zip(answers(policy, course), course, strict=True))
    changes = [state.epoch for command, state in told if is_structural(command, state)]
    assert all(after - before >= policy.limits.window_epochs for before, after in pairwise(changes))
    cuts = [state.epoch for command, state in told if isinstance(command, ScaleLearningRate)]
    assert len(cuts) <= policy.limits.most_cuts
    for command, state in told:
        if isinstance(command, SeedCommand) and command.operation == "germinate":
            assert state.growth is not None
            assert command.blueprint in state.growth.seeds[command.seed].offers


@every
@some
@given(course=courses() | courses(tame), cut=st.integers(0, 8))
def test_a_restored_policy_decides_alike(
    make: Callable[[], Any], course: list[SystemState], cut: int
) -> None:
    first, second = make(), make()
    answers(first, course[:cut])
    if hasattr(first, "state_dict"):
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert answers(first, course[cut:]) == answers(second, course[cut:])
    if hasattr(first, "state_dict"):
        assert json.dumps(first.state_dict()) == json.dumps(second.state_dict())


@ruled
@some
@given(course=courses(tame))
def test_states_that_went_through_json_or_are_shown_twice_are_decided_alike(
    make: Callable[[], Any], course: list[SystemState]
) -> None:
    policy = make()
    expected = answers(make(), course)
    for state, command in zip(course, expected, strict=True):
        sent = msgspec.json.decode(msgspec.json.encode(state), type=SystemState)
        assert sent == state
        assert policy.decide(sent) == command
        assert policy.decide(state) == command


@some
@given(course=courses())
def test_every_state_can_be_sent(course: list[SystemState]) -> None:
    for state in course:
        bare = sendable(state)
        assert msgspec.json.decode(msgspec.json.encode(bare), type=SystemState) == bare


@pytest.mark.timeout(60)
def test_the_courses_drawn_here_lead_to_every_operation() -> None:
    seen: set[str] = set()

    def completes(course: list[SystemState]) -> bool:
        commands = answers(rules(), course)
        seen.update(c.operation.value for c in commands if isinstance(c, SeedCommand))
        return seen == {operation.value for operation in SeedOperation}

    drawing = settings(max_examples=1000, phases=[Phase.generate], database=None)
    find(courses(tame), completes, settings=drawing)
