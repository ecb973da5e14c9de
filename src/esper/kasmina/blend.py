"""How the output of a seed joins that of its host."""

from esper.kasmina.blueprints.base import Flow
from esper.kasmina.blueprints.plain import (
    AddBlend,
    Blend,
    ChannelBlend,
    GateBlend,
    MultiplyBlend,
)
from esper.leyline import GrowthError

__all__ = ["Blend", "make_blend"]

_NAMES = ("add", "multiply", "gate", "channel")


def make_blend(name: str, flow: Flow) -> Blend:
    """Return a blending of a name for what flows through a slot.

    ``add`` is ``h + a*s``; ``multiply`` ``h*(1 + a*tanh(s))``; ``gate`` ``h + a*g(h)*s`` with one
    learnt ``g`` for each sample, which begins at one half; ``channel`` ``h + a*c*s`` with one
    learnt ``c`` for each channel, which begins at one.

    :raises GrowthError: there is none of this name.
    """
    if name == "add":
        return AddBlend()
    if name == "multiply":
        return MultiplyBlend()
    if name == "gate":
        return GateBlend(flow.channels, flow.channel_dim).to(flow.device, flow.dtype)
    if name == "channel":
        blend = ChannelBlend(flow.channels, flow.channel_dim, len(flow.shape))
        return blend.to(flow.device, flow.dtype)
    raise GrowthError(f"there is no blending {name!r}; give one of {', '.join(_NAMES)}")
