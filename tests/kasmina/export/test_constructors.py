from typing import Any

import pytest
import torch
from torch import nn

from esper.kasmina.export.constructors import construction_of
from esper.kasmina.export.layout import flat

LAYER = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, bias=False)


def text_of(module: nn.Module) -> str:
    construction = construction_of(module)
    assert construction is not None
    return flat(construction.text())


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Linear(3, 4, bias=False), "nn.Linear(3, 4, bias=False)"),
        (nn.Conv2d(1, 8, (3, 5), padding=1), "nn.Conv2d(1, 8, (3, 5), padding=1)"),
        (nn.Conv1d(2, 2, 3, padding="same"), 'nn.Conv1d(2, 2, 3, padding="same")'),
        (nn.BatchNorm2d(4, momentum=None), "nn.BatchNorm2d(4, momentum=None)"),
        (nn.LayerNorm((5,)), "nn.LayerNorm(5)"),
        (nn.LayerNorm((5, 5)), "nn.LayerNorm((5, 5))"),
        (nn.Embedding(5, 3, padding_idx=-1), "nn.Embedding(5, 3, padding_idx=4)"),
        (nn.Hardtanh(-2, 2), "nn.Hardtanh(min_val=-2, max_val=2)"),
        (nn.MaxPool2d(2), "nn.MaxPool2d(2, stride=2)"),
        (nn.GRU(3, 4, bidirectional=True), "nn.GRU(3, 4, bidirectional=True)"),
        (nn.RNN(3, 4, nonlinearity="relu"), 'nn.RNN(3, 4, nonlinearity="relu")'),
        (nn.PReLU(3), "nn.PReLU(num_parameters=3)"),
        (nn.Threshold(float("inf"), 2), 'nn.Threshold(float("inf"), 2)'),
        (nn.Linear(2, 2).double(), "nn.Linear(2, 2).to(torch.float64)"),
        (
            nn.MultiheadAttention(8, 2, bias=False, kdim=4),
            "nn.MultiheadAttention(8, 2, bias=False, kdim=4)",
        ),
        (
            nn.TransformerEncoder(LAYER, 2, nn.LayerNorm(8), enable_nested_tensor=False),
            "nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, "
            'activation="gelu", batch_first=True, bias=False), 2, norm=nn.LayerNorm(8), '
            "enable_nested_tensor=False)",
        ),
    ],
)
def test_the_call_that_builds_a_module(module: nn.Module, text: str) -> None:
    assert text_of(module) == text


def with_hook() -> nn.Module:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: None)
    return module


def with_own_forward() -> nn.Module:
    module: Any = nn.Linear(2, 2)
    module.forward = lambda x: x
    return module


def with_other_weights() -> nn.Module:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.zeros(3, 2))
    return module


def grown_within() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    layer.linear2 = nn.Sequential(layer.linear2, nn.Tanh())  # type: ignore[assignment]
    return layer


def of_two_types() -> nn.Module:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(module.weight.double())
    return module


class Derived(nn.Linear):
    pass


@pytest.mark.parametrize(
    "module",
    [
        with_hook(),
        with_own_forward(),
        with_other_weights(),
        grown_within(),
        of_two_types(),
        Derived(2, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_was_changed_since_is_built_by_no_call(module: nn.Module) -> None:
    assert construction_of(module) is None


def test_building_for_comparison_draws_no_random_number() -> None:
    before = torch.random.get_rng_state()
    assert construction_of(LAYER) is not None
    assert torch.equal(before, torch.random.get_rng_state())
