"""What growth brings: a grown model beside two of fixed size, over paired seeds."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from esper.leyline import RunError
from esper.nissa.report.html import ABSENT
from esper.nissa.report.student import Interval, interval

COMPARISON = "baselines.json"
GROWN, SMALL, LARGE = "grown", "small", "large"
ARMS = (GROWN, SMALL, LARGE)
COMPLETED = "completed"
_UNITS = ((1e12, " T"), (1e9, " G"), (1e7, " M"))
# Parts of a metric's name that say that less of it is better.
_LESS = ("loss", "error", "mse", "mae", "perplexity", "nll", "entropy", "bits", "distance")


class ArmRun(msgspec.Struct, frozen=True, omit_defaults=True):
    """One training of one arm.

    :param arm: ``grown``, ``small`` or ``large``.
    :param seed: of initial weights and the order of the data.
    :param outcome: ``completed``, or what it came to instead.
    :param validation: metrics after the last epoch.
    :param parameters: of the model at the end.
    :param operations: floating-point operations of its training steps, second passes, surveys of
        seeds and structural changes included, validation left out; absent where they could not be
        counted.
    :param seconds: on the clock, from the first step to the last; others trained beside it.
    :param error: why it did not complete.
    """

    arm: str
    seed: int
    outcome: str
    validation: dict[str, float] = {}
    parameters: int | None = None
    operations: float | None = None
    seconds: float | None = None
    error: str = ""


class Comparison(msgspec.Struct, frozen=True, omit_defaults=True):
    """Trainings of three arms with the same seeds.

    :param targets: what was trained, by arm.
    :param seeds: of each arm.
    :param runs: those that have ended so far.
    :param directions: ``min`` or ``max`` by metric, where it is known which is better; of others
        it is told by their names.
    """

    targets: dict[str, str]
    seeds: list[int]
    runs: list[ArmRun] = []
    directions: dict[str, str] = {}

    def values(self, arm: str, read: "Reading") -> dict[int, float]:
        """Return what was read from the runs of an arm, by seed."""
        found = {run.seed: read(run) for run in self.runs if run.arm == arm and _done(run)}
        return {seed: value for seed, value in found.items() if value is not None}


Reading = Callable[[ArmRun], float | None]


@dataclass(frozen=True)
class Difference:
    """How much more the grown arm has than another one, in pairs of the same seed.

    :param against: the other arm.
    :param interval: of the mean difference; None without a pair.
    :param verdict: in words.
    """

    against: str
    interval: Interval | None
    verdict: str


@dataclass(frozen=True)
class Measure:
    """One metric or cost, compared.

    :param less_is_better: whether a lower value is better.
    :param is_cost: whether it is a cost rather than a metric.
    :param values: by seed, by arm.
    :param intervals: of the mean, by arm.
    """

    name: str
    less_is_better: bool
    is_cost: bool
    values: dict[str, dict[int, float]]
    intervals: dict[str, Interval | None]
    differences: list[Difference]


def read_comparison(run: Path) -> Comparison | None:
    """Return the comparison that a run directory holds; None without one.

    :raises RunError: it is damaged.
    """
    path = run / COMPARISON
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Comparison)
    except (OSError, msgspec.MsgspecError) as error:
        raise RunError(
            f"{path} cannot be read: {error}; remove it, or run --baselines anew"
        ) from error


def write_comparison(run: Path, comparison: Comparison) -> None:
    """Write ``baselines.json`` into a run directory.

    :raises RunError: it cannot be written.
    """
    path = run / COMPARISON
    temporary = run / f"{COMPARISON}.tmp"
    try:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(comparison)) + b"\n")
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from error


def measures(comparison: Comparison) -> list[Measure]:
    """Compare every validation metric, and what training costs."""
    names = dict.fromkeys(name for run in comparison.runs for name in run.validation)
    found = [
        _measure(comparison, name, _metric(name), less=_is_less_better(comparison, name))
        for name in names
    ]
    found += [
        _measure(comparison, name, read, less=True, is_cost=True) for name, read in _COSTS.items()
    ]
    return [measure for measure in found if any(measure.values.values())]


def verdicts(comparison: Comparison) -> Iterator[str]:
    """Yield one sentence for each metric: what growth has brought."""
    for measure in measures(comparison):
        if not measure.is_cost:
            told = "; ".join(difference.verdict for difference in measure.differences)
            yield f"{measure.name}, grown: {told}"


def failures(comparison: Comparison) -> Iterator[str]:
    """Yield one sentence for each training that did not complete."""
    for run in comparison.runs:
        if not _done(run):
            yield f"{run.arm}, seed {run.seed} {run.outcome}: {run.error}; its pairs are left out"


def interval_text(found: Interval | None) -> str:
    """Return a mean and how far its interval reaches, with the digits that it settles."""
    if found is None:
        return ABSENT
    scale, unit = _scale(found)
    if not math.isfinite(found.reach):
        return f"{found.mean / scale:.4g}{unit}"
    digits = _digits(found, scale)
    return f"{found.mean / scale:,.{digits}f} ± {found.reach / scale:,.{digits}f}{unit}"


def difference_text(found: Interval | None) -> str:
    """Return a difference with both ends of its interval."""
    if found is None:
        return "no pair"
    scale, unit = _scale(found)
    if not math.isfinite(found.reach):
        return f"{found.mean / scale:+.4g}{unit} in one pair"
    digits = _digits(found, scale)
    mean, low, high = (
        f"{value / scale:+,.{digits}f}" for value in (found.mean, found.low, found.high)
    )
    return f"{mean} ({low} to {high}){unit}"


def _scale(found: Interval) -> tuple[float, str]:
    """Return what to divide by, and how that is called."""
    return next(((size, unit) for size, unit in _UNITS if abs(found.mean) >= size), (1.0, ""))


def _measure(
    comparison: Comparison, name: str, read: Reading, *, less: bool, is_cost: bool = False
) -> Measure:
    values = {arm: comparison.values(arm, read) for arm in ARMS}
    intervals = {arm: interval(list(found.values())) for arm, found in values.items()}
    differences = []
    for other in (SMALL, LARGE):
        pairs = [seed for seed in values[GROWN] if seed in values[other]]
        found = interval([values[GROWN][seed] - values[other][seed] for seed in pairs])
        differences.append(Difference(other, found, _verdict(found, other, less=less)))
    return Measure(name, less, is_cost, values, intervals, differences)


def _verdict(found: Interval | None, other: str, *, less: bool) -> str:
    """Say what a paired difference shows, and no more than that."""
    if found is None:
        return f"not compared with {other}"
    if found.count == 1:
        return f"one seed does not tell it from {other}"
    if found.low <= 0 <= found.high:
        return f"no benefit over {other} is shown"
    return f"{'better' if (found.mean < 0) == less else 'worse'} than {other}"


def _digits(found: Interval, scale: float) -> int:
    """Return decimals so that two digits of the interval's reach are seen."""
    size, shown = (found.reach, 1) if found.reach else (abs(found.mean), 3)
    return 0 if size == 0 else min(max(shown - math.floor(math.log10(size / scale)), 0), 9)


def _is_less_better(comparison: Comparison, name: str) -> bool:
    if name in comparison.directions:
        return comparison.directions[name] == "min"
    return any(part in name.lower() for part in _LESS)


def _metric(name: str) -> Reading:
    return lambda run: run.validation.get(name)


def _done(run: ArmRun) -> bool:
    return run.outcome == COMPLETED


_COSTS: dict[str, Reading] = {
    "parameters": lambda run: run.parameters,
    "operations": lambda run: run.operations,
    "seconds": lambda run: run.seconds,
}
