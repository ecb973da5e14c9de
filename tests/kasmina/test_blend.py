import math

import pytest
import torch
from torch import Tensor

from esper.kasmina.blend import make_blend
from esper.kasmina.blueprints import Flow
from esper.leyline import GrowthError
from kasmina.blueprints.builders import CPU, SHAPES, flow, flowing, stir

BLENDS = ["add", "multiply", "gate", "channel"]
HALF = torch.tensor(0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("name", BLENDS)
def test_without_a_share_the_hosts_output_is_left_to_the_bit(
    name: str, layout: str, dtype: torch.dtype
) -> None:
    blend = make_blend(name, flow(layout, dtype))
    stir(blend)
    h = flowing(layout, dtype)
    # As large as a finite number gets: a share that is multiplied too late would make it infinite.
    for s in (flowing(layout, dtype, seed=3), torch.full_like(h, torch.finfo(dtype).max)):
        joined = blend(h, s, torch.zeros(()))
        assert torch.equal(joined, h)
        assert joined.dtype == dtype


@pytest.mark.parametrize("layout", SHAPES)
def test_each_name_is_its_formula(layout: str) -> None:
    h, s = flowing(layout), flowing(layout, seed=3)
    dim = SHAPES[layout][1]
    made = {name: make_blend(name, flow(layout)) for name in BLENDS}
    assert torch.equal(made["add"](h, s, HALF), h + 0.5 * s)
    torch.testing.assert_close(made["multiply"](h, s, HALF), h * (1 + 0.5 * torch.tanh(s)))
    torch.testing.assert_close(made["gate"](h, s, HALF), h + 0.5 * 0.5 * s)
    torch.testing.assert_close(made["channel"](h, s, HALF), h + 0.5 * s)
    for blend in made.values():
        stir(blend)
    last, into = h.movedim(dim, -1), s.movedim(dim, -1)
    scale = made["channel"].scale.flatten()
    assert scale.numel() == h.shape[dim]
    expected = (last + 0.5 * scale * into).movedim(-1, dim)
    torch.testing.assert_close(made["channel"](h, s, HALF), expected)
    gated = made["gate"](h, s, HALF)
    for sample in range(len(h)):
        mean = last[sample].reshape(-1, last.shape[-1]).mean(0)
        gate = made["gate"].gate.requires_grad_(False)
        score = float(mean @ gate.weight[0] + gate.bias)
        share = 1 / (1 + math.exp(-score))
        torch.testing.assert_close(gated[sample], h[sample] + 0.5 * share * s[sample])


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize(("name", "learnt"), [("gate", 2), ("channel", 1)])
def test_what_a_blend_has_of_its_own_learns(name: str, learnt: int, layout: str) -> None:
    blend = make_blend(name, flow(layout))
    h, s, target = (flowing(layout, seed=seed) for seed in (1, 2, 3))
    optimizer = torch.optim.SGD(blend.parameters(), 0.1)

    def loss() -> Tensor:
        return (blend(h, s, torch.ones(())) - target).square().mean()

    before = loss()
    before.backward()
    assert [bool(p.grad.any()) for p in blend.parameters() if p.grad is not None] == [True] * learnt
    optimizer.step()
    assert loss() < before


def test_a_blend_is_made_for_what_flows() -> None:
    wide = make_blend("channel", Flow((2, 3, 4, 4), torch.float64, CPU, 1))
    assert [(tuple(p.shape), p.dtype) for p in wide.parameters()] == [((1, 3, 1, 1), torch.float64)]
    last = make_blend("channel", Flow((2, 4, 3), torch.bfloat16, CPU, -1))
    assert [(tuple(p.shape), p.dtype) for p in last.parameters()] == [((1, 1, 3), torch.bfloat16)]
    assert not list(make_blend("add", flow("tokens")).parameters())


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        GrowthError, match="no blending 'lerp'; give one of add, multiply, gate, ch"
    ):
        make_blend("lerp", flow("tokens"))
