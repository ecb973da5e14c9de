"""PCGrad as others formulate it, on gradients that are there already.

Every function takes one list of parameter gradients for each task and returns the combined list.
The formulations are written from the papers and from what the packages do, for timing.
"""

import copy
import random
from collections.abc import Sequence

import torch
from torch import Tensor

Gradients = Sequence[Sequence[Tensor]]


def flatten(gradients: Gradients) -> list[Tensor]:
    """Lay each task's gradients end to end, as every formulation on vectors has to."""
    return [torch.cat([gradient.reshape(-1) for gradient in row]) for row in gradients]


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = vector.split([gradient.numel() for gradient in like])
    return [piece.view_as(gradient) for piece, gradient in zip(pieces, like, strict=True)]


def textbook(gradients: Gradients, orders: Sequence[Sequence[int]]) -> list[Tensor]:
    """Algorithm 1 of arXiv 2001.06782 on vectors."""
    vectors = flatten(gradients)
    squares = [float(vector @ vector) for vector in vectors]
    total = torch.zeros_like(vectors[0])
    for task, order in enumerate(orders):
        projected = vectors[task].clone()
        for other in order:
            inner = float(projected @ vectors[other]) if other != task else 0.0
            if inner < 0:
                projected.sub_(vectors[other], alpha=inner / squares[other])
        total += projected
    return unflatten(total, gradients[0])


def libmtl(gradients: Gradients) -> list[Tensor]:
    """As LibMTL does: a matrix of gradients, norms taken anew for each pair, 1e-8 added."""
    matrix = torch.stack(flatten(gradients))
    projected = matrix.clone()
    for task in range(len(matrix)):
        order = list(range(len(matrix)))
        random.shuffle(order)
        for other in order:
            inner = torch.dot(projected[task], matrix[other])
            if inner < 0:
                norm = matrix[other].norm()
                projected[task] -= inner * matrix[other] / (norm.pow(2) + 1e-8)
    return unflatten(projected.sum(0), gradients[0])


def optimizer_wrapper(gradients: Gradients) -> list[Tensor]:
    """As the most used PCGrad optimizer for torch does: copies, masks of what each task reaches."""
    vectors = flatten(gradients)
    reached = flatten([[torch.ones_like(gradient) for gradient in row] for row in gradients])
    shared = torch.stack(reached).prod(0).bool()
    projected, others = copy.deepcopy(vectors), list(vectors)
    for vector in projected:
        random.shuffle(others)
        for other in others:
            inner = torch.dot(vector, other)
            if inner < 0:
                vector -= inner * other / (other.norm() ** 2)
    merged = torch.zeros_like(vectors[0])
    merged[shared] = torch.stack([vector[shared] for vector in projected]).mean(0)
    merged[~shared] = torch.stack([vector[~shared] for vector in projected]).sum(0)
    return unflatten(merged, gradients[0])
