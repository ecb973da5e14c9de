from pathlib import Path

import pytest

from esper.tolaria.profiler import Reply, RequestBox, RequestError


@pytest.fixture
def box(tmp_path: Path) -> RequestBox:
    box = RequestBox(tmp_path)
    box.open()
    return box


def test_a_request_is_read_and_answered(box: RequestBox) -> None:
    name = box.ask(5, timeout_s=10)
    assert box.waiting() == [name]
    request = box.read(name)
    assert request is not None
    assert request.steps == 5
    assert box.fetch(name) is None
    box.answer(name, Reply(path="x", steps=5, bytes=7))
    assert box.waiting() == []
    assert box.fetch(name) == Reply(path="x", steps=5, bytes=7)
    box.forget(name)
    assert list(box.folder.iterdir()) == []


def test_requests_are_listed_oldest_first(box: RequestBox) -> None:
    names = [box.ask(1, timeout_s=10) for _ in range(5)]
    assert box.waiting() == names


def test_who_has_gone_is_not_answered(box: RequestBox) -> None:
    name = box.ask(5, timeout_s=10)
    box.forget(name)
    box.answer(name, Reply(error="late"))
    assert list(box.folder.iterdir()) == []


def test_an_expired_request_is_taken_away(box: RequestBox) -> None:
    name = box.ask(5, timeout_s=-1)
    assert box.read(name) is None
    assert list(box.folder.iterdir()) == []


def test_answers_that_nobody_fetched_are_taken_away(box: RequestBox) -> None:
    name = box.ask(5, timeout_s=10)
    box.answer(name, Reply(error="x"))
    waiting = box.ask(5, timeout_s=10)
    box.open()
    assert [path.name for path in box.folder.iterdir()] == [f"request-{waiting}.json"]


def test_what_is_not_there_or_broken_is_a_clear_error(tmp_path: Path, box: RequestBox) -> None:
    with pytest.raises(RequestError, match="no request can be left in"):
        RequestBox(tmp_path / "none").ask(1, timeout_s=1)
    (box.folder / "request-1-1.json").write_text('{"steps": "five", "expires": 1}')
    (box.folder / "answer-1-1.json").write_text("")
    with pytest.raises(RequestError, match=r"request-1-1\.json cannot be read"):
        box.read("1-1")
    with pytest.raises(RequestError, match=r"answer-1-1\.json cannot be read"):
        box.fetch("1-1")
    (box.folder / "answer-1-1.tmp").mkdir()
    with pytest.raises(RequestError, match=r"request-1-1\.json cannot be answered"):
        box.answer("1-1", Reply())


def test_closing_leaves_no_empty_directory(box: RequestBox) -> None:
    box.close()
    assert not box.folder.parent.exists()
    box.close()
    box.open()
    trace = box.folder.parent / "x.pt.trace.json"
    trace.touch()
    box.close()
    assert list(trace.parent.iterdir()) == [trace]


def test_closing_leaves_what_somebody_still_wants(box: RequestBox) -> None:
    name = box.ask(5, timeout_s=10)
    box.close()
    assert box.waiting() == [name]
