"""Parts of a model whose conflicts are resolved apart from each other."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

Groups = Mapping[str, Iterable[Tensor]]


def by_layer(model: nn.Module) -> dict[str, list[Tensor]]:
    """Group the parameters by the module that holds them; a tied one stays with the first."""
    seen: set[int] = set()
    groups: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen and parameter.requires_grad:
                seen.add(id(parameter))
                groups.setdefault(name, []).append(parameter)
    return groups


def by_name(model: nn.Module, names: Sequence[str]) -> dict[str, list[Tensor]]:
    """Group the parameters by submodule: each goes with the longest of the names it lies under.

    :param names: qualified names of submodules, such as ``"trunk.0"``; ``""`` takes the rest.
    :raises RuntimeError: a name is no submodule, or a parameter lies under none of them.
    """
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise RuntimeError(f"the model has no submodule {name!r}; it has {sorted(known)[1:9]}")
    groups: dict[str, list[Tensor]] = {name: [] for name in names}
    for qualified, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        under = [name for name in names if not name or qualified.startswith(f"{name}.")]
        if not under:
            raise RuntimeError(
                f"parameter {qualified!r} is in none of the groups {list(names)}; "
                "name a submodule above it, or add '' for the rest"
            )
        groups[max(under, key=len)].append(parameter)
    return groups


def columns_of(
    groups: Groups | None, parameters: Sequence[Tensor], shared: Sequence[int]
) -> dict[str, list[int]]:
    """Return the shared parameters of each group, by index.

    :raises RuntimeError: a shared parameter is in no group or in two, or a group holds a tensor
        that is no parameter.
    """
    if groups is None:
        return {"": list(shared)}
    index = {id(parameter): position for position, parameter in enumerate(parameters)}
    group_of: dict[int, str] = {}
    for name, members in groups.items():
        for member in members:
            if not member.requires_grad:
                continue
            position = index.get(id(member))
            if position is None:
                raise RuntimeError(
                    f"group {name!r} holds a tensor of shape {tuple(member.shape)} that is not "
                    "among the parameters"
                )
            if group_of.setdefault(position, name) != name:
                raise RuntimeError(
                    f"parameter {position} is in groups {group_of[position]!r} and {name!r}; "
                    "put it into one"
                )
    result: dict[str, list[int]] = {}
    for position in shared:
        if position not in group_of:
            shape = tuple(parameters[position].shape)
            raise RuntimeError(f"parameter {position} of shape {shape} is in no group; add it")
        result.setdefault(group_of[position], []).append(position)
    return result
