from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.export.comparison import Reference
from esper.kasmina.export.sample import Inputs, Sample
from esper.leyline import GrowthError


class Outputs(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"a": x * 1000, "b": (x > 0, None)}


@pytest.fixture
def reference() -> Reference:
    x = torch.tensor([[1.0, -1.0], [0.5, 0.0]])
    model = Outputs()
    return Reference(model, Inputs(model, Sample((x,))), 1e-4)


def answering(change: Callable[[Any], Any]) -> Callable[[Inputs], Any]:
    return lambda inputs: change(Outputs()(*inputs.sample.args))


def test_a_small_difference_is_told(reference: Reference) -> None:
    close = answering(lambda out: out | {"a": out["a"] + 0.05})
    worst = reference.check(close, dynamic=True, what="it")
    assert worst == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out | {"a": out["a"] + 0.2}, r"output_a of it differs .* by 0\.2, relative"),
        (lambda out: out | {"a": out["a"] * float("nan")}, "output_a of it differs"),
        (lambda out: out | {"a": out["a"][:, :1]}, r"is \(2, 1\), of the model \(2, 2\)"),
        (lambda out: out | {"a": out["a"].double()}, "is torch.float64, of the model"),
        (lambda out: out | {"b": (~out["b"][0], None)}, "output_b_0 of it differs"),
        (lambda out: out | {"b": (out["b"][0], 3)}, "output_b_1 of it is 3, of the model None"),
        (lambda out: {"a": out["a"]}, r"it gives \['output_a'\], the model"),
        (lambda out: 1 / 0, "it fails: ZeroDivisionError"),
    ],
)
def test_a_difference_is_an_error(
    change: Callable[[Any], Any], message: str, reference: Reference
) -> None:
    with pytest.raises(GrowthError, match=message):
        reference.check(answering(change), dynamic=False, what="it")


def test_another_batch_is_tried_when_it_may_be(reference: Reference) -> None:
    def fixed(inputs: Inputs) -> Any:
        out = Outputs()(*inputs.sample.args)
        return out if inputs.batch == 2 else out | {"a": out["a"] * 0}

    assert reference.check(fixed, dynamic=False, what="it") == 0
    with pytest.raises(GrowthError, match="it with a batch of 3 differs"):
        reference.check(fixed, dynamic=True, what="it")


def test_infinite_outputs_are_compared_by_position() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 0, -torch.inf).masked_fill(x == 0, torch.nan)

    model, x = Masked(), torch.tensor([1.0, -1.0, 0.0])
    reference = Reference(model, Inputs(model, Sample((x,))), 1e-4)
    assert reference.check(lambda i: model(*i.sample.args) + 1e-5, dynamic=True, what="it") < 2e-5
    with pytest.raises(GrowthError, match="differs from the model's by inf"):
        reference.check(lambda i: -model(*i.sample.args), dynamic=True, what="it")
