"""``torch.compile`` for a growing model: block by block, so that growth recompiles one of them.

A model that is compiled as a whole is compiled anew at every growth, and after eight times torch
gives up and runs it eagerly, with no more than a line in a log.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from esper.kasmina.attach import module_at

Backend = Callable[[torch.fx.GraphModule, list[torch.Tensor]], Callable[..., Any]]


class CompiledBlocks:
    """Compiles modules of a model each on its own, and counts how often.

    :param model: the host.
    :param names: of the modules to compile, such as ``layers.0``; none may contain another.
    :param backend: of ``torch.compile``, by name.
    :raises GrowthError: there is no such module.
    :ivar compilations: graphs that were compiled, by block; the first one of each included.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], backend: str = "inductor") -> None:
        self.compilations: Counter[str] = Counter()
        self._model = model
        self._names = list(names)
        self._backend = backend
        self.refresh()

    def refresh(self) -> None:
        """Compile what is not compiled: at first all, later what growth has put in its place."""
        for name in self._names:
            module = module_at(self._model, name)
            if module._compiled_call_impl is None:
                call = torch.compile(_frame_of(module), backend=self._counting(name))
                module._compiled_call_impl = call

    @property
    def recompilations(self) -> int:
        """Compilations beyond the first one of each block."""
        return sum(count - 1 for count in self.compilations.values())

    @property
    def exhausted(self) -> list[str]:
        """Blocks that torch may run eagerly from now on: they were compiled too often."""
        limit = torch._dynamo.config.recompile_limit
        return [name for name, count in self.compilations.items() if count >= limit]

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        return {
            "kasmina.recompilations_total": float(self.recompilations),
            "kasmina.blocks_exhausted": float(len(self.exhausted)),
        }

    def _counting(self, name: str) -> Backend:
        inner: Backend = torch._dynamo.lookup_backend(self._backend)

        def compile_graph(
            graph: torch.fx.GraphModule, inputs: list[torch.Tensor]
        ) -> Callable[..., Any]:
            self.compilations[name] += 1
            return inner(graph, inputs)

        return compile_graph


def _frame_of(module: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a module, with a code object of its own.

    ``module.compile()`` compiles nothing of a plain ``nn.Sequential``: torch does not begin at
    frames of its own. And how often something may be compiled is counted by code object.
    """

    def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        return module._call_impl(*arguments, **named)  # type: ignore[no-untyped-call]

    return FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
