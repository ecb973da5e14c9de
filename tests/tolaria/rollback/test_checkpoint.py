import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from esper.leyline import CheckpointError, ConfigError
from esper.tolaria.rollback import CheckpointStore, FileSystem, generation, is_locked, manifest
from esper.tolaria.state import Capture
from support.states import Stamped

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class Given:
    """A state of given tensors and values that remembers what was restored."""

    def __init__(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.content = Capture(tensors, values)
        self.got = Capture({}, {})

    def capture(self) -> Capture:
        return self.content

    def restore(self, capture: Capture, *, keep: object = ()) -> None:
        tensors = {name: tensor.clone() for name, tensor in capture.tensors.items()}
        self.got = Capture(tensors, capture.values)


def through_a_checkpoint(state: Given) -> Capture:
    with tempfile.TemporaryDirectory() as directory, CheckpointStore(Path(directory)) as store:
        store.save(state, step=0)
        store.load_latest(state)
    return state.got


class Damaging(FileSystem):
    """Lets the last bit of each tensor file come out wrong."""

    def sync(self, file: BinaryIO) -> None:
        super().sync(file)
        path = Path(file.name)
        if path.suffix == ".safetensors":
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def saved(directory: Path, *steps: int, keep: int = 3, healthy: bool = True) -> Stamped:
    state = Stamped()
    with CheckpointStore(directory, keep=keep) as store:
        for step in steps:
            state.set(step)
            store.save(state, step=step, healthy=healthy)
    return state


def test_the_newest_checkpoint_is_restored_to_the_bit(tmp_path: Path) -> None:
    # Beyond nine digits, names no longer sort like steps.
    saved(tmp_path, 5, 999_999_999, 1_000_000_000)
    state = Stamped()
    info = CheckpointStore(tmp_path).load_latest(state)
    assert info.step == 1_000_000_000
    assert state.is_step(1_000_000_000)


def test_an_older_one_is_restored_on_request(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30)
    state = Stamped()
    for limit in (29, 20):
        assert CheckpointStore(tmp_path).load_latest(state, before_step=limit).step == 20
    assert state.is_step(20)
    with pytest.raises(CheckpointError, match="of step 9 or earlier"):
        CheckpointStore(tmp_path).load_latest(state, before_step=9)


def test_the_tensors_open_with_plain_safetensors(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    with safe_open(tmp_path / "step-000000005" / "tensors.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("model/weight"), torch.full((200, 10), 5.0))
        assert file.get_tensor("model/half").dtype == torch.bfloat16


def test_tensors_that_are_not_contiguous_or_share_memory_are_saved(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"a": base.T, "b": base[1], "c": torch.ones(1).expand(5)}
    got = through_a_checkpoint(Given(tensors, {})).tensors
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)), max_size=6
    )
)
def test_tensors_of_any_dtype_and_shape_come_back_in_any_company(
    kinds: list[tuple[torch.dtype, list[int]]],
) -> None:
    tensors = {
        f"{index}/é": torch.randint(0, 2, shape).to(dtype)
        for index, (dtype, shape) in enumerate(kinds)
    }
    got = through_a_checkpoint(Given(tensors, {})).tensors
    assert list(got.keys() ^ tensors.keys()) == []
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name], tensor)


def test_a_nan_keeps_its_bits() -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -1], dtype=torch.int32)
    got = through_a_checkpoint(Given({"nan": bits.view(torch.float32)}, {})).tensors["nan"]
    assert torch.equal(got.view(torch.int32), bits)


@given(values=st.dictionaries(st.text(), JSON, max_size=4))
def test_values_come_back_as_they_were(values: dict[str, Any]) -> None:
    # repr tells 1 from 1.0 and from True, and takes a NaN for equal to itself.
    assert repr(through_a_checkpoint(Given({}, values)).values) == repr(values)


def test_the_newest_and_the_newest_healthy_are_kept(tmp_path: Path) -> None:
    state = saved(tmp_path, 1, 2, keep=2)
    with CheckpointStore(tmp_path, keep=2) as store:
        for step in range(3, 7):
            state.set(step)
            store.save(state, step=step, healthy=False)
        assert [info.step for info in store.list()] == [6, 5, 2]
        assert [info.healthy for info in store.list()] == [False, False, True]


def test_nothing_is_deleted_while_the_newest_is_damaged(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    before = sorted(tmp_path.iterdir())
    with CheckpointStore(tmp_path, keep=1, disk=Damaging()) as store:
        for step in (3, 4):
            with pytest.raises(CheckpointError, match="cannot be read back"):
                store.save(Stamped(), step=step)
    assert sorted(tmp_path.iterdir()) == before
    assert all(report.valid for report in store.verify())


def test_a_checkpoint_of_a_lower_step_is_not_deleted_by_its_own_save(tmp_path: Path) -> None:
    state = saved(tmp_path, 80, 90, 100)
    state.set(75)
    with CheckpointStore(tmp_path, keep=2) as store:
        info = store.save(state, step=75)
        assert info.path.is_dir()
        assert [info.step for info in store.list()] == [100, 90, 75]
        store.load_latest(Stamped(), before_step=80)


def test_an_unreadable_checkpoint_takes_no_place_of_a_good_one(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 9)
    (tmp_path / "step-000000009" / "MANIFEST.json").unlink()
    saved(tmp_path, 3, keep=2)
    assert [info.step for info in CheckpointStore(tmp_path).list()] == [3, 2]


def test_limits_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)
    with pytest.raises(CheckpointError, match="step -1"):
        CheckpointStore(tmp_path).save(Stamped(), step=-1)
    assert list(tmp_path.iterdir()) == []


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


def test_a_step_can_be_replaced_more_often_than_its_name_has_digits(tmp_path: Path) -> None:
    saved(tmp_path, 7)
    (tmp_path / "step-000000007").rename(tmp_path / "step-000000007.999")
    saved(tmp_path, 7)
    saved(tmp_path, 7)
    assert [info.path.name for info in CheckpointStore(tmp_path).list()] == ["step-000000007.1001"]


def test_damage_is_set_aside_and_the_older_one_is_used(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    file = tmp_path / "step-000000002" / "state.json"
    file.write_bytes(file.read_bytes().replace(b"2", b"3"))
    assert [report.valid for report in CheckpointStore(tmp_path).verify()] == [False, True]
    state = Stamped()
    assert CheckpointStore(tmp_path).load_latest(state).step == 1
    assert state.is_step(1)
    assert state.restored == 1
    aside = "step-000000002.damaged-state-json-does-not-match-its-digest"
    assert (tmp_path / aside).is_dir()


def test_each_damaged_checkpoint_of_a_step_is_set_aside(tmp_path: Path) -> None:
    for _ in range(3):
        saved(tmp_path, 1)
        (tmp_path / "step-000000001" / "state.json").unlink()
        with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
            CheckpointStore(tmp_path).load_latest(Stamped())
    assert len(list(tmp_path.glob("step-000000001.damaged-state-json-cannot-be-read-*"))) == 3


def test_verifying_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-000000002" / "state.json").write_bytes(b"{}")
    before = sorted(tmp_path.rglob("*"))
    problems = [report.problem for report in CheckpointStore(tmp_path).verify()]
    assert "2 bytes instead of" in problems[0]
    assert problems[1] == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_under_the_name_of_another_step_is_not_trusted(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-000000001").rename(tmp_path / "step-000000005")
    state = Stamped()
    assert CheckpointStore(tmp_path).load_latest(state).step == 2
    assert (tmp_path / "step-000000005.damaged-holds-step-1-it-was-renamed").is_dir()


def test_another_spelling_of_the_same_number_is_damage_too(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    path = tmp_path / "step-000000001" / "MANIFEST.json"
    created = json.loads(path.read_text())["created"]
    path.write_text(path.read_text().replace(f"{created}", f"{created}000000000"))
    assert json.loads(path.read_text())["created"] == created
    assert "its own digest" in CheckpointStore(tmp_path).verify()[0].problem


def test_a_reader_finds_the_next_checkpoint_when_a_writer_retires_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, reader = Stamped(), Stamped()
    read = manifest.read_manifest
    with CheckpointStore(tmp_path, keep=1) as writer:
        writer.save(state, step=1)

        def overtaken(path: Path) -> object:
            monkeypatch.setattr(generation, "read_manifest", read)
            state.set(2)
            writer.save(state, step=2)
            return read(path)

        monkeypatch.setattr(generation, "read_manifest", overtaken)
        assert CheckpointStore(tmp_path).load_latest(reader).step == 2
    assert reader.is_step(2)


def test_a_checkpoint_retired_while_it_is_restored_still_counts(tmp_path: Path) -> None:
    class Slow(Stamped):
        before: Callable[[], object]

        def restore(self, capture: Capture, *, keep: object = ()) -> None:
            self.before()
            super().restore(capture)

    with CheckpointStore(tmp_path, keep=1) as writer:
        state = Stamped()
        state.set(1)
        writer.save(state, step=1)
        reader = Slow()
        reader.before = lambda: writer.save(state, step=2)
        assert CheckpointStore(tmp_path).load_latest(reader).step == 1
    assert reader.is_step(1)
    assert not (tmp_path / "step-000000001").exists()


def test_when_all_are_damaged_every_problem_is_told(tmp_path: Path) -> None:
    state = saved(tmp_path, 1, 2)
    for directory in tmp_path.glob("step-*"):
        (directory / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)step-000000002.*step-000000001"):
        CheckpointStore(tmp_path).load_latest(state)
    assert state.restored == 0


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [0, {"b": object()}]}, "values/new/a/1/b"),
        ([(1, 2)], "values/new/0"),
        ({"a": {1: "one"}}, "values/new/a"),
        ({"a": {1, 2}}, "values/new/a"),
    ],
)
def test_a_value_that_json_would_change_is_named_and_leaves_nothing(
    tmp_path: Path, value: object, where: str
) -> None:
    state = Stamped()
    state.values["new"] = value
    with (
        CheckpointStore(tmp_path) as store,
        pytest.raises(CheckpointError, match=f"{where}:.*JSON"),
    ):
        store.save(state, step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]


def test_values_that_hold_themselves_are_refused() -> None:
    state = Given({}, {})
    state.content.values["new"] = state.content.values
    with pytest.raises(CheckpointError, match="as JSON"):
        through_a_checkpoint(state)


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
        "JOURNAL",
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
