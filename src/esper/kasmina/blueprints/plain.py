"""The modules that a grown model may be left with: torch and nothing else."""

import torch
from torch import Tensor, nn


class Seed(nn.Module):
    """A block with an outgoing layer; it maps a tensor to one of the shape of the slot's output.

    :param inner: everything before the outgoing layer.
    :param last: the outgoing layer.
    """

    def __init__(self, inner: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the host's output."""
        output: Tensor = self.last(self.inner(x))
        return output


class Blend(nn.Module):
    """Joins host and seed: ``forward(h, s, alpha)`` with ``alpha`` a 0-dim tensor, or a number."""

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """Return what the model goes on with."""
        raise NotImplementedError


class AddBlend(Blend):
    """``h + a*s``."""

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """Return ``h + alpha * s``."""
        return h + alpha * s


class MultiplyBlend(Blend):
    """``h*(1 + a*tanh(s))``."""

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """Return ``h * (1 + alpha * tanh(s))``."""
        return h * (1 + alpha * torch.tanh(s))


class GateBlend(Blend):
    """``h + a*g(h)*s`` with one ``g`` from 0 to 1 for each sample.

    :param channels: of ``h``.
    :param channel_dim: where they are.
    """

    def __init__(self, channels: int, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.gate = nn.Linear(channels, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """Return ``h + alpha * sigmoid(gate(mean of h)) * s``."""
        share = alpha * torch.sigmoid(self.gate(_pooled(h, self.channel_dim))).squeeze(-1)
        # Samples last, so that there is one number for each of them.
        return h + (share * s.movedim(0, -1)).movedim(-1, 0)


class ChannelBlend(Blend):
    """``h + a*c*s`` with one ``c`` for each channel.

    :param channels: of ``h``.
    :param channel_dim: where they are.
    :param dimensions: of ``h``.
    """

    def __init__(self, channels: int, channel_dim: int, dimensions: int) -> None:
        super().__init__()
        shape = [1] * dimensions
        shape[channel_dim] = channels
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, h: Tensor, s: Tensor, alpha: Tensor) -> Tensor:
        """Return ``h + alpha * scale * s``."""
        return h + alpha * self.scale * s


class Residual(nn.Module):
    """``h + block(h)``: what most seeds become.

    :param block: a seed with its share multiplied into its outgoing layer.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor) -> Tensor:
        """Return ``h + block(h)``."""
        grown: Tensor = h + self.block(h)
        return grown


class Grown(nn.Module):
    """A seed with a blending that is not a plain sum.

    :param block: the seed.
    :param blend: the blending.
    :param alpha: its share.
    """

    alpha: Tensor

    def __init__(self, block: nn.Module, blend: Blend, alpha: float) -> None:
        super().__init__()
        self.block = block
        self.blend = blend
        weight = next(self.parameters(), torch.empty(0))
        # In full precision, as it was in the slot, whatever the weights have.
        self.register_buffer("alpha", torch.tensor(alpha, device=weight.device))

    def forward(self, h: Tensor) -> Tensor:
        """Return host and seed, blended."""
        grown: Tensor = self.blend(h, self.block(h), self.alpha)
        return grown


class TokenAttention(nn.Module):
    """Self-attention over tokens, or over the positions of a feature map.

    :param features: of each token.
    :param heads: that share them.
    :param channel_dim: where the features are: 1 or -1.
    """

    def __init__(self, features: int, heads: int, channel_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.channel_dim = channel_dim
        self.norm = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * features)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each token attends to: batch by positions, of any number, by features."""
        spread = x.movedim(self.channel_dim, -1)
        tokens = spread.flatten(1, -2)
        split = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).reshape(spread.shape)


class FeaturesTo(nn.Module):
    """An outgoing layer over the last dimension, whose result is moved to where features belong.

    :param layer: from features to features.
    :param channel_dim: where they belong.
    """

    def __init__(self, layer: nn.Linear, channel_dim: int) -> None:
        super().__init__()
        self.layer = layer
        self.channel_dim = channel_dim

    def forward(self, hidden: Tensor) -> Tensor:
        """Return batch by positions by features as what flows through the slot."""
        mixed: Tensor = self.layer(hidden)
        return mixed.movedim(-1, self.channel_dim)


class SqueezeExcite(nn.Module):
    """A gain for each channel, from the mean of all of them; zero at the start.

    :param channels: of the input.
    :param width: of the layer in between.
    :param channel_dim: where the channels are.
    """

    def __init__(self, channels: int, width: int, channel_dim: int) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        # Not ReLU: where there are few units, all of them may be dead from the start.
        self.inner = nn.Sequential(nn.Linear(channels, width), nn.GELU())
        self.last = nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x * tanh(gain)``."""
        gain = torch.tanh(self.last(self.inner(_pooled(x, self.channel_dim))))
        ends, places = (-2, -1), (0, self.channel_dim)
        return (x.movedim(places, ends) * gain).movedim(ends, places)


def _pooled(x: Tensor, channel_dim: int) -> Tensor:
    """Return the mean over all positions: batch by channels."""
    return x.movedim(channel_dim, -1).unsqueeze(1).flatten(1, -2).mean(1)
