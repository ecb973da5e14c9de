"""Power cuts on a real file system: an ext4 of its own is shut down without a flush."""

import fcntl
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.tolaria.rollback import CheckpointStore
from support.states import Stamped

pytestmark = [pytest.mark.fault, pytest.mark.timeout(3600)]
PATH = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
CUTS = int(os.environ.get("ESPER_TEST_POWER_CUTS", "12"))
# _IOR('X', 125, __u32), and the flag that drops what the journal has not written yet.
EXT4_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2

WRITER = """
import sys
from pathlib import Path
from support.states import Stamped
from esper.tolaria.rollback import CheckpointStore
state = Stamped(20_000)
with CheckpointStore(Path(sys.argv[1]), keep=2) as store:
    step = max((info.step for info in store.list()), default=0)
    print("ready", flush=True)
    while True:
        step += 1
        state.set(step)
        store.save(state, step=step)
        print(step, flush=True)
"""


class Disk:
    """A file system in a file, which can lose power."""

    def __init__(self, place: Path) -> None:
        self._image, self.path = place / "image", place / "disk"
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(48 << 20)
        run("mkfs.ext4", "-q", "-F", str(self._image))
        self.mount()

    def mount(self) -> None:
        run("mount", "-o", "loop", str(self._image), str(self.path))

    def cut(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(descriptor)

    def unmount(self) -> None:
        run("umount", str(self.path))


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed: power cuts are not tested")
    try:
        made = Disk(tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("mounting needs privileges that are missing: power cuts are not tested")
    yield made
    subprocess.run(["umount", str(made.path)], check=False, capture_output=True)


def test_what_was_acknowledged_before_the_power_went_is_there_when_it_comes_back(
    disk: Disk, tmp_path: Path
) -> None:
    seed, newest, saves = random.Random(0), 0, 0
    said = tmp_path / "stderr"
    for _ in range(CUTS):
        with said.open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", WRITER, str(disk.path / "checkpoints")],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"},
            )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", said.read_text()
        acknowledged = newest
        for _ in range(seed.randrange(0, 6)):
            line = process.stdout.readline()
            assert line, said.read_text()
            acknowledged = int(line)
        # Somewhere within the next save.
        try:
            process.wait(seed.uniform(0, 0.02))
        except subprocess.TimeoutExpired:
            disk.cut()
        process.kill()
        # What it had time to say before the cut, a pipe has kept.
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
        process.stdout.close()
        process.wait()
        disk.unmount()
        disk.mount()
        saves += acknowledged - newest
        state = Stamped(20_000)
        store = CheckpointStore(disk.path / "checkpoints")
        if acknowledged:
            newest = store.load_latest(state).step
            assert newest >= acknowledged
            assert state.is_step(newest)
            assert all(report.valid for report in store.verify())
    assert saves > CUTS
