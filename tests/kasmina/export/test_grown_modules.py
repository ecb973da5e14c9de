from pathlib import Path

import pytest
import torch
from torch import nn

from esper.kasmina.blueprints import plain
from esper.kasmina.export import export_model

CHANNELS = 4


def conv_block() -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(CHANNELS, 3, 3, padding=1), nn.GELU())
    return plain.Seed(inner, nn.Conv2d(3, CHANNELS, 1))


def attention() -> nn.Module:
    last = plain.FeaturesTo(nn.Linear(CHANNELS, CHANNELS), 1)
    return plain.Seed(plain.TokenAttention(CHANNELS, 2, 1), last)


MODULES = {
    "residual": lambda: plain.Residual(conv_block()),
    "attention": lambda: plain.Residual(attention()),
    "excitation": lambda: plain.Residual(plain.SqueezeExcite(CHANNELS, 2, 1)),
    "sum": lambda: plain.Grown(conv_block(), plain.AddBlend(), 0.5),
    "product": lambda: plain.Grown(conv_block(), plain.MultiplyBlend(), 0.5),
    "gate": lambda: plain.Grown(conv_block(), plain.GateBlend(CHANNELS, 1), 0.5),
    "channels": lambda: plain.Grown(attention(), plain.ChannelBlend(CHANNELS, 1, 4), 0.5),
}


@pytest.mark.parametrize("name", MODULES)
def test_what_a_seed_becomes_is_exported_module_by_module(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        host = nn.Conv2d(2, CHANNELS, 3)
        model = nn.Sequential(nn.Sequential(host, MODULES[name]()), nn.Flatten())
        images = torch.rand(3, 2, 6, 6)
    report = export_model(model, images, tmp_path / "out", formats=["safetensors"])
    assert report.generated == "fx"
    assert report.differences == {"safetensors": 0.0}
    assert report.batch == {"safetensors": "dynamic"}
    assert report.notes == ()
