import multiprocessing
import os
from pathlib import Path

import pytest

from esper.leyline import CheckpointError
from esper.tolaria.rollback import durable
from esper.tolaria.rollback.durable import FileSystem, WriterLock, is_locked


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with durable.committed_directory(final) as directory:
        with durable.synced_file(directory / "file") as file:
            file.write(b"content")
        assert not final.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (final / "file").read_bytes() == b"content"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    def fill() -> None:
        with durable.committed_directory(tmp_path / "final") as directory:
            (directory / "part").write_bytes(b"x")
            raise error

    with pytest.raises(error):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_exists_is_not_replaced(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").touch()
    with pytest.raises(OSError, match="not empty"), durable.committed_directory(final):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "old"]


def test_files_then_their_directory_then_the_rename_then_the_parent_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, rename = os.fsync, Path.rename
    done: list[object] = []

    def noted_sync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        # Whatever Python still buffers at this moment would be missing from the size.
        done.append((status.st_ino, status.st_size if status.st_nlink == 1 else None))
        sync(descriptor)

    def noted_rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    final = tmp_path / "final"
    with durable.committed_directory(final) as directory:
        with durable.synced_file(directory / "file") as file:
            file.write(b"content")
        (directory / "sub").mkdir()
    assert done == [
        ((final / "file").stat().st_ino, 7),
        (final.stat().st_ino, None),
        "rename",
        (tmp_path.stat().st_ino, None),
    ]


def test_a_file_that_exists_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError), durable.synced_file(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_bytes() == b"old"


class Noting(FileSystem):
    """Notes which directories were brought to the disk."""

    def __init__(self) -> None:
        self.synced: list[Path] = []

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        self.synced.append(path)


def test_the_whole_way_to_a_new_directory_is_synced(tmp_path: Path) -> None:
    disk = Noting()
    durable.make_directory(tmp_path / "runs" / "one" / "checkpoints", disk)
    assert disk.synced[:3] == [tmp_path / "runs" / "one", tmp_path / "runs", tmp_path]
    durable.make_directory(tmp_path / "runs" / "one" / "checkpoints", disk)


def test_directories_of_others_on_the_way_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, disk = tmp_path.parent, Noting()
    # The superuser may write everywhere, so permissions cannot be set up for real.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != theirs)
    durable.make_directory(tmp_path / "runs", disk)
    assert disk.synced == [tmp_path]


@pytest.mark.parametrize("content", [b"torn", b""])
def test_space_that_was_set_aside_and_not_written_is_cut_off(
    tmp_path: Path, content: bytes
) -> None:
    with durable.synced_file(tmp_path / "file", size=3 << 20) as file:
        file.write(content)
    assert (tmp_path / "file").read_bytes() == content


def test_only_debris_is_swept(tmp_path: Path) -> None:
    for name in (".tmp-1", ".trash-2", "step-000000001", ".config"):
        (tmp_path / name / "inner").mkdir(parents=True)
    durable.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".config", "step-000000001"]


def test_a_discarded_directory_is_gone_and_discarding_it_twice_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "old"
    (path / "inner").mkdir(parents=True)
    durable.discard_directory(path)
    durable.discard_directory(path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    lock = WriterLock(tmp_path)
    assert is_locked(tmp_path)
    with pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        WriterLock(tmp_path)
    lock.release()
    assert not is_locked(tmp_path)
    WriterLock(tmp_path).release()


def test_a_released_lock_is_free_although_a_forked_child_lives(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    lock, done = WriterLock(tmp_path), context.Event()
    child = context.Process(target=done.wait)
    child.start()
    try:
        lock.release()
        assert not is_locked(tmp_path)
    finally:
        done.set()
        child.join()


def test_a_forked_child_cannot_release_the_lock_of_its_parent(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=lock.release)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert is_locked(tmp_path)
    lock.release()
