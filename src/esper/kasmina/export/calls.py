"""How the modules of a model are called in one forward pass, and what each of them then does."""

import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from esper.kasmina.export.constructors import is_as_built
from esper.kasmina.export.nodes import Untraceable
from esper.kasmina.export.sample import Inputs
from esper.kasmina.export.trees import PLAIN, leaves, tensors

_CONSTANTS = (*PLAIN, torch.dtype, torch.device)
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Call:
    """What a module was called with.

    :param signature: of its ``forward``.
    :param symbolic: parameters that tensors were given for.
    :param constants: value of every other parameter that something was given for.
    """

    signature: inspect.Signature
    symbolic: tuple[str, ...]
    constants: dict[str, Any]


class Calls:
    """The calls of all modules in one forward pass.

    :param model: whose modules are listened to.
    :param inputs: what it is called with.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._calls: dict[int, list[Call | str]] = {}
        handles = [
            module.register_forward_pre_hook(self._note, with_kwargs=True)
            for module in model.modules()
        ]
        try:
            model(*inputs.sample.args, **inputs.sample.kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def of(self, module: nn.Module) -> Call | None:
        """Return the one way in which a module is called; None where it is not.

        :raises Untraceable: it is called in several ways, or with something that has no plain form.
        """
        calls = self._calls.get(id(module))
        if calls is None:
            return None
        for call in calls:
            if isinstance(call, str):
                raise Untraceable(f"{type(module).__name__} {call}")
            if call != calls[0]:
                raise Untraceable(f"{type(module).__name__} is called in several ways")
        first = calls[0]
        return first if isinstance(first, Call) else None

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.setdefault(id(module), []).append(_call(module, args, kwargs))


def trace(module: nn.Module, call: Call) -> fx.Graph:
    """Return what a module does in a call, with its own modules as they are.

    :raises Untraceable: its code asks for the values of tensors, or does what fx cannot follow.
    """
    if not is_as_built(module):
        raise Untraceable(f"{type(module).__name__} has hooks, or a forward of its own")
    try:
        return _Tracer(call).trace(module)
    # It is the model's own code that runs here.
    except Exception as error:
        name = type(module).__name__
        raise Untraceable(f"fx cannot follow {name}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


class _Tracer(fx.Tracer):
    """Follows one module; what it calls is taken as given, and constants are built in."""

    # Else a buffer could not be sliced by what is computed.
    proxy_buffer_attributes = True

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: ARG002 - of the base class
        concrete_args: Any = None,  # noqa: ANN401, ARG002
    ) -> tuple[Callable[..., Any], list[Any]]:
        proxies = {
            name: self.create_proxy("placeholder", name, (), {}) for name in self._call.symbolic
        }
        arguments = OrderedDict(
            (name, proxies.get(name, self._call.constants.get(name)))
            for name in self._call.signature.parameters
            if name in proxies or name in self._call.constants
        )
        bound = inspect.BoundArguments(self._call.signature, arguments)
        return partial(root_fn, self.root, *bound.args, **bound.kwargs), []


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | str:
    """Return a call, or why it has no plain form."""
    signature = inspect.signature(module.forward)
    variable = [p.name for p in signature.parameters.values() if p.kind in _VARIABLE]
    if variable:
        return f"takes any number of arguments ({', '.join(variable)})"
    arguments = signature.bind(*args, **kwargs).arguments
    symbolic = tuple(name for name, value in arguments.items() if tensors(value))
    constants = {name: value for name, value in arguments.items() if name not in symbolic}
    if odd := _odd(constants):
        return f"is given {odd}, a {type(constants[odd]).__qualname__}"
    return Call(signature, symbolic, constants)


def _odd(constants: dict[str, Any]) -> str:
    """Return the name of an argument that cannot be written as a constant; empty without one."""
    for name, value in constants.items():
        if not all(isinstance(leaf, _CONSTANTS) for _, leaf in leaves(value)):
            return name
    return ""
