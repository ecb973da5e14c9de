"""What the modes that go through the trunk once make of the update, and of the result.

    python benchmarks/approximate_modes.py [--quick] [--seeds 5] [--epochs 8] [--markdown FILE]

Eight tasks read the built-in job's overlaid digits through one trunk: both digits, their parities,
sum, difference, the larger of the two, whether both are above four. PCGrad and MGDA (torchjd's
weights, doubled per task so that they sum to the number of tasks) each train it exactly, with the
Gramian of the shared representation, and refreshed every 10 steps.

The error of an update is its distance to the exact one of the same step, relative to that one's
norm, over the trunk; it is taken every 10 steps of the exact run, and follows from the weights and
the exact Gramian. The last rows give it for weights that are merely kept. Accuracies are means over
tasks, on validation pairs; differences are to the exact run of the same seed, with standard errors.
Times are CPU time of the step on one thread.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchjd.aggregation import MGDAWeighting

from esper.jobs import digits
from esper.tolaria.aggregation import (
    Aggregator,
    Mode,
    PCGrad,
    Refreshed,
    Sum,
    TorchJDWeighting,
    backward,
)

CLASSES = {
    "left": 10,
    "right": 10,
    "left even": 2,
    "right even": 2,
    "sum": 19,
    "difference": 10,
    "left larger": 2,
    "both above four": 2,
}
EVERY = 10
# The job's rate is for two losses; here four times as many are added.
RATE = 0.05 / 4
FEATURES, REFRESHED, KEPT = "features", f"refreshed every {EVERY}", "weights kept"
QUICK_SEEDS, QUICK_EPOCHS = 2, 1


@dataclass(frozen=True)
class Arm:
    """One way to train.

    :ivar exact: the arm that it is compared with.
    """

    make: Callable[[], Aggregator]
    mode: Mode = "sequential"
    every: int = 1
    exact: str = ""

    def aggregator(self) -> Aggregator:
        return self.make() if self.every == 1 else Refreshed(self.make(), every=self.every)


@dataclass
class Run:
    """What one training run gave: accuracies by task, CPU milliseconds a step, errors by way."""

    accuracy: float
    milliseconds: float
    errors: dict[str, list[float]] = field(default_factory=dict)


def mgda() -> TorchJDWeighting:
    weighting = MGDAWeighting()
    return TorchJDWeighting(lambda gramian: len(gramian) * weighting(gramian), normalise=True)


def arms() -> dict[str, Arm]:
    result = {"sum": Arm(Sum)}
    for name, make in (("PCGrad", PCGrad), ("MGDA", mgda)):
        exact = f"{name}, exact"
        result[exact] = Arm(make)
        result[f"{name}, {FEATURES}"] = Arm(make, mode="features", exact=exact)
        result[f"{name}, {REFRESHED}"] = Arm(make, every=EVERY, exact=exact)
    return result


class Reader(nn.Module):
    """The built-in job's trunk with eight heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = digits.TwoDigitReader().trunk
        self.heads = nn.ModuleList(nn.Linear(64, classes) for classes in CLASSES.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.trunk(images)
        return [head(features) for head in self.heads]


def labels_of(left: Tensor, right: Tensor) -> list[Tensor]:
    """Return the label of each task, in the order of ``CLASSES``."""
    return [
        left,
        right,
        left % 2,
        right % 2,
        left + right,
        (left - right).abs(),
        (left > right).long(),
        ((left > 4) & (right > 4)).long(),
    ]


def train(arm: Arm, seed: int, epochs: int, data: tuple[Tensor, ...]) -> tuple[nn.Module, Run]:
    torch.manual_seed(seed)
    model = Reader()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=0.9, weight_decay=1e-4)
    aggregator = arm.aggregator()
    order = torch.Generator().manual_seed(seed)
    watch = Watch(arm, model) if not arm.exact and arm.make is not Sum else None
    spent, steps = 0.0, 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(data[0]), generator=order).split(digits.BATCH_SIZE):
            images, *labels = (tensor[chosen] for tensor in data)
            state = torch.get_rng_state()
            began = time.process_time()
            optimizer.zero_grad()
            losses = losses_of(model, images, labels)
            report = backward(losses, parameters, aggregator, mode=arm.mode)
            spent += time.process_time() - began
            if watch is not None:
                watch.see(steps, report.gramian, (images, labels, state))
            began = time.process_time()
            optimizer.step()
            spent += time.process_time() - began
            steps += 1
    return model, Run(0.0, spent * 1e3 / steps, {} if watch is None else watch.errors)


def losses_of(model: nn.Module, images: Tensor, labels: list[Tensor]) -> dict[str, Tensor]:
    outputs = model(images)
    return {
        task: functional.cross_entropy(output, label)
        for task, output, label in zip(CLASSES, outputs, labels, strict=True)
    }


class Watch:
    """Compares the exact weights of a step with those that other ways would have taken.

    Each aggregator that is asked here is a new one, so that PCGrad draws the same order for all.
    """

    def __init__(self, arm: Arm, model: nn.Module) -> None:
        self.errors: dict[str, list[float]] = {way: [] for way in (FEATURES, REFRESHED, KEPT)}
        self._arm = arm
        self._model = model
        self._last: tuple[Tensor, Refreshed] | None = None

    def see(self, step: int, gramian: Tensor, batch: tuple[Tensor, list[Tensor], Tensor]) -> None:
        if step % EVERY == 0:
            at_features = self._at_features(*batch)
            self._note(FEATURES, gramian, self._weights(at_features))
            comparison = Refreshed(self._arm.make(), every=EVERY)
            comparison.keep(tuple(CLASSES), gramian, at_features.diagonal().sqrt())
            self._last = (self._weights(gramian), comparison)
        elif self._last is not None and step % EVERY == EVERY // 2:
            # Half way between two comparisons: the mean age.
            kept, comparison = self._last
            self._note(KEPT, gramian, kept)
            lengths = self._at_features(*batch).diagonal().sqrt()
            estimate = comparison.estimate(tuple(CLASSES), lengths)
            if estimate is not None:
                self._note(REFRESHED, gramian, self._weights(estimate))

    def _weights(self, gramian: Tensor) -> Tensor:
        return self._arm.make().weights(gramian)

    def _note(self, way: str, gramian: Tensor, weights: Tensor) -> None:
        exact = self._weights(gramian)
        off = weights - exact
        error = (off @ gramian @ off).clamp(min=0).sqrt() / (exact @ gramian @ exact).sqrt()
        self.errors[way].append(float(error))

    def _at_features(self, images: Tensor, labels: list[Tensor], state: Tensor) -> Tensor:
        """Repeat the forward pass with the same dropout; return the representation's Gramian."""
        now = torch.get_rng_state()
        torch.set_rng_state(state)
        losses = losses_of(self._model, images, labels)
        held = [parameter.grad for parameter in self._model.parameters()]
        report = backward(losses, list(self._model.parameters()), Sum(), mode="features")
        for parameter, gradient in zip(self._model.parameters(), held, strict=True):
            parameter.grad = gradient
        torch.set_rng_state(now)
        return report.gramian


def accuracy(model: nn.Module, data: tuple[Tensor, ...]) -> float:
    """Return the mean over the tasks of the share of pairs that are told right."""
    model.eval()
    with torch.no_grad():
        outputs = model(data[0])
    shares = [
        (output.argmax(1) == label).double().mean()
        for output, label in zip(outputs, data[1:], strict=True)
    ]
    return 100 * float(torch.stack(shares).mean())


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    seeds = QUICK_SEEDS if options.quick else options.seeds
    epochs = QUICK_EPOCHS if options.quick else options.epochs
    training, validation = (
        (data.tensors[0], *labels_of(*data.tensors[1:])) for data in digits.overlaid_digits()
    )
    runs: dict[str, list[Run]] = {name: [] for name in arms()}
    for seed in range(seeds):
        for name, arm in arms().items():
            model, run = train(arm, seed, epochs, training)
            run.accuracy = accuracy(model, validation)
            runs[name].append(run)
            print(
                f"seed {seed}, {name}: {run.accuracy:.2f} %, {run.milliseconds:.1f} ms",
                file=sys.stderr,
            )
    text = "\n".join([*table(runs), "", f"{seeds} seeds, {epochs} epochs."])
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


def table(runs: dict[str, list[Run]]) -> Iterator[str]:
    yield "| method | mean accuracy, % | to exact | error of an update | worst of 100 | ms a step |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, arm in arms().items():
        scores = [run.accuracy for run in runs[name]]
        cells = [f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}"]
        if arm.exact:
            pairs = zip(scores, (run.accuracy for run in runs[arm.exact]), strict=True)
            differences = [score - exact for score, exact in pairs]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            cells.append(f"{statistics.mean(differences):+.2f} ± {error:.2f}")
            cells += errors(runs[arm.exact], name.split(", ")[1])
        else:
            cells += ["", "", ""]
        cells.append(f"{statistics.mean(run.milliseconds for run in runs[name]):.1f}")
        yield f"| {name} | " + " | ".join(cells) + " |"
    for name in runs:
        if runs[name][0].errors:
            cells = ["", "", *errors(runs[name], KEPT), ""]
            yield f"| {name.split(', ')[0]}, {KEPT} for {EVERY} | " + " | ".join(cells) + " |"


def errors(exact: list[Run], way: str) -> list[str]:
    """Return the median error with its quartiles, and the 99th percentile."""
    found = [error for run in exact for error in run.errors[way]]
    low, middle, high = statistics.quantiles(found, n=4)
    return [
        f"{middle:.2f} ({low:.2f} to {high:.2f})",
        f"{statistics.quantiles(found, n=100)[-1]:.1f}",
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    quick = f"{QUICK_SEEDS} seeds, {QUICK_EPOCHS} epoch"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm, 2 or more")
    parser.add_argument("--epochs", type=int, default=8, help="passes over 12,000 pairs")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    if options.seeds < 2 or options.epochs < 1:
        parser.error("a standard error takes two seeds or more, and one epoch or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
