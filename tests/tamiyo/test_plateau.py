import pytest

from esper.leyline import ConfigError, ScaleLearningRate, SystemState
from esper.tamiyo import PlateauPolicy


def state(loss: float) -> SystemState:
    return SystemState(epoch=0, step=0, attempt=0, time=0.0, losses={"a": loss / 2, "b": loss / 2})


def answers(policy: PlateauPolicy, losses: list[float]) -> list[bool]:
    return [policy.decide(state(loss)) is not None for loss in losses]


def test_a_falling_loss_is_left_alone() -> None:
    assert not any(answers(PlateauPolicy(), [2.0**-n for n in range(20)]))


def test_a_plateau_is_cut_after_the_patience_and_then_waited_for_again() -> None:
    policy = PlateauPolicy(patience=2, factor=0.25)
    assert answers(policy, [1.0, 1.0, 0.999, 1.0, 1.0]) == [False, False, True, False, True]
    policy = PlateauPolicy(patience=1, factor=0.25)
    policy.decide(state(1.0))
    assert policy.decide(state(1.0)) == ScaleLearningRate(0.25)


def test_its_memory_is_saved() -> None:
    first, second = PlateauPolicy(patience=2), PlateauPolicy(patience=2)
    answers(first, [1.0, 1.0])
    second.load_state_dict(first.state_dict())
    assert answers(second, [1.0]) == [True]


@pytest.mark.parametrize("bad", [{"patience": 0}, {"factor": 1.0}, {"factor": 0.0}])
def test_parameters_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        PlateauPolicy(**bad)  # type: ignore[arg-type]
