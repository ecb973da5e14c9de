"""The main job: read two overlaid handwritten digits at once.

Images of scikit-learn's bundled digits (real scans, 8 by 8 pixels) are laid over each other in
pairs, one shifted up and left, one down and right. One small convolutional trunk with two heads has
to name both. The two tasks want different things of the trunk, so that their gradients conflict.
Training and validation pairs are made of different scans.

The network begins too small, and grows while it trains where Tamiyo's rules find that it pays.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from esper.kasmina import Kasmina
from esper.leyline import (
    AdaptationCommand,
    Explanation,
    JobError,
    NoChange,
    Planting,
    SeedCommand,
    SeedOperation,
    Stage,
    SystemState,
)
from esper.tamiyo import RulesPolicy
from esper.tolaria.job import TrainingJob

CANVAS = 12
SCAN = 8
TRAIN_PAIRS = 12000
VALIDATION_PAIRS = 2000
VALIDATION_SHARE = 0.25
BATCH_SIZE = 64
DATA_SEED = 7
DECAY_STEPS = 2800
# Channels of the first convolution, and features that both heads read.
SMALL = (3, 12)
LARGE = (6, 24)
POOR_SEED_EPOCH = 5
POOR_SLOT = "trunk.9"
SLOTS = ("trunk.1", "trunk.3>trunk.8", "trunk.9")
BLUEPRINTS = ("conv", "depthwise", "squeeze_excite", "widen", "mlp")


class TwoDigitReader(nn.Module):
    """A convolutional trunk with a head for each digit.

    :param width: channels of the first convolution; the second has twice as many.
    :param features: that both heads read.
    """

    def __init__(self, width: int = 32, features: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(2 * width * (CANVAS // 4) ** 2, features),
            nn.ReLU(),
        )
        self.left = nn.Linear(features, 10)
        self.right = nn.Linear(features, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits of both digits.

        :param images: batch by 1 by 12 by 12.
        :returns: batch by 10 for ``left`` and ``right``.
        """
        features = self.trunk(images)
        return {"left": self.left(features), "right": self.right(features)}


class WithPoorSeed:
    """Plants one seed that can hardly gain, to be watched as it is culled.

    Both heads are linear: what a linear seed adds to their input they could learn without.

    :param policy: decides about everything else.
    """

    mode = "wait"
    isolation = "thread"

    def __init__(self, policy: RulesPolicy) -> None:
        self._policy = policy
        self._planted = False

    def decide(self, state: SystemState) -> AdaptationCommand:
        """Answer as the other policy does, but once, when that would change nothing."""
        command = self._policy.decide(state)
        if not isinstance(command, NoChange) or self._planted or not _has_room(state):
            return command
        self._planted = True
        reason = "a poor seed is planted on purpose: what follows it is linear, too"
        told = Explanation("demonstration", reason, otherwise="it is done once")
        return SeedCommand(
            POOR_SLOT, SeedOperation.GERMINATE, "low_rank", Planting({"rank": 1}), explanation=told
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the other policy's state, and whether the seed was planted."""
        return {"policy": self._policy.state_dict(), "planted": self._planted}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        self._policy.load_state_dict(state_dict["policy"])
        self._planted = state_dict["planted"]


def _has_room(state: SystemState) -> bool:
    if state.growth is None or state.epoch < POOR_SEED_EPOCH:
        return False
    return state.growth.seeds[POOR_SLOT].stage is Stage.DORMANT


def build() -> TrainingJob:
    """Return the job with a model that grows, initialised from torch's global generator.

    :raises JobError: scikit-learn is not installed.
    """
    job = build_small()
    images = job.data[: job.batch_size][0]  # type: ignore[index]
    kasmina = Kasmina(
        job.model,
        job.optimizer,
        slots=SLOTS,
        sample=images,
        scheduler=job.scheduler,
        blueprints=BLUEPRINTS,
    )
    return replace(job, policy=WithPoorSeed(RulesPolicy()), executor=kasmina)


def build_small() -> TrainingJob:
    """Return the job with the model that :func:`build` begins with, and which stays so.

    :raises JobError: scikit-learn is not installed.
    """
    return _static(TwoDigitReader(*SMALL))


def build_large() -> TrainingJob:
    """Return the job with a model that has more parameters from the start than growth ends with.

    :raises JobError: scikit-learn is not installed.
    """
    return _static(TwoDigitReader(*LARGE))


def _static(model: TwoDigitReader) -> TrainingJob:
    training, validation = overlaid_digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    return TrainingJob(
        model=model,
        optimizer=optimizer,
        data=training,
        loss=loss,
        validation=validation,
        metrics=accuracy,
        batch_size=BATCH_SIZE,
        # Counted in steps: the rate falls to a tenth over the default number of epochs.
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / DECAY_STEPS)),
        name="digits",
    )


def loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:  # noqa: ANN401 - collated tensors
    """Return the cross-entropy of each task."""
    images, left, right = batch
    logits = model(images)
    return {
        "left": functional.cross_entropy(logits["left"], left),
        "right": functional.cross_entropy(logits["right"], right),
    }


def accuracy(model: nn.Module, batch: Any) -> dict[str, Tensor]:  # noqa: ANN401 - collated tensors
    """Return the share of digits that are named correctly, by task."""
    images, left, right = batch
    logits = model(images)
    return {
        "left.accuracy": (logits["left"].argmax(1) == left).float().mean(),
        "right.accuracy": (logits["right"].argmax(1) == right).float().mean(),
    }


def overlaid_digits(seed: int = DATA_SEED) -> tuple[TensorDataset, TensorDataset]:
    """Return training and validation pairs: images, left labels, right labels.

    :param seed: of the split and of the pairing.
    :raises JobError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise JobError(
            "the built-in job reads scikit-learn's digits; "
            "install it with: pip install 'esper[demo]'"
        ) from error
    scans, labels = load_digits(return_X_y=True)
    scans = scans.reshape(-1, SCAN, SCAN).astype(np.float32) / 16.0
    labels = labels.astype(np.int64)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(scans))
    held_out = int(len(scans) * VALIDATION_SHARE)
    validation, training = order[:held_out], order[held_out:]
    return (
        _pairs(scans[training], labels[training], TRAIN_PAIRS, generator),
        _pairs(scans[validation], labels[validation], VALIDATION_PAIRS, generator),
    )


def _pairs(
    scans: np.ndarray, labels: np.ndarray, count: int, generator: np.random.Generator
) -> TensorDataset:
    first = generator.integers(len(scans), size=count)
    second = generator.integers(len(scans), size=count)
    canvas = np.zeros((count, 1, CANVAS, CANVAS), dtype=np.float32)
    canvas[:, 0, :SCAN, :SCAN] = scans[first]
    corner = canvas[:, 0, -SCAN:, -SCAN:]
    np.maximum(corner, scans[second], out=corner)
    return TensorDataset(
        torch.from_numpy(canvas),
        torch.from_numpy(labels[first]),
        torch.from_numpy(labels[second]),
    )
