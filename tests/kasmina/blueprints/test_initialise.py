from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from esper.kasmina import Kasmina
from esper.kasmina.blueprints import Seed, get, initialise, needs_gradient
from esper.kasmina.blueprints.plain import FeaturesTo
from esper.kasmina.slot import slots_of
from esper.leyline import GrowthError, Planting, SeedCommand, SeedOperation
from kasmina.blueprints.builders import built, flowing, pair_flow, pair_of, unchanged_stream
from support.growth import QUICK, Loop, batch

SOLVED = ["gradmax", "small_solve"]


def gradient_of(x: Tensor, target: Tensor) -> Tensor:
    """Return the gradient at ``x`` of a loss that is not quadratic."""
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(curved(leaf, target), leaf)
    return gradient


def curved(h: Tensor, target: Tensor) -> Tensor:
    return functional.smooth_l1_loss(torch.tanh(h), target)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("mlp", "features"),
        ("low_rank", "tokens"),
        ("low_rank", "conv2d"),
        ("linear", "tokens"),
        ("attention", "tokens"),
        ("attention", "conv2d"),
        ("conv", "conv1d"),
        ("conv", "conv2d"),
        ("depthwise", "conv1d"),
        ("depthwise", "conv2d"),
    ],
)
def test_a_small_solve_goes_down_the_loss(name: str, layout: str) -> None:
    seed, h = built(name, layout), flowing(layout)
    target = flowing(layout, seed=8)
    gradient = gradient_of(h, target)
    before = curved(h, target)
    initialise("small_solve", seed, inputs=h, gradient=gradient)
    step = seed(h).detach()
    slope = float((gradient * step).sum())
    assert slope < 0
    assert curved(h + step, target) < before
    tiny = 1e-2
    lowered = curved(h.double() + tiny * step.double(), target.double()) - before.double()
    assert float(lowered) == pytest.approx(tiny * slope, rel=0.05)
    size = float(step.square().mean().sqrt() / h.square().mean().sqrt())
    assert size == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "layout", "dim"), [("mlp", "features", -1), ("conv", "conv2d", 1)]
)
def test_a_small_solve_is_the_least_squares_solution(name: str, layout: str, dim: int) -> None:
    seed, h = built(name, layout, torch.float64), flowing(layout, torch.float64)
    gradient = gradient_of(h, flowing(layout, torch.float64, seed=8))
    initialise("small_solve", seed, inputs=h, gradient=gradient)
    solved = seed(h).detach()
    # Any other weights of the same layer fit the descent worse, at their best length.
    misfit = fit(solved, -gradient)
    optimum = seed.last.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        noise = torch.randn(optimum.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            seed.last.weight.copy_(optimum + 0.3 * optimum.norm() / noise.norm() * noise)
        assert fit(seed(h).detach(), -gradient) > misfit


def fit(output: Tensor, wanted: Tensor) -> float:
    length = (output * wanted).sum() / output.square().sum()
    return float((length * output - wanted).norm())


PAIRS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "linear": ([nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)], (9, 5)),
    "norm": ([nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)], (9, 5)),
    "strided": (
        [
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3, stride=2, padding=1, padding_mode="circular"),
        ],
        (9, 2, 6, 6),
    ),
    "same": (
        [nn.Conv1d(2, 4, 3), nn.GELU(), nn.Conv1d(4, 3, 3, padding="same", dilation=2)],
        (9, 2, 8),
    ),
    "flattened": (
        [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)],
        (9, 1, 6, 6),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_branch_over_a_pair_is_solved_with_all_options_of_its_layers(name: str) -> None:
    layers, source = PAIRS[name]
    flow = pair_flow(pair_of(*layers, source=source))
    torch.manual_seed(1)
    seed = get("widen").build(flow, width=3)
    x = torch.randn(source)
    h = nn.Sequential(*layers)(x).detach()
    target = torch.randn(h.shape)
    gradient = gradient_of(h, target)
    statistics = [buffer.clone() for buffer in seed.buffers()]
    initialise("small_solve", seed, inputs=x, gradient=gradient)
    assert all(map(torch.equal, seed.buffers(), statistics))
    step = seed(x).detach()
    assert float((gradient * step).sum()) < 0
    assert float(step.square().mean().sqrt()) == pytest.approx(
        0.05 * float(x.square().mean().sqrt()), rel=1e-3
    )


@pytest.mark.parametrize(
    ("name", "layout", "width"),
    [("mlp", "features", 3), ("mlp", "tokens", 2), ("linear", "tokens", 3)],
)
def test_gradmax_gives_the_incoming_layer_a_larger_gradient_than_chance(
    name: str, layout: str, width: int
) -> None:
    seed, h = built(name, layout, width=width), flowing(layout)
    gradient = gradient_of(h, flowing(layout, seed=8))
    initialise("gradmax", seed, inputs=h, gradient=gradient)
    assert not seed(h).any()
    best = incoming_gradient(seed, h, gradient)
    length = seed.last.weight.norm(dim=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        chance = torch.randn(seed.last.weight.shape, generator=generator)
        with torch.no_grad():
            seed.last.weight.copy_(functional.normalize(chance, dim=0) * length)
        assert incoming_gradient(seed, h, gradient) < best


def incoming_gradient(seed: nn.Module, h: Tensor, gradient: Tensor) -> float:
    layer = next(m for m in seed.get_submodule("inner").modules() if isinstance(m, nn.Linear))
    (pulled,) = torch.autograd.grad((seed(h) * gradient).sum(), layer.weight)
    return float(pulled.norm())


def test_with_gradmax_every_unit_learns_also_beyond_the_rank() -> None:
    seed, h = built("mlp", "features", width=20), flowing("features")
    initialise("gradmax", seed, inputs=h, gradient=gradient_of(h, flowing("features", seed=8)))
    assert bool((seed.last.weight.norm(dim=0) > 0.1).all())
    weight = seed.inner[0].weight
    (pulled,) = torch.autograd.grad((seed(h) * flowing("features", seed=4)).sum(), weight)
    assert bool((pulled.norm(dim=1) > 0).all())


@pytest.mark.parametrize("initialiser", ["zero_out", *SOLVED])
@pytest.mark.parametrize("given", [True, False])
def test_no_initialiser_touches_the_random_stream(initialiser: str, given: bool) -> None:
    seed, h = built("mlp", "features", width=20), flowing("features")
    generator = torch.Generator().manual_seed(3) if given else None
    with unchanged_stream():
        initialise(initialiser, seed, inputs=h, gradient=gradient_of(h, -h), generator=generator)


def test_what_is_drawn_follows_from_the_generator() -> None:
    h = flowing("features")
    gradient = gradient_of(h, flowing("features", seed=8))

    def drawn(start: int, stream: int) -> Tensor:
        seed = built("mlp", "features", width=20)
        torch.manual_seed(stream)
        generator = torch.Generator().manual_seed(start)
        initialise("gradmax", seed, inputs=h, gradient=gradient, generator=generator)
        return seed.last.weight.detach()

    assert torch.equal(drawn(3, 1), drawn(3, 2))
    # The first units follow from the gradient; only those beyond its rank are drawn.
    same = (drawn(3, 1) == drawn(4, 1)).all(0)
    assert same.tolist() == [True] * 12 + [False] * 8


def relu_seed() -> Seed:
    return Seed(nn.Sequential(nn.Linear(12, 4), nn.ReLU()), nn.Linear(4, 12))


def normed_seed() -> Seed:
    return Seed(nn.Sequential(nn.Linear(12, 4), nn.LayerNorm(4)), nn.Linear(4, 12))


def moved_seed() -> Seed:
    return Seed(nn.Linear(12, 4), FeaturesTo(nn.Linear(4, 12), 1))


def grouped_seed() -> Seed:
    return Seed(nn.Conv1d(8, 4, 1), nn.Conv1d(4, 8, 1, groups=2))


@pytest.mark.parametrize(
    ("initialiser", "seed", "layout", "reason"),
    [
        ("gradmax", relu_seed(), "features", "passes no gradient .as ReLU does"),
        ("gradmax", built("conv", "conv2d"), "conv2d", "for seeds with one linear layer before"),
        ("gradmax", built("attention", "conv2d"), "conv2d", "one linear layer before"),
        ("gradmax", built("squeeze_excite", "conv2d"), "conv2d", "one linear layer before"),
        ("gradmax", normed_seed(), "features", "nothing but an activation .* there is a LayerNorm"),
        ("gradmax", moved_seed(), "features", "for seeds whose outgoing layer is linear"),
        ("small_solve", built("squeeze_excite", "conv2d"), "conv2d", "this SqueezeExcite does not"),
        ("small_solve", grouped_seed(), "conv1d", "a convolution without groups; this Seed"),
        ("zero_out", nn.Linear(12, 12), "features", "a Linear has no outgoing layer 'last'"),
        ("kaiming", built("mlp", "features"), "features", "give one of: zero_out, gradmax, small"),
    ],
)
def test_what_would_not_learn_is_refused_and_the_seed_left_as_it_is(
    initialiser: str, seed: nn.Module, layout: str, reason: str
) -> None:
    before = {name: tensor.clone() for name, tensor in seed.state_dict().items()}
    h = flowing(layout)
    with pytest.raises(GrowthError, match=reason):
        initialise(initialiser, seed, inputs=h, gradient=h)
    assert all(torch.equal(before[name], tensor) for name, tensor in seed.state_dict().items())


@pytest.mark.parametrize("initialiser", SOLVED)
def test_what_is_solved_for_has_to_be_there_and_finite(initialiser: str) -> None:
    seed, h = built("mlp", "features"), flowing("features")
    assert needs_gradient(initialiser)
    with pytest.raises(GrowthError, match="needs inputs and the loss gradient"):
        initialise(initialiser, seed, inputs=h)
    with pytest.raises(GrowthError, match="not finite"):
        initialise(initialiser, seed, inputs=h, gradient=h / 0)


def test_zeros_need_no_gradient_nor_does_a_name_that_is_unknown() -> None:
    assert not needs_gradient("zero_out")
    assert not needs_gradient("kaiming")


@pytest.mark.parametrize(
    ("slot", "name"),
    [("trunk.6", "mlp"), ("trunk.0", "conv"), ("trunk.1", "depthwise"), ("trunk.0", "attention")],
)
def test_a_planted_seed_is_solved_on_what_was_surveyed(slot: str, name: str) -> None:
    loop = Loop([slot])
    refused = loop.plant(slot, name, initialiser="small_solve")
    assert "call survey() before" in refused.detail
    loop.step(30)
    loop.survey()
    assert loop.ask(SeedOperation.GERMINATE, slot, name, planting=solved()).applied
    loop.kasmina.settle()
    assert loop.survey().seeds[slot].gain.mean > 0


def solved(initialiser: str = "small_solve") -> Planting:
    return Planting(initialiser=initialiser)


def test_gradmax_is_planted_with_a_gradient_at_once_for_what_comes_before() -> None:
    loop = Loop(["trunk.5"])
    loop.survey()
    asked = loop.ask(SeedOperation.GERMINATE, "trunk.5", "mlp", planting=solved("gradmax"))
    assert asked.applied, asked.detail
    seed = slots_of(loop.model)["trunk.5"].seed
    assert not seed.inner[0].weight.any()
    loop.step(2)
    assert bool((seed.inner[0].weight.norm(dim=1) > 0).all())


class Layers(nn.Module):
    """Layers of several widths, so that input and output of a pair cannot be confused."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 6), activation, nn.Linear(6, 3))

    def forward(self, images: Tensor) -> Any:
        return self.net(images)


@pytest.mark.parametrize("initialiser", SOLVED)
def test_the_seed_of_a_pair_is_solved_on_the_input_of_the_first_layer(initialiser: str) -> None:
    torch.manual_seed(0)
    model = Layers(nn.GELU())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    slot = "net.1>net.3"
    kasmina = Kasmina(model, optimizer, slots=[slot], sample=batch()[0], config=QUICK)
    held_out = [batch(100 + index, 256) for index in range(4)]

    def loss(content: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(content[0]), content[1])

    kasmina.survey(loss, held_out, None)
    command = SeedCommand(slot, SeedOperation.GERMINATE, "widen", solved(initialiser))
    report = kasmina.apply(command)
    assert report.applied, report.detail
    kasmina.settle()
    if initialiser == "small_solve":
        assert kasmina.survey(loss, held_out, None).seeds[slot].gain.mean > 0
        return
    seed = slots_of(model)[slot].seed
    loss(held_out[0]).backward()
    kasmina.train_seeds(lambda: loss(held_out[0]))
    pulled = seed.get_parameter("inner.0.weight").grad
    assert pulled is not None
    assert bool((pulled.norm(dim=1) > 0).sum() >= 3)


def test_a_slot_that_the_loss_does_not_depend_on_cannot_be_solved_for() -> None:
    loop = Loop(["head"])
    held_out = [batch(1000 + index) for index in range(2)]
    features = loop.model.trunk

    def elsewhere(content: tuple[Tensor, Tensor]) -> Tensor:
        loop.model(content[0])
        return features(content[0]).square().mean()

    loop.kasmina.survey(elsewhere, held_out, None)
    refused = loop.ask(SeedOperation.GERMINATE, "head", "mlp", planting=solved())
    assert not refused.applied
    assert "no gradient of the loss gets to slot 'head'" in refused.detail
    assert not loop.model.head.esper_slot.planted
