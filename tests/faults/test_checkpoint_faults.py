"""Checkpoints under real faults: kills, flipped bits, cut files, a full disk, planted code."""

import errno
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper.leyline import CheckpointError
from esper.tolaria.rollback import CheckpointStore
from support.states import Stamped

pytestmark = [pytest.mark.fault, pytest.mark.timeout(180)]
TESTS = Path(__file__).parent.parent

WRITER = """
import sys
from pathlib import Path
from support.states import Stamped
from esper.tolaria.rollback import CheckpointStore
state = Stamped(int(sys.argv[2]))
first, last = int(sys.argv[3]), int(sys.argv[4])
with CheckpointStore(Path(sys.argv[1]), keep=1) as store:
    print("ready", flush=True)
    for step in range(first, last):
        state.set(step)
        store.save(state, step=step)
        print(step, flush=True)
"""


def writer(directory: Path, size: int, first: int, last: int) -> list[str]:
    return [sys.executable, "-c", WRITER, str(directory), str(size), str(first), str(last)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}


def check_oracle(directory: Path, acknowledged: int | None, size: int) -> int | None:
    """What was acknowledged, or something newer, must load and be whole."""
    state = Stamped(size)
    try:
        info = CheckpointStore(directory).load_latest(state)
    except CheckpointError:
        assert acknowledged is None, f"step {acknowledged} was acknowledged and is gone"
        return None
    assert state.is_step(info.step)
    assert acknowledged is None or info.step >= acknowledged
    return info.step


def test_a_writer_killed_at_random_moments_loses_nothing_acknowledged(tmp_path: Path) -> None:
    size, seed = 200_000, random.Random(0)
    newest = 0
    for _ in range(25):
        process = subprocess.Popen(
            writer(tmp_path, size, newest + 1, newest + 10_000),
            stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + seed.uniform(0.01, 0.25)
        while time.monotonic() < deadline:
            pass
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        acknowledged = int(lines[-1]) if lines else (newest or None)
        newest = check_oracle(tmp_path, acknowledged, size) or newest
    assert newest > 25, "the kills must have struck a working writer"


@pytest.mark.parametrize(
    ("call", "step", "fewest"),
    [
        ("write", 2, 7),
        ("fsync", 2, 6),
        ("rename", 2, 2),
        ("rename", 1, 2),
        ("mkdir", 2, 1),
        ("unlink", 2, 3),
        ("rmdir", 2, 1),
    ],
)
def test_a_writer_killed_at_every_system_call_of_a_save_loses_nothing(
    tmp_path: Path, call: str, step: int, fewest: int
) -> None:
    """Save ``step`` over step 1, killed at the first ``call``, then the second, to the end.

    :param fewest: calls that a save has to make; fewer kills have missed it.
    """
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: kills at each system call are not tested")
    saved = tmp_path / "saved"
    with CheckpointStore(saved) as store:
        state = Stamped()
        state.set(1)
        store.save(state, step=1)
    for kills in range(60):
        directory = tmp_path / f"{kills}"
        shutil.copytree(saved, directory)
        # The pattern covers both a call and its *at form: which of them exists is the platform's.
        inject = f"inject=/^{call}(at2?)?$:signal=KILL:when={kills + 1}"
        command = ["strace", "--seccomp-bpf", "-f", "-qq", "-o", os.devnull, "-e", inject]
        result = subprocess.run(
            [*command, *writer(directory, 2000, step, step + 1)],
            capture_output=True, text=True, env=environment(), check=False,
        )  # fmt: skip
        if "Operation not permitted" in result.stderr:
            pytest.skip("strace may not trace here: kills at each system call are not tested")
        if "invalid system call" in result.stderr:
            pytest.skip(f"this platform has no {call}: kills at it are not tested")
        assert result.returncode in (0, -signal.SIGKILL), result.stderr
        acknowledged = step if f"{step}\n" in result.stdout else 1
        found = check_oracle(directory, acknowledged, 2000)
        with CheckpointStore(directory) as store:
            store.save(Stamped(), step=3)
            assert [info.step for info in store.list()][:2] == [3, found]
        assert not [path for path in directory.iterdir() if path.name.startswith(".")]
        if result.returncode == 0:
            break
    assert result.returncode == 0
    assert kills >= fewest


def test_a_failing_sync_is_an_error_and_older_checkpoints_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, left = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    for calls in range(6):
        directory = tmp_path / f"{calls}"
        state = Stamped()
        state.set(1)
        with CheckpointStore(directory, keep=1) as store:
            left = 1000
            store.save(state, step=1)
            left = calls
            state.set(2)
            if calls == 5:
                # Three files, their directory and the one above it were synced.
                store.save(state, step=2)
                continue
            with pytest.raises(CheckpointError, match=re.escape(str(directory))) as raised:
                store.save(state, step=2)
            assert isinstance(raised.value.__cause__, OSError)
            assert (directory / "step-000000001").is_dir()
            assert not list(directory.glob(".tmp-*"))
            check_oracle(directory, 1, 2000)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "MANIFEST.json"])
def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path, name: str) -> None:
    state = Stamped(400)
    with CheckpointStore(tmp_path) as store:
        for step in (1, 2):
            state.set(step)
            store.save(state, step=step)
    path = tmp_path / "step-000000002" / name
    whole = path.read_bytes()
    seed = random.Random(name)
    store = CheckpointStore(tmp_path)
    for offset in {
        0,
        7,
        8,
        9,
        len(whole) - 1,
        *seed.sample(range(len(whole)), min(60, len(whole))),
    }:
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << seed.randrange(8)
        path.write_bytes(damaged)
        assert not store.verify()[0].valid, f"a bit flipped at {offset} went unnoticed"
    for length in {0, 1, 8, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert not store.verify()[0].valid, f"a cut to {length} bytes went unnoticed"
    path.write_bytes(whole + b"\0")
    assert not store.verify()[0].valid
    fresh = Stamped(400)
    assert store.load_latest(fresh).step == 1
    assert fresh.is_step(1)


def test_a_full_disk_is_an_error_and_older_checkpoints_stay(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("mounting needs privileges that are missing: a full disk is not tested")
    try:
        small, large = Stamped(1000), Stamped(2_000_000)
        small.set(1)
        with CheckpointStore(tmp_path) as store:
            store.save(small, step=1)
            with pytest.raises(CheckpointError, match="No space left"):
                store.save(large, step=2)
            assert sorted(path.name for path in tmp_path.iterdir()) == [
                "JOURNAL",
                "LOCK",
                "step-000000001",
            ]
            small.set(3)
            store.save(small, step=3)
        fresh = Stamped(1000)
        assert CheckpointStore(tmp_path).load_latest(fresh).step == 3
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


class Planted:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["ESPER_TEST_PLANTED"],)


def test_a_planted_pickle_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_TEST_PLANTED", str(tmp_path / "ran"))
    state = Stamped()
    with CheckpointStore(tmp_path / "store") as store:
        store.save(state, step=1)
    for path in (tmp_path / "store" / "step-000000001").iterdir():
        path.write_bytes(pickle.dumps(Planted()))
    with pytest.raises(CheckpointError):
        CheckpointStore(tmp_path / "store").load_latest(state)
    assert not (tmp_path / "ran").exists()
    assert state.restored == 0
