import subprocess
import sys
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from esper.tolaria.rollback import SharedDeadlineSignal

READER = """
import sys
from pathlib import Path
from esper.tolaria.rollback import SharedDeadlineSignal
trip = SharedDeadlineSignal(Path(sys.argv[1])).read()
print(trip.count, trip.at_ns, trip.deadline_ms, trip.process, trip.reason, sep="|")
"""


def test_another_process_learns_when_and_why(tmp_path: Path) -> None:
    path = tmp_path / "signal"
    with SharedDeadlineSignal(path) as signal:
        assert signal.read() is None
        before = time.monotonic_ns()
        signal.trip("first", 500)
        trip = signal.trip("the disk did not answer", 12000)
        assert before <= trip.at_ns <= time.monotonic_ns()
    told = subprocess.run(
        [sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=True
    )
    expected = f"2|{trip.at_ns}|12000.0|{trip.process}|the disk did not answer\n"
    assert told.stdout == expected


def test_it_can_be_forgotten_and_survives_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "signal"
    SharedDeadlineSignal(path).trip("late", 1)
    with SharedDeadlineSignal(path) as signal:
        assert signal.read() is not None
        signal.clear()
        assert signal.read() is None


@given(reason=st.text(), at=st.integers(0, 255), bit=st.integers(0, 7))
def test_any_text_is_carried_and_any_flipped_bit_is_noticed(reason: str, at: int, bit: int) -> None:
    with SharedDeadlineSignal() as signal:
        trip = signal.trip(reason, 1.5)
        read = signal.read()
        assert read is not None
        assert reason.encode("utf-8", "replace").decode().startswith(read.reason)
        assert (read.count, read.at_ns) == (1, trip.at_ns)
        signal._map[at] ^= 1 << bit
        assert signal.read() is None


def test_a_file_of_something_else_is_made_into_one(tmp_path: Path) -> None:
    (tmp_path / "signal").write_bytes(b"x" * 1000)
    with SharedDeadlineSignal(tmp_path / "signal") as signal:
        assert signal.read() is None
        signal.trip("late", 1)
        assert signal.read() is not None
