"""The source of ``model.py`` from the operations that ``torch.export`` has recorded."""

import re
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from esper.kasmina.export.layout import Group, Text, docstring, lines_of, literal, prefixed
from esper.kasmina.export.nodes import RESERVED, Expressions, Names, Untraceable
from esper.kasmina.export.sample import Inputs
from esper.kasmina.export.traced import Code
from esper.kasmina.export.trees import dtype_name
from esper.kasmina.export.weights import Weights

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_GETTERS = {InputKind.PARAMETER: "get_parameter"}
_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size"}
_HELPER = '''\
def _home(module, name):
    """Return the module that holds a tensor, made where it is missing, and its key."""
    *path, key = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]
    return module, key'''
_INIT = """\
    def __init__(self):
        super().__init__()
        for name, (shape, dtype) in PARAMETERS.items():
            home, key = _home(self, name)
            tensor = torch.zeros(shape, dtype=dtype)
            trainable = dtype.is_floating_point or dtype.is_complex
            home.register_parameter(key, nn.Parameter(tensor, requires_grad=trainable))
        for name, (shape, dtype, persistent) in BUFFERS.items():
            home, key = _home(self, name)
            tensor = torch.zeros(shape, dtype=dtype)
            home.register_buffer(key, tensor, persistent=persistent)"""
_TIES = """\
        for alias, name in TIED.items():
            (home, key), (first, first_key) = _home(self, alias), _home(self, name)
            setattr(home, key, getattr(first, first_key))"""


def operations_class(
    program: ExportedProgram,
    name: str,
    inputs: Inputs,
    outputs: Any,  # noqa: ANN401 - any tree
    weights: Weights,
    intro: list[str],
) -> Code:
    """Return one class whose ``forward`` is the recorded operations.

    :param name: of the class.
    :param inputs: of the sample.
    :param outputs: of the sample; their structure is given back.
    :param intro: what the class says of itself, line by line.
    :raises Untraceable: an operation is none of torch's own, or the program changes its inputs.
    """
    specs = program.graph_signature.input_specs
    nodes = list(program.graph.nodes)
    constants = _constants(program, weights)
    names = Names(inputs.given)
    unpacking = _bind(nodes, specs, names, inputs)
    writer = Expressions(names)
    body = [*unpacking, *_operations(nodes, names, writer)]
    _check_outputs(program)
    results = iter(nodes[-1].args[0])
    body += lines_of(prefixed("return ", _rebuilt(outputs, results, writer)), 2)
    if next(results, None) is not None:
        raise Untraceable("torch.export returns more than the model")
    wanted = re.sub(r"\W", "_", name)
    wanted = f"{wanted}Model" if wanted in RESERVED else wanted
    head = lines_of(Group("def forward(", ["self", *inputs.given], "):"), 1)
    lines = [f"class {wanted}(nn.Module):", *docstring(intro, 1), "", *_INIT.splitlines()]
    lines += _TIES.splitlines() if weights.tied else []
    tables = _tables(weights, constants)
    return Code([*tables, _HELPER.splitlines(), [*lines, "", *head, *body]], wanted, constants)


def _constants(program: ExportedProgram, weights: Weights) -> dict[str, Tensor]:
    found = dict(weights.unsaved)
    for name, value in program.constants.items():
        if not isinstance(value, Tensor):
            raise Untraceable(f"{name} is a {type(value).__qualname__}")
        found[name] = value.detach()
    return found


def _bind(nodes: list[fx.Node], specs: list[InputSpec], names: Names, inputs: Inputs) -> list[str]:
    """Say how each placeholder is written; return the lines that take nested inputs apart."""
    placeholders = [node for node in nodes if node.op == "placeholder"]
    paths = [pair for name, value in inputs.named.items() for pair in _paths(value, name)]
    users = iter(paths)
    lines = []
    for node, spec in zip(placeholders, specs, strict=True):
        if spec.kind in _HELD:
            lines += _fetch(node, spec, names)
        elif spec.kind is InputKind.USER_INPUT:
            path = next(users, None)
            if path is None:
                raise Untraceable("torch.export takes more inputs than the model is given")
            names.give(node, path)
        else:
            raise Untraceable(f"torch.export has an input of kind {spec.kind.name}")
    if next(users, None) is not None:
        raise Untraceable("torch.export takes fewer inputs than the model is given")
    return lines


def _fetch(node: fx.Node, spec: InputSpec, names: Names) -> list[str]:
    """Return the lines that take a parameter or buffer from the module, where it is used."""
    if not node.users:
        return []
    getter = _GETTERS.get(spec.kind, "get_buffer")
    return lines_of(Group(f"{names.of(node)} = self.{getter}(", [literal(spec.target)]), 2)


def _paths(value: Any, text: str) -> list[str]:  # noqa: ANN401 - any tree
    """Return the expression for each leaf of an argument."""
    if isinstance(value, dict):
        return [p for key, part in value.items() for p in _paths(part, f"{text}[{literal(key)}]")]
    if isinstance(value, list | tuple):
        return [p for i, part in enumerate(value) for p in _paths(part, f"{text}[{i}]")]
    return [text]


def _operations(nodes: list[fx.Node], names: Names, writer: Expressions) -> list[str]:
    lines = []
    for node in nodes:
        if node.op == "call_function":
            target: Any = node.target
            if getattr(target, "_opname", "") in _CHECKS and not node.users:
                continue
            text = prefixed(f"{names.of(node)} = " if node.users else "", writer.function(node))
            lines += lines_of(text, 2)
        elif node.op not in ("placeholder", "output"):
            raise Untraceable(f"torch.export has an operation of kind {node.op}: {node.target}")
    return lines


def _check_outputs(program: ExportedProgram) -> None:
    for spec in program.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise Untraceable(f"torch.export has an output of kind {spec.kind.name}")


def _rebuilt(tree: Any, results: Any, writer: Expressions) -> Text:  # noqa: ANN401
    if isinstance(tree, dict):
        items = [
            prefixed(f"{literal(key)}: ", _rebuilt(value, results, writer))
            for key, value in tree.items()
        ]
        return Group("{", items, "}")
    if isinstance(tree, list | tuple):
        items = [_rebuilt(value, results, writer) for value in tree]
        if isinstance(tree, list):
            return Group("[", items, "]")
        return Group("(", items, ",)" if len(items) == 1 else ")")
    return writer.value(next(results))


def _tables(weights: Weights, constants: dict[str, Tensor]) -> list[list[str]]:
    parameters = {n: [_shape(t), _dtype(t)] for n, t in weights.parameters.items()}
    buffers = {n: [_shape(t), _dtype(t), "True"] for n, t in weights.persistent.items()}
    buffers |= {n: [_shape(t), _dtype(t), "False"] for n, t in constants.items()}
    lines = [*_table("PARAMETERS", parameters), *_table("BUFFERS", buffers)]
    return [lines]


def _table(name: str, rows: dict[str, list[str]]) -> list[str]:
    items: list[Text] = [prefixed(f"{literal(k)}: ", Group("(", [*v])) for k, v in rows.items()]
    return lines_of(Group(f"{name} = {{", items, "}"))


def _shape(tensor: Tensor) -> str:
    return literal(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return f"torch.{dtype_name(tensor)}"
