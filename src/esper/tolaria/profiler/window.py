"""When a step is profiled: wait, warm up, record, and again; a small pure state machine."""

from dataclasses import dataclass
from enum import StrEnum

from esper.leyline import ConfigError


class Phase(StrEnum):
    """What the profiler does during one step."""

    WAIT = "wait"
    WARMUP = "warmup"
    ACTIVE = "active"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Window:
    """Cycles of waiting, warming up and recording, counted in steps.

    It agrees with ``torch.profiler.schedule``, but always ends.

    :param wait: steps that are left alone at the start of each cycle.
    :param warmup: steps with the profiler switched on whose events are thrown away, so that the
        cost of switching it on is in no trace.
    :param active: steps that are recorded into one trace.
    :param repeat: cycles, one trace each.
    :raises ConfigError: a number is out of range.
    """

    wait: int = 0
    warmup: int = 1
    active: int = 5
    repeat: int = 1

    def __post_init__(self) -> None:
        for name, least in (("wait", 0), ("warmup", 0), ("active", 1), ("repeat", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} of a profiler window is {value}; give {least} or more")

    @property
    def length(self) -> int:
        """Steps of one cycle."""
        return self.wait + self.warmup + self.active

    def phase(self, position: int) -> Phase:
        """Return what happens during the step at ``position``, counted from 0."""
        if position >= self.length * self.repeat:
            return Phase.DONE
        within = position % self.length
        if within < self.wait:
            return Phase.WAIT
        return Phase.WARMUP if within < self.wait + self.warmup else Phase.ACTIVE

    def opens(self, position: int) -> bool:
        """Whether the profiler is switched on before the step at ``position``."""
        return self.phase(position) is not Phase.DONE and position % self.length == self.wait

    def closes(self, position: int) -> bool:
        """Whether the trace is complete after the step at ``position``."""
        return self.phase(position) is Phase.ACTIVE and (position + 1) % self.length == 0
