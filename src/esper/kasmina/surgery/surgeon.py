"""Operations on a live optimizer, its moments and its schedule while a model grows."""

from collections.abc import Iterable
from functools import partial

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper.kasmina.surgery import groups
from esper.kasmina.surgery.replacement import Replacement, State
from esper.kasmina.surgery.schedule import Entry, Schedule
from esper.kasmina.surgery.undo import Journal, Undo
from esper.kasmina.surgery.warm_up import attach
from esper.leyline import GrowthError

States = dict[Tensor, State | None]


class OptimizerSurgeon:
    """Changes groups, parameters and moments of an optimizer between two of its steps.

    An operation takes effect wholly, or raises before it has touched anything. Each returns an
    :class:`Undo`; these are used in reverse order, the last operation's first. With no step in
    between, undoing puts every bit back. Steps taken in between are not taken back: what was
    removed or replaced returns as it was then, what stayed keeps what it has learnt. To go back in
    time, undo first, then restore a snapshot of that time.

    Groups added here hold ``name``, ``warmup_steps`` and ``warmup_left`` besides what the first
    group holds, all saved with the optimizer.

    :param optimizer: any of ``torch.optim`` that has a state for each parameter, or one that keeps
        to its layout. Its step is hooked, once, to warm new groups up.
    :param scheduler: what sets the optimizer's rates; a scheduler that steps it but is not given
        here goes wrong at the first operation. A ``SequentialLR`` or ``ChainedScheduler`` counts
        with all its parts.
    :raises GrowthError: the scheduler is another optimizer's.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None = None) -> None:
        self._optimizer = optimizer
        self._schedule = Schedule(optimizer, scheduler)
        self._journal = Journal()
        self._warm_up = attach(optimizer)

    @property
    def operations(self) -> list[str]:
        """What can still be undone, in words, oldest first."""
        return self._journal.operations

    def commit(self) -> None:
        """Let go of everything that could be undone, and of the memory that this takes."""
        self._journal.clear()

    def restore_rates(self) -> None:
        """Put back the rates of groups that warm up, after a step that raised.

        The next step, the next operation and ``optimizer.state_dict()`` do this by themselves; call
        it where the schedule goes on before any of them.
        """
        self._warm_up.recover()

    def require_growable(self, *, rate_factor: float = 1.0) -> None:
        """Refuse now what :meth:`add_group` would refuse for the optimizer's or schedule's sake.

        :param rate_factor: the new group's rate over the first group's.
        :raises GrowthError: no group can be added.
        """
        groups.require_supported(self._optimizer)
        groups.require_factor(rate_factor)
        self._schedule.require_known()
        self._schedule.require_share(rate_factor)

    def add_group(
        self,
        name: str,
        parameters: Iterable[Tensor | tuple[str, Tensor]],
        *,
        rate_factor: float = 1.0,
        warmup_steps: int = 0,
    ) -> Undo:
        """Add parameters as a group of their own, with the first group's hyper-parameters.

        Its rate stays at ``rate_factor`` times the first group's as the schedule goes on.

        :param name: of the group, such as ``seed:trunk.4``.
        :param parameters: tensors, or pairs of name and tensor. Names are needed where the
            optimizer was built with them, and dropped where it was not.
        :param rate_factor: above 0.
        :param warmup_steps: steps in which the rate rises linearly, from ``1/warmup_steps`` of
            itself in the first to all of it in the last.
        :raises GrowthError: the name is taken, a parameter is held already, or optimizer or
            schedule cannot take a group in.
        """
        self._begin()
        self.require_growable(rate_factor=rate_factor)
        optimizer = self._optimizer
        group = groups.new_group(optimizer, name, parameters, rate_factor, warmup_steps)
        states = {p: groups.initial_state(optimizer, p, group) for p in group["params"]}
        pairs = zip(group.pop("param_names", ()), group["params"], strict=False)
        try:
            optimizer.add_param_group({**group, "params": list(pairs) or group["params"]})
        except (TypeError, ValueError, RuntimeError) as error:
            raise GrowthError(f"the optimizer refuses group {name!r}: {error}") from error
        groups.set_state(optimizer, optimizer.state, states)
        self._schedule.append(rate_factor)

        def back() -> None:
            self._drop(name)

        return self._journal.enter(f"adding group {name!r}", back)

    def remove_group(self, name: str) -> Undo:
        """Remove a group with its parameters' state; the parameters themselves are left alone.

        :raises GrowthError: there is no such group, it is the first one, or the schedule cannot be
            told.
        """
        index = self._removable(name)
        order = list(self._optimizer.state)
        group, entries, states = self._drop(name)
        back = partial(self._put_back, index, group, entries, (order, states))
        return self._journal.enter(f"removing group {name!r}", back)

    def merge_group(self, name: str, into: str | None = None) -> Undo:
        """Move all parameters of a group to the end of another; the group ends, moments stay.

        What is left of the group's warm-up ends with it.

        :param into: a group's name; None is the first group.
        :raises GrowthError: there is no such group, the options of the two shape the state
            differently, or the schedule cannot be told.
        """
        index, target = self._removable(name), groups.find_group(self._optimizer, into)
        self._require_movable(self._optimizer.param_groups[index]["params"], target)
        kept = groups.members(self._optimizer)
        for _ in kept[index][0]:
            groups.move(self._optimizer, groups.Place(index, 0), target)
        group = self._optimizer.param_groups.pop(index)
        entries = self._schedule.remove(index)

        def back() -> None:
            self._put_back(index, group, entries, None)
            groups.set_members(self._optimizer, kept)

        return self._journal.enter(f"merging group {name!r}", back)

    def move_parameters(self, parameters: Iterable[Tensor], into: str | None = None) -> Undo:
        """Move parameters to the end of another group; their moments stay.

        :param into: a group's name; None is the first group.
        :raises GrowthError: a parameter is not held, or in that group already, a group would be
            left empty, or options of the groups shape the state differently.
        """
        self._begin()
        moving, target = list(parameters), groups.find_group(self._optimizer, into)
        if not moving or len(set(moving)) < len(moving):
            raise GrowthError("no parameter to move, or one is there twice; pass each one once")
        sources = self._require_movable(moving, target)
        for index in set(sources):
            group = self._optimizer.param_groups[index]
            if len(group["params"]) == sources.count(index):
                raise GrowthError(
                    f"moving {len(moving)} parameters would leave group "
                    f"{group.get('name', index)!r} empty; use merge_group, which ends the group"
                )
        kept = groups.members(self._optimizer)
        for parameter in moving:
            groups.move(self._optimizer, groups.place(self._optimizer, parameter, "move"), target)
        back = partial(groups.set_members, self._optimizer, kept)
        return self._journal.enter(f"moving {len(moving)} parameters", back)

    def replace_parameters(
        self, pairs: Iterable[tuple[Tensor, Tensor]], *, carry: bool = True
    ) -> Undo:
        """Put new parameters in the places of old ones, all at once.

        :param pairs: old and new parameter. With ``carry``, the old one has to correspond to the
            leading block of the new one, ``new[:rows, :columns]`` and so on.
        :param carry: widen the old moments by what new entries begin with; else the new parameters
            start with none.
        :raises GrowthError: an old parameter is not held or a new one is, shapes do not fit, or an
            entry of the state has a shape that cannot be understood.
        """
        self._begin()
        change = Replacement(self._optimizer, list(pairs), carry=carry)
        change.carry_out()
        return self._journal.enter("replacing parameters", change.take_back)

    def _begin(self) -> None:
        self._warm_up.recover()
        groups.require_supported(self._optimizer)

    def _removable(self, name: str) -> int:
        self._begin()
        index = groups.find_group(self._optimizer, name)
        if index == 0:
            raise GrowthError(
                f"group {name!r} is the optimizer's first one, whose rate the others follow; it "
                "cannot be removed or merged"
            )
        self._schedule.require_known()
        return index

    def _require_movable(self, moving: list[Tensor], target: int) -> list[int]:
        """Return the index of each parameter's group."""
        there = self._optimizer.param_groups
        sources = [groups.place(self._optimizer, parameter, "move").group for parameter in moving]
        for index in sources:
            if index == target:
                raise GrowthError(
                    f"parameters of group {there[index].get('name', index)!r} are in that group "
                    "already; name another one to move them into"
                )
            groups.require_alike(there[index], there[target])
        groups.require_as_far(self._optimizer, moving, there[target])
        return sources

    def _drop(self, name: str) -> tuple[groups.Group, list[Entry], States]:
        index = groups.find_group(self._optimizer, name)
        group = self._optimizer.param_groups.pop(index)
        entries = self._schedule.remove(index)
        states = {p: self._optimizer.state.get(p) for p in group["params"]}
        groups.set_state(self._optimizer, self._optimizer.state, dict.fromkeys(states))
        return group, entries, states

    def _put_back(
        self,
        index: int,
        group: groups.Group,
        entries: list[Entry],
        state: tuple[list[Tensor], States] | None,
    ) -> None:
        self._optimizer.param_groups.insert(index, group)
        self._schedule.insert(index, entries)
        if state is not None:
            groups.set_state(self._optimizer, *state)
