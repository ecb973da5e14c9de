import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from esper.core import AsyncWorker
from esper.leyline import Level, RunError
from esper.tolaria import TolariaTrainer, TrainingJob
from esper.tolaria.incident import cases as cases_module
from esper.tolaria.incident import (
    find_incident,
    incident_directories,
    read_incident,
    read_unrecorded,
)
from esper.tolaria.incident import recorder as recorder_module
from esper.tolaria.incident.batch_file import read_batch
from esper.tolaria.incident.record import BatchEntry
from esper.tolaria.incident.writer import Evidence
from esper.tolaria.rollback import CheckpointStore
from support.jobs import two_task_job
from support.mishaps import (
    BAD_SAMPLE,
    divides_by_zero,
    explodes,
    incidents,
    poisoned,
    root_of_zero,
    settings,
    train,
)

JUMPS = {"guard": {"warmup": 4}}


def test_a_skip_is_recorded_with_everything_that_a_replay_needs(tmp_path: Path) -> None:
    sink = train(divides_by_zero(), tmp_path)
    incident = incidents(tmp_path)[1]
    assert (incident.id, incident.action) == ("0002-step-000021", "skip")
    assert (incident.job, incident.run) == ("mishap", tmp_path.name)
    assert incident.triggers[0].reason == "loss nan is not finite"
    assert incident.triggers[0].signal == "loss"
    assert incident.state.step == 10
    assert [step.step for step in incident.course] == list(range(10, 22))
    assert (incident.course[-1].action, incident.course[-1].loss) == ("skip", "nan")
    assert BAD_SAMPLE in incident.batches[0].samples
    assert incident.batches[0].tensors == ["float32 (16, 8)", "float32 (16, 1)"]
    assert incident.guard["total"]["statistics"]["recent"], "the window is part of it"
    assert incident.settings["guard"]["margin"] == 8
    assert incident.environment.torch == torch.__version__
    directory = tmp_path / "incidents" / incident.id
    info, _ = CheckpointStore(directory / incident.state.path).read_latest()
    assert info.step == 10
    told = sink.events("incident_recorded")
    assert [event.data["path"] for event in told][1] == str(directory)


def test_the_content_of_the_batch_is_kept(tmp_path: Path) -> None:
    train(divides_by_zero(), tmp_path)
    incident = incidents(tmp_path)[0]
    inputs, target = read_batch(tmp_path / "incidents" / incident.id, incident.batches[0])
    assert inputs.shape == (16, 8)
    assert (inputs[:, 0] == 0).sum() == 1
    assert target.shape == (16, 1)


def test_what_followed_is_added(tmp_path: Path) -> None:
    train(divides_by_zero(), tmp_path, settings(train={"epochs": 5}))
    outcomes = [incident.followed.outcome for incident in incidents(tmp_path)]
    assert outcomes[0] == "diverged again", "within the steps that are waited for"
    assert outcomes[-1] == "run ended"


def test_a_run_that_goes_on_well_is_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "FOLLOWED_STEPS", 8)
    train(divides_by_zero(), tmp_path)
    followed = incidents(tmp_path)[1].followed
    assert (followed.outcome, followed.steps) == ("recovered", 8)
    assert isinstance(followed.loss_before, float)
    assert isinstance(followed.loss_after, float)


def test_a_rollback_is_recorded_with_the_skips_before_it_as_one_incident(tmp_path: Path) -> None:
    train(explodes(), tmp_path)
    first = incidents(tmp_path)[0]
    assert [trigger.action for trigger in first.triggers][-1] == "rollback"
    assert first.suspect == 41
    assert first.course[-1].step == first.last_step
    followed = first.followed
    assert (followed.tier, followed.restored_step) == ("memory", 30)
    assert followed.skipped
    assert followed.latency_ms > 0
    assert followed.learning_rate is not None


@pytest.mark.parametrize("megabytes", [64.0, 0.0])
def test_the_batches_of_later_verdicts_are_added(tmp_path: Path, megabytes: float) -> None:
    config = settings(train={"epochs": 6}, incidents={"max_batch_megabytes": megabytes})
    train(two_task_job(), tmp_path, config, drill=True)
    incident = incidents(tmp_path)[0]
    assert [trigger.action for trigger in incident.triggers] == ["skip", "rollback"]
    steps = [entry.step for entry in incident.batches]
    assert steps == [trigger.step for trigger in incident.triggers]
    first, second = incident.batches
    assert (second.epoch, second.number) != (first.epoch, first.number)
    assert second.samples
    assert second.samples != first.samples
    if megabytes:
        content = read_batch(tmp_path / "incidents" / incident.id, second)
        assert [f"float32 {tuple(part.shape)}" for part in content][:1] == second.tensors[:1]
    else:
        assert "incidents.max_batch_megabytes" in second.note


def test_of_many_skips_in_a_row_the_first_batches_are_kept(tmp_path: Path) -> None:
    train(divides_by_zero(), tmp_path)
    incident = incidents(tmp_path)[0]
    case = cases_module.Case(incident, Evidence(None, 3, [], max_bytes := 3 * 2**20))
    case.add_batches([(BatchEntry(step, 0, step, []), torch.zeros(4)) for step in range(20)])
    evidence = case.take_further()
    assert [entry.step for entry, _ in evidence.batches] == list(range(8))
    assert evidence.max_batch_bytes == max_bytes - incident.batches[0].bytes
    assert not case.further
    case.dirty = False
    case.add_batches([(BatchEntry(5, 0, 5, []), torch.zeros(4))])
    assert not case.dirty, "it is known already"


def test_a_halt_is_recorded(tmp_path: Path) -> None:
    config = settings(guard={"max_rollbacks": 1}, train={"epochs": 20})
    sink = train(explodes(), tmp_path, config)
    assert sink.events("guard_halted")
    last = incidents(tmp_path)[-1]
    assert last.action == "halt"
    assert last.followed.outcome == "halted"
    assert "guard.max_rollbacks" in last.followed.note


def test_beyond_the_limit_incidents_are_counted_only(tmp_path: Path) -> None:
    sink = train(divides_by_zero(), tmp_path, settings(incidents={"max_records": 1}))
    assert len(incident_directories(tmp_path)) == 1
    left_out = read_unrecorded(tmp_path)
    assert (left_out.count, left_out.first_step, left_out.last_step) == (2, 21, 34)
    (told,) = sink.events("incident_not_recorded")
    assert "incidents.max_records = 1" in told.message


def test_a_batch_that_is_too_large_leaves_identity_and_shapes(tmp_path: Path) -> None:
    train(divides_by_zero(), tmp_path, settings(incidents={"max_batch_megabytes": 0}))
    entry = incidents(tmp_path)[0].batches[0]
    assert entry.file == ""
    assert "incidents.max_batch_megabytes" in entry.note
    assert entry.tensors == ["float32 (16, 8)", "float32 (16, 1)"]
    assert BAD_SAMPLE in entry.samples
    with pytest.raises(RunError, match="was not kept"):
        read_batch(tmp_path, entry)


def test_a_state_that_is_too_large_is_named_not_copied(tmp_path: Path) -> None:
    config = settings(
        incidents={"max_state_megabytes": 0}, checkpoints={"every": 10, "mode": "wait"}
    )
    train(divides_by_zero(), tmp_path, config)
    first, second = incidents(tmp_path)[:2]
    assert (first.state.step, first.state.path) == (-1, "")
    assert "no checkpoint is old enough" in first.state.note
    assert (second.state.step, second.state.path) == (20, "../../checkpoints")
    assert "incidents.max_state_megabytes (0)" in second.state.note


@pytest.mark.parametrize("how", ["switched off", "no directory"])
def test_without_a_place_nothing_is_recorded(tmp_path: Path, how: str) -> None:
    config = settings(incidents={"enabled": how != "switched off"})
    trainer = TolariaTrainer.from_job(
        divides_by_zero(), config=config, directory=None if how == "no directory" else tmp_path
    )
    for _ in trainer.steps():
        pass
    assert not (tmp_path / "incidents").exists()


def test_a_resumed_run_goes_on_numbering(tmp_path: Path) -> None:
    train(divides_by_zero(), tmp_path, settings(train={"epochs": 1}))
    trainer = TolariaTrainer.from_job(
        divides_by_zero(), config=settings(train={"epochs": 2}), directory=tmp_path
    )
    trainer.resume()
    for _ in trainer.steps():
        pass
    first, second = incidents(tmp_path)
    assert (first.id[:4], second.id[:4]) == ("0001", "0002")
    assert second.attempt == 1


def test_every_snapshot_is_let_go_of(tmp_path: Path) -> None:
    trainer = TolariaTrainer.from_job(explodes(), config=settings(), directory=tmp_path)
    for _ in trainer.steps():
        pass
    memory = trainer._parts.rollback.tiers.memory
    assert memory is not None
    assert not any(snapshot.held for snapshot in memory._snapshots.values())
    assert not any(snapshot.held for snapshot in memory._leaving)


@pytest.mark.fault
def test_a_disk_that_refuses_is_told_of_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "incidents").write_text("in the way")
    sink = train(divides_by_zero(), tmp_path)
    assert len(sink.events("incident_failed")) == 3
    failed = sink.events("incident_failed")[0]
    assert failed.level is Level.CRITICAL
    assert "cannot be written" in failed.message
    assert sink.events("run_ended")[0].data["outcome"] == "completed"
    assert not sink.events("conservative_mode_entered"), "no reason to train more carefully"


@pytest.mark.fault
def test_a_full_disk_leaves_no_half_an_incident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esper.tolaria.rollback.durable import FileSystem

    def refuse(self: FileSystem, file: BinaryIO) -> None:
        if "incidents" in str(file.name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileSystem, "sync", refuse)
    sink = train(divides_by_zero(), tmp_path)
    assert len(sink.events("incident_failed")) == 3
    assert list((tmp_path / "incidents").iterdir()) == []


@pytest.mark.fault
def test_a_disk_that_hangs_does_not_keep_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from esper.tolaria.incident import cases

    write_new: Callable[..., object] = cases.write_new

    def slowly(*arguments: object) -> object:
        time.sleep(1.0)
        return write_new(*arguments)

    monkeypatch.setattr(cases, "write_new", slowly)
    config = settings(incidents={"write_deadline_ms": 50})
    began = time.monotonic()
    with AsyncWorker() as worker:
        sink = train(root_of_zero(), tmp_path, config, worker=worker)
        seconds = time.monotonic() - began
        assert seconds < 6, seconds
    assert sink.events("incident_failed")
    assert sink.events("run_ended")[0].data["outcome"] == "completed"


def test_what_a_worker_process_collates_is_recorded_by_identity(tmp_path: Path) -> None:
    job = poisoned()
    loader = DataLoader(job.data, batch_size=16, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    train(TrainingJob(model=job.model, optimizer=job.optimizer, data=loader, loss=odd), tmp_path)
    entry = incidents(tmp_path)[0].batches[0]
    assert entry.file == ""
    assert "a Wrapped is neither a tensor nor a plain value" in entry.note


class Wrapped:
    def __init__(self, inputs: Tensor, target: Tensor) -> None:
        self.inputs, self.target = inputs, target


def collate(samples: list[tuple[Tensor, Tensor]]) -> Wrapped:
    return Wrapped(*(torch.stack(parts) for parts in zip(*samples, strict=True)))


def odd(model: nn.Module, batch: Wrapped) -> Tensor:
    return (model(batch.inputs) - batch.target).square().mean()


def test_incidents_are_found_by_name_and_number(tmp_path: Path) -> None:
    train(divides_by_zero(), tmp_path)
    assert find_incident(tmp_path, "2").name == "0002-step-000021"
    assert find_incident(tmp_path, "0002-step-000021").name == "0002-step-000021"
    with pytest.raises(RunError, match="has no incident '9'; it has 0001-step-000003"):
        find_incident(tmp_path, "9")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"format": 99}', "has format 99; this Esper reads 1"),
        ('{"format": 1}', "cannot be read"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    directory = tmp_path / "incidents" / "0001-step-000003"
    directory.mkdir(parents=True)
    (directory / "incident.json").write_text(text)
    with pytest.raises(RunError, match=message):
        read_incident(directory)
