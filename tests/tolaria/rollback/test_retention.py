from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline import CheckpointError, ConfigError
from esper.tolaria.rollback import CheckpointStore, Retention
from esper.tolaria.rollback.retention import Candidate
from support.states import Stamped

CANDIDATES = st.lists(
    st.tuples(st.booleans(), st.booleans(), st.none() | st.floats()), min_size=1, max_size=12
)


def kept(directory: Path, retention: Retention, losses: dict[int, float]) -> list[int]:
    with CheckpointStore(directory, keep=retention) as store:
        for step, loss in losses.items():
            store.save(Stamped(), step=step, metrics={"loss": loss})
        return [info.step for info in store.list()]


def test_every_nth_step_stays_for_good(tmp_path: Path) -> None:
    assert kept(tmp_path, Retention(1, every=4), dict.fromkeys(range(1, 11), 0.0)) == [10, 8, 4]


@pytest.mark.parametrize(("direction", "best"), [("min", [5, 3]), ("max", [4, 2])])
def test_the_best_by_a_metric_stay(tmp_path: Path, direction: str, best: list[int]) -> None:
    retention = Retention(1, metric="loss", best=2, direction=direction)  # type: ignore[arg-type]
    losses = {1: 4.0, 2: 8.0, 3: 1.0, 4: 9.0, 5: 2.0, 6: float("nan"), 7: 5.0}
    assert kept(tmp_path, retention, losses) == [7, *best]


def test_a_pinned_one_stays_until_it_is_let_go(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(Stamped(), step=1)
        assert store.pin(1).pinned
        store.save(Stamped(), step=2)
        store.save(Stamped(), step=3)
        assert [(info.step, info.pinned) for info in store.list()] == [(3, False), (1, True)]
        assert not store.pin(1, pinned=False).pinned
        store.save(Stamped(), step=4)
        assert [info.step for info in store.list()] == [4]
        with pytest.raises(CheckpointError, match="no checkpoint of step 1"):
            store.pin(1)


@given(
    states=CANDIDATES,
    last=st.integers(1, 4),
    every=st.integers(0, 4),
    metric=st.none() | st.just("loss"),
)
def test_nothing_that_has_to_stay_is_ever_superfluous(
    states: list[tuple[bool, bool, float | None]], last: int, every: int, metric: str | None
) -> None:
    candidates = [
        Candidate(Path(f"{step}"), step, healthy, pinned, {} if loss is None else {"loss": loss})
        for step, (healthy, pinned, loss) in reversed(list(enumerate(states)))
    ]
    saved = candidates[-1].path
    deleted = Retention(last, every, metric).superfluous(candidates, saved)
    left = [c for c in candidates if c.path not in deleted]
    assert saved in [c.path for c in left]
    assert left[:last] == candidates[:last]
    assert all(c.path not in deleted for c in candidates if c.pinned)
    healthy = [c for c in candidates if c.healthy]
    assert not healthy or healthy[0] in left
    finite = [c.metrics["loss"] for c in candidates if abs(c.metrics.get("loss", 1e999)) < 1e999]
    if metric and finite:
        assert min(finite) in [c.metrics.get("loss") for c in left]


@pytest.mark.parametrize("wrong", [{"last": 0}, {"every": -1}, {"best": 0}])
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="|".join(str(value) for value in wrong.values())):
        Retention(**wrong)  # type: ignore[arg-type]
