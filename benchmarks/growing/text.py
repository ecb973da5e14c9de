"""A small language model over characters, and the text it learns: topics of Python's own help."""

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from esper.kasmina import Blueprint, Flow, register
from esper.kasmina.blueprints.plain import Residual, Seed
from growing.task import Split

WIDTH, CONTEXT, HEADS = 48, 64, 4
STEPS_AN_EPOCH, BATCH = 50, 32


class Decoder(nn.Module):
    """Attention to earlier characters, and a perceptron, without an outgoing layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Return batch by characters by width."""
        batch, count, width = h.shape
        split = self.qkv(self.norm(h)).reshape(batch, count, 3, HEADS, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        seen = mixed.transpose(1, 2).reshape(batch, count, width)
        deeper: Tensor = seen + self.mlp(h + seen)
        return deeper


class DecoderLayer(Blueprint):
    """A layer that looks at earlier characters only, as the layers of the host do."""

    name = "decoder_layer"
    defaults: ClassVar[Mapping[str, int | float | str]] = {}

    def fits(self, flow: Flow) -> str:
        """See :class:`Blueprint`."""
        return "" if len(flow.shape) == 3 and flow.channel_dim == -1 else "it needs characters"

    def make(self, flow: Flow, arguments: dict[str, Any]) -> nn.Module:
        """See :class:`Blueprint`."""
        del arguments
        return Seed(Decoder(flow.channels), nn.Linear(flow.channels, flow.channels))


register(DecoderLayer())


class LanguageModel(nn.Module):
    """Predicts each next character.

    :param layers: how many of four places hold a layer.
    :param symbols: that there are.
    """

    def __init__(self, layers: int, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.layers = nn.Sequential(
            *(
                Residual(Seed(Decoder(WIDTH), nn.Linear(WIDTH, WIDTH)))
                if place < layers
                else nn.Identity()
                for place in range(4)
            )
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.outer = nn.Linear(WIDTH, symbols)

    def forward(self, characters: Tensor) -> Tensor:
        """Return logits, batch by characters by symbols."""
        logits: Tensor = self.outer(self.norm(self.layers(self.embed(characters) + self.place)))
        return logits


class Crops(Dataset[Any]):
    """Random stretches of a text; every epoch has others."""

    def __init__(self, characters: Tensor) -> None:
        self._characters = characters
        self._source = torch.Generator().manual_seed(5)

    def __len__(self) -> int:
        return STEPS_AN_EPOCH * BATCH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        del index
        room = len(self._characters) - CONTEXT - 1
        start = int(torch.randint(room, (1,), generator=self._source))
        crop = self._characters[start : start + CONTEXT + 1]
        return crop[:-1], crop[1:]


def language_model(layers: int) -> nn.Module:
    """Return a language model for the text."""
    return LanguageModel(layers, len(_characters()[1]))


def text() -> Split:
    """Return the first eight tenths to learn from, one to decide with, one to report on."""
    characters = _characters()[0]
    first, second = len(characters) * 8 // 10, len(characters) * 9 // 10
    parts = characters[first:second], characters[second:]
    return Split(Crops(characters[:first]), *(_windows(part) for part in parts))


def _windows(characters: Tensor) -> TensorDataset:
    count = min((len(characters) - 1) // CONTEXT, 512)
    inputs = characters[: count * CONTEXT].reshape(count, CONTEXT)
    return TensorDataset(inputs, characters[1 : count * CONTEXT + 1].reshape(count, CONTEXT))


@cache
def _characters() -> tuple[Tensor, list[str]]:
    from pydoc_data.topics import topics

    whole = "".join(topics[name] for name in sorted(topics))
    symbols = sorted(set(whole))
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    return torch.tensor([numbers[symbol] for symbol in whole]), symbols
