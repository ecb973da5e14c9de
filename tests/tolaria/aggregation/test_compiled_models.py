from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper.tolaria.aggregation import Mode, PCGrad, backward
from tolaria.aggregation.models import Case, make

# Compiling takes seconds; the backend without code generation needs no compiler on the machine.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def keep_buffers() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["sequential", "factored", "features"])
@pytest.mark.timeout(60)
def test_a_compiled_trunk_gives_the_same_gradients(mode: Mode) -> None:
    case = make("mlp")
    backward(case.losses(), case.parameters, PCGrad(), mode=mode)
    expected = case.gradients()
    case.clear()
    compiled = Case(torch.compile(case.trunk, backend=BACKEND), case.heads, case.batch)  # type: ignore[arg-type]
    backward(compiled.losses(), case.parameters, PCGrad(), mode=mode)
    for found, wanted in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.timeout(60)
def test_a_model_compiled_as_a_whole_names_its_heads() -> None:
    case = make("mlp")
    backward(case.losses(), case.parameters, PCGrad())
    expected = case.gradients()
    case.clear()
    losses = torch.compile(case.losses, backend=BACKEND)()
    backward(losses, case.parameters, PCGrad(), heads=list(case.heads.parameters()))
    for found, wanted in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.timeout(60)
def test_donated_buffers_are_explained() -> None:
    case = make("words")
    with torch._functorch.config.patch(donated_buffer=True):
        trunk = torch.compile(case.trunk, backend=BACKEND)
        compiled = Case(trunk, case.heads, case.batch)  # type: ignore[arg-type]
        # It is the first pass that decides whether buffers are given away.
        compiled.losses()["first"].backward()
        losses = compiled.losses()
        with pytest.raises(RuntimeError, match=r"donated_buffer = False before torch\.compile"):
            backward(losses, case.parameters, PCGrad())


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(self.inner, value, use_reentrant=False)
        return result


@pytest.mark.parametrize("mode", ["sequential", "features"])
def test_activation_checkpointing_gives_the_same_gradients(mode: Mode) -> None:
    case = make("mlp")
    backward(case.losses(), case.parameters, PCGrad(), mode=mode)
    expected = case.gradients()
    case.clear()
    lean = Case(Checkpointed(case.trunk), case.heads, case.batch)
    backward(lean.losses(), case.parameters, PCGrad(), mode=mode)
    for found, wanted in zip(case.gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
