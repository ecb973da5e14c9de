import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper.leyline import EmergencyLevel
from esper.tolaria.emergency import EmergencyWord

WRITER = """
import sys
from pathlib import Path
from esper.leyline import EmergencyLevel
from esper.tolaria.emergency import EmergencyWord
word = EmergencyWord(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    number += 1
    word.set(EmergencyLevel(number % 5), f"{number % 5}" * (number % 300 + 1), "writer")
"""

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "r+b")
fcntl.flock(file, fcntl.LOCK_EX)
print("ready", flush=True)
time.sleep(60)
"""

READER = """
import sys
from pathlib import Path
from esper.tolaria.emergency import EmergencyWord
print(EmergencyWord(Path(sys.argv[1])).read())
"""


def start(program: str, path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture(params=["file", "memory"])
def word(request: pytest.FixtureRequest, tmp_path: Path) -> EmergencyWord:
    return EmergencyWord(tmp_path / "word" if request.param == "file" else None)


def test_a_new_word_says_that_all_is_well(word: EmergencyWord) -> None:
    state = word.read()
    assert state is not None
    assert (state.level, state.reason, state.sequence) == (EmergencyLevel.NONE, "", 0)
    assert word.acknowledged is None


def test_what_is_set_is_read(word: EmergencyWord) -> None:
    before = time.monotonic_ns()
    sequence = word.set(EmergencyLevel.SEVERE, "fire: in the cellår", "cli")
    state = word.read()
    assert state is not None
    assert state.level is EmergencyLevel.SEVERE
    assert (state.reason, state.origin) == ("fire: in the cellår", "cli")
    assert (state.sequence, state.process) == (sequence, os.getpid())
    assert word.sequence == sequence == 2
    assert before <= state.issued_ns <= time.monotonic_ns()


def test_a_long_reason_is_cut_between_characters(word: EmergencyWord) -> None:
    word.set(EmergencyLevel.MINOR, "x" + "é" * 400, "an origin far too long for the few bytes")
    state = word.read()
    assert state is not None
    assert state.reason == "x" + "é" * 175
    assert state.origin == "an origin far too long for the f"


def test_acknowledging_does_not_touch_the_word(word: EmergencyWord) -> None:
    sequence = word.set(EmergencyLevel.MAJOR, "why", "who")
    word.acknowledge(sequence)
    assert word.acknowledged is not None
    assert word.acknowledged[0] == sequence
    assert word.sequence == sequence
    assert word.read() is not None


def test_the_file_is_private_and_outlives_its_maker(tmp_path: Path) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as first:
        first.set(EmergencyLevel.CRITICAL, "stays", "cli")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == 512
    with EmergencyWord(path) as second:
        state = second.read()
        assert state is not None
        assert state.reason == "stays"
    assert [entry.name for entry in tmp_path.iterdir()] == ["word"]


@pytest.mark.parametrize("garbage", [b"", b"x", bytes(512), bytes(600), b"\xff" * 512])
def test_what_is_no_word_is_replaced(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "word"
    path.write_bytes(garbage)
    with EmergencyWord(path) as word:
        state = word.read()
        assert state is not None
        assert state.level is EmergencyLevel.NONE
    assert path.stat().st_size == 512


def test_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "word").symlink_to(tmp_path / "target")
    with pytest.raises(OSError):
        EmergencyWord(tmp_path / "word")
    assert (tmp_path / "target").read_bytes() == b"precious"


@pytest.mark.parametrize("position", [8, 12, 14, 20, 64, 200])
def test_a_damaged_word_is_not_believed_and_the_next_writing_repairs_it(
    tmp_path: Path, position: int
) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as word:
        word.set(EmergencyLevel.MINOR, "y" * 300, "cli")
        with path.open("r+b") as file:
            file.seek(position)
            byte = file.read(1)
            file.seek(position)
            file.write(bytes([byte[0] ^ 0x40]))
        assert word.read() is None
        word.set(EmergencyLevel.MAJOR, "again", "cli")
        state = word.read()
        assert state is not None
        assert state.reason == "again"


def test_a_word_of_a_writer_that_died_in_the_middle_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as word:
        sequence = word.set(EmergencyLevel.MINOR, "whole", "cli")
        with path.open("r+b") as file:
            file.write((sequence + 1).to_bytes(8, "little"))
        assert word.read() is None
        assert word.set(EmergencyLevel.MAJOR, "after", "cli") % 2 == 0
        state = word.read()
        assert state is not None
        assert state.reason == "after"


def test_no_torn_word_is_ever_read_while_others_write(tmp_path: Path) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as word:
        writers = [start(WRITER, path) for _ in range(2)]
        read = 0
        finish = time.monotonic() + 2
        while time.monotonic() < finish:
            state = word.read()
            if state is not None and state.reason:
                read += 1
                assert set(state.reason) == {str(int(state.level))}
        for writer in writers:
            end(writer)
        assert read > 100


def test_a_writer_that_is_killed_again_and_again_leaves_a_word_that_can_be_set(
    tmp_path: Path,
) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as word:
        for _ in range(4):
            writer = start(WRITER, path)
            time.sleep(0.02)
            end(writer)
            sequence = word.set(EmergencyLevel.SEVERE, "ours", "test")
            state = word.read()
            assert state is not None
            assert (state.sequence, state.reason) == (sequence, "ours")


def test_a_process_that_was_stopped_while_it_held_the_lock_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as word:
        holder = start(HOLDER, path)
        holder.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        word.set(EmergencyLevel.CRITICAL, "in spite of it", "test")
        assert time.monotonic() - began < 1
        state = word.read()
        assert state is not None
        assert state.reason == "in spite of it"
        end(holder)


def test_a_reader_that_exits_deletes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as word:
        word.set(EmergencyLevel.MINOR, "still here", "test")
        for _ in range(2):
            shown = subprocess.run(
                [sys.executable, "-c", READER, str(path)],
                capture_output=True,
                text=True,
                check=True,
            )
            assert "still here" in shown.stdout
    assert path.is_file()
