"""Made-up losses: a falling curve under one of three kinds of noise, some of which diverge."""

import math
import random
from collections.abc import Callable, Iterator

from divergence_runs.recording import Trace

STEPS, RAMP = 600, 15
HEIGHTS = (1.6, 2.5)


def synthetic_runs(healthy: int, faulty: int, seed: int = 0) -> Iterator[Trace]:
    """Make traces: noise correlated from step to step, of 3 %, of 15 %, and with heavy tails.

    :param healthy: of each kind of noise.
    :param faulty: of each kind; they rise to 1.6 or 2.5 times within 15 steps.
    """
    source = random.Random(seed)
    noises: dict[str, Callable[[], float]] = {
        "noise of 3 %": lambda: source.gauss(0, 0.03),
        "noise of 15 %": lambda: source.gauss(0, 0.15),
        "heavy tails": lambda: 0.06 * _student(source),
    }
    for name, noise in noises.items():
        for number in range(healthy + faulty):
            onset = source.randint(200, 480) if number < faulty else -1
            trace = Trace(name, "synthetic" if onset >= 0 else "healthy", onset)
            for loss in _losses(noise, onset, source.choice(HEIGHTS)):
                trace.losses.append({"loss": loss})
                # There is no gradient; a loss's is about as noisy as the loss.
                trace.norms.append(loss)
            yield trace


def _losses(noise: Callable[[], float], onset: int, height: float) -> Iterator[float]:
    drift = 0.0
    for step in range(STEPS):
        drift = 0.5 * drift + noise() * math.sqrt(0.75)
        loss = (1 + 2 * math.exp(-step / 200)) * max(0.05, 1 + drift)
        rise = min(1.0, (step - onset) / RAMP) if 0 <= onset <= step else 0.0
        yield loss * (1 + (height - 1) * rise)


def _student(source: random.Random) -> float:
    """Draw from Student's t with three degrees of freedom."""
    chi = sum(source.gauss(0, 1) ** 2 for _ in range(3)) / 3
    return source.gauss(0, 1) / math.sqrt(chi)
