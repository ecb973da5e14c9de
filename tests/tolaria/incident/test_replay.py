import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from esper.leyline import RunError
from esper.tolaria import TolariaTrainer, TrainingJob
from esper.tolaria.incident import incident_directories
from esper.tolaria.incident.replay import Replay, replay
from support.jobs import two_task_job
from support.mishaps import (
    divides_by_zero,
    explodes,
    incidents,
    job,
    logarithm_of_negative,
    net,
    poisoned,
    root_of_zero,
    settings,
    train,
)


def replayed(run: Path, built: TrainingJob, number: int = 0, **options: bool) -> Replay:
    return replay(incident_directories(run)[number], built, **options)


@pytest.mark.parametrize(
    ("build", "phase", "module", "operation", "forward"),
    [
        (divides_by_zero, "forward", "odd", "aten.div", ""),
        (logarithm_of_negative, "forward", "odd", "aten.log", ""),
        (root_of_zero, "backward", "length", "aten.div", "aten.sqrt"),
    ],
)
def test_module_and_operation_are_named_and_the_batch_alone_is_the_cause(
    tmp_path: Path,
    build: Callable[[], TrainingJob],
    phase: str,
    module: str,
    operation: str,
    forward: str,
) -> None:
    train(build(), tmp_path)
    # The second: its course goes over the end of an epoch, with validation and dropout.
    result = replayed(tmp_path, build(), 1, from_healthy=True)
    assert result.exact, result.difference
    assert (result.baseline_steps, result.steps) == (11, 12)
    finding = result.offending.not_finite
    assert finding is not None
    assert (finding.phase, finding.module, finding.operation) == (phase, module, operation)
    assert finding.forward == forward
    assert finding.inputs[0].not_finite == 0
    assert result.cause == "batch"


def test_a_course_over_a_skipped_step_is_exact_and_learns_nothing_from_it(tmp_path: Path) -> None:
    train(divides_by_zero(), tmp_path, settings(train={"epochs": 4}))
    result = replayed(tmp_path, divides_by_zero(), 2)
    assert "skip" in [step.action for step in result.incident.course[:-1]]
    assert result.exact
    assert result.baseline_steps == result.steps - 2
    assert result.offending.not_finite is not None


def test_a_rate_far_too_high_is_batch_and_state_together(tmp_path: Path) -> None:
    train(explodes(), tmp_path)
    result = replayed(tmp_path, explodes(), from_healthy=True)
    assert result.exact
    assert result.cause == "batch and state"
    finding = result.offending.first
    assert finding is not None
    assert (finding.kind, finding.phase, finding.module) == ("out of trend", "forward", "0")
    assert max(r.high for r in finding.inputs if r.name == "0.weight") > 100
    assert not any(part.unusual for part in result.offending.batch)
    assert result.healthy is not None
    assert result.healthy.first is None


def test_after_rollbacks_with_a_climbing_and_a_cut_rate_the_course_is_exact(
    tmp_path: Path,
) -> None:
    train(explodes(), tmp_path, settings(train={"epochs": 6}))
    records = incidents(tmp_path)
    assert max(record.attempt for record in records) >= 2
    for number, record in enumerate(records):
        result = replayed(tmp_path, explodes(), number)
        assert result.exact, (record.id, result.difference)


def test_a_batch_that_was_not_doubted_is_the_first_sign(tmp_path: Path) -> None:
    train(poisoned(), tmp_path)
    result = replayed(tmp_path, poisoned(), from_healthy=True)
    assert result.exact
    assert result.sign is not None
    assert result.sign.step == 3
    assert [part.unusual for part in result.sign.batch] == [True, False]
    assert result.cause == "batch and state"


def test_a_drill_is_replayed_as_a_batch_out_of_the_ordinary(tmp_path: Path) -> None:
    train(two_task_job(), tmp_path, settings(train={"epochs": 6}), drill=True)
    result = replayed(tmp_path, two_task_job(), from_healthy=True)
    assert result.exact
    assert result.offending.batch[0].unusual
    assert result.offending.first is not None
    assert result.offending.first.phase == "forward"
    assert result.cause == "batch"


def test_a_checkpoint_of_the_run_serves_as_the_state(tmp_path: Path) -> None:
    checkpoints = {"every": 10, "mode": "wait", "keep": 9}
    config = settings(incidents={"max_state_megabytes": 0}, checkpoints=checkpoints)
    train(divides_by_zero(), tmp_path, config)
    result = replayed(tmp_path, divides_by_zero(), 1)
    assert result.exact
    assert (result.baseline_steps, result.steps) == (1, 2)
    with pytest.raises(RunError, match="has no state to begin from"):
        replayed(tmp_path, divides_by_zero(), 0)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000000020")
    with pytest.raises(RunError, match=r"the checkpoint of step 20 that .* names is gone"):
        replayed(tmp_path, divides_by_zero(), 1)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(RunError, match="cannot be read"):
        replayed(tmp_path, divides_by_zero(), 1)


class Drifting(Dataset[tuple[Tensor, Tensor]]):
    """Gives another sample when it is asked for it again in a later program."""

    def __init__(self, broken: bool) -> None:
        self._source = job_data()
        self._broken = broken

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self._source[index]
        if self._broken and index == 77:
            inputs = inputs.clone()
            inputs[0] = 0
        return inputs, target


def job_data() -> Dataset[tuple[Tensor, Tensor]]:
    from support.mishaps import data

    return data()  # type: ignore[return-value]


def test_where_the_data_gives_another_batch_the_kept_one_is_used(tmp_path: Path) -> None:
    from support.mishaps import Ratio

    train(job(net(Ratio()), Drifting(broken=True)), tmp_path, settings(train={"epochs": 1}))  # type: ignore[arg-type]
    again = job(net(Ratio()), Drifting(broken=False))  # type: ignore[arg-type]
    result = replayed(tmp_path, again)
    assert result.exact
    assert result.offending.not_finite is not None
    assert result.reasons == [
        "the data gives another batch for step 3 than then; the kept one is used"
    ]


def test_a_replay_that_is_not_exact_says_where_and_why(tmp_path: Path) -> None:
    train(divides_by_zero(), tmp_path)
    other = divides_by_zero()
    base = other.loss
    changed = TrainingJob(
        model=other.model,
        optimizer=other.optimizer,
        data=other.data,
        loss=lambda model, batch: base(model, batch) * 1.5,
        batch_size=16,
    )
    result = replayed(tmp_path, changed, 1)
    assert not result.exact
    assert result.difference is not None
    assert (result.difference.step, result.difference.what) == (10, "loss")
    assert result.difference.replayed == pytest.approx(1.5 * float(result.difference.recorded or 0))


def test_another_model_is_refused(tmp_path: Path) -> None:
    train(divides_by_zero(), tmp_path)
    with pytest.raises(RunError, match="does not fit the job"):
        replayed(tmp_path, two_task_job())


def test_a_replay_leaves_generators_threads_and_run_as_they_were(tmp_path: Path) -> None:
    train(divides_by_zero(), tmp_path)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    torch.manual_seed(99)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    built = divides_by_zero()
    torch.set_rng_state(before)
    replayed(tmp_path, built, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == files


def test_training_on_after_a_replay_in_the_same_process_is_undisturbed(tmp_path: Path) -> None:
    def losses(directory: Path) -> list[float]:
        trainer = TolariaTrainer.from_job(divides_by_zero(), config=settings(), directory=directory)
        return [record.loss for record in trainer.steps() if record.action == "commit"]

    first = losses(tmp_path / "first")
    replayed(tmp_path / "first", divides_by_zero())
    assert losses(tmp_path / "second") == first
