"""What is true of every blueprint, in every layout that it fits."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from esper.kasmina.blueprints import get, initialise, names
from esper.leyline import GrowthError
from kasmina.blueprints.builders import CASES, FITTING, SHAPES, built, flow, flowing


@pytest.mark.parametrize("layout", SHAPES)
def test_what_fits_a_layout_is_known_and_the_rest_is_refused(layout: str) -> None:
    # Others may have registered blueprints of their own in this process.
    ours = [name for name in names() if type(get(name)).__module__.startswith("esper.")]
    problems = {name: get(name).fits(flow(layout)) for name in ours}
    assert sorted(name for name, problem in problems.items() if not problem) == FITTING[layout]
    for name, problem in problems.items():
        if problem:
            with pytest.raises(GrowthError, match=f"blueprint '{name}' does not fit: "):
                built(name, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_seed_begins_at_zero_and_has_the_shape_of_what_flows(
    name: str, layout: str, dtype: torch.dtype
) -> None:
    seed, x = built(name, layout, dtype), flowing(layout, dtype)
    assert bool(seed(x).abs().sum() > 0)
    initialise("zero_out", seed)
    output = seed(x)
    assert (output.shape, output.dtype) == (x.shape, dtype)
    assert not output.any()
    assert {parameter.dtype for parameter in seed.parameters()} == {dtype}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_the_outgoing_layer_learns_at_once_and_all_the_others_after_a_step(
    name: str, layout: str
) -> None:
    seed, x = built(name, layout), flowing(layout)
    initialise("zero_out", seed)
    target = flowing(layout, seed=5)
    for step in range(2):
        seed.zero_grad()
        functional.mse_loss(x + seed(x), target).backward()
        pulled = {n: float(p.grad.norm()) for n, p in seed.named_parameters() if p.grad is not None}
        assert pulled.keys() == {n for n, _ in seed.named_parameters()}
        for parameter, norm in pulled.items():
            assert (norm > 0) is (step == 1 or parameter.startswith("last.")), parameter
        torch.optim.SGD(seed.parameters(), 0.1).step()


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_other_batches_and_lengths_pass_as_well(name: str, layout: str) -> None:
    seed, shape = built(name, layout), list(SHAPES[layout][0])
    shape[0] = 1
    if len(shape) > 2:
        shape[1 if layout == "tokens" else 2] += 3
    assert seed(torch.randn(shape)).shape == torch.Size(shape)


@pytest.mark.parametrize(
    ("name", "layout", "arguments", "reason"),
    [
        ("mlp", "features", {"depth": 2}, "'mlp' has no argument 'depth'; it has: width"),
        ("mlp", "features", {"width": "4"}, "'width' of blueprint 'mlp' is '4'; .* type int"),
        ("mlp", "features", {"width": 4.0}, "is 4.0; give a value of type int"),
        ("mlp", "features", {"width": True}, "is True; give a value of type int"),
        ("mlp", "features", {"width": -1}, "is -1; give 0 or more"),
        ("low_rank", "tokens", {"rank": -2}, "is -2; give 0 or more"),
        ("attention", "tokens", {"heads": 3}, "'heads' .* is 3, which does not divide the 8"),
        ("conv", "conv2d", {"kernel": 4}, "'kernel' of blueprint 'conv' is 4; .* odd"),
        ("depthwise", "conv1d", {"kernel": 2}, "'kernel' of blueprint 'depthwise' is 2; .* odd"),
    ],
)
def test_wrong_arguments_are_refused_with_the_reason(
    name: str, layout: str, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(GrowthError, match=reason):
        built(name, layout, **arguments)


@pytest.mark.parametrize(
    ("name", "layout", "arguments", "weights"),
    [
        ("mlp", "features", {"width": 5}, 2 * 12 * 5 + 5 + 12),
        ("mlp", "features", {}, 2 * (12 * 12 + 12)),
        ("linear", "tokens", {"width": 3}, 2 * 8 + (8 * 3 + 3) + (3 * 8 + 8)),
        ("low_rank", "tokens", {"rank": 2}, 2 * 8 * 2),
        ("low_rank", "conv2d", {"rank": 3}, 2 * 8 * 3),
        ("conv", "conv1d", {"width": 2, "kernel": 5}, (8 * 2 * 5 + 2) + (2 * 8 * 5 + 8)),
        ("conv", "conv2d", {"kernel": 0}, 2 * (8 * 8 * 9 + 8)),
        ("depthwise", "conv2d", {"kernel": 3}, (8 * 9 + 8) + (8 * 8 + 8)),
        ("squeeze_excite", "conv2d", {"width": 3}, (8 * 3 + 3) + (3 * 8 + 8)),
        ("attention", "conv1d", {"heads": 2}, 2 * 8 + (8 * 24 + 24) + (8 * 8 + 8)),
    ],
)
def test_arguments_set_the_size(
    name: str, layout: str, arguments: dict[str, Any], weights: int
) -> None:
    seed = built(name, layout, **arguments)
    assert sum(parameter.numel() for parameter in seed.parameters()) == weights
