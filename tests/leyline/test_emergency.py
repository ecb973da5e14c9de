import math

import msgspec
import pytest

from esper.leyline import EmergencyLevel, EmergencySignal


@pytest.mark.parametrize("value", ["severe", "SEVERE", "Severe", 3, EmergencyLevel.SEVERE])
def test_a_level_is_known_by_name_and_by_number(value: EmergencyLevel | str | int) -> None:
    assert EmergencyLevel.parse(value) is EmergencyLevel.SEVERE


@pytest.mark.parametrize("value", ["", "panic", 5, -1, True, None, 2.0])
def test_what_is_no_level_is_refused_with_those_that_are(value: object) -> None:
    with pytest.raises(ValueError, match="known are none, minor, major, severe, critical"):
        EmergencyLevel.parse(value)  # type: ignore[arg-type]


def test_the_worse_it_is_the_sooner_a_run_acts() -> None:
    times = [level.act_within_s for level in EmergencyLevel]
    assert times == [math.inf, 5.0, 2.0, 0.5, 0.1]


def test_a_signal_survives_the_wire() -> None:
    signal = EmergencySignal("a1", EmergencyLevel.MAJOR, "disk", "cli", 1.5, "run", 7)
    assert msgspec.json.decode(msgspec.json.encode(signal), type=EmergencySignal) == signal
