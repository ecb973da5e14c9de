"""Each method for two tasks, as a closed form in the inner products of the gradients."""

from collections.abc import Callable

import numpy as np

from toy.problem import Array, gradients

Rule = Callable[[Array, Array, Array], tuple[Array, Array]]

CAGRAD_C = 0.4
RATE, BETAS, EPSILON = 1e-3, (0.9, 0.999), 1e-8
TINY = 1e-300
EVERY = 20


def sum_rule(g11: Array, _g12: Array, g22: Array) -> tuple[Array, Array]:
    """Add: one and one."""
    return np.ones_like(g11), np.ones_like(g22)


def pcgrad_rule(g11: Array, g12: Array, g22: Array) -> tuple[Array, Array]:
    """Project each gradient that conflicts onto the normal plane of the other, and add."""
    conflict = np.minimum(g12, 0)
    return 1 - conflict / np.maximum(g11, TINY), 1 - conflict / np.maximum(g22, TINY)


def mgda_rule(g11: Array, g12: Array, g22: Array) -> tuple[Array, Array]:
    """Take the shortest vector between both gradients: the foot of the perpendicular, clipped."""
    first = np.clip((g22 - g12) / np.maximum(g11 + g22 - 2 * g12, TINY), 0, 1)
    return first, 1 - first


def cagrad_rule(g11: Array, g12: Array, g22: Array) -> tuple[Array, Array]:
    """Add to the mean g0 a vector of length c |g0| along the best mixture of both gradients.

    The mixture g2 + x d, d = g1 - g2, minimises g0·(x d) + c |g0| |g2 + x d|. With y the distance
    of x from the foot of the perpendicular, and h the height of the triangle, both in units of |d|,
    that is A y + B sqrt(y² + h²) with A = g0·d and B = c |g0| |d|. It is least at
    y = -A h / sqrt(B² - A²) where B > |A|, else as far as x may go. It is convex, so
    that clipping x is exact.
    """
    base = np.maximum(g11 + g22 - 2 * g12, TINY)
    radius = CAGRAD_C * 0.5 * np.sqrt(np.maximum(g11 + g22 + 2 * g12, 0))
    tilt = (g11 - g22) / 2
    height = np.sqrt(np.maximum(g11 * g22 - g12 * g12, 0)) / base
    room = radius * radius * base - tilt * tilt
    inside = -tilt * height / np.sqrt(np.where(room > 0, room, 1.0))
    y = np.where(room > 0, inside, np.where(tilt == 0, 0.0, np.copysign(np.inf, -tilt)))
    first = np.clip(y + (g22 - g12) / base, 0, 1)
    second = 1 - first
    square = first**2 * g11 + 2 * first * second * g12 + second**2 * g22
    # A mixture as short as the rounding of its square has no direction; the mean is left.
    clear = square > 1e-14 * (g11 + g22)
    share = np.where(clear, radius / np.sqrt(np.where(clear, square, 1.0)), 0.0)
    return 0.5 + share * first, 0.5 + share * second


def upgrad_rule(g11: Array, g12: Array, g22: Array) -> tuple[Array, Array]:
    """Project each gradient onto the cone of directions that harm no task; take the mean.

    With one other task the cone has one wall to project onto, PCGrad's: this is half of it.
    """
    first, second = pcgrad_rule(g11, g12, g22)
    return first / 2, second / 2


def nash_rule(g11: Array, g12: Array, g22: Array) -> tuple[Array, Array]:
    """Solve G a = 1 / a.

    Multiplied by a1 and a2, the two equations differ in g11 a1² and g22 a2² only; these are equal,
    so that a1 = t / |g1| and a2 = t / |g2|. Put in: t² (1 + cosine) = 1. The update's length is √2.
    """
    first, second = np.sqrt(np.maximum(g11, TINY)), np.sqrt(np.maximum(g22, TINY))
    # Opposite gradients leave nothing to bargain for; the floor keeps their sum, zero, finite.
    scale = 1 / np.sqrt(np.maximum(1 + g12 / (first * second), 1e-12))
    return scale / first, scale / second


RULES: dict[str, Rule] = {
    "Sum": sum_rule,
    "PCGrad": pcgrad_rule,
    "UPGrad": upgrad_rule,
    "MGDA": mgda_rule,
    "CAGrad": cagrad_rule,
    "Nash-MTL": nash_rule,
}


def combine(rule: Rule, jacobian: Array) -> Array:
    """Return the update.

    :param jacobian: 2 losses by variables by anything.
    """
    first, second = jacobian
    weights = rule((first * first).sum(0), (first * second).sum(0), (second * second).sum(0))
    combined: Array = weights[0] * first + weights[1] * second
    return combined


def descend(rules: dict[str, Rule], starts: Array, steps: int, every: int = EVERY) -> Array:
    """Run Adam with each rule from each start.

    :param starts: starts by 2.
    :returns: every so many steps the points: times by 2 by rules by starts, the first and the last
        included.
    """
    points = np.repeat(starts.T[:, None, :], len(rules), axis=1)
    mean, square = np.zeros_like(points), np.zeros_like(points)
    update = np.empty_like(points)
    history = [points.copy()]
    for step in range(1, steps + 1):
        jacobian = gradients(points)
        for index, rule in enumerate(rules.values()):
            update[:, index] = combine(rule, jacobian[:, :, index])
        mean += (1 - BETAS[0]) * (update - mean)
        square += (1 - BETAS[1]) * (update * update - square)
        scale = np.sqrt(square / (1 - BETAS[1] ** step)) + EPSILON
        points = points - RATE / (1 - BETAS[0] ** step) * mean / scale
        if step % every == 0 or step == steps:
            history.append(points.copy())
    return np.stack(history)
