from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from esper.cli.operations import OperationCounter
from esper.core.config import TolariaConfig
from esper.leyline import StepRecord
from esper.tolaria import TolariaTrainer, TrainingJob
from support.growth import QUICK, growing_job
from support.jobs import config

WIDTH, BATCH, SAMPLES, EPOCHS = 16, 8, 64, 3


def plain_job(samples: int = SAMPLES) -> TrainingJob:
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    data = TensorDataset(torch.randn(samples, WIDTH))
    return TrainingJob(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data=data,
        loss=lambda model, batch: model(batch[0]).square().mean(),
        validation=data,
        batch_size=BATCH,
    )


def settings(epochs: int = EPOCHS) -> TolariaConfig:
    growth = QUICK.model_copy(update={"ramp_steps": 20, "embargo_steps": 8})
    return config(train={"epochs": epochs}).model_copy(update={"growth": growth})


def taken(job: TrainingJob, epochs: int = EPOCHS) -> tuple[list[StepRecord], float | None]:
    counter = OperationCounter(job.executor, 1)
    trainer = TolariaTrainer.from_job(job, config=settings(epochs))
    return list(counter.over(trainer.steps())), counter.total()


def test_operations_are_those_of_the_matrix_products() -> None:
    records, total = taken(plain_job())
    assert len(records) == EPOCHS * SAMPLES // BATCH
    # Forwards, and the gradient of the weights: the input needs none.
    assert total == len(records) * 2 * (2 * BATCH * WIDTH * WIDTH)


def test_validation_is_not_counted_and_one_step_an_epoch_cannot_be() -> None:
    assert taken(plain_job(2 * BATCH))[1] == 2 * EPOCHS * 2 * (2 * BATCH * WIDTH * WIDTH)
    assert taken(plain_job(BATCH))[1] is None


def test_counting_leaves_training_as_it_is_to_the_bit() -> None:
    plain = TolariaTrainer.from_job(growing_job(), config=settings(10))
    expected = [record.losses for record in plain.steps()]
    records, _ = taken(growing_job(), 10)
    assert [record.losses for record in records] == expected


def test_a_growing_model_is_counted_with_second_passes_and_surveys() -> None:
    job = growing_job()
    found = taken(job, 10)[1]
    assert found is not None
    every = _all_operations(10)
    # A step that was not counted is taken to cost as those before it.
    assert abs(found / every - 1) < 0.005
    static = taken(_without_growth(), 10)[1]
    assert static is not None
    assert found > 1.2 * static


def _without_growth() -> TrainingJob:
    import dataclasses

    return dataclasses.replace(growing_job(), policy=None, executor=None)


def _all_operations(epochs: int) -> float:
    """Count everything, step by step, and take off what validation costs."""
    job: Any = growing_job()
    trainer = TolariaTrainer.from_job(job, config=settings(epochs))
    evaluation: Any = trainer._parts.evaluation
    run, apart = evaluation.run, 0

    def counted() -> Any:
        nonlocal apart
        with FlopCounterMode(display=False) as counter:
            found = run()
        apart += counter.get_total_flops()
        return found

    evaluation.run = counted
    with FlopCounterMode(display=False) as counter:
        for _ in trainer.steps():
            pass
    return float(counter.get_total_flops() - apart)
