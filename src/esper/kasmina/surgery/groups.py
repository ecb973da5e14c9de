"""Parameter groups of a live optimizer: which there are, who is in them, what a new one holds."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adagrad, Optimizer

from esper.kasmina.surgery.rates import same, scaled
from esper.kasmina.surgery.warm_up import LEFT, STEPS
from esper.leyline import GrowthError

Group = dict[str, Any]
Members = list[tuple[list[Tensor], list[str] | None]]

# Keys under which optimizers and schedulers of torch.optim keep a rate in a group.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# What a new group takes from nobody.
_OWN = ("params", "param_names")
# What decides which entries a parameter's state has, and where they are.
_SHAPING = ("amsgrad", "centered", "capturable", "fused")


class Place(NamedTuple):
    """Where an optimizer holds a parameter."""

    group: int
    position: int


def require_supported(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state is no state of single parameters.

    :raises GrowthError: it is ``LBFGS``.
    """
    if isinstance(optimizer, LBFGS):
        raise GrowthError(
            "LBFGS keeps one flat history of all parameters together and allows one group only, so "
            "the model cannot grow under it; use an optimizer with a state for each parameter"
        )


def find_group(optimizer: Optimizer, name: str | None) -> int:
    """Return the index of the group with a name; None is the first group.

    :raises GrowthError: there is none.
    """
    if name is None:
        return 0
    names = [group.get("name") for group in optimizer.param_groups]
    if name not in names:
        raise GrowthError(
            f"the optimizer has no parameter group {name!r}; its groups are "
            f"{', '.join(repr(known) for known in names)}"
        )
    return names.index(name)


def places(optimizer: Optimizer) -> dict[Tensor, Place]:
    """Return where each parameter is held."""
    return {
        parameter: Place(index, position)
        for index, group in enumerate(optimizer.param_groups)
        for position, parameter in enumerate(group["params"])
    }


def place(optimizer: Optimizer, parameter: Tensor, verb: str) -> Place:
    """Return where a parameter is held.

    :param verb: what should be done with it, in words.
    :raises GrowthError: it is not held.
    """
    found = places(optimizer).get(parameter)
    if found is None:
        raise GrowthError(
            f"the optimizer does not hold the parameter of shape {tuple(parameter.shape)} that it "
            f"should {verb}; pass a parameter of one of its groups, or add it as a group"
        )
    return found


def label(optimizer: Optimizer, at: Place) -> str:
    """Return words for the parameter at a place."""
    group = optimizer.param_groups[at.group]
    names, shape = group.get("param_names"), tuple(group["params"][at.position].shape)
    which = repr(names[at.position]) if names else f"{at.position}"
    return f"parameter {which} of group {group.get('name', at.group)!r}, shape {shape},"


def new_group(
    optimizer: Optimizer,
    name: str,
    parameters: Iterable[Tensor | tuple[str, Tensor]],
    rate_factor: float,
    warmup_steps: int,
) -> Group:
    """Return a group like the first one, for ``Optimizer.add_param_group``.

    :param parameters: tensors, or pairs of name and tensor.
    :raises GrowthError: the name is taken, or a parameter cannot be in the group.
    """
    _require_options(optimizer, name, rate_factor, warmup_steps)
    first = optimizer.param_groups[0]
    group: Group = {"params": [], **_names_key(first)}
    for item in parameters:
        title, parameter = item if isinstance(item, tuple) else (None, item)
        group["params"].append(parameter)
        if "param_names" in group:
            if title is None:
                raise GrowthError(
                    f"the optimizer keeps the names of its parameters, so group {name!r} needs "
                    "them too; pass pairs such as module.named_parameters()"
                )
            group["param_names"].append(title)
    require_new(optimizer, group["params"], f"group {name!r}")
    for key, value in first.items():
        if key not in _OWN:
            group[key] = scaled(value, rate_factor) if key in _RATES else same(value)
    group |= {"name": name, STEPS: warmup_steps, LEFT: warmup_steps}
    return group


def _names_key(group: Mapping[str, Any]) -> dict[str, list[str]]:
    return {"param_names": []} if "param_names" in group else {}


def _require_options(
    optimizer: Optimizer, name: str, rate_factor: float, warmup_steps: int
) -> None:
    if any(group.get("name") == name for group in optimizer.param_groups):
        raise GrowthError(
            f"the optimizer has a parameter group {name!r} already; choose another name, or remove "
            "that group first"
        )
    require_factor(rate_factor)
    if warmup_steps < 0:
        raise GrowthError(f"warmup_steps is {warmup_steps}; it must be 0 or more")


def require_factor(rate_factor: float) -> None:
    """Refuse a factor that gives no rate.

    :raises GrowthError: it is not finite, or not above 0.
    """
    if not (math.isfinite(rate_factor) and rate_factor > 0.0):
        raise GrowthError(f"rate_factor is {rate_factor}; it must be finite and above 0")


def require_new(optimizer: Optimizer, parameters: list[Any], where: str) -> None:
    """Refuse parameters that the optimizer cannot take in.

    :param where: what they are for, in words.
    :raises GrowthError: there are none, one is twice there or held already, or is of a kind that
        the optimizer does not train.
    """
    if not parameters:
        raise GrowthError(f"{where} would have no parameters; pass at least one")
    held = places(optimizer)
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor) or not (parameter.is_leaf or parameter.retains_grad):
            raise GrowthError(
                f"{where}: item {index} is no leaf tensor but {type(parameter).__name__}; "
                "pass parameters of a module"
            )
        if parameter in held:
            raise GrowthError(
                f"{where}: item {index} is held already, as "
                f"{label(optimizer, held[parameter])} and a parameter can be in one group only"
            )
        _require_kind(optimizer, parameter, f"{where}: item {index}")
    if len(set(parameters)) < len(parameters):
        raise GrowthError(f"{where} was given the same parameter twice; pass each one once")


def _require_kind(optimizer: Optimizer, parameter: Tensor, which: str) -> None:
    # Their constructors check this, but a group that is added later passes them by.
    kind = type(optimizer).__name__
    if kind == "Muon" and parameter.ndim != 2:
        raise GrowthError(
            f"{which} has {parameter.ndim} dimensions but Muon trains matrices only; "
            "give the others to a second optimizer"
        )
    if kind == "SparseAdam" and (parameter.is_complex() or parameter.is_sparse):
        raise GrowthError(f"{which} is sparse or complex, which SparseAdam does not train")


def require_alike(source: Group, target: Group) -> None:
    """Refuse to move parameters between groups that keep different entries in the state.

    :raises GrowthError: their options differ in what shapes the state.
    """
    options = {key: (source.get(key), target.get(key)) for key in _SHAPING}
    options["momentum"] = (bool(source.get("momentum")), bool(target.get("momentum")))
    for key, (ours, theirs) in options.items():
        if ours != theirs:
            raise GrowthError(
                f"the group {source.get('name')!r} has {key} = {ours} but the group it should join "
                f"has {theirs}, so the moments would not fit; make the options equal"
            )


def members(optimizer: Optimizer) -> Members:
    """Return who is in which group, for :func:`set_members`."""
    return [
        (list(group["params"]), list(group["param_names"]) if "param_names" in group else None)
        for group in optimizer.param_groups
    ]


def set_members(optimizer: Optimizer, kept: Members) -> None:
    """Put parameters into the groups that they were in."""
    for group, (parameters, names) in zip(optimizer.param_groups, kept, strict=True):
        # In place: the optimizer or its user may hold the list.
        group["params"][:] = parameters
        if names is not None:
            group["param_names"][:] = names


def move(optimizer: Optimizer, source: Place, target: int) -> None:
    """Move one parameter to the end of another group."""
    leaving, joining = optimizer.param_groups[source.group], optimizer.param_groups[target]
    for key in ("params", "param_names"):
        if key in leaving:
            joining[key].append(leaving[key].pop(source.position))


def require_as_far(optimizer: Optimizer, moving: Iterable[Tensor], target: Group) -> None:
    """Refuse to mix parameters that have momentum with some that have none where it matters.

    :raises GrowthError: a fused kernel takes momentum for all of a group's parameters, or for none.
    """
    if not _all_or_none(optimizer, target):
        return
    settled = any(_has_momentum(optimizer, parameter) for parameter in target["params"])
    for parameter in moving:
        if parameter.requires_grad and _has_momentum(optimizer, parameter) is not settled:
            raise GrowthError(
                f"a parameter of shape {tuple(parameter.shape)} has "
                f"{'no momentum yet' if settled else 'momentum'} but the group it should join has "
                f"{'some' if settled else 'none yet'}, and fused SGD cannot mix them; take a step "
                "with both first, or build SGD with fused=False"
            )


def initial_state(
    optimizer: Optimizer, parameter: Tensor, group: Group, others: Iterable[Tensor] = ()
) -> dict[str, Any] | None:
    """Return the state that a parameter needs before its first step, or None where that is none.

    :param group: its hyper-parameters.
    :param others: who else is in its group.
    """
    if isinstance(optimizer, Adagrad):
        # Made in its constructor; before torch 2.13 there only.
        start, fused = group["initial_accumulator_value"], group.get("fused")
        built = Adagrad([parameter], initial_accumulator_value=start, fused=fused)
        return dict(built.state[parameter])
    if _all_or_none(optimizer, group) and any(_has_momentum(optimizer, p) for p in others):
        return {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}
    return None


def _all_or_none(optimizer: Optimizer, group: Group) -> bool:
    return isinstance(optimizer, SGD) and bool(group.get("fused")) and bool(group["momentum"])


def _has_momentum(optimizer: Optimizer, parameter: Tensor) -> bool:
    return optimizer.state.get(parameter, {}).get("momentum_buffer") is not None


def set_state(
    optimizer: Optimizer,
    order: Iterable[Tensor],
    changes: Mapping[Tensor, dict[str, Any] | None],
) -> None:
    """Set the state of some parameters, and the order in which all are kept.

    :param order: parameters; those that have no state are passed over.
    :param changes: new states by parameter; None takes the state away.
    """
    state = optimizer.state
    kept = {**state, **changes}
    ordered = dict.fromkeys([*order, *kept])
    state.clear()
    for parameter in ordered:
        entries = kept.get(parameter)
        if entries is not None:
            state[parameter] = entries
