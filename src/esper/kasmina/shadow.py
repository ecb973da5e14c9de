"""Isolated training: a second forward pass in which only one seed learns.

The host's output at the slot is detached and the seed is added to it, every other parameter is held
constant, and the loss is that of the model: the seed learns to improve what comes after it. Nothing
of this reaches the host: neither its gradients nor its buffers nor its random stream.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.probe import Probe, kept_random
from esper.kasmina.replay import ChangedError, Replay
from esper.kasmina.slot import Passage, Slot
from esper.leyline import GrowthError

Losses = Tensor | Mapping[str, Tensor | None]


class ShadowTraining:
    """Fills the gradients of seeds that train in isolation.

    :param model: the host.
    :param probe: runs it on a sample.
    """

    def __init__(self, model: nn.Module, probe: Probe) -> None:
        self.replay = Replay(probe)
        self._model = model
        self._homes: list[tuple[dict[str, Any], str]] = []
        self._spare: list[Tensor] = []
        self.refresh()

    def refresh(self) -> None:
        """Look the buffers up again; needed after the model's structure has changed."""
        self._homes = []
        seen: set[int] = set()
        for module in self._model.modules():
            if isinstance(module, Slot):
                continue
            for key, buffer in module._buffers.items():
                if isinstance(buffer, Tensor) and id(buffer) not in seen:
                    seen.add(id(buffer))
                    self._homes.append((module._buffers, key))
        self._spare = []

    def train(
        self, slot: Slot, loss: Callable[[], Losses], scale: Callable[[Tensor], Tensor]
    ) -> bool:
        """Compute the gradients of one seed.

        :param loss: runs the model on the batch of this step and returns the losses.
        :param scale: applied to the loss before the backward pass, as for the host.
        :returns: False when a gradient is not finite; then none is left.
        """
        own = slot.own_parameters()
        with self._apart(slot):
            total = scale(total_of(self._again(slot, loss)))
            if not total.requires_grad:
                raise GrowthError(f"the loss does not depend on the output of slot {slot.name!r}")
            gradients: Sequence[Tensor | None] = torch.autograd.grad(total, own, allow_unused=True)
        found = [gradient for gradient in gradients if gradient is not None]
        norms = torch.stack(torch._foreach_norm(found)) if found else torch.zeros(1)
        if not bool(torch.isfinite(norms).all()):
            return False
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient
        return True

    def _again(self, slot: Slot, loss: Callable[[], Losses]) -> Losses:
        """Run the model once more, but for what comes before the slot where that is known."""
        try:
            with self.replay.replayed(slot.name):
                return loss()
        except ChangedError:
            return loss()

    @contextmanager
    def _apart(self, slot: Slot) -> Iterator[None]:
        own = {id(parameter) for parameter in slot.own_parameters()}
        held = [p for p in self._model.parameters() if p.requires_grad and id(p) not in own]
        try:
            for parameter in held:
                parameter.requires_grad_(False)
            with kept_random(), self._spare_buffers(), slot.passing(Passage.SHADOW):
                yield
        finally:
            for parameter in held:
                parameter.requires_grad_(True)

    @contextmanager
    def _spare_buffers(self) -> Iterator[None]:
        """Let the forward pass read and write copies of the host's buffers."""
        live = [home[key] for home, key in self._homes]
        if [t.shape for t in self._spare] != [t.shape for t in live]:
            self._spare = [torch.empty_like(tensor) for tensor in live]
        if live:
            torch._foreach_copy_(self._spare, live)
        try:
            for (home, key), spare in zip(self._homes, self._spare, strict=True):
                home[key] = spare
            yield
        finally:
            for (home, key), tensor in zip(self._homes, live, strict=True):
                home[key] = tensor


def total_of(losses: Losses) -> Tensor:
    """Return the sum of the losses, those of absent tasks left out.

    :raises GrowthError: there is none.
    """
    if isinstance(losses, Tensor):
        return losses
    present = [loss.reshape(()) for loss in losses.values() if loss is not None]
    if not present:
        raise GrowthError("the loss function returned no loss")
    return torch.stack(present).sum() if len(present) > 1 else present[0]
