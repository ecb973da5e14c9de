import pytest
import torch

from esper.core.config import TolariaConfig, TrainConfig
from esper.jobs import digits
from esper.tolaria import TolariaTrainer


def test_training_and_validation_pairs_are_made_of_different_scans() -> None:
    training, validation = digits.overlaid_digits()
    assert len(training) == digits.TRAIN_PAIRS
    assert len(validation) == digits.VALIDATION_PAIRS

    def corners(images: torch.Tensor) -> set[bytes]:
        # The upper left of the canvas belongs to the first scan alone.
        return {image[0, :4, :4].numpy().tobytes() for image in images}

    images = validation.tensors[0]
    seen = corners(training.tensors[0])
    distinct = [image for image in images if image[0, :4, :4].unique().numel() > 10]
    assert distinct
    assert not any(image[0, :4, :4].numpy().tobytes() in seen for image in distinct)


def test_the_data_is_the_same_every_time() -> None:
    first, second = digits.overlaid_digits(), digits.overlaid_digits()
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_one_epoch_learns_to_read_and_the_tasks_conflict() -> None:
    torch.manual_seed(0)
    trainer = TolariaTrainer.from_job(
        digits.build_large(), config=TolariaConfig(train=TrainConfig(epochs=2, device="cpu"))
    )
    state = list(trainer.run())[-1]
    assert state.validation["left.accuracy"] > 0.7
    assert state.validation["right.accuracy"] > 0.7
    assert state.conflict_share is not None
    assert 0.1 < state.conflict_share < 0.9


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_the_model_grows_and_a_poor_seed_is_planted() -> None:
    torch.manual_seed(0)
    job = digits.build()
    trainer = TolariaTrainer.from_job(
        job, config=TolariaConfig(train=TrainConfig(epochs=8, device="cpu"))
    )
    state = list(trainer.run())[-1]
    planted = {r.blueprint for r in state.reports if r.operation == "germinate" and r.applied}
    assert "low_rank" in planted
    assert len(planted) > 1
    assert state.growth is not None
    assert state.growth.parameters > sum(p.numel() for p in digits.build_small().model.parameters())
