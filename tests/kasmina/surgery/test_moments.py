import pytest
import torch
from torch import Tensor

from esper.kasmina.surgery.moments import require_larger, widened
from esper.leyline import GrowthError
from kasmina.surgery.builders import parameter


def widen(state: dict[str, object], old: Tensor, new: Tensor) -> dict[str, object]:
    return widened(state, old, new, {"lr": 0.1}, "the weight")


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [((3,), (5,)), ((3, 2), (3, 4)), ((2, 3, 1, 1), (4, 3, 1, 1)), ((), ()), ((0, 2), (3, 2))],
)
def test_an_entry_with_the_parameter_s_shape_becomes_the_leading_block(
    narrow: tuple[int, ...], wide: tuple[int, ...]
) -> None:
    old, new = parameter(*narrow), parameter(*wide)
    moment = torch.rand(narrow)
    carried = widen({"moment": moment}, old, new)["moment"]
    assert isinstance(carried, Tensor)
    block = tuple(slice(size) for size in narrow)
    assert torch.equal(carried[block], moment)
    assert carried.shape == new.shape
    assert carried.sum() == pytest.approx(moment.sum())
    assert not carried.requires_grad
    carried.fill_(7.0)
    assert not (moment == 7.0).any()


def test_kind_and_layout_of_an_entry_are_kept() -> None:
    old = torch.nn.Parameter(torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last))
    new = torch.nn.Parameter(torch.rand(5, 3, 4, 4).to(memory_format=torch.channels_last))
    carried = widen({"moment": torch.rand(2, 3, 4, 4, dtype=torch.bfloat16)}, old, new)["moment"]
    assert isinstance(carried, Tensor)
    assert carried.dtype == torch.bfloat16
    assert carried.stride() == new.stride()


def test_counters_go_on_in_memory_of_their_own() -> None:
    count = torch.tensor(7.0)
    carried = widen({"step": count, "n": 3, "r": 0.5, "none": None}, parameter(2), parameter(4))
    assert carried == {"step": torch.tensor(7.0), "n": 3, "r": 0.5, "none": None}
    assert carried["step"] is not count


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("other", torch.zeros(3)),
        ("one", torch.zeros(1)),
        ("transposed", torch.zeros(3, 2)),
        ("row_var", torch.zeros(2, 3)),
        ("exp_avg_sq_col", torch.zeros(2, 3)),
        ("history", [torch.zeros(2, 3)]),
        ("nested", {"moment": torch.zeros(2, 3)}),
    ],
)
def test_what_cannot_be_understood_is_refused(key: str, value: object) -> None:
    with pytest.raises(GrowthError, match=f"the weight cannot be widened: .*'{key}'"):
        widen({"exp_avg": torch.zeros(2, 3), key: value}, parameter(2, 3), parameter(4, 3))


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (2, 3, 1), (6,)])
def test_only_a_leading_block_can_be_carried(shape: tuple[int, ...]) -> None:
    with pytest.raises(GrowthError, match="the weight cannot be carried into shape"):
        require_larger(parameter(2, 3), parameter(*shape), "the weight")


def test_rprop_of_complex_weights_begins_with_the_rate_in_both_parts() -> None:
    old, new = (torch.nn.Parameter(torch.ones(size, dtype=torch.complex64)) for size in (2, 3))
    optimizer = torch.optim.Rprop([old, new], 0.1)
    old.grad, new.grad = torch.ones_like(old), torch.ones_like(new)
    optimizer.step()
    group = optimizer.param_groups[0]
    carried = widened(optimizer.state[old], old, new, group, "the weight")
    assert carried["step_size"][2] == optimizer.state[new]["step_size"][2]
