"""Making a seed part of its host: plain modules in place of module and slot."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.kasmina.attach import Site, module_at, put_on, replace_module, take_off
from esper.kasmina.blueprints import Blueprint, Pair
from esper.kasmina.slot import Slot, slots_of
from esper.kasmina.surgery import OptimizerSurgeon
from esper.kasmina.undoing import Undoing
from esper.leyline import GrowthError


@dataclass(frozen=True)
class Folding:
    """What is folded, and where.

    :param model: that contains the slot.
    :param surgeon: of its optimizer.
    :param optimizer: the same.
    :param site: of the slot.
    :param group: name of the seed's parameter group.
    :param alpha: share of the seed.
    """

    model: nn.Module
    surgeon: OptimizerSurgeon
    optimizer: Optimizer
    site: Site
    group: str
    alpha: float


def fold(folding: Folding, slot: Slot, blueprint: Blueprint, undo: Undoing) -> None:
    """Put plain modules in place of a module with a slot; its optimizer goes along.

    :param undo: told how each part is taken back.
    :raises GrowthError: it cannot be done; what ``undo`` knows of has been done then.
    """
    model, site = folding.model, folding.site
    host = module_at(model, site.path)
    inner = [name for name in slots_of(host) if name != site.name]
    if inner:
        raise GrowthError(f"seed {site.name!r} cannot be folded around other slots: {inner}")
    take_off(model, site)
    undo.append(partial(put_on, model, site, slot))
    pair = slot.flow.pair
    if pair is None:
        _fold_behind(folding, slot, blueprint, host, undo)
    else:
        _fold_pair(folding, slot, blueprint, pair, undo)


def _fold_behind(
    folding: Folding, slot: Slot, blueprint: Blueprint, host: nn.Module, undo: Undoing
) -> None:
    own = slot.own_parameters()
    with torch.no_grad():
        folded = blueprint.fold(host, slot.seed, slot.blend, folding.alpha)
    _keep_mode(host, folded)
    before = replace_module(folding.model, folding.site.path, folded)
    undo.append(lambda: _restore(folding.model, folding.site.path, before))
    known = {id(parameter) for parameter in host.parameters()}
    new = [parameter for parameter in folded.parameters() if id(parameter) not in known]
    surgeon = folding.surgeon
    if [p.shape for p in new] == [p.shape for p in own]:
        # The seed's own, with what it has learnt of their gradients.
        undo.append(surgeon.replace_parameters(zip(own, new, strict=True)).undo)
        undo.append(surgeon.merge_group(folding.group).undo)
        return
    undo.append(surgeon.remove_group(folding.group).undo)
    merged = _merged(host, folded)
    if len(merged) != len(new):
        raise GrowthError(
            f"blueprint {blueprint.name!r} folds {folding.site.name!r} into parameters that are "
            "neither the seed's nor the host's; the optimizer could not follow"
        )
    _carry(folding, merged, undo)


def _fold_pair(
    folding: Folding, slot: Slot, blueprint: Blueprint, pair: Pair, undo: Undoing
) -> None:
    with torch.no_grad():
        wider = blueprint.fold_pair(pair, slot.seed, folding.alpha)
    home, _, first = folding.site.first.rpartition(".")
    parent = module_at(folding.model, home)
    names = list(parent._modules)
    start = names.index(first)
    old = (pair.first, *pair.between, pair.second)
    new = (wider.first, *wider.between, wider.second)
    for offset, (before, after) in enumerate(zip(old, new, strict=True)):
        path = f"{home}.{names[start + offset]}" if home else names[start + offset]
        _keep_mode(before, after)
        replace_module(folding.model, path, after)
        undo.append(partial(_restore, folding.model, path, before))
    undo.append(folding.surgeon.remove_group(folding.group).undo)
    _carry(folding, wider.replaced, undo)


def _carry(folding: Folding, replaced: Mapping[Tensor, Tensor], undo: Undoing) -> None:
    """Let the optimizer train the new parameters where it trained the old ones."""
    trained = {id(p) for group in folding.optimizer.param_groups for p in group["params"]}
    present = {id(parameter) for parameter in folding.model.parameters()}
    if any(id(old) in present for old in replaced):
        raise GrowthError(
            f"a weight that seed {folding.site.name!r} would be folded into is used elsewhere, too"
        )
    pairs = [(old, new) for old, new in replaced.items() if id(old) in trained]
    if pairs:
        undo.append(folding.surgeon.replace_parameters(pairs).undo)


def _merged(host: nn.Module, folded: nn.Module) -> dict[Tensor, Tensor]:
    """Return the host's parameters whose values were merged with the seed, with their heirs."""
    if type(folded) is not type(host):
        return {}
    heirs = dict(folded.named_parameters())
    return {
        parameter: heirs[name]
        for name, parameter in host.named_parameters()
        if name in heirs and heirs[name] is not parameter and heirs[name].shape == parameter.shape
    }


def _keep_mode(before: nn.Module, after: nn.Module) -> None:
    """Let what is new be in the mode of what it replaces; parts of the latter keep their own."""
    modes = {module: module.training for module in before.modules()}
    for module in after.modules():
        module.training = modes.get(module, before.training)


def _restore(model: nn.Module, path: str, module: nn.Module) -> None:
    replace_module(model, path, module)
