"""The file ``architecture.json``: what a model is made of."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.export.constructors import attributes_of, construction_of
from esper.kasmina.export.sample import Inputs
from esper.kasmina.export.trees import describe, dtype_name
from esper.kasmina.export.weights import Weights
from esper.leyline import GrowthError

ARCHITECTURE = "architecture.json"


def describe_model(
    model: nn.Module,
    weights: Weights,
    inputs: Inputs,
    outputs: Any,  # noqa: ANN401
    batch: int | None,
) -> dict[str, Any]:
    """Return modules, tensors, inputs and outputs of a model, of JSON types.

    :param outputs: of the sample.
    :param batch: of the sample; None when it cannot change.
    """
    parameters = {n: t for n, t in weights.saved.items() if n in weights.parameters}
    trainable = sum(t.numel() for n, t in parameters.items() if weights.parameters[n].requires_grad)
    return {
        "format": 1,
        "class": _class_name(model),
        "torch": str(torch.__version__),
        "parameters": {"total": weights.total, "trainable": trainable},
        "inputs": describe(inputs.given, batch),
        "built_in": {name: _readable(value) for name, value in inputs.built_in.items()},
        "outputs": describe(outputs, batch),
        "tied": weights.tied,
        "modules": [
            _describe_module(path, module)
            for path, module in model.named_modules(remove_duplicate=False)
        ],
    }


def encode(value: Mapping[str, Any]) -> str:
    """Return JSON for people.

    :raises GrowthError: something is of no JSON type.
    """
    try:
        return json.dumps(value, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise GrowthError(
            f"the metadata cannot be written as JSON: {error}; give texts, finite numbers, lists "
            "and dicts"
        ) from error


def _describe_module(path: str, module: nn.Module) -> dict[str, Any]:
    construction = construction_of(module)
    known = {} if construction is None else {"arguments": construction.facts()}
    attributes = {name: _readable(value) for name, value in attributes_of(module).items()}
    return {
        "path": path,
        "class": _class_name(module),
        **(known or {"attributes": attributes}),
        "parameters": _tensors(module._parameters),
        "buffers": _tensors(module._buffers),
    }


def _tensors(registry: Mapping[str, Tensor | None]) -> dict[str, Any]:
    return {
        name: {"shape": list(tensor.shape), "dtype": dtype_name(tensor)}
        for name, tensor in registry.items()
        if tensor is not None
    }


def _class_name(module: nn.Module) -> str:
    cls = type(module)
    home = "torch.nn" if getattr(nn, cls.__name__, None) is cls else cls.__module__
    return f"{home}.{cls.__qualname__}"


def _readable(value: Any) -> Any:  # noqa: ANN401
    """Return a value of a JSON type, or its text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return repr(value)
    return value
