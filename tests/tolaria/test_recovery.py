import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from esper.leyline import Action, StepRecord, Tier, Verdict
from esper.tolaria import TolariaTrainer
from esper.tolaria.recovery import Recovery
from esper.tolaria.rollback import SharedDeadlineSignal
from support.jobs import config, two_task_job
from support.sinks import Memory

UNDER_WAY: list[Generator[StepRecord, None, None]] = []
BACK_TO_25 = Verdict(Action.ROLLBACK, "test", True, first_suspect=33, before_step=25)


def trained(tmp_path: Path, steps: int = 35, **sections: dict[str, object]) -> TolariaTrainer:
    """A trainer that stopped in the middle of a step loop, its parts at hand."""
    trainer = TolariaTrainer.from_job(
        two_task_job(), config=config(**sections), directory=tmp_path, sinks=[Memory()]
    )
    generator = trainer.steps()
    for _ in range(steps):
        next(generator)
    UNDER_WAY.append(generator)
    return trainer


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    """End the runs of a test with it, not when they happen to be collected."""
    yield
    while UNDER_WAY:
        UNDER_WAY.pop().close()


def recovery(trainer: TolariaTrainer) -> Recovery:
    return trainer._parts.run.rescue._recovery


def test_the_newest_trusted_snapshot_is_taken(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    recovered = recovery(trainer).roll_back(BACK_TO_25)
    result = recovered.rollback
    assert (result.tier, result.step, result.error) == (Tier.MEMORY, 20, "")
    assert recovered.skipped == ((2, 0), (2, 1), (2, 2))
    assert trainer._parts.run.data.position == (1, 4)
    assert result.latency_ms < 5000


def test_without_snapshots_the_disk_serves(tmp_path: Path) -> None:
    trainer = trained(tmp_path, snapshots={"enabled": False})
    result = recovery(trainer).roll_back(BACK_TO_25).rollback
    assert (result.tier, result.step) == (Tier.DISK, 20)
    assert "no healthy snapshot" in result.error


def test_the_disk_is_taken_first_when_the_verdict_asks_for_it(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    verdict = Verdict(
        Action.ROLLBACK, "test", True, first_suspect=33, before_step=15, tier=Tier.DISK
    )
    result = recovery(trainer).roll_back(verdict).rollback
    assert (result.tier, result.step) == (Tier.DISK, 10)
    memory = trainer._parts.rollback.tiers.memory
    assert memory is not None
    assert max(memory.steps) <= 10, "snapshots of the course taken back are gone"


def test_damaged_checkpoints_fall_back_to_memory(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    for path in (tmp_path / "checkpoints").glob("step-*/state.json"):
        path.write_text("{}")
    verdict = Verdict(
        Action.ROLLBACK, "test", True, first_suspect=33, before_step=25, tier=Tier.DISK
    )
    result = recovery(trainer).roll_back(verdict).rollback
    assert result.tier is Tier.MEMORY
    assert "state.json" in result.error


def test_when_nothing_is_old_enough_the_oldest_snapshot_serves(tmp_path: Path) -> None:
    trainer = trained(tmp_path, checkpoints={"enabled": False})
    verdict = Verdict(Action.ROLLBACK, "test", True, first_suspect=1, before_step=-7)
    result = recovery(trainer).roll_back(verdict).rollback
    assert (result.tier, result.step) == (Tier.MEMORY, 0)


def test_with_nothing_kept_it_says_why(tmp_path: Path) -> None:
    off = {"enabled": False}
    trainer = trained(tmp_path, snapshots=off, checkpoints=off)
    result = recovery(trainer).roll_back(BACK_TO_25).rollback
    assert result.tier is None
    assert "no healthy snapshot" in result.error
    assert "no checkpoint directory" in result.error


def test_a_rate_cut_outlives_a_further_rollback(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    rates = [trainer._parts.run.update.learning_rate]
    for expected in (0.5, 0.25):
        verdict = Verdict(
            Action.ROLLBACK, "test", True, first_suspect=33, before_step=20, rate_factor=0.5
        )
        recovery(trainer).roll_back(verdict)
        assert trainer._parts.run.update.progress.rate_cut == expected
        rates.append(trainer._parts.run.update.learning_rate)
    assert rates[2] == pytest.approx(rates[1] / 2)
    assert trainer._parts.log.rollbacks == 2
    assert trainer._parts.run.guard.history.in_a_row == 2


def test_a_failed_checkpoint_is_told_of_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    memory = Memory()
    trainer = TolariaTrainer.from_job(
        two_task_job(), config=config(), directory=tmp_path, sinks=[memory]
    )
    list(trainer.steps())
    assert trainer.outcome == "completed"
    assert len(memory.events("checkpoint_failed")) == 5
    assert trainer.metrics_snapshot()["tolaria.rollback.checkpoint_failures_total"] == 5


def test_resuming_keeps_what_was_skipped(tmp_path: Path) -> None:
    settings = config(train={"epochs": 8}, snapshots={"every": 5}, guard={"warmup": 10})
    torch.manual_seed(5)
    first = TolariaTrainer.from_job(two_task_job(), config=settings, directory=tmp_path, drill=True)
    for record in first.steps():
        if record.attempt == 1 and record.step == 100:
            first.stop()
    skipped = set(first._parts.run.data.skipped)
    assert skipped
    second = TolariaTrainer.from_job(
        two_task_job(), config=settings, directory=tmp_path, drill=True
    )
    second.resume()
    assert second._parts.run.data.skipped == skipped
    assert second._parts.log.attempt == 2
    list(second.steps())
    assert second.metrics_snapshot()["tolaria.rollback.total"] == 1


def test_a_resume_after_a_rollback_does_not_return_to_the_course_taken_back(
    tmp_path: Path,
) -> None:
    settings = config(
        train={"epochs": 8}, snapshots={"every": 5}, checkpoints={"every": 1}, guard={"warmup": 10}
    )
    torch.manual_seed(5)
    memory = Memory()
    first = TolariaTrainer.from_job(
        two_task_job(), config=settings, directory=tmp_path, sinks=[memory], drill=True
    )
    generator = first.steps()
    for record in generator:
        if record.action == "rollback":
            break
    store = first._parts.rollback.tiers.disk
    assert store is not None
    back_to = first._parts.run.update.progress.step
    assert record.step > back_to
    assert next(info.step for info in store.list()) == back_to
    skipped = set(first._parts.run.data.skipped)
    store.close()  # as if the process had been killed here
    second = TolariaTrainer.from_job(
        two_task_job(), config=settings, directory=tmp_path, drill=True
    )
    assert second.resume() == back_to
    assert second._parts.run.data.skipped == skipped, "the bad batch must not be met again"
    generator.close()


def test_a_checkpoint_is_read_by_a_process_of_its_own(tmp_path: Path) -> None:
    trainer = trained(tmp_path, snapshots={"enabled": False})
    recovery(trainer).roll_back(BACK_TO_25)
    metrics = trainer.metrics_snapshot()
    assert metrics["tolaria.rollback.full.success_total"] == 1
    assert metrics["tolaria.rollback.full.success_ms"] > 0
    assert metrics["tolaria.rollback.fast.failure_total"] == 1


def test_a_file_system_that_hangs_is_given_up_on_and_memory_serves(tmp_path: Path) -> None:
    trainer = trained(tmp_path, rollback={"full_deadline_ms": 3000})
    manifests = list((tmp_path / "checkpoints").glob("step-*/MANIFEST.json"))
    for path in manifests:
        # Whoever opens this to read waits for ever.
        path.unlink()
        os.mkfifo(path)
    verdict = msgspec.structs.replace(BACK_TO_25, tier=Tier.DISK)
    began = time.monotonic()
    result = recovery(trainer).roll_back(verdict).rollback
    assert result.tier is Tier.MEMORY
    assert "tolaria.rollback did not end within 3000 ms" in result.error
    assert 3 <= time.monotonic() - began < 8
    assert result.deadline_exceeded
    assert trainer.metrics_snapshot()["tolaria.rollback.full.deadline_exceeded_total"] == 1
    # Or saving at the end would read them, until its own deadline.
    for path in manifests:
        path.unlink()


def test_with_a_closed_worker_a_checkpoint_is_read_all_the_same(tmp_path: Path) -> None:
    trainer = trained(tmp_path, snapshots={"enabled": False})
    trainer._parts.outside.worker.shutdown()
    result = recovery(trainer).roll_back(BACK_TO_25).rollback
    assert (result.tier, result.step) == (Tier.DISK, 20)


def test_a_deadline_that_was_missed_is_told_and_put_where_others_can_read_it(
    tmp_path: Path,
) -> None:
    trainer = trained(tmp_path, rollback={"fast_deadline_ms": 1e-6})
    sink = trainer._surroundings.sinks[0]
    assert isinstance(sink, Memory)
    rescue = trainer._parts.run.rescue
    rescue._roll_back(34, msgspec.structs.replace(BACK_TO_25, first_suspect=33))
    trip = SharedDeadlineSignal(tmp_path / "rollback.deadline").read()
    assert trip is not None
    assert "rollback.fast_deadline_ms" in trip.reason
    trainer._parts.hub.flush()
    assert "would take" in sink.events("rollback_deadline_exceeded")[0].message
    assert "rollbacks will be made from checkpoints" in sink.events("snapshot_slow")[0].message
    assert sink.events("rollback")[0].data["tier"] == "disk"


def test_a_disk_that_failed_too_often_is_left_alone_for_a_while(tmp_path: Path) -> None:
    trainer = trained(tmp_path, snapshots={"enabled": False})
    for path in (tmp_path / "checkpoints").glob("step-*/MANIFEST.json"):
        path.unlink()
    for _ in range(4):
        result = recovery(trainer).roll_back(BACK_TO_25).rollback
        assert result.tier is None
    assert "the breaker of rollback is open" in result.error
    assert trainer.metrics_snapshot()["tolaria.timeout.rollback.error"] == 3
    assert trainer.metrics_snapshot()["tolaria.timeout.rollback.refused"] == 1
