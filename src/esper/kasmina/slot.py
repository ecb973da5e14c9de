"""A slot: the place at a module of any model where a seed may grow.

The module's class is swapped for a subclass of itself, as ``torch.nn.utils.parametrize`` does, so
that code, attributes, ``isinstance`` and state-dict keys of the model stay as they are. Forward
hooks would be ignored, without a word, by a model that was compiled before.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from esper.kasmina.blend import Blend
from esper.kasmina.blueprints import Flow
from esper.leyline import GrowthError

AnyMemo = TypeVar("AnyMemo")

SLOT = "esper_slot"
_TAP = "esper_tap"
_MEMO = "esper_memo"
_grafted: dict[type[nn.Module], type[nn.Module]] = {}


class Passage(Enum):
    """What the forward pass does at a slot.

    ``HOST`` does not call the seed. ``BLENDED`` adds its share. ``SHADOW`` adds all of it to a
    detached output, so that gradients reach the seed and nothing before it.
    """

    HOST = "host"
    BLENDED = "blended"
    SHADOW = "shadow"


class Tap:
    """Hands the input of the first module of a pair to the slot at the second one."""

    def __init__(self) -> None:
        self.open = False
        self.seen: Tensor | None = None

    def take(self) -> Tensor:
        """Return what the first module was given in this forward pass.

        :raises GrowthError: it was not called before the second one.
        """
        seen, self.seen = self.seen, None
        if seen is None:
            raise GrowthError(
                "the second module of a pair was called without the first one; a pair needs both "
                "in one forward pass, in one region of activation checkpointing"
            )
        return seen


class Slot(nn.Module):
    """Holds the seed at one module.

    :param name: of the slot.
    :param flow: what flows through it.
    :param tap: gives the seed's input, where that is not the module's own output.
    :ivar seed: what grows here, where the slot is planted.
    :ivar blend: how it joins the module's output.
    :ivar alpha: share of the seed, a 0-dim float32 buffer that is in no state dict.
    :ivar idle: whether the forward pass goes by without calling the slot.
    :ivar watching: whether the module's output is kept in ``seen``.
    """

    alpha: Tensor
    whole: Tensor
    seed: nn.Module
    blend: Blend

    def __init__(self, name: str, flow: Flow, tap: Tap | None = None) -> None:
        super().__init__()
        self.name = name
        self.flow = flow
        self.tap = tap
        self.seen: Tensor | None = None
        self.idle = True
        self.watching = False
        self.passage = Passage.HOST
        self.register_module("seed", None)
        self.register_module("blend", None)
        self.register_buffer("alpha", torch.zeros((), device=flow.device), persistent=False)
        self.register_buffer("whole", torch.ones((), device=flow.device), persistent=False)

    def forward(self, output: Tensor) -> Tensor:
        """Return what the model goes on with.

        :param output: of the module, as it would be without the slot.
        """
        if self.watching:
            # What comes next may change its input in place.
            self.seen, output = output, output.clone()
        if self.passage is Passage.HOST:
            return output
        source = output if self.tap is None else self.tap.take()
        if self.passage is Passage.SHADOW:
            shadow: Tensor = self.blend(output.detach(), self.seed(source.detach()), self.whole)
            return shadow
        blended: Tensor = self.blend(output, self.seed(source), self.alpha)
        return blended

    def plant(self, seed: nn.Module, blend: Blend) -> None:
        """Put a seed in; the forward pass does not call it yet."""
        self.seed, self.blend = seed, blend
        self.go(Passage.HOST)

    def clear(self) -> None:
        """Take the seed out."""
        self.go(Passage.HOST)
        self._modules["seed"] = self._modules["blend"] = None
        self.alpha.zero_()

    def go(self, passage: Passage) -> None:
        """Choose what the forward pass does here."""
        self.passage = passage
        self._settle()

    @property
    def planted(self) -> bool:
        """Whether a seed grows here."""
        return self._modules["seed"] is not None

    @contextmanager
    def passing(self, passage: Passage) -> Iterator[None]:
        """Let the forward pass do something else for a while."""
        before = self.passage
        self.go(passage)
        try:
            yield
        finally:
            self.go(before)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keep the module's output of the last forward pass in ``seen`` for a while."""
        self.watching = True
        self._settle()
        try:
            yield
        finally:
            self.watching, self.seen = False, None
            self._settle()

    def own_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of seed and blending, in a fixed order."""
        return list(self.parameters())

    def extra_repr(self) -> str:
        """Return the name."""
        return f"{self.name!r}"

    def _settle(self) -> None:
        self.idle = self.passage is Passage.HOST and not self.watching
        if self.tap is not None:
            self.tap.open, self.tap.seen = self.passage is not Passage.HOST, None


def graft(module: nn.Module, slot: Slot) -> None:
    """Put a slot at a module."""
    _swap(module)
    module.register_module(SLOT, slot)


def graft_tap(module: nn.Module, tap: Tap) -> None:
    """Let a tap see what a module is given."""
    _swap(module)
    module.__dict__[_TAP] = tap


def remove_slot(module: nn.Module) -> Slot:
    """Take the slot off a module and return it; the module is of its own class again."""
    slot = module._modules.pop(SLOT)
    _swap_back(module)
    return cast("Slot", slot)


def remove_tap(module: nn.Module) -> None:
    """Take the tap off a module."""
    module.__dict__.pop(_TAP)
    _swap_back(module)


def slot_of(module: nn.Module) -> Slot | None:
    """Return the slot at a module, if there is one."""
    return getattr(module, SLOT, None)


def tap_of(module: nn.Module) -> Tap | None:
    """Return the tap at a module, if there is one."""
    return module.__dict__.get(_TAP)


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Return every slot of a model by name."""
    found = (module for module in model.modules() if isinstance(module, Slot))
    return {slot.name: slot for slot in found}


def _swap(module: nn.Module) -> None:
    if not hasattr(type(module), "_esper_base"):
        module.__class__ = _grafted_class(type(module))


def graft_memo(module: nn.Module, memo: AnyMemo) -> AnyMemo:
    """Let a memo run a module's forward; see :mod:`esper.kasmina.replay`."""
    _swap(module)
    module.__dict__[_MEMO] = memo
    return memo


def remove_memo(module: nn.Module) -> None:
    """Take the memo off a module."""
    module.__dict__.pop(_MEMO)
    _swap_back(module)


def _swap_back(module: nn.Module) -> None:
    if slot_of(module) is None and tap_of(module) is None and _MEMO not in module.__dict__:
        module.__class__ = type(module)._esper_base  # type: ignore[attr-defined]


def _grafted_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``base`` that asks tap and slot; the same one each time."""
    if base in _grafted:
        return _grafted[base]

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        tap = self.__dict__.get(_TAP)
        if tap is not None and tap.open:
            tap.seen = arguments[0] if arguments else next(iter(named.values()))
        memo = self.__dict__.get(_MEMO)
        if memo is None or not memo.mode:
            output = base.forward(self, *arguments, **named)
        else:
            output = memo.run(functools.partial(base.forward, self), arguments, named)
        slot = self._modules.get(SLOT)
        return output if slot is None or slot.idle else slot(output)

    def reduce(self: nn.Module, protocol: int) -> Any:  # noqa: ANN401 - pickle's own protocol
        # The class has no name that another process could import it by.
        return _new_grafted, (base,), *object.__reduce_ex__(self, protocol)[2:]

    body = {
        "forward": forward,
        "__reduce_ex__": reduce,
        "_esper_base": base,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    _grafted[base] = type(base.__name__, (base,), body)
    return _grafted[base]


def _new_grafted(base: type[nn.Module]) -> nn.Module:
    grafted = _grafted_class(base)
    return grafted.__new__(grafted)
