import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from esper.kasmina import attach
from esper.kasmina.blueprints import Pair, Seed, WidenedPair, get, offers
from esper.kasmina.slot import graft_memo
from esper.leyline import GrowthError
from kasmina.blueprints.builders import pair_flow, pair_of, stir, unchanged_stream

IMAGES = (6, 2, 8, 8)
SIGNALS = (6, 2, 16)
ROWS = (6, 5)
CHAINS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "perceptron": ([nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)], ROWS),
    "normalised perceptron": (
        [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Dropout(0.0), nn.Linear(4, 3)],
        ROWS,
    ),
    "tokens": ([nn.Linear(5, 4, bias=False), nn.GELU(), nn.Linear(4, 3)], (2, 7, 5)),
    "convolutions": (
        [
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 3, 3, padding=1),
        ],
        IMAGES,
    ),
    "options": (
        [
            nn.Conv2d(2, 4, (3, 1), stride=(2, 1), padding=(1, 0), padding_mode="circular"),
            nn.LeakyReLU(0.2),
            nn.AvgPool2d(3, stride=1, padding=1),
            nn.Conv2d(4, 3, 3, dilation=2, padding="same", padding_mode="reflect", bias=False),
        ],
        IMAGES,
    ),
    "classifier": (
        [
            nn.Conv2d(2, 4, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(4 * 9, 3),
        ],
        IMAGES,
    ),
    "normalised classifier": (
        [
            nn.Conv2d(2, 4, 3),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.BatchNorm1d(16),
            nn.Linear(16, 3),
        ],
        IMAGES,
    ),
    "signals": (
        [
            nn.Conv1d(2, 4, 5, stride=2, padding=2),
            nn.BatchNorm1d(4, momentum=None),
            nn.GELU("tanh"),
            nn.AvgPool1d(2),
            nn.Conv1d(4, 3, 3, padding=1, padding_mode="replicate"),
        ],
        SIGNALS,
    ),
    "no statistics": (
        [
            nn.Conv1d(2, 4, 3),
            nn.BatchNorm1d(4, affine=False, track_running_stats=False),
            nn.Conv1d(4, 3, 1),
        ],
        SIGNALS,
    ),
    "nothing between": ([nn.Linear(5, 4), nn.Linear(4, 3)], ROWS),
}


def chain(name: str, dtype: torch.dtype = torch.float32) -> Pair:
    layers, source = copy.deepcopy(CHAINS[name])
    for index, layer in enumerate(layers):
        stir(layer.to(dtype), seed=index)
    return pair_of(*layers, source=source)


def branch(pair: Pair, width: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    seed = get("widen").build(pair_flow(pair, dtype), width=width)
    stir(seed, seed=17)
    return seed


def host_of(pair: Pair) -> nn.Sequential:
    return nn.Sequential(pair.first, *pair.between, pair.second)


def folded_of(wider: WidenedPair) -> nn.Sequential:
    return nn.Sequential(wider.first, *wider.between, wider.second)


def close(given: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((given - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("width", [0, 1, 7])
@pytest.mark.parametrize("name", CHAINS)
def test_wider_layers_do_what_layers_and_branch_did(name: str, width: int, alpha: float) -> None:
    pair = chain(name)
    host, seed = host_of(pair), branch(pair, width)
    kept = [copy.deepcopy(module.state_dict()) for module in (host, seed)]
    with unchanged_stream():
        wider = get("widen").fold_pair(pair, seed, alpha)
    for module, state in zip((host, seed), kept, strict=True):
        assert all(torch.equal(module.state_dict()[key], state[key]) for key in state)
    folded, x = folded_of(wider), torch.randn(pair.source_shape)
    for training in (False, True):
        for module in (host, seed, folded):
            module.train(training)
        if training and name == "classifier":
            continue  # dropout falls on other units
        with torch.no_grad():
            expected = host(x) + alpha * seed(x)
            assert close(folded(x), expected)
    kinds = [type(module) for module in folded]
    assert kinds == [type(module) for module in host]
    assert not any(hasattr(kind, "_esper_base") for kind in kinds)


@pytest.mark.parametrize("name", ["convolutions", "normalised perceptron", "signals"])
def test_the_branch_brings_its_own_running_statistics(name: str) -> None:
    pair = chain(name)
    seed = branch(pair)
    wider = get("widen").fold_pair(pair, seed, 1.0)
    old = next(m for m in pair.between if hasattr(m, "running_mean"))
    own = next(m for m in seed.inner if hasattr(m, "running_mean"))
    joined = next(m for m in wider.between if hasattr(m, "running_mean"))
    assert type(joined) is type(old)
    assert (joined.momentum, joined.eps) == (old.momentum, old.eps)
    for key in ("running_mean", "running_var"):
        assert torch.equal(getattr(joined, key), torch.cat([getattr(old, key), getattr(own, key)]))
    assert int(joined.num_batches_tracked) == int(old.num_batches_tracked)
    x = torch.randn(pair.source_shape)
    folded, host = folded_of(wider).train(), host_of(pair).train()
    for module in (folded, host, seed.train()):
        module(x)
    kept = joined.running_mean[: len(old.running_mean)]
    torch.testing.assert_close(kept, old.running_mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CHAINS)
def test_the_dtype_stays(name: str, dtype: torch.dtype) -> None:
    pair = chain(name, dtype)
    seed = branch(pair, dtype=dtype)
    folded = folded_of(get("widen").fold_pair(pair, seed, 1.0)).eval()
    assert {p.dtype for p in (*seed.parameters(), *folded.parameters())} == {dtype}
    x = torch.randn(pair.source_shape).to(dtype)
    with torch.no_grad():
        expected = host_of(pair).eval()(x) + seed.eval()(x)
        assert close(folded(x), expected, 1e-13 if dtype is torch.float64 else 3e-2)


def test_replaced_are_all_parameters_each_by_one_that_it_is_the_beginning_of() -> None:
    pair = chain("convolutions")
    wider = get("widen").fold_pair(pair, branch(pair), 1.0)
    assert set(wider.replaced) == set(host_of(pair).parameters())
    assert set(wider.replaced.values()) == set(folded_of(wider).parameters())
    for old, new in wider.replaced.items():
        assert isinstance(new, nn.Parameter)
        assert torch.equal(new[tuple(slice(size) for size in old.shape)], old)


def test_what_is_frozen_stays_frozen() -> None:
    pair = chain("normalised perceptron")
    pair.first.requires_grad_(False)
    wider = get("widen").fold_pair(pair, branch(pair), 1.0)
    assert not any(p.requires_grad for p in wider.first.parameters())
    others = (wider.second, *wider.between)
    assert all(p.requires_grad for module in others for p in module.parameters())


def test_a_normalisation_without_bias_stays_without() -> None:
    try:
        norm: Any = nn.BatchNorm1d(4, bias=False)
    except TypeError:
        pytest.skip("this torch has no such option")
    pair = pair_of(nn.Linear(5, 4), norm, nn.Linear(4, 3), source=ROWS)
    seed = branch(pair)
    folded, x = folded_of(get("widen").fold_pair(pair, seed, 1.0)).eval(), torch.randn(ROWS)
    assert folded[1].bias is None
    with torch.no_grad():
        assert close(folded(x), host_of(pair).eval()(x) + seed.eval()(x))


@pytest.mark.parametrize("name", ["normalised perceptron", "convolutions"])
def test_the_modes_of_a_pair_stay(name: str) -> None:
    pair = chain(name)
    seed = branch(pair)
    pair.first.eval()
    next(m for m in pair.between if hasattr(m, "running_mean")).eval()
    modes = [module.training for module in host_of(pair)]
    folded = folded_of(get("widen").fold_pair(pair, seed, 1.0))
    assert [module.training for module in folded] == modes
    assert len(set(modes)) == 2


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


def replaced(layer: Any) -> nn.Module:
    layer.forward = layer.forward
    return layer


LINEAR = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("layers", "source", "reason"),
    [
        ([nn.Linear(5, 4), nn.LayerNorm(4), LINEAR], ROWS, "a LayerNorm .* mixes channels"),
        ([nn.Linear(5, 4), nn.Softmax(-1), LINEAR], ROWS, "a Softmax .* mixes channels"),
        ([nn.Linear(5, 4), nn.PReLU(4), LINEAR], ROWS, "a PReLU"),
        ([nn.Linear(5, 4), nn.Linear(4, 4), LINEAR], ROWS, "a Linear between .* mixes"),
        ([nn.Linear(5, 8), nn.MaxPool1d(2), LINEAR], (6, 7, 5), "a MaxPool1d .* mixes"),
        ([nn.Linear(5, 4), nn.BatchNorm1d(7), LINEAR], (6, 7, 5), "a BatchNorm1d .* mixes"),
        ([nn.Linear(5, 4), nn.Flatten(), nn.Linear(28, 3)], (6, 7, 5), "with tokens"),
        ([nn.Linear(5, 4), nn.Flatten(0), nn.Linear(24, 3)], ROWS, "begin at dimension 1"),
        (
            [nn.Conv1d(2, 4, 3), nn.Flatten(), nn.MaxPool1d(2), nn.Linear(28, 3)],
            SIGNALS,
            "a MaxPool1d .* mixes",
        ),
        ([nn.Conv1d(2, 4, 3), nn.Linear(14, 3)], SIGNALS, "a Linear is given channels in dim"),
        ([nn.Linear(16, 4), nn.Conv1d(2, 3, 3)], SIGNALS, "a Conv1d is given features last"),
        ([nn.Conv1d(2, 4, 3), nn.Conv1d(4, 3, 1)], (2, 16), "which has no batch dimension"),
        ([nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 3, 1)], IMAGES, "a grouped Conv2d"),
        ([nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1, groups=4)], IMAGES, "a grouped Conv2d"),
        ([nn.ConvTranspose2d(2, 4, 3), nn.Conv2d(4, 3, 1)], IMAGES, "a ConvTranspose2d cannot"),
        ([Own(5, 4), LINEAR], ROWS, "a Own cannot be made wider"),
        ([hooked(nn.Linear(5, 4)), LINEAR], ROWS, "a Linear of the pair has hooks"),
        ([nn.Linear(5, 4), replaced(nn.ReLU()), LINEAR], ROWS, "a ReLU .* has a forward that was"),
        (
            [nn.Linear(5, 4), hooked(nn.BatchNorm1d(4)), LINEAR],
            ROWS,
            "a BatchNorm1d between the layers has hooks",
        ),
        (
            [parametrizations.weight_norm(nn.Linear(5, 4)), LINEAR],
            ROWS,
            "a ParametrizedLinear cannot be made wider",
        ),
    ],
)
def test_what_would_not_fold_exactly_does_not_fit(
    layers: list[nn.Module], source: tuple[int, ...], reason: str
) -> None:
    flow = pair_flow(pair_of(*layers, source=source))
    with pytest.raises(GrowthError, match=f"blueprint 'widen' does not fit: .*{reason}"):
        get("widen").build(flow)


def test_it_sees_through_what_is_at_the_layers_of_a_pair() -> None:
    model = nn.Sequential(*CHAINS["convolutions"][0])
    slot = attach(model, "0>4", torch.randn(IMAGES))
    for part in model[1:4]:
        graft_memo(part, object())
    pair = slot.flow.pair
    assert pair is not None
    assert all(type(m) is not type(m)._esper_base for m in (pair.first, *pair.between, pair.second))
    assert offers(slot.flow).keys() == {"widen"}
    seed = get("widen").build(slot.flow)
    kinds = [type(module) for module in (*seed.get_submodule("inner"), seed.last)]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Conv2d]
    assert type(seed) is Seed
