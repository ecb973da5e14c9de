import random
from pathlib import Path

import pytest

from esper.tolaria.rollback import CheckpointStore
from esper.tolaria.rollback.journal import NAME, Journal
from support.states import Stamped


def story(directory: Path) -> list[tuple[str, int]]:
    return [(entry.event, entry.step) for entry in CheckpointStore(directory).history()]


def save(directory: Path, *steps: int, keep: int = 2) -> None:
    with CheckpointStore(directory, keep=keep) as store:
        for step in steps:
            assert store.save(Stamped(), step=step).problem == ""


def test_the_journal_tells_what_came_and_went_and_why(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    entries = CheckpointStore(tmp_path).history()
    assert [(e.event, e.step) for e in entries] == [
        ("saved", 1), ("saved", 2), ("saved", 3), ("deleted", 1),
    ]  # fmt: skip
    assert entries[-1].reason == "newer ones are kept"
    assert entries[0].data["latency_ms"] > 0


def test_a_lost_journal_is_begun_anew_from_what_is_there(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / NAME).unlink()
    save(tmp_path, 3)
    assert story(tmp_path) == [("found", 2), ("found", 1), ("saved", 3), ("deleted", 1)]


def test_what_came_or_went_unseen_is_noted(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step-000000001").rename(tmp_path / "elsewhere")
    save(tmp_path, 3)
    assert story(tmp_path)[2:] == [("missing", 1), ("saved", 3)]


def test_damage_that_is_set_aside_by_the_writer_is_noted(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "step-000000002" / "state.json").unlink()
    with CheckpointStore(tmp_path) as store:
        store.pin(1)
        store.load_latest(Stamped())
    assert story(tmp_path)[-2:] == [("pinned", 1), ("set aside", 2)]


def test_whatever_is_torn_or_damaged_is_cut_off_and_the_rest_stays(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    path, seed = tmp_path / NAME, random.Random(0)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        kept = [
            line for index, line in enumerate(lines) if len(b"".join(lines[: index + 1])) <= cut
        ]
        journal = Journal(tmp_path)
        assert len(journal.read()) == len(kept)
        journal.open({"step-000000001": 1, "step-000000002": 2})
        assert path.read_bytes().startswith(b"".join(kept))
        assert {entry.step for entry in journal.read()} == {1, 2}
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[seed.randrange(len(whole))] ^= 1 << seed.randrange(8)
        path.write_bytes(damaged)
        assert len(Journal(tmp_path).read()) < len(lines)


def test_a_journal_that_cannot_be_written_is_told_and_loses_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with CheckpointStore(tmp_path) as store:
        info = store.save(Stamped(), step=1)
        assert "the journal cannot be written" in info.problem
        assert store.load_latest(Stamped()).step == 1
        (tmp_path / NAME).rmdir()
        assert store.save(Stamped(), step=2).problem == ""
    assert story(tmp_path) == [("found", 1), ("saved", 2)]


@pytest.mark.parametrize("name", [NAME, "LOCK"])
def test_an_empty_file_in_its_place_is_no_trouble(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    save(tmp_path, 1)
    assert story(tmp_path) == [("saved", 1)]
