"""Not computing twice what a shadow pass has in common with the host's own pass.

Everything before a slot gives in the shadow pass what it gave in the host's, moments ago on the
same batch. Modules that end before the slot does therefore keep their outputs, and give them again.
This is done only where it is sure: inputs are compared, and an output that was changed in place
since, or a module that ran several times, lets the whole pass be computed instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from esper.kasmina.probe import Probe, quietly
from esper.kasmina.slot import graft_memo, remove_memo


class ChangedError(Exception):
    """A module is asked for something else than it was in the host's pass."""


class Memo:
    """Keeps what one module was given and gave.

    :param family: the memos of one model by the memory of their outputs, shared by all of them.
    :ivar mode: ``record``, ``replay`` or empty.
    """

    def __init__(self, family: dict[int, "Memo"]) -> None:
        self.mode = ""
        self._family = family
        self._calls = 0
        self._inputs: list[Any] = []
        self._output: Any = None
        self._versions: list[int] = []

    def clear(self) -> None:
        """Forget; needed before each pass of the host."""
        self._calls, self._inputs, self._output, self._versions = 0, [], None, []

    def run(self, forward: Callable[..., Any], inputs: Any, named: Any) -> Any:  # noqa: ANN401
        """Call the module's own forward and keep what it did, or give again what it gave.

        :raises ChangedError: it would give something else than it gave.
        """
        if self.mode == "replay":
            return self._replay([*tree_leaves(inputs), *tree_leaves(named)])
        given = [*tree_leaves(inputs), *tree_leaves(named)]
        before = _versions(given)
        output = forward(*inputs, **named)
        self._note_changes(given, before)
        self._calls += 1
        self._inputs = [_trace(leaf) for leaf in given]
        self._output = tree_map(_detached, output)
        self._versions = _versions(tree_leaves(self._output))
        for leaf in tree_leaves(self._output):
            if isinstance(leaf, Tensor):
                self._family[leaf.data_ptr()] = self
        return output

    def _replay(self, given: list[Any]) -> Any:  # noqa: ANN401 - whatever a module gives
        changed = _versions(tree_leaves(self._output)) != self._versions
        if self._calls != 1 or changed or len(given) != len(self._inputs):
            raise ChangedError
        if not all(map(_same, self._inputs, given)):
            raise ChangedError
        return self._output

    def _note_changes(self, given: list[Any], before: list[int]) -> None:
        """Let whoever gave a tensor know that this module has changed it in place.

        Both are left out together; only a change that would be made again matters.
        """
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        for tensor, version in zip(tensors, before, strict=True):
            giver = self._family.get(tensor.data_ptr())
            if tensor._version != version and giver is not None:
                giver._versions = _versions(tree_leaves(giver._output))


@dataclass
class Prefix:
    """The modules that end before a slot's module does, each once.

    :ivar modules: the outermost of them, by path, the slot's own included.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)


def find_prefix(probe: Probe, path: str) -> Prefix:
    """Run the model once, and find what a shadow pass for the module at ``path`` can leave out."""
    order = _order(probe)
    target = order.get(path)
    if target is None or len(target) != 1:
        return Prefix()
    _, end = target[0]
    before = {
        name: calls[0]
        for name, calls in order.items()
        if name and len(calls) == 1 and calls[0][1] <= end
    }
    modules = dict(probe.model.named_modules())
    return Prefix(
        {
            name: modules[name]
            for name, span in before.items()
            if not any(_inside(span, other) for other in before.values())
        }
    )


def _order(probe: Probe) -> dict[str, list[tuple[int, int]]]:
    """Return by path when each module was entered and left."""
    calls: dict[str, list[tuple[int, int]]] = {}
    clock = [0]

    def watched(name: str, module: nn.Module) -> None:
        forward = module.forward

        def run(*inputs: Any, **named: Any) -> Any:  # noqa: ANN401
            clock[0] += 1
            entered = clock[0]
            output = forward(*inputs, **named)
            clock[0] += 1
            calls.setdefault(name, []).append((entered, clock[0]))
            return output

        vars(module)["forward"] = run

    # One that has a forward of its own on the object stays what it is, and is not left out.
    modules = {n: m for n, m in probe.model.named_modules() if "forward" not in vars(m)}
    modules = {n: m for n, m in modules.items() if not isinstance(m, torch.jit.ScriptModule)}
    try:
        for name, module in modules.items():
            watched(name, module)
        with quietly(probe.model, training=True):
            probe.run()
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)
    return calls


class Replay:
    """Lets the host's passes be kept, and shadow passes begin where they have to.

    :param probe: runs the model, to see in which order its modules do.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._memos: dict[str, Memo] = {}
        self._modules: dict[str, nn.Module] = {}
        self._prefixes: dict[str, list[str]] = {}
        self._family: dict[int, Memo] = {}

    def prepare(self, paths: Mapping[str, str]) -> None:
        """Keep what the shadow passes of some slots can leave out, from the next pass on.

        :param paths: of the modules that the slots are at, by slot.
        """
        self.stop()
        # A compiled module would be compiled anew for each thing that it is told to do.
        if any(m._compiled_call_impl is not None for m in self._probe.model.modules()):
            return
        for slot, path in paths.items():
            found = find_prefix(self._probe, path).modules
            self._prefixes[slot] = list(found)
            self._modules.update(found)
        for name, module in self._modules.items():
            self._memos[name] = graft_memo(module, Memo(self._family))
        self.listen()

    def listen(self) -> None:
        """Forget the last pass and keep the next one."""
        self._family.clear()
        for memo in self._memos.values():
            memo.clear()
            memo.mode = "record"

    def rest(self) -> None:
        """Keep nothing until told otherwise."""
        self._family.clear()
        for memo in self._memos.values():
            memo.clear()
            memo.mode = ""

    def stop(self) -> None:
        """Leave all modules as they are without this."""
        for module in self._modules.values():
            remove_memo(module)
        self._memos, self._modules, self._prefixes = {}, {}, {}
        self._family.clear()

    @contextmanager
    def replayed(self, slot: str) -> Iterator[bool]:
        """Let the modules before a slot give again what they gave."""
        names = self._prefixes.get(slot, [])
        for memo in self._memos.values():
            memo.mode = ""
        for name in names:
            self._memos[name].mode = "replay"
        try:
            yield bool(names)
        finally:
            for memo in self._memos.values():
                memo.mode = ""


def _inside(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return other[0] < span[0] and span[1] < other[1]


def _detached(leaf: Any) -> Any:  # noqa: ANN401
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _versions(leaves: Iterable[Any]) -> list[int]:
    return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]


def _trace(leaf: Any) -> Any:  # noqa: ANN401
    return (leaf.detach(), leaf._version) if isinstance(leaf, Tensor) else leaf


def _same(kept: Any, leaf: Any) -> bool:  # noqa: ANN401
    if not isinstance(leaf, Tensor):
        return bool(type(kept) is type(leaf) and kept == leaf)
    if not isinstance(kept, tuple):
        return False
    tensor, version = kept
    if tensor.shape != leaf.shape or tensor.dtype != leaf.dtype:
        return False
    if tensor.data_ptr() == leaf.data_ptr() and tensor.stride() == leaf.stride():
        return bool(leaf._version == version)
    return bool(tensor._version == version and torch.equal(tensor, leaf))
