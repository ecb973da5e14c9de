"""The architecture as a journal of changes, each of which can be undone or made again.

Content is not the journal's business: what a change puts in begins with the blueprint's own initial
values, and whoever rebuilds an architecture restores the weights afterwards.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
import torch
from torch import nn
from torch.optim import Optimizer

from esper.kasmina.attach import Site, locate, take_off
from esper.kasmina.blend import make_blend
from esper.kasmina.blueprints import Flow, get, initialise
from esper.kasmina.fold import Folding, fold
from esper.kasmina.probe import kept_random
from esper.kasmina.slot import SLOT, Slot
from esper.kasmina.surgery import OptimizerSurgeon
from esper.kasmina.undoing import Undo, Undoing, whole
from esper.leyline import GrowthError, Planting


class Plant(msgspec.Struct, frozen=True, tag_field="change", tag="plant"):
    """A seed was put into a slot.

    :param slot: its name.
    :param blueprint: by name.
    :param blueprint_version: of the blueprint; another one builds something else.
    :param planting: its arguments, and how it is blended.
    :param seed: of the random numbers it began with.
    """

    slot: str
    blueprint: str
    blueprint_version: int
    planting: Planting
    seed: int


class Uproot(msgspec.Struct, frozen=True, tag_field="change", tag="uproot"):
    """A seed was taken out."""

    slot: str


class Fold(msgspec.Struct, frozen=True, tag_field="change", tag="fold"):
    """A seed became part of the host.

    :param alpha: its share then.
    :param reopened: whether the slot stayed open, at what it was folded into.
    """

    slot: str
    alpha: float
    reopened: bool


Change = Plant | Uproot | Fold


@dataclass(frozen=True)
class GroupOptions:
    """How a seed's parameters are trained.

    :param rate_factor: their learning rate over that of the first group.
    :param warmup_steps: optimizer steps in which it rises.
    """

    rate_factor: float = 1.0
    warmup_steps: int = 0


class Architecture:
    """Makes structural changes of model and optimizer, takes them back, and makes them again.

    :param model: with its slots attached.
    :param optimizer: of the model.
    :param surgeon: of the optimizer.
    :param sites: where each slot is to be; they are attached here.
    :param open_slot: attaches a slot at a place.
    :param options: of the seeds' parameter groups.
    :ivar slots: those that are open, by name.
    :ivar options: as given.
    :ivar version: counts up with every change, and when changes are taken back.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        surgeon: OptimizerSurgeon,
        sites: dict[str, Site],
        open_slot: Callable[[Site], Slot],
        options: GroupOptions,
    ) -> None:
        self.version = 0
        self.sites = sites
        self.slots: dict[str, Slot] = {}
        with whole() as undo:
            for name, site in sites.items():
                self.slots[name] = open_slot(site)
                undo.append(partial(_close, model, site))
        self._model = model
        self._optimizer = optimizer
        self._surgeon = surgeon
        self._open_slot = open_slot
        self.options = options
        self._done: list[tuple[Change, Undo]] = []

    @property
    def changes(self) -> list[Change]:
        """All that was done, oldest first."""
        return [change for change, _ in self._done]

    def make(self, change: Change, initial: Callable[[nn.Module], None] | None = None) -> None:
        """Make one change, wholly or not at all.

        :param initial: gives a new seed its first weights; by default the blueprint's own.
        :raises GrowthError: it cannot be made.
        """
        with whole() as undo:
            self._make(change, initial, undo)
        self._done.append((change, undo))
        self.version += 1

    def take_back(self) -> None:
        """Undo the last change."""
        _, undo = self._done.pop()
        undo()
        self.version += 1

    def describe(self) -> dict[str, Any]:
        """Return version and journal, of JSON types."""
        return {"version": self.version, "changes": msgspec.to_builtins(self.changes)}

    def is_at(self, described: Mapping[str, Any]) -> bool:
        """Whether the model is built as was described."""
        return bool(msgspec.to_builtins(self.changes) == described["changes"])

    def close(self) -> None:
        """Take all slots off; what was done cannot be undone any more."""
        for name in list(self.slots):
            take_off(self._model, self.sites[name])
        self.slots.clear()
        self._done.clear()

    def rebuild(self, described: Mapping[str, Any]) -> None:
        """Take changes back and make others, until the model is built as was described.

        :raises GrowthError: it cannot be; the model is built as it was then.
        """
        wanted: list[Change] = msgspec.convert(described["changes"], list[Change])
        before, version = self.changes, self.version
        undone = self._back_to(wanted)
        try:
            for change in wanted[len(self._done) :]:
                self.make(change)
        except GrowthError:
            self._back_to(before)
            for change in before[len(self._done) :]:
                self.make(change)
            raise
        # An answer to a question about what was taken back must not fit what comes now.
        self.version = version + 1 if undone else max(version, int(described["version"]))

    def _back_to(self, wanted: Sequence[Change]) -> int:
        """Take changes back until what is left begins like ``wanted``; return how many."""
        count = 0
        while self.changes != list(wanted)[: len(self._done)]:
            self.take_back()
            count += 1
        return count

    def _make(
        self, change: Change, initial: Callable[[nn.Module], None] | None, undo: Undoing
    ) -> None:
        if isinstance(change, Plant):
            self._plant(change, initial, undo)
        elif isinstance(change, Uproot):
            self._uproot(change.slot, undo)
        else:
            self._fold(change, undo)

    def _plant(
        self, change: Plant, initial: Callable[[nn.Module], None] | None, undo: Undoing
    ) -> None:
        slot = self.slots[change.slot]
        blueprint = get(change.blueprint)
        if blueprint.version != change.blueprint_version:
            raise GrowthError(
                f"seed {change.slot!r} was built by version {change.blueprint_version} of "
                f"blueprint {change.blueprint!r}; there is version {blueprint.version}"
            )
        flow = live_flow(slot)
        with kept_random():
            torch.manual_seed(change.seed)
            seed = blueprint.build(flow, **change.planting.arguments)
            if initial is None:
                initialise("zero_out", seed)
            else:
                initial(seed)
            blend = make_blend(change.planting.blend, flow)
        slot.plant(seed.train(self._model.training), blend)
        undo.append(slot.clear)
        added = self._surgeon.add_group(
            _group(change.slot),
            _named(f"{self.sites[change.slot].path}.{SLOT}", slot),
            rate_factor=self.options.rate_factor,
            warmup_steps=self.options.warmup_steps,
        )
        undo.append(added.undo)

    def _uproot(self, name: str, undo: Undoing) -> None:
        slot = self.slots[name]
        seed, blend = slot.seed, slot.blend
        undo.append(self._surgeon.remove_group(_group(name)).undo)
        slot.clear()
        undo.append(lambda: slot.plant(seed, blend))

    def _fold(self, change: Fold, undo: Undoing) -> None:
        slot, site = self.slots[change.slot], self.sites[change.slot]
        blueprint = get(self._planted(change.slot).blueprint)
        folding = Folding(
            self._model, self._surgeon, self._optimizer, site, _group(change.slot), change.alpha
        )
        fold(folding, slot, blueprint, undo)
        if not change.reopened:
            del self.slots[change.slot]
            undo.append(lambda: self.slots.update({change.slot: slot}))
            return
        reopened = locate(self._model, change.slot)
        self.slots[change.slot] = self._open_slot(reopened)
        self.sites[change.slot] = reopened

        def close() -> None:
            take_off(self._model, reopened)
            self.slots[change.slot], self.sites[change.slot] = slot, site

        undo.append(close)

    def _planted(self, name: str) -> Plant:
        planted = (c for c in reversed(self.changes) if isinstance(c, Plant) and c.slot == name)
        return next(planted)


def live_flow(slot: Slot) -> Flow:
    """Return what flows through a slot, on the device where the model is now."""
    return replace(slot.flow, device=slot.alpha.device)


def seed_of_change(slot: str, version: int) -> int:
    """Return where a new seed's random numbers begin: the run's own, but drawn from no stream."""
    return zlib.crc32(f"{slot}/{version}/{torch.initial_seed()}".encode())


def _close(model: nn.Module, site: Site) -> None:
    take_off(model, site)


def _group(name: str) -> str:
    return f"seed:{name}"


def _named(path: str, slot: Slot) -> list[tuple[str, nn.Parameter]]:
    return [(f"{path}.{name}", parameter) for name, parameter in slot.named_parameters()]
