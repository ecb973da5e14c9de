"""The file ``model.py``: a model that needs torch and safetensors, and nothing else."""

import importlib.util
import re
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from esper.kasmina.export.calls import first_line
from esper.kasmina.export.layout import Group, docstring, lines_of, literal, prefixed
from esper.kasmina.export.sample import Inputs
from esper.kasmina.export.traced import Code
from esper.kasmina.export.trees import brief
from esper.kasmina.export.weights import Weights
from esper.leyline import GrowthError

MODEL = "model.py"
WEIGHTS = "model.safetensors"
CONSTANTS = "constants.safetensors"


def introduction(model: nn.Module, inputs: Inputs, outputs: Any, batch: int | None) -> list[str]:  # noqa: ANN401
    """Return what the model's class says of itself, line by line.

    :param batch: of the sample; None when it cannot change.
    """
    name = type(model).__name__
    lines = [f"{name} in evaluation mode.", "", "Inputs:"]
    lines += [f"    {key}: {brief(value, batch)}" for key, value in inputs.given.items()]
    lines += ["", "Returns:", f"    {brief(outputs, batch)}"]
    if inputs.built_in:
        built_in = ", ".join(f"{key}={value!r}" for key, value in inputs.built_in.items())
        lines += ["", f"Built in: {built_in}"]
    return [line.replace("\\", "\\\\").replace('"""', "'''") for line in lines]


def render(code: Code, inputs: Inputs, weights: Weights, *, readable: bool) -> str:
    """Return the text of the file.

    :param readable: whether it names modules, instead of operations.
    """
    arguments = ", ".join(inputs.given)
    origin = (
        "The file was generated from the model's modules."
        if readable
        else "The file was generated from the operations that torch.export has recorded."
    )
    head = [
        f"{code.name}: a trained model as plain PyTorch.",
        "",
        "It needs torch and safetensors, and nothing else.",
        "",
        "    from model import load",
        "",
        f"    model = load()  # with the weights of {WEIGHTS}, in evaluation mode",
        f"    outputs = model({arguments})",
        "",
        origin,
        "architecture.json describes it.",
    ]
    parts = [*code.classes[:-1], _tied(weights), code.classes[-1], _load(code, weights)]
    body = "\n\n\n".join("\n".join(part) for part in parts if part)
    # A table stands apart from the next one by a single line or by two, as a function does.
    return "\n".join([*docstring(head, 0), "", *_imports(body), "", *_gap(body), body, ""])


def load_generated(directory: Path) -> nn.Module:
    """Import the ``model.py`` of a directory and load its model.

    :raises GrowthError: it cannot be imported or loaded.
    """
    try:
        module = _import(directory / MODEL)
        model: nn.Module = module.load(directory)
    # What was generated runs for the first time here.
    except Exception as error:
        raise GrowthError(f"the generated {MODEL} does not load: {first_line(error)}") from error
    return model


class _Loader(SourceFileLoader):
    """Leaves no compiled file behind."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:  # noqa: ANN401
        """Keep nothing."""


def _import(file: Path) -> ModuleType:
    loader = _Loader("esper_exported_model", str(file))
    spec = importlib.util.spec_from_file_location(loader.name, file, loader=loader)
    if not isinstance(spec, ModuleSpec):
        raise ImportError(f"{file} is no module")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _imports(body: str) -> list[str]:
    def used(name: str) -> bool:
        return re.search(rf"(?<![\w.\"]){name}\b", body) is not None

    standard = [f"import {name}" for name in ("math", "operator") if used(rf"{name}\.")]
    standard += ["from collections import OrderedDict"] if used("OrderedDict") else []
    standard += ["from pathlib import Path"]
    others = ["import torch"] if used(r"torch\.") else []
    others += ["from safetensors.torch import load_file", "from torch import nn"]
    others += ["from torch.nn import functional"] if used(r"functional\.") else []
    aten = ["", "aten = torch.ops.aten"] if used(r"aten\.") else []
    others += ["import torch"] if aten and "import torch" not in others else []
    return [*standard, "", *sorted(others, key=_order), *aten]


def _order(line: str) -> tuple[bool, str]:
    return line.startswith("from"), line


def _gap(body: str) -> list[str]:
    return [""] if body.startswith(("class", "def")) else []


def _tied(weights: Weights) -> list[str]:
    if not weights.tied:
        return []
    items = [prefixed(f"{literal(a)}: ", literal(n)) for a, n in weights.tied.items()]
    return lines_of(Group("TIED = {", [*items], "}"))


def _load(code: Code, weights: Weights) -> list[str]:
    lines = [
        "def load(directory=None):",
        *docstring(
            [
                "Return the model with its weights, in evaluation mode.",
                "",
                "directory: where the weights are; by default, where this file is.",
            ],
            1,
        ),
        "    folder = Path(__file__).parent if directory is None else Path(directory)",
        f"    weights = load_file(folder / {literal(WEIGHTS)})",
    ]
    if weights.tied:
        lines += ["    for alias, name in TIED.items():", "        weights[alias] = weights[name]"]
    lines += [f"    model = {code.name}()", "    model.load_state_dict(weights, strict=True)"]
    if code.constants:
        lines += [
            f"    for name, value in load_file(folder / {literal(CONSTANTS)}).items():",
            "        model.get_buffer(name).copy_(value)",
        ]
    return [*lines, "    return model.eval()"]
