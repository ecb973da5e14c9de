"""Where the model and its batches live."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper.leyline import ConfigError


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
    return lambda content: _move(content, device)


def _stay(content: Any) -> Any:  # noqa: ANN401 - the user's batch
    return content


def _move(content: Any, device: torch.device) -> Any:  # noqa: ANN401 - the user's batch
    if isinstance(content, Tensor):
        return content.to(device, non_blocking=True)
    if isinstance(content, dict):
        return {key: _move(value, device) for key, value in content.items()}
    if isinstance(content, list):
        return [_move(value, device) for value in content]
    if isinstance(content, tuple):
        moved = [_move(value, device) for value in content]
        return type(content)(*moved) if hasattr(content, "_fields") else tuple(moved)
    return content
