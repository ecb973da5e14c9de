"""A model as a program of ``torch.export``: with a batch of any size where that can be."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from esper.kasmina.export.calls import first_line
from esper.kasmina.export.comparison import Reference
from esper.kasmina.export.intact import unchanged
from esper.kasmina.export.report import Batch
from esper.kasmina.export.sample import Inputs
from esper.kasmina.export.trees import leaves, map_leaves
from esper.leyline import GrowthError


@dataclass(frozen=True)
class Program:
    """A program and the batches that it takes.

    :param exported: the program.
    :param batch: whether batches of other sizes than the sample's may be given.
    :param note: why they may not.
    """

    exported: ExportedProgram
    batch: Batch
    note: str = ""


def export_program(model: nn.Module, reference: Reference) -> Program:
    """Export a model, and check it against the model itself.

    :raises GrowthError: torch cannot export it, or what it exports gives other outputs.
    """
    problem = reference.fixed
    for dimension in _dimensions() if reference.dynamic else ():
        try:
            exported = _export(model, reference.inputs, dimension)
            reference.check(_caller(exported), dynamic=True, what="torch.export")
        # It is the model's own code that runs here, and torch has many errors for it.
        except Exception as error:  # noqa: BLE001
            problem = problem or first_line(error)
            continue
        return Program(exported, "dynamic")
    try:
        exported = _export(model, reference.inputs, None)
    except Exception as error:
        raise GrowthError(
            f"torch.export cannot follow {type(model).__name__}: {first_line(error)}; where its "
            "code asks for the values of tensors, use torch.where"
        ) from error
    reference.check(_caller(exported), dynamic=False, what="torch.export")
    return Program(exported, "static", problem)


def _dimensions() -> Iterator[Any]:
    yield Dim("batch")
    yield Dim.DYNAMIC


def _export(model: nn.Module, inputs: Inputs, dimension: Any) -> ExportedProgram:  # noqa: ANN401
    size = inputs.batch
    shapes = None
    if dimension is not None:
        # A dimension of one is never taken for dynamic.
        inputs = inputs.resized(2) if size == 1 else inputs
        size = inputs.batch
        shapes = map_leaves(inputs.arguments, lambda leaf: _shape(leaf, size, dimension))
    sample = inputs.sample
    with unchanged(model):
        return torch.export.export(
            model, sample.args, sample.kwargs, dynamic_shapes=shapes, strict=False
        )


def _shape(leaf: Any, size: int | None, dimension: Any) -> dict[int, Any] | None:  # noqa: ANN401
    if not isinstance(leaf, Tensor):
        return None
    return {0: dimension} if leaf.dim() and leaf.shape[0] == size else {}


def _caller(exported: ExportedProgram) -> Any:  # noqa: ANN401
    module = exported.module()
    return lambda inputs: module(*inputs.sample.args, **inputs.sample.kwargs)


def output_names(outputs: Any, taken: set[str]) -> list[str]:  # noqa: ANN401 - any tree
    """Return a name for each tensor of a model's outputs: its keys, or ``output`` and a number.

    :param taken: names that are not free.
    """
    found: list[str] = []
    base = "" if isinstance(outputs, dict) else "output"
    for name, leaf in leaves(outputs, base):
        if isinstance(leaf, Tensor):
            found.append(f"output_{name}" if name in {*taken, *found} else name)
    return found
