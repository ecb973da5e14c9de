"""Every random generator that a training step may draw from, as tensors."""

import random

import numpy as np
import torch
from torch import Tensor

from esper.leyline import StateError


def capture_random() -> dict[str, Tensor]:
    """Return the states of the generators of Python, NumPy, torch and every CUDA device.

    :returns: CPU tensors by name: ``rng/python`` and ``rng/numpy`` int64, the others uint8.
    """
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    states = {
        "rng/torch": torch.get_rng_state(),
        "rng/python": torch.tensor([version, *words], dtype=torch.int64),
        "rng/python_gauss": torch.tensor(
            [float("nan") if gauss is None else gauss], dtype=torch.float64
        ),
        "rng/numpy": torch.tensor(
            [inner["pos"], numpy_state["has_gauss"], *inner["key"].tolist()], dtype=torch.int64
        ),
        "rng/numpy_gauss": torch.tensor([numpy_state["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"rng/cuda/{index}"] = state
    return states


def restore_random(tensors: dict[str, Tensor]) -> None:
    """Set every generator that ``tensors`` holds a state of (see :func:`capture_random`).

    :raises StateError: a generator's state is missing.
    """
    try:
        python = tensors["rng/python"].tolist()
        gauss = float(tensors["rng/python_gauss"])
        numpy = tensors["rng/numpy"]
        numpy_gauss = float(tensors["rng/numpy_gauss"])
        torch_state = tensors["rng/torch"]
    except KeyError as missing:
        raise StateError(f"the saved state lacks the random generator {missing}") from missing
    # NaN stands for "no value kept back": Box-Muller never returns one.
    random.setstate((python[0], tuple(python[1:]), None if gauss != gauss else gauss))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"pos": int(numpy[0]), "key": numpy[2:].numpy().astype(np.uint32)},
            "has_gauss": int(numpy[1]),
            "gauss": numpy_gauss,
        }
    )
    torch.set_rng_state(torch_state.cpu().clone())
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        state = tensors.get(f"rng/cuda/{index}")
        if state is not None:
            torch.cuda.set_rng_state(state.cpu().clone(), index)
