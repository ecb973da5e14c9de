"""The optimizer's state by parameter name, captured without a copy and restored in place.

``Optimizer.state_dict`` numbers parameters by position and ``load_state_dict`` keeps references to
what it is given, so that the next step changes a kept state. Names and in-place copies avoid both.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.leyline import StateError
from esper.tolaria.state.tree import join, split, split_flat


class OptimizerState:
    """Captures and restores one optimizer.

    :param optimizer: any optimizer of ``torch.optim``, or one that keeps to its layout.
    :param model: names the parameters; one that is not the model's is named by its position.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self._optimizer = optimizer
        self._model = model
        self._names: dict[int, str] = {}

    def refresh(self) -> None:
        """Look the names of parameters up again; needed after the model's structure has changed."""
        self._names = {id(p): name for name, p in self._model.named_parameters()}

    def capture(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Add the state's tensors to ``tensors`` and return everything else, as JSON values."""
        state, names, values = self._optimizer.state, {}, {}
        for name, parameter, _ in self._named():
            names[id(parameter)] = name
            if parameter in state:
                values[name] = split_flat(state[parameter], f"optimizer/{name}", tensors)
        return {"groups": self._capture_groups(names, tensors), "state": values}

    def _capture_groups(
        self, names: dict[int, str], tensors: dict[str, Tensor]
    ) -> list[dict[str, Any]]:
        groups = []
        for index, group in enumerate(self._optimizer.param_groups):
            hyper = {key: value for key, value in group.items() if key != "params"}
            values = split(hyper, f"optimizer/groups/{index}", tensors)
            values["params"] = [names[id(parameter)] for parameter in group["params"]]
            groups.append(values)
        return groups

    def check(self, values: dict[str, Any]) -> None:
        """Raise StateError unless ``values`` has this optimizer's groups and parameters."""
        live = [
            [name for name, _, group in self._named() if group is candidate]
            for candidate in self._optimizer.param_groups
        ]
        saved = [group["params"] for group in values["groups"]]
        if live != saved:
            raise StateError(
                f"the saved optimizer has parameter groups {_outline(saved)}, "
                f"the live one has {_outline(live)}; build the same optimizer to continue"
            )

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Put a captured state back. Live tensors are overwritten, never replaced, where they fit.

        :param values: what :meth:`capture` returned.
        :param tensors: the captured tensors; they are only read.
        """
        for live, saved in zip(self._optimizer.param_groups, values["groups"], strict=True):
            hyper = {key: value for key, value in saved.items() if key != "params"}
            for key, value in join(hyper, tensors).items():
                if isinstance(value, Tensor) and isinstance(live.get(key), Tensor):
                    live[key].copy_(value)
                else:
                    live[key] = value
        for name, parameter, group in self._named():
            if name not in values["state"]:
                self._optimizer.state.pop(parameter, None)
                continue
            self._restore_parameter(parameter, group, values["state"][name], tensors)

    def _restore_parameter(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        saved: dict[str, Any],
        tensors: dict[str, Tensor],
    ) -> None:
        live = self._optimizer.state[parameter]
        for key in [key for key in live if key not in saved]:
            del live[key]
        for key, value in saved.items():
            source = tensors[value["$tensor"]] if _is_tensor(value) else None
            if source is None:
                live[key] = join(value, tensors)
            elif _fits(live.get(key), source):
                live[key].copy_(source)
            else:
                live[key] = source.to(_state_device(key, parameter, group), copy=True)

    def _named(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        groups = self._optimizer.param_groups
        if any(id(parameter) not in self._names for g in groups for parameter in g["params"]):
            self.refresh()
        for index, group in enumerate(groups):
            for position, parameter in enumerate(group["params"]):
                name = self._names.get(id(parameter)) or f"group{index}.{position}"
                yield name, parameter, group


def _is_tensor(value: object) -> bool:
    return isinstance(value, dict) and "$tensor" in value


def _fits(live: object, source: Tensor) -> bool:
    return isinstance(live, Tensor) and live.shape == source.shape and live.dtype == source.dtype


def _state_device(key: str, parameter: Tensor, group: dict[str, Any]) -> torch.device:
    # torch keeps the step counter on the host unless the kernel needs it on the device.
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return torch.device("cpu")
    return parameter.device


def _outline(groups: list[list[str]]) -> str:
    sizes = ", ".join(str(len(group)) for group in groups)
    first = groups[0][0] if groups and groups[0] else "none"
    return f"of {sizes} parameters (first {first!r})"
