"""Watches every operation of a step, both ways, and names the first that goes wrong.

Operations are those that reach a device: torch hands each to a dispatch mode, below autograd. In
the forward pass the module is the innermost one under way. In the backward pass an operation
belongs to an autograd node; the node's number tells in which module, and during which operation, it
was made.
"""

import bisect
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper.tolaria.incident.ranges import Baseline, Place, Range, can_measure, range_of, rms_of
from esper.tolaria.incident.trace import Trace, memory_of

OUTSIDE = "(loss function)"
_COMBINING = "(gradients)"
# Their memory is not written yet: whatever lies there is no result.
_UNWRITTEN = ("empty", "new_empty", "resize", "set_")
_NO_NODE = 2**63


@dataclass(frozen=True)
class Finding:
    """The first operation of its kind.

    :param kind: ``not finite`` or ``out of trend``.
    :param phase: ``forward`` or ``backward``.
    :param module: path of the module; the loss function and the combination of gradients are named
        in parentheses, the model itself by its class.
    :param operation: name of the operation, such as ``aten.addmm``.
    :param forward: for the backward pass, the operation whose gradient this is.
    :param number: how many operations of the step came before it.
    :param inputs: ranges of what went in.
    :param output: range of what came out.
    :param usual: lowest and highest root mean square of it in the steps before, when known.
    """

    kind: str
    phase: str
    module: str
    operation: str
    forward: str
    number: int
    inputs: tuple[Range, ...]
    output: Range
    usual: tuple[float, float] | None


@dataclass(frozen=True)
class _Call:
    """An operation with what it was given.

    :param inputs: ranges of what it was given, where it has changed that.
    :param parents: who wrote what of it is not finite.
    """

    operation: str
    given: tuple[Any, Any]
    inputs: tuple[Range, ...] | None
    parents: tuple[int, ...]


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one step.

    :param model: whose modules are named.
    :param baseline: what is usual.
    :param doubtful: whether the guard doubted the step. In another one, values that are not finite
        belong there, and only what is far out of the trend is remarked on.
    :ivar not_finite: the first output that is not finite and does harm.
    :ivar out_of_trend: the first output that breaks the trend.
    :ivar values: root mean square of each output, by its place.
    """

    def __init__(self, model: nn.Module, baseline: Baseline, *, doubtful: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.not_finite: Finding | None = None
        self.out_of_trend: Finding | None = None
        self.operations = 0
        self.values: list[tuple[Place, float]] = []
        self._baseline = baseline
        self._doubtful = doubtful
        self._trace = Trace()
        self._origins: dict[int, Finding] = {}
        root = type(model).__name__
        self._paths = {id(module): path or root for path, module in model.named_modules()}
        self._names = {memory_of(p): name for name, p in model.named_parameters()}
        self._names |= {memory_of(b): name for name, b in model.named_buffers()}
        self._stack = [OUTSIDE]
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._phase = "forward"
        # Where the numbers of autograd's nodes begin that belong to a module and an operation.
        self._starts: list[int] = [torch._C._autograd._get_sequence_nr()]
        self._makers: list[tuple[str, str]] = []

    @contextmanager
    def watching(self, batch: Sequence[tuple[str, Tensor]]) -> Iterator[None]:
        """Watch what happens meanwhile.

        :param batch: name and tensor of each part of the batch, to be named in ranges.
        """
        self._names |= {memory_of(tensor): name for name, tensor in batch}
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            with self:
                yield
        finally:
            before.remove()
            after.remove()

    def turn(self) -> None:
        """Note that the backward pass begins."""
        self._note_nodes("")
        self._phase = "backward"

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's signature
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Carry an operation out and look at what it returns."""
        kwargs = kwargs or {}
        operation = str(func.overloadpacket)
        if self._forwards:
            self._note_nodes(operation)
        parents = self._trace.parents((args, kwargs)) if self._doubtful else ()
        changes = func._schema.is_mutable
        # What an operation changes in place cannot be looked at any more afterwards.
        inputs = self._ranges(args, kwargs) if changes and self._doubtful else None
        result = func(*args, **kwargs)
        self.operations += 1
        if not func.is_view and not func._opname.startswith(_UNWRITTEN):
            self._look(_Call(operation, (args, kwargs), inputs, parents), result)
        return result

    def conclude(self, results: Sequence[Tensor], *, spoilt_besides: bool = False) -> None:
        """Find the first output that is not finite and that a result is spoilt by.

        :param results: losses and gradients.
        :param spoilt_besides: their sum or norm is not finite, whether they are or not.
        """
        harmful = self._trace.origins(results, spoilt_besides=spoilt_besides)
        first = min(harmful & self._origins.keys(), default=None)
        self.not_finite = None if first is None else self._origins[first]

    @property
    def _forwards(self) -> bool:
        """Whether a module is under way; in a backward pass, to compute again what was not kept."""
        return self._phase == "forward" or len(self._stack) > 1

    def _look(self, call: _Call, result: object) -> None:
        module, forward = self._where()
        key = self._phase, module, call.operation
        occurrence = self._seen[key]
        self._seen[key] += 1
        for number, output in enumerate(tree_leaves(result)):
            if not isinstance(output, Tensor) or not output.numel() or not can_measure(output):
                continue
            place: Place = (*key, occurrence, number)
            rms = rms_of(output)
            self.values.append((place, rms))
            if not math.isfinite(rms):
                self._note_not_finite(call, place, forward, output)
                continue
            self._trace.cleaned(output)
            if self.out_of_trend is None and self._baseline.broken_by(
                place, rms, doubtful=self._doubtful
            ):
                self.out_of_trend = self._finding("out of trend", call, place, forward, output)

    def _note_not_finite(self, call: _Call, place: Place, forward: str, output: Tensor) -> None:
        if not self._doubtful or self._baseline.often_not_finite(place):
            return
        parents = call.parents
        if parents:
            self._trace.wrote(output, parents)
            return
        finding = self._finding("not finite", call, place, forward, output)
        # What has no name and was written by nobody that was seen comes from further up.
        if any(given.not_finite and not given.name for given in finding.inputs):
            parents = self._trace.newest
        writer = self._trace.wrote(output, parents)
        if not parents:
            self._origins[writer] = finding

    def _finding(
        self, kind: str, call: _Call, place: Place, forward: str, output: Tensor
    ) -> Finding:
        phase, module, operation, _, _ = place
        return Finding(
            kind=kind,
            phase=phase,
            module=module,
            operation=operation,
            forward=forward,
            number=self.operations - 1,
            inputs=call.inputs or self._ranges(*call.given),
            output=range_of(output),
            usual=self._baseline.usual(place),
        )

    def _ranges(self, args: Any, kwargs: Any) -> tuple[Range, ...]:  # noqa: ANN401
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return tuple(range_of(tensor, self._names.get(memory_of(tensor), "")) for tensor in tensors)

    def _where(self) -> tuple[str, str]:
        """Return the module that an operation belongs to, and in the backward pass its origin."""
        if self._forwards:
            return self._stack[-1], ""
        node: Any = torch._C._current_autograd_node()
        number = _NO_NODE if node is None else node._sequence_nr()
        index = bisect.bisect_right(self._starts, number) - 1
        if number >= _NO_NODE or not 0 <= index < len(self._makers):
            return _COMBINING, ""
        return self._makers[index]

    def _note_nodes(self, operation: str) -> None:
        """Say who made the nodes since the last call: the present module, for this operation."""
        present = torch._C._autograd._get_sequence_nr()
        if present > self._starts[-1]:
            self._starts.append(present)
            self._makers.append((self._stack[-1], operation))

    def _enter(self, module: nn.Module, _: Any) -> None:  # noqa: ANN401
        self._note_nodes("")
        self._stack.append(self._paths.get(id(module), self._stack[-1]))

    def _leave(self, module: nn.Module, *_: Any) -> None:  # noqa: ANN401, ARG002
        self._note_nodes("")
        if len(self._stack) > 1:
            self._stack.pop()
