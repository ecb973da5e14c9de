"""New parameters in the places of old ones, with or without the old ones' moments."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from esper.kasmina.surgery import groups
from esper.kasmina.surgery.moments import require_larger, widened
from esper.leyline import GrowthError

State = dict[str, Any]


class Replacement:
    """Worked out in full when it is made; carrying it out cannot fail.

    :param pairs: old and new parameter.
    :param carry: widen the old moments; else the new parameters start with none.
    :raises GrowthError: a parameter or an entry of the state does not fit.
    """

    def __init__(
        self, optimizer: Optimizer, pairs: list[tuple[Tensor, Tensor]], *, carry: bool
    ) -> None:
        groups.require_new(optimizer, [new for _, new in pairs], "the replacement")
        self._optimizer = optimizer
        self._heirs: dict[Tensor, Tensor] = dict(pairs)
        if len(self._heirs) < len(pairs):
            raise GrowthError("a parameter cannot be replaced twice at once; pass each one once")
        self._places = {old: groups.place(optimizer, old, "replace") for old in self._heirs}
        self._new_states = {
            new: self._carried(old, new) if carry else self._fresh(old, new) for old, new in pairs
        }
        self._members = groups.members(optimizer)
        self._order = list(optimizer.state)
        self._old_states: dict[Tensor, State | None] = {
            old: optimizer.state.get(old) for old in self._heirs
        }

    def carry_out(self) -> None:
        """Put the new parameters into their places."""
        for old, (group, position) in self._places.items():
            self._optimizer.param_groups[group]["params"][position] = self._heirs[old]
        order = [self._heirs.get(parameter, parameter) for parameter in self._order]
        leaving = dict.fromkeys(self._old_states)
        groups.set_state(self._optimizer, order, {**leaving, **self._new_states})

    def take_back(self) -> None:
        """Put the old parameters back, with the state that they left with."""
        groups.set_members(self._optimizer, self._members)
        leaving = dict.fromkeys(self._new_states)
        groups.set_state(self._optimizer, self._order, {**leaving, **self._old_states})

    def _carried(self, old: Tensor, new: Tensor) -> State | None:
        which = groups.label(self._optimizer, self._places[old])
        require_larger(old, new, which)
        state = self._optimizer.state.get(old)
        return None if state is None else widened(state, old, new, self._group(old), which)

    def _fresh(self, old: Tensor, new: Tensor) -> State | None:
        group = self._group(old)
        staying = [parameter for parameter in group["params"] if parameter not in self._heirs]
        return groups.initial_state(self._optimizer, new, group, staying)

    def _group(self, old: Tensor) -> groups.Group:
        return self._optimizer.param_groups[self._places[old].group]
