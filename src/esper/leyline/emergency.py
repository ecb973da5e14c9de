"""Emergencies: how bad they are, and the message that tells of one."""

import math
from enum import IntEnum

import msgspec

_ACT_WITHIN_S = (math.inf, 5.0, 2.0, 0.5, 0.1)


class EmergencyLevel(IntEnum):
    """How bad it is, and so what a run does about it."""

    NONE = 0
    MINOR = 1
    MAJOR = 2
    SEVERE = 3
    CRITICAL = 4

    @property
    def act_within_s(self) -> float:
        """Seconds within which a run is to act."""
        return _ACT_WITHIN_S[self]

    @classmethod
    def parse(cls, value: "EmergencyLevel | str | int") -> "EmergencyLevel":
        """Return the level of a name, in any case, or of a number.

        :raises ValueError: there is no such level.
        """
        if isinstance(value, str) and value.upper() in cls.__members__:
            return cls[value.upper()]
        if isinstance(value, int) and not isinstance(value, bool) and value in list(cls):
            return cls(value)
        known = ", ".join(level.name.lower() for level in cls)
        raise ValueError(f"{value!r} is no emergency level; known are {known}")


class EmergencySignal(msgspec.Struct, frozen=True, tag_field="type", tag="emergency"):
    """One escalation, for whoever has to know.

    :param id: the same whenever this signal is sent again.
    :param level: how bad it is.
    :param reason: one sentence for a person.
    :param origin: who escalated, for instance ``engine`` or ``cli``.
    :param time: seconds since the Unix epoch.
    :param run: name of the run.
    :param step: steps that it had taken.
    """

    id: str
    level: EmergencyLevel
    reason: str
    origin: str
    time: float
    run: str
    step: int
