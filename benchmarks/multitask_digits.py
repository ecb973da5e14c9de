"""What the choice of aggregator does to the built-in job: two overlaid digits, one trunk.

    python benchmarks/multitask_digits.py [--quick] [--seeds 5] [--epochs 15]
                                          [--markdown FILE] [--plot FILE]

Each method trains the job's network with the job's optimizer and schedule from the same weights on
the same batches with the same dropout, through ``esper.tolaria.aggregation.backward``. Two arms
train one task alone. The weightings of torchjd take ones as preferences, and MGDA's weights, which
sum to one, are doubled, so that no method trains the trunk at another rate merely because it
averages. For two tasks UPGrad is PCGrad by another way.

Differences are taken to the sum of the same seed, and their standard errors over the seeds. Times
are CPU time of the whole step on one thread.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchjd.aggregation import AlignedMTLWeighting, MGDAWeighting, UPGradWeighting

from esper.jobs import digits
from esper.tolaria.aggregation import Aggregator, PCGrad, Sum, TorchJDWeighting, backward

sys.path.insert(0, str(Path(__file__).parent))

from drawing import COLORS, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TASKS = ("left", "right")
REFERENCE = "sum"
SMOOTH_STEPS = 100
QUICK_SEEDS, QUICK_EPOCHS = 2, 2

Curve = NDArray[np.float64]


@dataclass(frozen=True)
class Method:
    """One arm.

    :ivar make: makes a fresh aggregator.
    :ivar tasks: the tasks that are trained.
    """

    make: Callable[[], Aggregator]
    tasks: tuple[str, ...] = TASKS


@dataclass(frozen=True)
class Run:
    """What one training run gave.

    :ivar losses: of each step, by task.
    :ivar cosines: between both tasks' gradients in the trunk, of each step; empty for one task.
    :ivar accuracies: on the validation pairs at the end, by task.
    :ivar milliseconds: CPU time of a step.
    """

    losses: dict[str, list[float]]
    cosines: list[float]
    accuracies: dict[str, float]
    milliseconds: float


def methods() -> dict[str, Method]:
    """Return the arms, the reference first."""
    ones = torch.ones(len(TASKS), dtype=torch.float64)
    mgda = MGDAWeighting()
    return {
        REFERENCE: Method(Sum),
        "PCGrad": Method(PCGrad),
        "UPGrad": Method(lambda: TorchJDWeighting(UPGradWeighting(ones), normalise=True)),
        "MGDA": Method(lambda: TorchJDWeighting(lambda gramian: 2 * mgda(gramian), normalise=True)),
        "Aligned-MTL": Method(lambda: TorchJDWeighting(AlignedMTLWeighting(ones), normalise=True)),
        "left alone": Method(Sum, TASKS[:1]),
        "right alone": Method(Sum, TASKS[1:]),
    }


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    seeds = QUICK_SEEDS if options.quick else options.seeds
    epochs = QUICK_EPOCHS if options.quick else options.epochs
    arms = methods()
    runs: dict[str, list[Run]] = {name: [] for name in arms}
    for seed in range(seeds):
        for name, method in arms.items():
            run = train(method, seed, epochs)
            runs[name].append(run)
            scores = ", ".join(f"{task} {value:.4f}" for task, value in run.accuracies.items())
            print(f"seed {seed}, {name}: {scores}, {run.milliseconds:.2f} ms", file=sys.stderr)
    steps = len(next(iter(runs[REFERENCE][0].losses.values())))
    lines = [*table(runs), "", f"{seeds} seeds, {epochs} epochs, {steps:,} steps each."]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.plot:
        draw(runs, options.plot)
    return 0


def train(method: Method, seed: int, epochs: int) -> Run:
    """Train one network and validate it.

    :param seed: of weights, dropout and batches.
    """
    torch.manual_seed(seed)
    job = digits.build()
    parameters = list(job.model.parameters())
    aggregator = method.make()
    losses: dict[str, list[float]] = {task: [] for task in method.tasks}
    cosines: list[float] = []
    spent = 0.0
    for batch in _batches(job.data, seed, epochs):
        start = time.process_time()
        job.optimizer.zero_grad()
        values = digits.loss(job.model, batch)
        report = backward({task: values[task] for task in method.tasks}, parameters, aggregator)
        job.optimizer.step()
        if job.scheduler is not None:
            job.scheduler.step()
        spent += time.process_time() - start
        cosines += report.cosines().values()
        for task in method.tasks:
            losses[task].append(values[task].item())
    steps = len(losses[method.tasks[0]])
    accuracies = validate(job.model, job.validation, method.tasks)
    return Run(losses, cosines, accuracies, spent * 1000 / steps)


def validate(model: nn.Module, data: object, tasks: Sequence[str]) -> dict[str, float]:
    """Return the accuracy of each trained task on all validation pairs."""
    model.eval()
    with torch.no_grad():
        scores = digits.accuracy(model, _tensors(data))
    return {task: float(scores[f"{task}.accuracy"]) for task in tasks}


def _batches(data: object, seed: int, epochs: int) -> Iterator[tuple[Tensor, ...]]:
    tensors = _tensors(data)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(tensors[0]), generator=generator)
        for chosen in torch.split(order, digits.BATCH_SIZE):
            yield tuple(tensor[chosen] for tensor in tensors)


def _tensors(data: object) -> tuple[Tensor, ...]:
    if not isinstance(data, TensorDataset):
        raise TypeError(f"the job's data is a {type(data).__name__}; expected a TensorDataset")
    return data.tensors


def table(runs: dict[str, list[Run]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each method; accuracies and differences in %."""
    yield (
        "| method | left, % | right, % | left, to sum | right, to sum | steps in conflict "
        "| ms a step |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, arm in runs.items():
        cells = [_spread(_scores(arm, task)) for task in TASKS]
        for task in TASKS:
            reference = _scores(runs[REFERENCE], task)
            pairs = zip(_scores(arm, task), reference, strict=False)
            cells.append("" if name == REFERENCE else _difference([a - b for a, b in pairs]))
        cosines = np.array([run.cosines for run in arm])
        cells.append(f"{100 * (cosines < 0).mean():.0f} %" if cosines.size else "")
        cells.append(f"{statistics.mean(run.milliseconds for run in arm):.2f}")
        yield f"| {name} | " + " | ".join(cells) + " |"


def _scores(arm: Sequence[Run], task: str) -> list[float]:
    return [100 * run.accuracies[task] for run in arm if task in run.accuracies]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if values else ""


def _difference(values: Sequence[float]) -> str:
    if not values:
        return ""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.2f} ± {error:.2f}"


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Draw the loss of each task and the cosine over the steps: mean and deviation of the seeds."""
    figure = new_figure((12, 5.2))
    panels = figure.subplots(1, 3)
    for color, (name, arm) in zip(COLORS, runs.items(), strict=True):
        style = "--" if len(arm[0].losses) == 1 else "-"
        for task, panel in zip(TASKS, panels[:2], strict=True):
            if task in arm[0].losses:
                _band(panel, np.array([run.losses[task] for run in arm]), color, style)
        if arm[0].cosines:
            _band(panels[2], np.array([run.cosines for run in arm]), color, style)
        # One legend for all panels: lines without points.
        panels[0].plot([], [], color=color, linestyle=style, linewidth=2, label=name)
    for task, panel in zip(TASKS, panels[:2], strict=True):
        panel.set(title=f"training loss, {task}", yscale="log", xlabel="step")
    panels[2].set(title="cosine in the trunk", xlabel="step")
    panels[2].axhline(0, color="grey", linewidth=0.8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    save_png(figure, path)


def _band(panel: "Axes", curves: Curve, color: str, style: str) -> None:
    """Draw the mean of the moving averages, and a deviation to either side.

    :param curves: seeds by steps.
    """
    window = min(SMOOTH_STEPS, curves.shape[1])
    kernel = np.full(window, 1 / window)
    smooth = np.stack([np.convolve(curve, kernel, mode="valid") for curve in curves])
    steps = np.arange(smooth.shape[1]) + window
    mean, deviation = smooth.mean(0), smooth.std(0, ddof=1)
    panel.plot(steps, mean, color=color, linestyle=style, linewidth=1.5)
    panel.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.15, lw=0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    quick = f"{QUICK_SEEDS} seeds, {QUICK_EPOCHS} epochs"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method, 2 or more")
    parser.add_argument("--epochs", type=int, default=15, help="the job's default is 15")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--plot", type=Path, help="write the picture to this file (PNG)")
    options = parser.parse_args()
    if options.seeds < 2 or options.epochs < 1:
        parser.error("a standard error takes two seeds or more, and one epoch or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
