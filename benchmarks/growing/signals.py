"""A one-dimensional task of ten classes, after the construction of MNIST-1D.

Source: Greydanus and Kobak, "Scaling Down Deep Learning with MNIST-1D", 2024. Each class is a short
template. A sample is its template, padded, scaled, shifted, sheared, with correlated and white
noise, at 40 points. The templates are our own, so that scores are not those of the paper.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

CACHE = Path(__file__).parents[1] / "__pycache__" / "growing"
POINTS, CLASSES = 40, 10
_VERSION = 1
# Twelve heights of each class, at even distances.
_TEMPLATES = np.array(
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)


def signals(count: int, seed: int) -> TensorDataset:
    """Return so many samples, count by 40, and their labels; made once, and kept in a file.

    :param count: of samples.
    :param seed: of the noise and everything else that is drawn.
    """
    path = CACHE / f"signals-{_VERSION}-{count}-{seed}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        waves, labels = make(count, seed)
        np.savez(path, waves=waves, labels=labels)
    with np.load(path) as kept:
        return TensorDataset(_tensor(kept["waves"]), _tensor(kept["labels"]))


def make(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw samples: waves, count by 40, float32, and labels, int64."""
    random = np.random.default_rng([_VERSION, seed])
    labels = np.arange(count) % CLASSES
    random.shuffle(labels)
    waves = np.stack([_wave(_TEMPLATES[label], random) for label in labels])
    return waves.astype(np.float32), labels.astype(np.int64)


def _wave(template: np.ndarray, random: np.random.Generator) -> np.ndarray:
    centred = (template - 5.0) / 2.0
    padded = np.concatenate([centred, np.zeros(random.integers(36, 60))])
    padded *= 1.0 + 0.4 * (random.random() - 0.5)
    padded = np.roll(padded, random.integers(padded.size))
    smooth = _smoothed(0.5 * random.standard_normal(padded.size), 2.0)
    wave = padded + smooth
    wave = wave - 1.35 * (random.random() - 0.5) * np.linspace(-1.0, 1.0, wave.size)
    places = np.linspace(0, wave.size - 1, POINTS)
    sampled = np.interp(places, np.arange(wave.size), wave)
    return sampled + 0.05 * random.standard_normal(POINTS)


def _smoothed(noise: np.ndarray, width: float) -> np.ndarray:
    reach = np.arange(-8, 9)
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    return np.convolve(noise, kernel / kernel.sum(), mode="same")


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)
