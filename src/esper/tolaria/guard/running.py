"""Running statistics of normalisation layers: a forward pass changes them, skipped or not."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """Remembers the running means and variances from before a forward pass.

    Refusing an update keeps a bad batch from the parameters only: its forward pass has already
    entered these buffers, where a value that is not finite would stay for ever.

    :param model: whose batch and instance normalisation layers are meant.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._live: list[Tensor] = []
        self._kept: list[Tensor] = []
        self.refresh()

    def refresh(self) -> None:
        """Look the layers up again and remember their statistics."""
        self._live = [
            buffer
            for module in self._model.modules()
            if isinstance(module, _NormBase)
            for buffer in (module.running_mean, module.running_var, module.num_batches_tracked)
            if buffer is not None
        ]
        self._kept = [buffer.clone() for buffer in self._live]

    def remember(self) -> None:
        """Before a forward pass: keep the statistics as they are."""
        if self._live:
            with torch.no_grad():
                torch._foreach_copy_(self._kept, self._live)

    def put_back(self) -> None:
        """Undo what the forward pass since :meth:`remember` has done to them."""
        if self._live:
            with torch.no_grad():
                torch._foreach_copy_(self._live, self._kept)
