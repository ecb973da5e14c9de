"""Which checkpoints are kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from esper.leyline import ConfigError

Direction = Literal["min", "max"]


@dataclass(frozen=True)
class Candidate:
    """What decides about one checkpoint.

    :param path: its directory.
    :param step: steps taken in it.
    :param healthy: the guard had no doubt about it.
    :param pinned: somebody asked for it to be kept.
    :param metrics: validation metrics of its state.
    """

    path: Path
    step: int
    healthy: bool
    pinned: bool
    metrics: dict[str, float]


@dataclass(frozen=True)
class Retention:
    """Keeps the newest, and whatever else is asked for. A pinned one always stays.

    The newest healthy checkpoint stays, too, however many doubtful ones have followed it.

    :param last: newest checkpoints that are kept.
    :param every: one whose step is a multiple of this is kept for good; 0 keeps none for that.
    :param metric: a validation metric; the best by it are kept. None keeps none for that.
    :param best: how many of the best.
    :param direction: whether the lowest (``min``) or the highest (``max``) is the best.
    :raises ConfigError: a number makes no sense.
    """

    last: int = 3
    every: int = 0
    metric: str | None = None
    best: int = 1
    direction: Direction = "min"

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ConfigError(f"keep is {self.last}; at least 1 checkpoint must be kept")
        if self.every < 0 or self.best < 1:
            raise ConfigError(
                f"every is {self.every} and best is {self.best}; give every >= 0 and best >= 1"
            )

    def superfluous(self, candidates: Sequence[Candidate], saved: Path) -> list[Path]:
        """Return what may be deleted.

        :param candidates: newest first.
        :param saved: the one just written, which stays even if later steps exist: after a rollback
            the new one is not of the highest step.
        """
        healthy = [candidate for candidate in candidates if candidate.healthy]
        stay = [*candidates[: self.last], *healthy[:1], *self._best_of(candidates)]
        stay += [c for c in candidates if c.pinned or self._archives(c)]
        kept = {saved, *(candidate.path for candidate in stay)}
        return [candidate.path for candidate in candidates if candidate.path not in kept]

    def _archives(self, candidate: Candidate) -> bool:
        return bool(self.every) and candidate.step % self.every == 0 and candidate.healthy

    def _best_of(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        name = self.metric
        if name is None:
            return []
        sign = 1 if self.direction == "min" else -1
        measured = [c for c in candidates if math.isfinite(c.metrics.get(name, math.nan))]
        return sorted(measured, key=lambda c: (sign * c.metrics[name], -c.step))[: self.best]
