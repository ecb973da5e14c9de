import time
from pathlib import Path

import pytest
import torch

from esper.core.worker import AsyncWorker
from esper.tolaria.profiler import ProfilerError, Trace
from esper.tolaria.profiler.recording import Recording
from esper.tolaria.profiler.writer import TraceWriter, write_trace


class SlowRecording(Recording):
    def save(self, path: Path) -> None:
        time.sleep(0.3)
        super().save(path)


class BrokenRecording(Recording):
    def save(self, path: Path) -> None:
        raise MemoryError("no room")


def recorded(kind: type[Recording] = Recording) -> Recording:
    recording = kind()
    recording.start()
    recording.begin_step(0)
    torch.ones(3).sum()
    recording.end_step()
    recording.stop()
    return recording


def test_no_other_file_is_ever_replaced(tmp_path: Path) -> None:
    path = tmp_path / "taken.pt.trace.json"
    path.write_text("somebody's")
    with pytest.raises(ProfilerError, match=r"taken\.pt\.trace\.json cannot be written: .*exists"):
        write_trace(recorded(), path)
    assert path.read_text() == "somebody's"
    assert list(tmp_path.iterdir()) == [path]


def test_a_trace_is_written_once(tmp_path: Path) -> None:
    recording = recorded()
    write_trace(recording, tmp_path / "one.pt.trace.json")
    with pytest.raises(ProfilerError, match="already saved"):
        write_trace(recording, tmp_path / "two.pt.trace.json")


def test_writing_that_takes_too_long_is_told(tmp_path: Path) -> None:
    outcomes: list[Trace | ProfilerError] = []
    with AsyncWorker(preload=()) as worker:
        writer = TraceWriter(tmp_path, "run", worker, timeout_s=0.05)
        writer.write(recorded(SlowRecording), outcomes.append)
        assert writer.busy
        with pytest.raises(RuntimeError, match="the one before is being written"):
            writer.write(recorded(), outcomes.append)
        writer.finish()
    assert "the trace was not written" in str(outcomes[0])


@pytest.mark.parametrize("beside", [True, False])
def test_any_error_while_writing_is_told(tmp_path: Path, beside: bool) -> None:
    outcomes: list[Trace | ProfilerError] = []
    with AsyncWorker(preload=()) as worker:
        writer = TraceWriter(tmp_path, "run", worker if beside else None)
        writer.write(recorded(BrokenRecording), outcomes.append)
        writer.finish()
    assert "the trace was not written: MemoryError: no room" in str(outcomes[0])
    assert list(tmp_path.iterdir()) == []
