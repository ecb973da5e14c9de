"""Where the model and its batches live."""

from collections.abc import Callable
from typing import Any

import torch

from esper.leyline import ConfigError
from esper.tolaria.batch_tree import map_tensors


def resolve_device(name: str) -> torch.device:
    """Return the device of a configured name.

    :param name: a torch device, or ``auto`` for CUDA when there is one and the CPU otherwise.
    :raises ConfigError: torch does not know the name, or has no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(
            f"train.device is {name!r}, which is not available here ({first_line}); "
            "give cpu, or auto"
        ) from error
    return device


def placer(device: torch.device) -> Callable[[Any], Any]:
    """Return a function that moves the tensors of a batch to a device; on a CPU it does nothing."""
    if device.type == "cpu":
        return _stay
    return lambda content: map_tensors(content, lambda t: t.to(device, non_blocking=True))


def _stay(content: Any) -> Any:  # noqa: ANN401 - the user's batch
    return content
