"""The two losses, their gradients by hand, and their Pareto set."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# The papers' problem: the second loss is the first with the signs of 3.5 and 7 turned.
SIGNS = np.array([1.0, -1.0])
FLOOR = 5e-6
BOTTOM = 7.0


def losses(points: Array) -> Array:
    """Return both losses.

    :param points: 2 by anything: x1 and x2.
    :returns: 2 by the rest of the shape.
    """
    return _evaluate(points)[0]


def gradients(points: Array) -> Array:
    """Return the gradients of both losses: 2 losses by 2 variables by the rest of the shape."""
    return _evaluate(points)[1]


def _evaluate(points: Array) -> tuple[Array, Array]:
    x1, x2 = points
    sign = SIGNS.reshape(2, *(1,) * x1.ndim)
    tanh, half = np.tanh(x2), np.tanh(x2 / 2)
    above, below = np.maximum(half, 0), np.maximum(-half, 0)
    slope = 0.5 * (1 - half * half)
    inner = -0.5 * x1 + sign * (tanh - 3.5)
    size = np.abs(inner)
    valley = np.log(np.maximum(size, FLOOR)) + 6
    # Of a clamp and of its corner, torch takes this derivative.
    steep = np.where(size >= FLOOR, 1 / np.where(inner == 0, 1.0, inner), 0.0)
    from_bottom = x1 - BOTTOM * sign
    depth = x2 + 8
    bowl = (from_bottom * from_bottom + 0.1 * depth * depth) / 10 - 20
    along = -0.5 * above * steep + below * from_bottom / 5
    up = above * steep * sign * (1 - tanh * tanh) + below * 0.02 * depth
    up += (half >= 0) * slope * valley - (half <= 0) * slope * bowl
    return above * valley + below * bowl, np.stack([along, up], axis=1)


def pareto_x2(x1: Array) -> Array:
    """Return the x2 of the Pareto set at each x1 from -7 to 7.

    With weights a and 1 - a, the gradient in x1 vanishes at x1 = 7 (2 a - 1), where the weighted
    bowl is (49 - x1²) / 10 - 20 + (x2 + 8)² / 100. What is left is one equation in x2. Its root,
    found by bisection, lies below the bowls' bottoms at -8, as tanh(-x2 / 2) still grows there.
    """
    low, high = np.full_like(x1, -12.0), np.full_like(x1, -8.0)
    for _ in range(60):
        x2 = (low + high) / 2
        half = np.tanh(-x2 / 2)
        bowl = (BOTTOM**2 - x1 * x1) / 10 - 20 + 0.01 * (x2 + 8) ** 2
        rising = half * 0.02 * (x2 + 8) - 0.5 * (1 - half * half) * bowl > 0
        low, high = np.where(rising, low, x2), np.where(rising, x2, high)
    return (low + high) / 2


def pareto_distance(points: Array) -> Array:
    """Return how far points lie from the Pareto set, straight up or down, or from its ends.

    :param points: 2 by anything.
    """
    x1, x2 = points
    inside = np.clip(x1, -BOTTOM, BOTTOM)
    distance: Array = np.hypot(x1 - inside, x2 - pareto_x2(inside))
    return distance


# By symmetry, the two losses are alike there.
LEAST_MEAN = np.array([0.0, pareto_x2(np.zeros(1))[0]])
