"""Putting slots at modules by name, or refusing to, with the reason."""

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esper.kasmina.blueprints import Flow, Pair
from esper.kasmina.probe import Probe, Sample, Sighting, watch
from esper.kasmina.slot import Slot, Tap, graft, graft_tap, remove_slot, remove_tap, slot_of, tap_of
from esper.leyline import GrowthError

PAIR = ">"
_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.GroupNorm,
)
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")
_MODES = ("training", "evaluation")
_PARALLEL = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule")


@dataclass(frozen=True)
class Site:
    """Where a slot is.

    :param name: of the slot, as it was asked for.
    :param path: of the module whose output the seed joins.
    :param first: path of the first module of a pair, whose input the seed takes; else empty.
    """

    name: str
    path: str
    first: str = ""


def attach(model: nn.Module, name: str, sample: Sample, *, channel_dim: int | None = None) -> Slot:
    """Put a dormant slot at a module of a model. The model computes what it did, to the bit.

    :param model: any module.
    :param name: of a module, such as ``layers.2``; or of two, such as ``fc1>fc2``, for seeds that
        widen the layers between the first one's input and the second one's output.
    :param sample: a real input of the model: a tensor, positional arguments, or named ones.
    :param channel_dim: the dimension that holds features: 1 or -1; by default 1 where the module or
        the shape of its output is that of images, else -1.
    :raises GrowthError: a slot cannot be put there, with the reason; the model is as it was.
    """
    return attach_at(model, locate(model, name), Probe(model, sample), channel_dim)


def detach(model: nn.Module, name: str) -> Slot:
    """Take a slot off again; the module is of its own class then.

    :raises GrowthError: there is none of this name, or a seed grows in it.
    """
    site = locate(model, name)
    module = module_at(model, site.path)
    slot = slot_of(module)
    if slot is None:
        raise GrowthError(f"there is no slot at {name!r}")
    if slot.planted:
        raise GrowthError(f"a seed grows at {name!r}; cull it before the slot is taken off")
    return take_off(model, site)


def locate(model: nn.Module, name: str) -> Site:
    """Resolve a slot's name to modules; the output of a plain Sequential is its last child's.

    :raises GrowthError: there is no such module.
    """
    names = name.split(PAIR)
    if len(names) > 2:
        raise GrowthError(f"slot {name!r} names {len(names)} modules; give one, or two for a pair")
    path = names[-1]
    module = module_at(model, path)
    while type(module) is nn.Sequential:
        if not len(module):
            raise GrowthError(f"{path!r} is an empty Sequential; it has no output of its own")
        child = list(module._modules)[-1]
        path = f"{path}.{child}" if path else child
        module = module_at(model, path)
    if len(names) == 2:
        module_at(model, names[0])
    return Site(name, path, names[0] if len(names) == 2 else "")


def attach_at(model: nn.Module, site: Site, probe: Probe, channel_dim: int | None = None) -> Slot:
    """Put a slot at a resolved place; see :func:`attach`."""
    target = module_at(model, site.path)
    if slot_of(target) is not None:
        raise GrowthError(f"{site.path!r} has a slot already")
    _require_growable(model, site.path, target)
    sighting = _seen_in_both_modes(probe, site.path, target)
    output = sighting.output
    shape, tap, pair = tuple(output.shape), None, None
    if site.first:
        pair = _pair(model, site, probe, target)
        tap = Tap()
    _require_apart(model, site.name, target, pair)
    channel_dim = channel_dim or _channel_dim(target, output)
    flow = Flow(shape, output.dtype, output.device, channel_dim, pair)
    slot = Slot(site.name, flow, tap)
    if tap is not None:
        graft_tap(module_at(model, site.first), tap)
    graft(target, slot)
    return slot


def take_off(model: nn.Module, site: Site) -> Slot:
    """Take a slot off, whatever is in it."""
    slot = remove_slot(module_at(model, site.path))
    if site.first:
        remove_tap(module_at(model, site.first))
    return slot


def put_on(model: nn.Module, site: Site, slot: Slot) -> None:
    """Put a slot that was taken off on again."""
    graft(module_at(model, site.path), slot)
    if slot.tap is not None:
        graft_tap(module_at(model, site.first), slot.tap)


def _require_apart(model: nn.Module, name: str, target: nn.Module, pair: Pair | None) -> None:
    """Refuse a slot at layers that folding another one would put others in the place of."""
    ours = _touched(target, pair)
    for module in model.modules():
        slot = slot_of(module)
        if slot is None or (pair is None and slot.flow.pair is None):
            continue
        shared = ours & _touched(module, slot.flow.pair)
        paths = [path for path, m in model.named_modules() if m in shared]
        if paths:
            raise GrowthError(
                f"slot {name!r} and slot {slot.name!r} share {paths[0]!r}, which a pair replaces "
                "when it is folded; give slots that have no layer in common"
            )


def _touched(target: nn.Module, pair: Pair | None) -> set[nn.Module]:
    if pair is None:
        return {target}
    return {m for part in (pair.first, *pair.between, pair.second) for m in part.modules()}


def _pair(model: nn.Module, site: Site, probe: Probe, second: nn.Module) -> Pair:
    first = module_at(model, site.first)
    if tap_of(first) is not None:
        raise GrowthError(f"{site.first!r} is the first module of another pair already")
    _require_growable(model, site.first, first)
    source = _seen_in_both_modes(probe, site.first, first).inputs
    if not source or not isinstance(source[0], Tensor):
        raise GrowthError(f"{site.first!r} takes no tensor; a pair begins with a layer that does")
    between = _between(model, site)
    return Pair(first, second, between, tuple(source[0].shape))


def _between(model: nn.Module, site: Site) -> tuple[nn.Module, ...]:
    """Return the modules that lie between the two of a pair, in one Sequential."""
    home, _, first = site.first.rpartition(".")
    other, _, second = site.path.rpartition(".")
    parent = module_at(model, home)
    if home != other or type(parent) is not nn.Sequential:
        raise GrowthError(
            f"slot {site.name!r}: what is between two layers can only be told inside one "
            f"nn.Sequential; {site.first!r} and {site.path!r} do not share one"
        )
    names = list(parent._modules)
    start, end = names.index(first), names.index(second)
    if start >= end:
        raise GrowthError(f"slot {site.name!r}: {site.first!r} does not come before {site.path!r}")
    return tuple(module for module in list(parent)[start + 1 : end])


def _require_growable(model: nn.Module, path: str, module: nn.Module) -> None:
    problem = _obstacle_of_kind(path, module) or _obstacle_above(model, path)
    problem = problem or _obstacle_of_identity(model, path, module)
    if problem:
        raise GrowthError(f"no slot at {path!r}: {problem}")


def _obstacle_of_kind(path: str, module: nn.Module) -> str:
    if not path:
        return "it is the whole model; name one of its modules"
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
        return f"a {type(module).__name__} is never called; name one of its modules"
    if isinstance(module, nn.Sequential):
        return "it is a Sequential of its own kind, whose children are its steps; name one of them"
    if "forward" in vars(module):
        return "its forward was replaced on the object, which the slot would not see"
    if any(is_lazy(parameter) for parameter in module.parameters()):
        return "it has no weights yet; run the model once before"
    return ""


def _obstacle_above(model: nn.Module, path: str) -> str:
    """Look at the module and all modules around it."""
    parts = path.split(".")
    for length in range(len(parts) + 1):
        outer = ".".join(parts[:length])
        module = module_at(model, outer)
        kind = f"{outer or 'the model'!r} is a {type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{kind}, compiled by TorchScript; attach to the module it was made from"
        names = {base.__name__ for base in type(module).__mro__}
        if names & set(_PARALLEL):
            return f"{kind}; growth under parallel wrappers is not supported yet"
        if type(module).__module__.startswith(_QUANTISED):
            return f"{kind}, which is quantised; grow before quantising"
    return ""


def _obstacle_of_identity(model: nn.Module, path: str, module: nn.Module) -> str:
    names = [name for name, m in model.named_modules(remove_duplicate=False) if m is module]
    if len(names) > 1:
        others = ", ".join(repr(name) for name in names if name != path)
        return f"the same module is used as {others}; a seed would grow at all of these places"
    return ""


def _seen_in_both_modes(probe: Probe, path: str, module: nn.Module) -> Sighting:
    seen = {mode: watch(probe, module, training=mode == "training") for mode in _MODES}
    for mode, sighting in seen.items():
        problem = _obstacle_seen(sighting)
        if problem:
            raise GrowthError(f"no slot at {path!r}: in {mode} mode {problem}")
    return seen["training"]


def _obstacle_seen(sighting: Sighting) -> str:
    output: Any = sighting.output
    if sighting.calls == 0:
        return "the model does not call it (a fused path, or its weights are used directly)"
    if sighting.calls > 1:
        return f"the model calls it {sighting.calls} times in one forward pass"
    if not isinstance(output, Tensor):
        return f"it returns a {type(output).__name__}; a seed needs one tensor"
    if not output.is_floating_point():
        return f"it returns {output.dtype}; a seed needs floating-point numbers"
    if output.ndim < 2:
        return f"it returns shape {tuple(output.shape)}; a seed needs a batch and features"
    return ""


def _channel_dim(module: nn.Module, output: Tensor) -> int:
    first = isinstance(module, _CHANNELS_FIRST) or output.ndim >= 4
    return 1 if first and output.ndim > 2 else -1


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return a module by its path.

    :raises GrowthError: there is none, naming the nearest.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    if path not in known:
        nearest = difflib.get_close_matches(path, list(known), n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "see model.named_modules()"
        raise GrowthError(f"the model has no module {path!r}; {hint}")
    found: nn.Module = known[path]
    return found


def replace_module(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Put another module at a path; return the one that was there."""
    home, _, name = path.rpartition(".")
    parent = module_at(model, home)
    before = parent._modules[name]
    if before is None:
        raise GrowthError(f"there is no module at {path!r} to be replaced")
    parent._modules[name] = module
    return before
