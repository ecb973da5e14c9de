import pytest
import torch
from torch import Tensor, nn

from esper.tolaria.aggregation import MODES, Mode, PCGrad, Sum, backward
from esper.tolaria.aggregation.graph import shared_graph
from esper.tolaria.aggregation.layer import wide_layers
from esper.tolaria.aggregation.pull import EXACT
from tolaria.aggregation.models import KINDS, TASKS, Case, make
from tolaria.aggregation.textbook import textbook_pcgrad

EXACT_MODES = [mode for mode in MODES if mode in EXACT]
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def by_hand(case: Case, seed: int) -> tuple[Tensor, list[Tensor | None]]:
    """Return the Gramian of the shared parameters, and what has to be in ``.grad``."""
    torch.manual_seed(9)
    losses = case.losses()
    rows = [
        torch.autograd.grad(loss, case.parameters, retain_graph=True, allow_unused=True)
        for loss in losses.values()
    ]
    columns = list(zip(*rows, strict=True))
    shared = [c for c, column in enumerate(columns) if all(g is not None for g in column)]
    vectors = [torch.cat([row[c].flatten() for c in shared]).double() for row in rows]
    orders = PCGrad(torch.Generator().manual_seed(seed))._orders(len(rows))
    combined = textbook_pcgrad(vectors, orders.tolist())
    result: list[Tensor | None] = [
        next((g for g in column if g is not None), None) for column in columns
    ]
    sizes = [case.parameters[c].numel() for c in shared]
    for c, part in zip(shared, combined.split(sizes), strict=True):
        result[c] = part.view_as(case.parameters[c])
    matrix = torch.stack(vectors)
    return matrix @ matrix.T, result


def assert_same(case: Case, expected: list[Tensor | None], relative: float) -> None:
    found = case.gradients()
    assert [g is None for g in found] == [g is None for g in expected]
    pairs = [
        (a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None
    ]
    whole = torch.cat([b.flatten().double() for _, b in pairs]).norm()
    for actual, wanted in pairs:
        assert (actual.double() - wanted.double()).norm() <= relative * whole


@every_kind
@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize("seed", range(3))
def test_exact_modes_agree_with_the_paper(mode: Mode, kind: str, seed: int, device: str) -> None:
    case = make(kind, seed=seed, dtype=torch.float64).to(device)
    gramian, expected = by_hand(case, seed)
    torch.manual_seed(9)
    aggregator = PCGrad(torch.Generator().manual_seed(seed))
    report = backward(case.losses(), case.parameters, aggregator, mode=mode)
    assert report.mode == mode
    torch.testing.assert_close(report.gramian, gramian, rtol=1e-9, atol=1e-12)
    assert_same(case, expected, 1e-9)


@every_kind
@pytest.mark.parametrize("mode", ["sequential", "factored"])
def test_single_precision_is_rounded_only(mode: Mode, kind: str) -> None:
    case = make(kind)
    _, expected = by_hand(case, 0)
    torch.manual_seed(9)
    backward(
        case.losses(),
        case.parameters,
        PCGrad(torch.Generator().manual_seed(0)),
        mode=mode,
    )
    assert_same(case, expected, 1e-6)


@every_kind
@pytest.mark.parametrize("mode", ["features", "sequential", "factored"])
def test_with_sum_every_mode_is_one_backward_pass_of_the_summed_loss(
    mode: Mode, kind: str, device: str
) -> None:
    case = make(kind).to(device)
    torch.manual_seed(9)
    torch.stack(list(case.losses().values())).sum().backward()
    expected = case.gradients()
    case.clear()
    torch.manual_seed(9)
    backward(case.losses(), case.parameters, Sum(), mode=mode)
    assert_same(case, expected, 1e-6)


@every_kind
def test_features_weigh_by_the_gradients_of_the_representation(kind: str) -> None:
    case = make(kind, dtype=torch.float64)
    torch.manual_seed(9)
    features = case.trunk(case.batch)
    leaf = features.detach().requires_grad_()
    losses = Case(nn.Identity(), case.heads, leaf).losses()
    rows = torch.stack(
        [
            torch.autograd.grad(loss, leaf, retain_graph=True)[0].flatten()
            for loss in losses.values()
        ]
    )
    weights = PCGrad().weights(rows @ rows.T)
    features.backward((weights @ rows).view_as(features))
    expected = case.gradients()
    case.clear()
    torch.manual_seed(9)
    report = backward(case.losses(), case.parameters, PCGrad(), mode="features")
    torch.testing.assert_close(report.gramian, rows @ rows.T)
    trunk = len(list(case.trunk.parameters()))
    for found, wanted in zip(case.gradients()[:trunk], expected[:trunk], strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        # Wide linear layers with few rows.
        ("mlp", {"0.weight", "2.inner.weight", "4.weight"}),
        # Convolutions over small images; not those over large ones, nor one with groups.
        ("convolutions", {"6.weight"}),
        ("words", {"0.weight", "2.inner.project.weight", "4.weight"}),
        # A weight that is used three times is left to autograd.
        ("tied", {"2.weight", "4.weight"}),
        ("recurrent", set()),
    ],
)
def test_factored_takes_the_layers_that_it_should(kind: str, taken: set[str]) -> None:
    case = make(kind)
    graph = shared_graph(list(case.losses().values()), case.parameters)
    layers = wide_layers(graph, case.parameters)
    names = [name for name, _ in case.trunk.named_parameters()]
    assert {names[index] for index in layers} == taken


def test_a_task_that_misses_a_layer_counts_as_zero_in_its_factors() -> None:
    torch.manual_seed(0)
    below, above = nn.Linear(50, 60).double(), nn.Linear(60, 70).double()
    batch = torch.randn(3, 50).double()

    def losses() -> dict[str, Tensor]:
        low = below(batch).tanh()
        high = above(low)
        return {"low": low.sum(), "high": high.square().sum(), "other": high.tanh().sum()}

    parameters = [*below.parameters(), *above.parameters()]
    reports = {}
    for mode in ("sequential", "factored"):
        for parameter in parameters:
            parameter.grad = None
        report = backward(losses(), parameters, PCGrad(), mode=mode)
        reports[mode] = (report.gramian, [parameter.grad for parameter in parameters])
    torch.testing.assert_close(reports["factored"], reports["sequential"])


def test_two_frontiers_meet_in_one_trunk() -> None:
    torch.manual_seed(0)
    trunk = nn.Linear(6, 8).double()
    batch = torch.randn(4, 6).double()

    def losses() -> dict[str, Tensor]:
        left, right = trunk(batch).chunk(2, dim=1)
        return {
            "left": left.square().sum(),
            "both": (left * right).sum(),
            "right": -right.exp().sum(),
        }

    expected = torch.stack(
        [
            torch.autograd.grad(loss, trunk.weight, retain_graph=True)[0].flatten()
            for loss in losses().values()
        ]
    )
    for mode in ("sequential", "batched", "factored"):
        report = backward(losses(), [trunk.weight], Sum(), mode=mode)
        torch.testing.assert_close(report.gramian, expected @ expected.T)
    trunk.weight.grad = None
    backward(losses(), [trunk.weight], Sum(), mode="features")
    torch.testing.assert_close(trunk.weight.grad.flatten(), expected.sum(0))  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", MODES)
def test_one_task_gets_its_gradient_in_every_mode(mode: Mode) -> None:
    case = make("mlp")
    loss = case.losses()["first"]
    loss.backward(retain_graph=True)
    expected = case.gradients()
    case.clear()
    backward({"first": loss}, case.parameters, PCGrad(), mode=mode)
    assert_same(case, expected, 1e-6)


class Opaque(torch.autograd.Function):
    """An operation of the user's without a vectorised form."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        return value * 2

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.from_numpy(gradient.numpy() * 2)


class WithOpaque(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = Opaque.apply(value)
        return result


def test_batched_names_the_other_modes_when_an_operation_cannot_be_vectorised() -> None:
    case = make("mlp")
    case.trunk = nn.Sequential(case.trunk, WithOpaque())
    backward(case.losses(), case.parameters, PCGrad(), mode="sequential")
    case.clear()
    with pytest.raises(RuntimeError, match="mode='sequential'"):
        backward(case.losses(), case.parameters, PCGrad(), mode="batched")
    assert all(parameter.grad is None for parameter in case.parameters)


def test_the_tasks_are_named_in_order() -> None:
    case = make("mlp")
    assert backward(case.losses(), case.parameters, PCGrad()).tasks == TASKS


class Mute(torch.autograd.Function):
    """A head that passes no gradient on."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        return value.sum()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize("mode", MODES)
def test_heads_that_pass_no_gradient_on_leave_the_trunk_alone(mode: Mode) -> None:
    weight = nn.Parameter(torch.ones(3))
    features = weight * 2
    losses = {"a": Mute.apply(features), "b": Mute.apply(features)}
    backward(losses, [weight], PCGrad(), mode=mode)
    assert weight.grad is None


@pytest.mark.parametrize("mode", EXACT_MODES)
def test_gradients_with_a_negative_bit_keep_their_sign(mode: Mode) -> None:
    real, imaginary = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def losses() -> dict[str, Tensor]:
        value = torch.complex(real, imaginary).conj()
        return {"a": value.imag.sum() * 2, "b": value.imag.sum() * 3 + value.real.sum()}

    torch.stack(list(losses().values())).sum().backward()
    expected = [real.grad, imaginary.grad]
    real.grad = imaginary.grad = None
    backward(losses(), [real, imaginary], Sum(), mode=mode)
    torch.testing.assert_close([real.grad, imaginary.grad], expected)


def test_a_complex_representation_is_refused() -> None:
    weight = nn.Parameter(torch.ones(4))
    features = torch.fft.rfft(weight)
    losses = {"a": features.abs().sum(), "b": features.real.sum()}
    with pytest.raises(RuntimeError, match="complex64"):
        backward(losses, [weight], Sum(), mode="features")


@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 40, 2, padding="valid"),
        nn.Conv2d(3, 40, 3, padding="same"),
        nn.Conv2d(3, 40, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 40, (2, 1), stride=(1, 2), dilation=(1, 2)),
    ],
    ids=str,
)
def test_convolutions_of_every_kind(layer: nn.Conv2d, mode: Mode) -> None:
    images = torch.randn(1, 3, 4, 4)
    output = layer(images).tanh()
    losses = {"a": output.sum(), "b": output.square().sum()}
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(losses["a"] + losses["b"], parameters, retain_graph=True)
    for parameter in parameters:
        parameter.grad = None
    backward(losses, parameters, Sum(), mode=mode)
    torch.testing.assert_close([parameter.grad for parameter in parameters], list(expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", [nn.Linear(60, 60), nn.Conv2d(60, 8, 1)], ids=str)
def test_layers_that_are_given_no_rows(layer: nn.Module, mode: Mode) -> None:
    batch = torch.randn(0, 60, 2, 2) if isinstance(layer, nn.Conv2d) else torch.randn(0, 60)
    output = layer(batch)
    losses = {"a": output.sum(), "b": output.square().sum()}
    backward(losses, list(layer.parameters()), Sum(), mode=mode)
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("mode", EXACT_MODES)
def test_what_a_padded_place_is_given_does_not_matter(mode: Mode) -> None:
    table = nn.Embedding(50, 7, padding_idx=0)
    words = table(torch.tensor([[0, 3], [4, 0]]))
    # The norm of a padded word has no derivative.
    losses = {"a": words.square().sum(-1).sqrt().sum(), "b": words.sum()}
    report = backward(losses, [table.weight], PCGrad(), mode=mode)
    assert report.nonfinite == ()
    assert table.weight.grad is not None
    assert table.weight.grad.isfinite().all()


@pytest.mark.parametrize("mode", EXACT_MODES)
def test_one_word_alone_is_looked_up(mode: Mode) -> None:
    table = nn.Embedding(50, 7)
    word = table(torch.tensor(3))
    losses = {"a": word.sum(), "b": word.square().sum()}
    backward(losses, [table.weight], Sum(), mode=mode)
    assert table.weight.grad is not None
    torch.testing.assert_close(table.weight.grad[3], 1 + 2 * table.weight[3])


@pytest.mark.parametrize("mode", MODES)
def test_a_task_that_reaches_no_parameter(mode: Mode) -> None:
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    losses = {"a": weight.sum(), "b": other.sum()}
    backward(losses, [weight], Sum(), mode=mode)
    assert weight.grad is not None
    assert weight.grad.tolist() == [1, 1, 1]
    assert other.grad is None
