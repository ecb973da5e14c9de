"""PCGrad as the paper's Algorithm 1 states it, on whole vectors: the oracle of the tests."""

import torch
from torch import Tensor


def textbook_pcgrad(gradients: list[Tensor], orders: list[list[int]]) -> Tensor:
    """Project each gradient against the others' originals in the given order, and add them."""
    originals = [gradient.double() for gradient in gradients]
    total = torch.zeros_like(originals[0])
    for task, order in enumerate(orders):
        projected = originals[task].clone()
        for other in order:
            inner = projected @ originals[other]
            if other != task and inner < 0:
                projected -= inner / (originals[other] @ originals[other]) * originals[other]
        total += projected
    return total
