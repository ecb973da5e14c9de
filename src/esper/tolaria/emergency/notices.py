"""The events that tell a person of emergencies."""

from esper.leyline import EmergencyLevel, Level
from esper.tolaria.emergency.broadcast import Announce


class Notices:
    """Puts what happened into words.

    :param announce: takes events: name, message, level, data.
    """

    def __init__(self, announce: Announce) -> None:
        self._announce = announce

    def escalated(
        self, level: EmergencyLevel, reason: str, origin: str, present: EmergencyLevel
    ) -> None:
        """Tell of a level that was asked for, and of the one that holds now."""
        name = _name(level)
        self._announce(
            "emergency_escalated",
            f"emergency {name} ({origin}): {reason}",
            Level.CRITICAL if level >= EmergencyLevel.SEVERE else Level.WARNING,
            {"level": name, "reason": reason, "origin": origin, "present": _name(present)},
        )

    def lowered(
        self, before: EmergencyLevel, level: EmergencyLevel, reason: str, origin: str
    ) -> None:
        """Tell of a level that was lowered, or of an emergency that is over."""
        why = f": {reason}" if reason else ""
        data = {"before": _name(before), "level": _name(level), "origin": origin}
        if level is EmergencyLevel.NONE:
            message = f"emergency {_name(before)} is over ({origin}){why}"
            self._announce("emergency_cleared", message, Level.INFO, data)
        else:
            message = f"emergency {_name(before)} lowered to {_name(level)}{why}"
            self._announce("emergency_downgraded", message, Level.WARNING, data)

    def left_over(self, before: EmergencyLevel, reason: str) -> None:
        """Tell of a level that an earlier process has left, and that does not hold any more."""
        message = f"emergency {_name(before)} of an earlier process ({reason}) is over"
        data = {"before": _name(before), "level": "none", "origin": "engine"}
        self._announce("emergency_cleared", message, Level.INFO, data)

    def acted(self, level: EmergencyLevel, origin: str, milliseconds: float, *, late: bool) -> None:
        """Tell how long it took until a level was acted on."""
        name, allowed = _name(level), level.act_within_s * 1e3
        message = f"{name}: acted on after {milliseconds:.4g} ms; {allowed:g} ms are allowed"
        data = {"level": name, "latency_ms": milliseconds, "origin": origin}
        event = "emergency_acted_late" if late else "emergency_acted"
        self._announce(event, message, Level.WARNING if late else Level.INFO, data)

    def word_failed(self, error: str) -> None:
        """Tell that other processes do not hear of an emergency."""
        message = f"other processes could not be told of an emergency: {error}"
        self._announce("emergency_word_failed", message, Level.CRITICAL, {"error": error})


def _name(level: EmergencyLevel) -> str:
    return level.name.lower()
