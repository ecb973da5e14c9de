"""From the operations of a traced graph to lines of Python."""

import builtins
import keyword
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from esper.kasmina.export.layout import Group, Text, flat, literal, prefixed

# What the generated file has other uses for.
RESERVED = {"self", "nn", "torch", "functional", "operator", "math", "aten", "load", "Path"}
RESERVED |= {"OrderedDict", "load_file", *keyword.kwlist, *dir(builtins)}
_INFIX: dict[Callable[..., Any], str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.matmul: "@",
    operator.and_: "&",
    operator.or_: "|",
    operator.xor: "^",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
_PREFIX: dict[Callable[..., Any], str] = {operator.neg: "-", operator.invert: "~"}
_HOMES = (
    ("torch", torch),
    ("functional", torch.nn.functional),
    ("operator", operator),
    ("math", math),
    ("", builtins),
    ("torch.linalg", torch.linalg),
    ("torch.special", torch.special),
    ("torch.fft", torch.fft),
    ("torch._C._nn", torch._C._nn),
)
_TORCH_VALUES = (torch.dtype, torch.memory_format, torch.layout)
_OPERATORS = ("aten", "prims")
# It says where a warning points to.
_LEFT_OUT = {"_stacklevel"}


class Untraceable(Exception):  # noqa: N818 - the next way is tried, so it is no error
    """Something cannot be written as plain Python; the message says what."""


class Names:
    """Gives each value a name of its own.

    :param taken: names that are not free.
    """

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = {*RESERVED, *taken}
        self._names: dict[fx.Node, str] = {}

    def of(self, node: fx.Node) -> str:
        """Return the name of a node's value."""
        if node not in self._names:
            name, number = node.name, 1
            while name in self._taken:
                name, number = f"{node.name}_{number}", number + 1
            self._taken.add(name)
            self._names[node] = name
        return self._names[node]

    def give(self, node: fx.Node, text: str) -> None:
        """Have a node's value written so wherever it is used."""
        self._names[node] = text


class Expressions:
    """Writes operations and their arguments.

    :param names: of the values.
    """

    def __init__(self, names: Names) -> None:
        self._names = names

    def function(self, node: fx.Node) -> Text:
        """Return a call of a function.

        :raises Untraceable: it is none of torch, or of Python's own.
        """
        target: Any = node.target
        short = None if node.kwargs else self._operator(target, node.args)
        return self.call(name_of(target), node) if short is None else short

    def method(self, node: fx.Node) -> Text:
        """Return a call of a tensor's method."""
        owner = flat(self.value(node.args[0]))
        return Group(f"{owner}.{node.target}(", self._arguments(node.args[1:], node.kwargs))

    def call(self, name: str, node: fx.Node) -> Text:
        """Return a call of something that has a name."""
        return Group(f"{name}(", self._arguments(node.args, node.kwargs))

    def value(self, argument: Any) -> Text:  # noqa: ANN401 - any argument of fx
        """Return an argument.

        :raises Untraceable: it has no plain form.
        """
        if isinstance(argument, fx.Node):
            return self._names.of(argument)
        if isinstance(argument, tuple | list | dict):
            return self._nested(argument)
        if isinstance(argument, slice):
            parts = (argument.start, argument.stop, argument.step)
            return Group("slice(", [self.value(part) for part in parts])
        if isinstance(argument, _TORCH_VALUES):
            return str(argument)
        if isinstance(argument, torch.device):
            return f'torch.device("{argument}")'
        if argument is Ellipsis:
            return "..."
        if argument is None or type(argument) in (bool, int, float, str, complex):
            return literal(argument)
        raise Untraceable(f"a {type(argument).__qualname__} is among the arguments")

    def _nested(self, argument: Any) -> Text:  # noqa: ANN401
        if type(argument) is dict or isinstance(argument, fx.immutable_collections.immutable_dict):
            pairs = argument.items()
            return Group("{", [prefixed(f"{literal(k)}: ", self.value(v)) for k, v in pairs], "}")
        items = [self.value(item) for item in argument]
        if isinstance(argument, list):
            return Group("[", items, "]")
        if isinstance(argument, torch.Size) or type(argument) is tuple:
            return Group("(", items, ",)" if len(items) == 1 else ")")
        raise Untraceable(f"a {type(argument).__qualname__} is among the values")

    def _arguments(self, args: Iterable[Any], kwargs: dict[str, Any]) -> list[Text]:
        named = [
            prefixed(f"{name}=", self.value(value))
            for name, value in kwargs.items()
            if name not in _LEFT_OUT
        ]
        return [*(self.value(argument) for argument in args), *named]

    def _operator(self, target: Any, args: tuple[Any, ...]) -> Text | None:  # noqa: ANN401
        if target in _INFIX and len(args) == 2:
            first, second = map(self._operand, args)
            sign = _INFIX[target]
            return f"{first}{sign}{second}" if sign == "**" else f"{first} {sign} {second}"
        if target in _PREFIX and len(args) == 1:
            return f"{_PREFIX[target]}{self._operand(args[0])}"
        if target is getattr and len(args) == 2 and str(args[1]).isidentifier():
            return f"{self._operand(args[0])}.{args[1]}"
        if target is operator.getitem:
            return f"{self._operand(args[0])}[{self._index(args[1])}]"
        return None

    def _operand(self, argument: Any) -> str:  # noqa: ANN401
        text = flat(self.value(argument))
        return f"({text})" if text.startswith("-") else text

    def _index(self, index: Any) -> str:  # noqa: ANN401
        if isinstance(index, slice):
            start, stop, step = (
                "" if part is None else flat(self.value(part))
                for part in (index.start, index.stop, index.step)
            )
            return f"{start}:{stop}" + (f":{step}" if step else "")
        if type(index) is tuple and index:
            return ", ".join(map(self._index, index)) + ("," if len(index) == 1 else "")
        return flat(self.value(index))


def name_of(function: Any) -> str:  # noqa: ANN401 - any callable
    """Return how a function is written in the generated file.

    :raises Untraceable: it is not one that everybody has who has torch.
    """
    if isinstance(function, torch._ops.OpOverload):
        if function.namespace not in _OPERATORS:
            raise Untraceable(f"{function} is no operator of torch itself")
        name = str(function)
        return name if function.namespace == "aten" else f"torch.ops.{name}"
    name = getattr(function, "__name__", "")
    for home, module in _HOMES:
        if name and getattr(module, name, None) is function:
            return f"{home}.{name}" if home else name
    raise Untraceable(f"{name or function} is no function of torch itself")
