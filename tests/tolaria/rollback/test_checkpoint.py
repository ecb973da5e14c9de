import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from esper.leyline import CheckpointError
from esper.tolaria.rollback import CheckpointStore, is_locked
from support.states import Stamped


def saved(directory: Path, *steps: int, keep: int = 3, healthy: bool = True) -> Stamped:
    state = Stamped()
    with CheckpointStore(directory, keep=keep) as store:
        for step in steps:
            state.set(step)
            store.save(state, step=step, healthy=healthy)
    return state


def test_the_newest_checkpoint_is_restored_to_the_bit(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    state = Stamped()
    info = CheckpointStore(tmp_path).load_latest(state)
    assert info.step == 3
    assert state.is_step(3)


def test_an_older_one_is_restored_on_request(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30)
    state = Stamped()
    assert CheckpointStore(tmp_path).load_latest(state, before_step=29).step == 20
    assert state.is_step(20)
    with pytest.raises(CheckpointError, match="of step 9 or earlier"):
        CheckpointStore(tmp_path).load_latest(state, before_step=9)


def test_the_tensors_open_with_plain_safetensors(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    with safe_open(tmp_path / "step-000000005" / "tensors.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("model/weight"), torch.full((200, 10), 5.0))
        assert file.get_tensor("model/half").dtype == torch.bfloat16


def test_tensors_that_are_not_contiguous_or_share_memory_are_saved(tmp_path: Path) -> None:
    class Views(Stamped):
        def __init__(self) -> None:
            super().__init__()
            base = torch.arange(12.0).reshape(3, 4)
            self.tensors = {"a": base.T, "b": base[1], "c": torch.ones(1).expand(5)}

        def restore(self, capture: object, *, keep: object = ()) -> None:
            self.got = {name: t.clone() for name, t in capture.tensors.items()}  # type: ignore[attr-defined]

    state = Views()
    with CheckpointStore(tmp_path) as store:
        store.save(state, step=0)
        store.load_latest(state)
    assert all(torch.equal(state.got[name], tensor) for name, tensor in state.tensors.items())


def test_the_newest_and_the_newest_healthy_are_kept(tmp_path: Path) -> None:
    state = saved(tmp_path, 1, 2, keep=2)
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in range(3, 7):
            state.set(step)
            store.save(state, step=step, healthy=False)
        assert [info.step for info in store.list()] == [6, 5, 2]
        assert [info.healthy for info in store.list()] == [False, False, True]


def test_nothing_is_deleted_while_the_newest_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2, 3)
    store = CheckpointStore(tmp_path, keep=2)
    original = CheckpointStore._problem
    monkeypatch.setattr(
        CheckpointStore, "_problem", lambda self, path: original(self, path) or "damaged in writing"
    )
    store.save(Stamped(), step=4)
    store.close()
    assert [info.step for info in store.list()] == [4, 3, 2, 1]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    state = Stamped()
    with CheckpointStore(tmp_path) as store:
        store.save(state, step=7)
        state.set(7)
        store.save(state, step=7)
        store.save(state, step=7)
        assert [info.step for info in store.list()] == [7]
        fresh = Stamped()
        store.load_latest(fresh)
    assert fresh.is_step(7)


def test_damage_is_set_aside_and_the_older_one_is_used(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    file = tmp_path / "step-000000002" / "state.json"
    file.write_bytes(file.read_bytes().replace(b"2", b"3"))
    assert [report.valid for report in CheckpointStore(tmp_path).verify()] == [False, True]
    state = Stamped()
    assert CheckpointStore(tmp_path).load_latest(state).step == 1
    assert state.is_step(1)
    assert state.restored == 1
    assert len(list(tmp_path.glob("step-000000002.damaged-*"))) == 1


def test_when_all_are_damaged_every_problem_is_told(tmp_path: Path) -> None:
    state = saved(tmp_path, 1, 2)
    for directory in tmp_path.glob("step-*"):
        (directory / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)step-000000002.*step-000000001"):
        CheckpointStore(tmp_path).load_latest(state)
    assert state.restored == 0


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    path = tmp_path / "step-000000001" / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert "format 99" in CheckpointStore(tmp_path).verify()[0].problem


def test_a_value_that_json_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    state = Stamped()
    state.values["object"] = object()
    with CheckpointStore(tmp_path) as store, pytest.raises(CheckpointError, match="JSON"):
        store.save(state, step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]


def test_a_dtype_without_a_place_is_named(tmp_path: Path) -> None:
    state = Stamped()
    state.tensors["model/wave"] = torch.zeros(2, dtype=torch.complex64)
    with CheckpointStore(tmp_path) as store, pytest.raises(CheckpointError, match="model/wave"):
        store.save(state, step=1)


def hold(directory: Path, held: object, release: object) -> None:
    with CheckpointStore(directory) as store:
        store.save(Stamped(), step=1)
        held.set()  # type: ignore[attr-defined]
        release.wait()  # type: ignore[attr-defined]


def test_a_second_writer_is_refused_by_the_pid_of_the_first(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, release))
    process.start()
    try:
        assert held.wait(10)
        assert is_locked(tmp_path)
        store = CheckpointStore(tmp_path)
        with pytest.raises(CheckpointError, match=f"process {process.pid}"):
            store.save(Stamped(), step=2)
        assert CheckpointStore(tmp_path).load_latest(Stamped()).step == 1, "reading needs no lock"
    finally:
        release.set()
        process.join()
    assert not is_locked(tmp_path)
    store.save(Stamped(), step=2)
    store.close()


def test_debris_of_a_killed_writer_is_swept(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    for name in (".tmp-dead", ".trash-dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").write_bytes(b"x")
    saved(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "LOCK",
        "step-000000001",
        "step-000000002",
    ]


def test_an_unwritable_directory_is_a_checkpoint_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.raises(CheckpointError, match="cannot save"):
        CheckpointStore(blocked / "checkpoints").save(Stamped(), step=1)
    assert os.listdir(tmp_path) == ["file"]


def test_listing_and_loading_where_nothing_was_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "none")
    assert store.list() == []
    assert store.verify() == []
    with pytest.raises(CheckpointError, match="there is none"):
        store.load_latest(Stamped())
