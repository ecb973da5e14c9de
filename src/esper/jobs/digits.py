"""The main job: read two overlaid handwritten digits at once.

Images of scikit-learn's bundled digits (real scans, 8 by 8 pixels) are laid over each other in
pairs, one shifted up and left, one down and right. One small convolutional trunk with two heads has
to name both. The two tasks want different things of the trunk, so that their gradients conflict.
Training and validation pairs are made of different scans.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from esper.leyline import JobError
from esper.tolaria.job import TrainingJob

CANVAS = 12
SCAN = 8
TRAIN_PAIRS = 12000
VALIDATION_PAIRS = 2000
VALIDATION_SHARE = 0.25
BATCH_SIZE = 64
DATA_SEED = 7
DECAY_STEPS = 2800


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


def build() -> TrainingJob:
    """Return the job. The model is initialised from torch's global generator.

    :raises JobError: scikit-learn is not installed.
    """
    training, validation = overlaid_digits()
    model = TwoDigitReader()
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
