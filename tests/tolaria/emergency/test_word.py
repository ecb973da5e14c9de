import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline import EmergencyLevel
from esper.tolaria.emergency import EmergencyWord
from loops.counting import count_calls

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


class Interrupted:
    """A mapping in which another writer gets in between two stores of this one."""

    def __init__(self, memory: Any, other: EmergencyWord) -> None:
        self.memory = memory
        self.other = other
        self.overtaken_as: int | None = None

    def __setitem__(self, where: slice, data: bytes) -> None:
        self.memory[where] = data
        if self.overtaken_as is None:
            self.overtaken_as = self.other.set(EmergencyLevel.SEVERE, "overtakes", "other")


def test_a_writer_that_was_overtaken_writes_again_and_no_number_comes_twice(tmp_path: Path) -> None:
    with EmergencyWord(tmp_path / "word") as slow, EmergencyWord(tmp_path / "word") as fast:
        memory = slow._map
        interrupted = Interrupted(memory, fast)
        slow._map = interrupted  # type: ignore[assignment]
        number = slow.set(EmergencyLevel.MAJOR, "was stopped", "slow")
        slow._map = memory
        assert interrupted.overtaken_as is not None
        assert number > interrupted.overtaken_as
        state = fast.read()
        assert state is not None
        assert (state.sequence, state.reason) == (number, "was stopped")
        assert fast.set(EmergencyLevel.NONE, "", "fast") > number


def test_a_writer_out_of_turn_keeps_away_from_the_numbers_of_the_one_whose_turn_it_is(
    tmp_path: Path,
) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as ours, EmergencyWord(path) as theirs, ours.turn() as alone:
        assert alone
        before = theirs.set(EmergencyLevel.MINOR, "out of turn", "theirs")
        after = theirs.set(EmergencyLevel.MINOR, "out of turn", "theirs")
        assert before > 100
        assert after > before + 100
        assert ours.set(EmergencyLevel.MINOR, "in turn", "ours") == after + 2


@pytest.mark.parametrize("number", [2**64 - 1, 2**64 - 2])
def test_a_number_that_cannot_rise_any_more_starts_anew(tmp_path: Path, number: int) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as word:
        with path.open("r+b") as file:
            file.write(number.to_bytes(8, "little"))
        word.set(EmergencyLevel.MAJOR, "again", "cli")
        state = word.read()
        assert state is not None
        assert state.reason == "again"


@given(garbage=st.binary(min_size=512, max_size=512))
def test_whatever_another_process_writes_over_it_makes_nothing_fail(garbage: bytes) -> None:
    with EmergencyWord(None) as word:
        word._map[:512] = garbage
        word.read()
        assert word.acknowledged is None
        sequence = word.set(EmergencyLevel.MAJOR, "again", "cli")
        word.acknowledge(sequence)
        state = word.read()
        assert state is not None
        assert (state.sequence, state.reason) == (sequence, "again")
        assert word.acknowledged is not None


def test_a_word_that_stays_torn_costs_little_to_look_at(tmp_path: Path) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as word:
        word.set(EmergencyLevel.MINOR, "y" * 300, "cli")
        with path.open("r+b") as file:
            file.seek(100)
            file.write(b"torn")
        assert word.read() is None

        def look() -> None:
            for _ in range(100):
                word.read()

        assert count_calls(look).total() / 100 < 30


def test_nobody_gets_between_a_look_and_a_writing_of_one_turn(tmp_path: Path) -> None:
    path = tmp_path / "word"
    with EmergencyWord(path) as ours, EmergencyWord(path) as theirs:
        began = time.monotonic()
        with ours.turn():
            with path.open("rb") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours.set(EmergencyLevel.MINOR, "nested", "ours")
            theirs.set(EmergencyLevel.MAJOR, "does not wait for ever", "theirs")
        assert time.monotonic() - began < 1
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("where", ["file", "memory"])
def test_threads_that_share_a_word_take_turns(tmp_path: Path, where: str) -> None:
    numbers: list[int] = []

    def write(word: EmergencyWord) -> None:
        numbers.extend(word.set(EmergencyLevel.MINOR, f"{n}", "thread") for n in range(300))

    with EmergencyWord(tmp_path / "word" if where == "file" else None) as word:
        threads = [threading.Thread(target=write, args=(word,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(numbers)) == len(numbers) == 1200
        state = word.read()
        assert state is not None
        assert state.sequence == max(numbers)


FULL = """
import os, resource, signal, sys
from pathlib import Path
from esper.tolaria.emergency import EmergencyWord
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
before = len(os.listdir("/proc/self/fd"))
try:
    EmergencyWord(Path(sys.argv[1]))
except OSError:
    sys.exit(len(os.listdir("/proc/self/fd")) - before)
"""


@pytest.mark.parametrize("room", [0, 100])
def test_without_room_for_it_the_word_is_refused_and_nothing_is_left(
    tmp_path: Path, room: int
) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "word"), str(room)]
    assert subprocess.run(command, check=False).returncode == 0
    assert list(tmp_path.iterdir()) == []
