"""A state whose content tells its step, for testing what keeps states."""

from typing import Any

import torch

from esper.tolaria.state import Capture


class Stamped:
    """A state of several tensors that all hold the step."""

    def __init__(self, size: int = 2000) -> None:
        self.tensors = {
            "model/weight": torch.zeros(size // 10, 10),
            "model/half": torch.zeros(7, dtype=torch.bfloat16),
            "model/flag": torch.zeros((), dtype=torch.bool),
            "model/empty": torch.zeros(0, 3),
            "optimizer/weight/step": torch.zeros((), dtype=torch.int64),
        }
        self.values: dict[str, Any] = {"step": 0, "inf": float("inf")}
        self.restored = 0

    def set(self, step: int) -> None:
        for tensor in self.tensors.values():
            tensor.fill_(step % 2 if tensor.dtype == torch.bool else step)
        self.values["step"] = step

    def capture(self) -> Capture:
        return Capture(self.tensors, self.values)

    def restore(self, capture: Capture, *, keep: object = ()) -> None:
        self.restored += 1
        for name, tensor in self.tensors.items():
            tensor.copy_(capture.tensors[name])
        self.values = dict(capture.values)

    def is_step(self, step: int) -> bool:
        expected = Stamped(self.tensors["model/weight"].numel())
        expected.set(step)
        same = all(torch.equal(t, expected.tensors[n]) for n, t in self.tensors.items())
        return same and self.values == expected.values
