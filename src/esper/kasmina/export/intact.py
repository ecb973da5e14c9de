"""Working with a model, and leaving it as it was found."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Others hold on to these dictionaries: their content is put back, not the dictionary.
_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, without gradients.

    Afterwards it is as before, and so are torch's random generators.
    """
    with unchanged(model), warnings.catch_warnings():
        # They are about the insides of torch's exporters.
        warnings.simplefilter("ignore")
        with torch.random.fork_rng(), torch.no_grad():
            model.eval()
            yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put modes, attributes and the content of buffers back in the end.

    Tracing runs the model's code with stand-ins for tensors, which it may keep.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    registries = [{key: dict(vars(module)[key]) for key in _REGISTRIES} for module in modules]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, own, registered in zip(modules, attributes, registries, strict=True):
            _put_back(module, own, registered)
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)


def on_cpu(model: nn.Module) -> nn.Module:
    """Return the model, or a copy of it on the CPU where a part of it is elsewhere."""
    held = [*model.parameters(), *model.buffers()]
    if all(tensor.device.type == "cpu" for tensor in held):
        return model
    return copy.deepcopy(model).cpu()


def _put_back(
    module: nn.Module, own: dict[str, object], registered: dict[str, dict[str, object]]
) -> None:
    present = vars(module)
    for name in present.keys() - own.keys():
        del present[name]
    present.update(own)
    for key, content in registered.items():
        registry = present[key]
        registry.clear()
        registry.update(content)
