"""The source of ``model.py`` from the modules of a model and a trace of each one's ``forward``."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from esper.kasmina.export.calls import Call, Calls, trace
from esper.kasmina.export.constructors import construction_of, is_as_built
from esper.kasmina.export.layout import Group, Text, docstring, lines_of, literal, prefixed
from esper.kasmina.export.nodes import RESERVED, Expressions, Names, Untraceable
from esper.kasmina.export.places import access, assignment, registration
from esper.kasmina.export.sample import Inputs
from esper.kasmina.export.weights import Weights


@dataclass
class Code:
    """Classes of a generated file.

    :param classes: lines of each class, in order.
    :param name: of the class to build.
    :param constants: tensors that the state dict leaves out, by their place in the model.
    """

    classes: list[list[str]]
    name: str
    constants: dict[str, Tensor] = field(default_factory=dict)


def trace_classes(model: nn.Module, inputs: Inputs, weights: Weights, intro: list[str]) -> Code:
    """Return a class for each kind of module that is none of torch.nn.

    :param intro: what the ``forward`` of the model says of itself, line by line.
    :raises Untraceable: a module does what cannot be written as plain Python.
    """
    return _Writer(model, Calls(model, inputs), weights, intro).write()


class _Writer:
    """Writes each module once, and modules that read alike as one class."""

    def __init__(self, model: nn.Module, calls: Calls, weights: Weights, intro: list[str]) -> None:
        self._model = model
        self._calls = calls
        self._weights = weights
        self._intro = intro
        self._known: dict[int, str] = {}
        self._classes: dict[tuple[str, ...], str] = {}
        self._constants: dict[int, dict[str, Tensor]] = {}

    def write(self) -> Code:
        name = self._root()
        classes = [[f"class {name}{body[0]}", *body[1:]] for body, name in self._classes.items()]
        constants = dict(self._weights.unsaved)
        for path, module in self._model.named_modules(remove_duplicate=False):
            for key, tensor in self._constants.get(id(module), {}).items():
                constants[f"{path}.{key}" if path else key] = tensor
        return Code(classes, name, constants)

    def _root(self) -> str:
        """Write the model itself; one that is a module of torch.nn becomes a subclass of it."""
        model = self._model
        if not is_as_built(model):
            raise Untraceable(f"{type(model).__name__} has hooks, or a forward of its own")
        built = self._construct(model)
        ties = [
            assignment(model, alias, access(model, name))
            for alias, name in self._weights.tied.items()
        ]
        if not isinstance(built, Group):
            return self._define(model, ties, root=True)
        begin = lines_of(Group("super().__init__(", built.items), 2)
        # What follows the call is a cast.
        cast = [f"        self{built.closing[1:]}"] if built.closing != ")" else []
        head = f"({built.opening[:-1]}):"
        body = [head, *docstring(self._intro, 1), "", "    def __init__(self):", *begin, *cast]
        body += [f"        {tie}" for tie in ties]
        return self._named("Model", body)

    def _expression(self, module: nn.Module) -> Text:
        """Return the call that builds a module."""
        built = self._construct(module)
        if built is not None:
            return built
        if id(module) not in self._known:
            self._known[id(module)] = self._define(module, [])
        return f"{self._known[id(module)]}()"

    def _construct(self, module: nn.Module) -> Text | None:
        """Return the call of a class of torch.nn; None where it is not built by one."""
        if _is_container(module):
            return self._contain(module)
        construction = construction_of(module)
        return None if construction is None else construction.text()

    def _contain(self, module: nn.Module) -> Text:
        children = list(module._modules.items())
        items = [self._expression(child) for _, child in children if child is not None]
        if isinstance(module, nn.ModuleList):
            return Group("nn.ModuleList(", [Group("[", items, "]")])
        keys = [name for name, _ in children]
        if isinstance(module, nn.ModuleDict):
            pairs = [prefixed(f"{literal(k)}: ", i) for k, i in zip(keys, items, strict=True)]
            return Group("nn.ModuleDict(", [Group("{", pairs, "}")])
        if keys == [str(index) for index in range(len(keys))]:
            return Group("nn.Sequential(", items)
        named = [Group("(", [literal(k), i]) for k, i in zip(keys, items, strict=True)]
        return Group("nn.Sequential(", [Group("OrderedDict(", [Group("[", [*named], "]")])])

    def _define(self, module: nn.Module, ties: list[str], *, root: bool = False) -> str:
        """Write the class of a module that is none of torch.nn, and return its name."""
        call = self._calls.of(module)
        forward = [] if call is None else self._forward(module, call)
        begin = [*self._registrations(module), *(f"        {tie}" for tie in ties)]
        for name, child in module._modules.items():
            if child is not None:
                at = len(begin) - len(ties)
                begin[at:at] = lines_of(registration(name, self._expression(child)), 2)
        init = ["    def __init__(self):", "        super().__init__()", *begin]
        doc = docstring(self._intro, 1) if root else []
        body = ["(nn.Module):", *([*doc, ""] if doc else []), *init]
        return self._named(type(module).__name__, [*body, *([""] if forward else []), *forward])

    def _named(self, wanted: str, body: list[str]) -> str:
        """Return the name of the class with this body."""
        wanted = re.sub(r"\W", "_", wanted)
        key = tuple(body)
        known = self._classes.get(key)
        if known is not None and known.rstrip("0123456789_") == wanted.rstrip("0123456789_"):
            return known
        taken = {*RESERVED, *self._classes.values()}
        name, number = wanted, 2
        while name in taken:
            name, number = f"{wanted}{number}", number + 1
        self._classes[key] = name
        return name

    def _registrations(self, module: nn.Module) -> list[str]:
        lines = []
        for name, parameter in module._parameters.items():
            if parameter is not None:
                lines += lines_of(_parameter(name, parameter), 2)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                persistent = name not in module._non_persistent_buffers_set
                lines += lines_of(_buffer(name, buffer, persistent=persistent), 2)
        for name, constant in self._constants.get(id(module), {}).items():
            lines += lines_of(_buffer(name, constant, persistent=False), 2)
        return lines

    def _forward(self, module: nn.Module, call: Call) -> list[str]:
        if any(name in RESERVED for name in call.symbolic):
            raise Untraceable(f"forward of {type(module).__name__} has a parameter with a bad name")
        graph = trace(module, call)
        names = Names(call.symbolic)
        writer = Expressions(names)
        lines: list[str] = []
        returned: fx.Node | None = None
        for node in graph.nodes:
            if node.op == "placeholder":
                names.give(node, str(node.target))
            elif node.op == "get_attr":
                names.give(node, self._attribute(module, str(node.target)))
            elif node.op == "output":
                if node.args[0] is not returned:
                    lines += lines_of(prefixed("return ", writer.value(node.args[0])), 2)
            elif not _is_idle(node):
                text = self._operation(module, node, writer)
                returned = node if _is_result(node) else returned
                lines += lines_of(prefixed(_start_of(node, names), text), 2)
        return [*lines_of(Group("def forward(", ["self", *call.symbolic], "):"), 1), *lines]

    def _operation(self, module: nn.Module, node: fx.Node, writer: Expressions) -> Text:
        if node.op == "call_function":
            return writer.function(node)
        if node.op == "call_method":
            return writer.method(node)
        path = str(node.target)
        child = module.get_submodule(path)
        if not self._is_built(child):
            _drop_constants(node, child, self._calls.of(child))
        return writer.call(access(module, path), node)

    def _is_built(self, module: nn.Module) -> bool:
        return _is_container(module) or construction_of(module) is not None

    def _attribute(self, module: nn.Module, path: str) -> str:
        owner_path, _, key = path.rpartition(".")
        owner = module.get_submodule(owner_path)
        value: Any = getattr(owner, key)
        if not isinstance(value, Tensor):
            raise Untraceable(f"{type(module).__name__} uses {path}, a {type(value).__qualname__}")
        if key not in owner._parameters and key not in owner._buffers:
            if owner is not module:
                raise Untraceable(f"{path} of {type(module).__name__} is no buffer")
            self._constants.setdefault(id(module), {})[key] = value.detach()
        return access(module, path)


def _is_container(module: nn.Module) -> bool:
    kinds = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    whole = all(child is not None for child in module._modules.values())
    plain = not module._parameters and not module._buffers
    return type(module) in kinds and whole and plain and is_as_built(module)


def _is_idle(node: fx.Node) -> bool:
    return node.target is getattr and not node.users


def _is_result(node: fx.Node) -> bool:
    """Whether a node is the last one, and its value is what is returned."""
    return node.next.op == "output" and node.next.args[0] is node and len(node.users) == 1


def _drop_constants(node: fx.Node, child: nn.Module, call: Call | None) -> None:
    """Leave out arguments that are built into the class of what is called.

    :raises Untraceable: one of them is computed.
    """
    if call is None:
        raise Untraceable(f"{type(child).__name__} is called in the trace alone")
    bound = call.signature.bind(*node.args, **node.kwargs).arguments
    for name in call.constants:
        if isinstance(bound.get(name), fx.Node):
            raise Untraceable(f"{type(child).__name__} is given a computed {name}")
    node.args = tuple(bound[name] for name in call.symbolic)
    node.kwargs = {}


def _parameter(name: str, parameter: nn.Parameter) -> Text:
    items: list[Text] = [_zeros(parameter)]
    if not (parameter.is_floating_point() or parameter.is_complex()):
        items.append("requires_grad=False")
    call = Group("nn.Parameter(", items)
    if name.isidentifier():
        return prefixed(f"self.{name} = ", call)
    return Group("self.register_parameter(", [literal(name), call])


def _buffer(name: str, buffer: Tensor, *, persistent: bool) -> Text:
    items: list[Text] = [literal(name), _zeros(buffer)]
    return Group("self.register_buffer(", items if persistent else [*items, "persistent=False"])


def _zeros(tensor: Tensor) -> Text:
    shape = literal(tuple(tensor.shape))
    kind = [] if tensor.dtype == torch.float32 else [f"dtype={tensor.dtype}"]
    return Group("torch.zeros(", [shape, *kind])


def _start_of(node: fx.Node, names: Names) -> str:
    if _is_result(node):
        return "return "
    return f"{names.of(node)} = " if node.users else ""
