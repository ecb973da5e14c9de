"""Everything that makes a resume exact, as one object."""

import copy
from collections.abc import Callable, Container, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.leyline import EsperError, StateError, Stateful
from esper.tolaria.state.capture import Capture
from esper.tolaria.state.optimizer import OptimizerState
from esper.tolaria.state.random_state import capture_random, restore_random
from esper.tolaria.state.tree import join, split

_AS_BUILT: dict[str, Any] = {"version": 0, "changes": []}


class Structure(Protocol):
    """How a model has changed since it was built; Kasmina is such an object."""

    def structure(self) -> dict[str, Any]:
        """Return all changes, of JSON types; ``changes`` is empty when there were none."""
        ...

    def rebuild(self, structure: dict[str, Any]) -> bool:
        """Change the model until it is built so; return whether anything had to be changed."""
        ...


class TrainState:
    """The whole training state: model, optimizer, random generators and named components.

    :param model: its parameters and buffers are state, non-persistent buffers included.
    :param optimizer: its moments, step counters and hyper-parameters are state.
    :param components: anything else with ``state_dict`` and ``load_state_dict``, by name:
        schedule, gradient scaler, data position, guard statistics.
    :param structure: knows how the model has grown, and rebuilds it as a saved state needs it.
    :ivar on_refresh: called when the model's structure has changed, after this state knows.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        components: Mapping[str, Stateful] | None = None,
        *,
        structure: Structure | None = None,
    ) -> None:
        self.on_refresh: Callable[[], None] = _do_nothing
        self._model = model
        self._structure = structure
        self._optimizer = OptimizerState(optimizer, model)
        self._components = dict(components or {})
        self._homes = _homes(model)

    def add(self, name: str, component: Stateful) -> None:
        """Make ``component`` part of the state.

        :raises StateError: the name is taken.
        """
        if name in self._components:
            raise StateError(f"the state has a component {name!r} already; choose another name")
        self._components[name] = component

    def refresh(self) -> None:
        """Look the model's modules up again; needed after its structure has changed."""
        self._homes = _homes(self._model)
        self._optimizer.refresh()
        self.on_refresh()

    def capture(self) -> Capture:
        """Return the state. Its tensors are the live ones: copy them before training goes on.

        :raises StateError: a component's state holds something that cannot be saved.
        """
        tensors = self._model_tensors()
        tensors.update(capture_random())
        values: dict[str, Any] = {"optimizer": self._optimizer.capture(tensors)}
        if self._structure is not None:
            values["structure"] = self._structure.structure()
        values["components"] = {
            name: split(component.state_dict(), f"component/{name}", tensors)
            for name, component in self._components.items()
        }
        return Capture(tensors, values)

    def restore(self, capture: Capture, *, keep: Container[str] = ()) -> None:
        """Put a state back, by copying into the live tensors; the capture is left untouched.

        :param keep: names of components that stay as they are.
        :raises StateError: the capture does not fit; nothing was changed then.
        """
        wanted = capture.values.get("structure", _AS_BUILT)
        if self._structure is None:
            if wanted["changes"]:
                raise StateError(
                    f"the saved model has grown ({len(wanted['changes'])} changes); give the job "
                    "the executor that it was grown with"
                )
            self._restore(capture, keep)
            return
        before = self._structure.structure()
        backup = self._copied() if wanted["changes"] != before["changes"] else None
        try:
            self._rebuild(self._structure, wanted)
            self._restore(capture, keep)
        except StateError:
            if backup is not None:
                self._rebuild(self._structure, before)
                self._restore(backup, ())
            raise

    def _rebuild(self, structure: Structure, wanted: dict[str, Any]) -> None:
        try:
            changed = structure.rebuild(wanted)
        except EsperError as error:
            raise StateError(f"the saved model cannot be rebuilt: {error}") from error
        if changed:
            self.refresh()

    def _copied(self) -> Capture:
        """Return the state in memory of its own."""
        capture = self.capture()
        tensors = {name: tensor.clone() for name, tensor in capture.tensors.items()}
        return Capture(tensors, copy.deepcopy(capture.values))

    def _restore(self, capture: Capture, keep: Container[str]) -> None:
        """Put a state back into a model that is built as it has to be."""
        live = self._model_tensors()
        self._check(capture, live)
        components = {
            name: join(capture.values["components"][name], capture.tensors)
            for name in self._components
            if name not in keep
        }
        with torch.no_grad():
            for name, target in live.items():
                target.copy_(capture.tensors[name])
            self._optimizer.restore(capture.values["optimizer"], capture.tensors)
        for name, state_dict in components.items():
            self._components[name].load_state_dict(state_dict)
        # Last: whatever loading drew from the generators is undone.
        restore_random(capture.tensors)

    def _model_tensors(self) -> dict[str, Tensor]:
        # Looked up in the modules' own dictionaries each time: a module may rebind a buffer.
        return {
            name: tensor.detach()
            for name, home, key in self._homes
            if (tensor := home.get(key)) is not None
        }

    def _check(self, capture: Capture, live: dict[str, Tensor]) -> None:
        for name, tensor in live.items():
            saved = capture.tensors.get(name)
            if saved is None:
                raise StateError(f"the saved state lacks {name}; it is of another model")
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                raise StateError(
                    f"{name} is {tuple(tensor.shape)} {tensor.dtype} in the model but "
                    f"{tuple(saved.shape)} {saved.dtype} in the saved state"
                )
        for name in capture.tensors.keys() - live.keys():
            if name.startswith("model/"):
                raise StateError(f"the saved state holds {name}, which the model lacks")
        for name in self._components.keys() - capture.values["components"].keys():
            raise StateError(f"the saved state lacks the component {name!r}")
        self._optimizer.check(capture.values["optimizer"])


def _homes(model: nn.Module) -> list[tuple[str, dict[str, Tensor | None], str]]:
    """List every parameter and buffer once, as its name, the dictionary it is in, and its key."""
    homes: list[tuple[str, dict[str, Tensor | None], str]] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"model/{path}." if path else "model/"
        for home in (module._parameters, module._buffers):
            for key, tensor in home.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    homes.append((prefix + key, cast("dict[str, Tensor | None]", home), key))
    return homes


def _do_nothing() -> None:
    pass
