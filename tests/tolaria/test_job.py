from collections import namedtuple
from typing import Any

import pytest
import torch

from esper.leyline import ConfigError, JobError
from esper.tolaria.batch_tree import map_tensors
from esper.tolaria.drill import poison
from esper.tolaria.job import TrainingJob
from esper.tolaria.placement import placer, resolve_device
from support.jobs import two_task_job


def plateau() -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"model": 3}, "model is a int; give a torch.nn"),
        ({"loss": None}, "loss is a NoneType; give a function"),
        ({"metrics": 3}, "metrics is a int"),
        ({"scheduler": "cosine"}, "scheduler is a str"),
        ({"scheduler": plateau()}, "PlateauPolicy"),
        ({"aggregator": "pcgrad"}, r"has no weights\(gramian\)"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_part_of_the_wrong_type_is_named(part: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        two_task_job(**part)


def test_an_optimizer_of_the_wrong_type_is_named() -> None:
    job = two_task_job()
    with pytest.raises(JobError, match="optimizer is a str"):
        TrainingJob(model=job.model, optimizer="adam", data=job.data, loss=job.loss)  # type: ignore[arg-type]


Pair = namedtuple("Pair", "inputs target")


def test_every_tensor_of_a_batch_is_reached() -> None:
    batch = {"a": [torch.ones(2), 3], "b": Pair(torch.ones(1), ("x", torch.ones(1)))}
    doubled = map_tensors(batch, lambda tensor: tensor * 2)
    assert doubled["a"][0].tolist() == [2, 2]
    assert doubled["a"][1] == 3
    assert isinstance(doubled["b"], Pair)
    assert doubled["b"].target[1].tolist() == [2]
    assert batch["a"][0].tolist() == [1, 1]  # type: ignore[index]


def test_poison_spares_labels() -> None:
    inputs, labels = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])
    spoilt = poison((inputs, labels))
    assert spoilt[0].tolist() == [[-60.0], [-30.0]]
    assert torch.equal(spoilt[1], labels)
    assert inputs.tolist() == [[1.0], [2.0]]


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.device is 'nonsense'"):
        resolve_device("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"train\.device is 'cuda'"):
            resolve_device("cuda")
        assert resolve_device("auto").type == "cpu"


def test_placing_on_the_processor_returns_the_batch_itself() -> None:
    batch = [torch.ones(1)]
    assert placer(torch.device("cpu"))(batch) is batch
    moved = placer(torch.device("meta"))(batch)
    assert moved[0].device.type == "meta"
