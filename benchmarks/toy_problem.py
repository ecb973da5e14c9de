"""Six ways to combine two gradients, on the toy problem of the CAGrad and Nash-MTL papers.

    python benchmarks/toy_problem.py [--quick] [--steps 100000] [--markdown FILE] [--plot FILE]

Two losses of two variables (Liu et al. 2021, arXiv 2110.14048, figure 1; Navon et al. 2022, arXiv
2202.01017). The upper half plane has two narrow valleys, the lower half two bowls with bottoms near
(7, -8) and (-7, -8), one for each loss. What lies between the bottoms is the Pareto set. Adam, rate
1e-3, in float64; the five starts and the 35,000 steps of Nash-MTL's experiment, and the 100,000
steps of CAGrad's. Nash-MTL's own picture scales the first loss by 0.1; here, as in CAGrad's, it is
as it is. CAGrad's constant is 0.4.

The papers' pictures show: the sum gets stuck in the valleys from the two starts at the top; MGDA
and Nash-MTL reach the Pareto set from every start; CAGrad goes to the point of least mean loss;
PCGrad goes to points of the Pareto set that depend on the start. Whether each was seen is printed.

For two tasks each method has a closed form in the three inner products of the gradients, so that
all starts run as one array. The forms are checked first: gradients against autograd, PCGrad and
Adam against ``esper.tolaria.aggregation.backward`` and ``torch.optim.Adam``, the others against
torchjd where it is installed, Nash-MTL by the equation it solves.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esper.tolaria.aggregation import PCGrad, backward

sys.path.insert(0, str(Path(__file__).parent))

from drawing import COLORS, new_figure, save_png
from toy.problem import LEAST_MEAN, Array, gradients, losses, pareto_distance, pareto_x2
from toy.rules import CAGRAD_C, EVERY, RATE, RULES, Rule, descend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STARTS = np.array([(-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)])
AT_THE_TOP = (0, 2)
NASH_STEPS, CAGRAD_STEPS, QUICK_STEPS = 35_000, 100_000, 4_000
# Adam's steps are 0.001 long; whatever has arrived is closer than this.
NEAR = 0.05
CHECKED_GRAMIANS, CHECKED_STEPS = 100, 100
# The solvers of torchjd stop at about 1e-6; what is ours agrees to rounding.
SOLVER_LIMIT, LIMIT = 1e-4, 1e-9


@dataclass(frozen=True)
class Outcome:
    """Where the starts of one method are after some steps.

    :ivar points: starts by 2.
    """

    points: Array

    @property
    def reached(self) -> NDArray[np.bool_]:
        """Whether each point lies in the Pareto set."""
        near: NDArray[np.bool_] = pareto_distance(self.points.T) < NEAR
        return near

    @property
    def to_least_mean(self) -> Array:
        """Distance of each point to the point of least mean loss."""
        distance: Array = np.linalg.norm(self.points - LEAST_MEAN, axis=1)
        return distance

    def place(self, start: int) -> str:
        """Say where one point is: the valleys lie above zero, the bowls below."""
        if self.reached[start]:
            return "Pareto set"
        return "valley" if self.points[start, 1] > 0 else "on the way"


def main() -> int:
    options = _options()
    torch.set_num_threads(1)
    print("largest differences found when checking:")
    for name, difference, limit in checks():
        print(f"  {name}: {difference:.1e}")
        if not difference <= limit:
            print(f"{name} differs by more than {limit:.0e}", file=sys.stderr)
            return 1
    steps = QUICK_STEPS if options.quick else options.steps
    history = descend(RULES, STARTS, steps)
    times = sorted({min(NASH_STEPS, steps), steps})
    outcomes = {time: _outcomes(history, time) for time in times}
    text = "\n".join([*summary(outcomes), "", *end_points(outcomes)])
    print(f"\n{text}\n")
    for time, outcome in outcomes.items():
        for claim, seen in observations(outcome).items():
            print(f"after {time:,} steps, {'seen' if seen else 'NOT seen'}: {claim}")
        apart = np.abs(outcome["PCGrad"].points - outcome["UPGrad"].points).max(axis=1)
        print(f"after {time:,} steps, UPGrad, half of PCGrad, is off it by {_spaced(apart)}\n")
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        draw(history, outcomes, options.plot)
    return 0


def checks() -> Iterator[tuple[str, float, float]]:
    """Yield what was compared, the largest difference, and how large it may be."""
    source = np.random.default_rng(0)
    points = np.concatenate([STARTS.T, source.uniform(-11, 11, (2, 1000))], axis=1)
    yield "losses and gradients, autograd", _against_autograd(points), LIMIT
    rows = source.normal(size=(CHECKED_GRAMIANS, 2, 3))
    rows *= np.exp(source.normal(size=(CHECKED_GRAMIANS, 2, 1)))
    gramians = rows @ rows.transpose(0, 2, 1)
    yield "PCGrad, esper's weights", _against(RULES["PCGrad"], PCGrad().weights, gramians), LIMIT
    yield f"PCGrad, {CHECKED_STEPS} steps of esper's backward and torch's Adam", _replay(), LIMIT
    yield "Nash-MTL, G a = 1 / a", _nash_residual(gramians), LIMIT
    if importlib.util.find_spec("torchjd") is None:
        print("  torchjd is not installed: MGDA, CAGrad and UPGrad are not checked against it")
        return
    for name, weighting in _torchjd_weightings().items():
        yield f"{name}, torchjd", _against(RULES[name], weighting, gramians), SOLVER_LIMIT


def torch_losses(x: Tensor) -> dict[str, Tensor]:
    """Return both losses as the papers write them, summed over independent points.

    :param x: points by 2.
    """
    x1, x2 = x.unbind(-1)
    f1 = (0.5 * (-x1 - 7) - torch.tanh(-x2)).abs().clamp(min=5e-6).log() + 6
    f2 = (0.5 * (-x1 + 3) + torch.tanh(-x2) + 2).abs().clamp(min=5e-6).log() + 6
    c1, c2 = torch.tanh(x2 / 2).clamp(min=0), torch.tanh(-x2 / 2).clamp(min=0)
    q1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    q2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    return {"first": (c1 * f1 + c2 * q1).sum(), "second": (c1 * f2 + c2 * q2).sum()}


def _against_autograd(points: Array) -> float:
    x = torch.tensor(points.T.copy(), requires_grad=True)
    values = list(torch_losses(x).values())
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0].numpy().T for value in values]
    totals = np.array([value.item() for value in values])
    # Relative: next to the bottom of a valley a gradient reaches 1e5.
    off = np.abs(gradients(points) - rows) / (1 + np.abs(rows))
    return float(max(off.max(), np.abs(losses(points).sum(1) / totals - 1).max()))


def _against(rule: Rule, weights: Callable[[Tensor], Tensor], gramians: Array) -> float:
    ours = np.stack(rule(gramians[:, 0, 0], gramians[:, 0, 1], gramians[:, 1, 1]), axis=1)
    theirs = np.stack([weights(torch.from_numpy(gramian)).numpy() for gramian in gramians])
    return float(np.abs(ours - theirs).max())


def _replay() -> float:
    ours = descend({"PCGrad": RULES["PCGrad"]}, STARTS, CHECKED_STEPS)[-1, :, 0].T
    off = 0.0
    for start, end in zip(STARTS, ours, strict=True):
        x = torch.tensor(start, requires_grad=True)
        optimizer = torch.optim.Adam([x], lr=RATE)
        for _ in range(CHECKED_STEPS):
            optimizer.zero_grad()
            backward(torch_losses(x), [x], PCGrad())
            optimizer.step()
        off = max(off, float(np.abs(x.detach().numpy() - end).max()))
    return off


def _nash_residual(gramians: Array) -> float:
    weights = RULES["Nash-MTL"](gramians[:, 0, 0], gramians[:, 0, 1], gramians[:, 1, 1])
    a = np.stack(weights, axis=1)
    return float(np.abs((gramians @ a[:, :, None])[:, :, 0] * a - 1).max())


def _torchjd_weightings() -> dict[str, Callable[[Tensor], Tensor]]:
    from torchjd.aggregation import CAGradWeighting, MGDAWeighting, UPGradWeighting
    from torchjd.linalg import QuadprogProjector

    # Its default regularisation of 1e-4 alone would move the weights by as much.
    exact: Any = QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
    return {
        "MGDA": MGDAWeighting(),
        "CAGrad": CAGradWeighting(CAGRAD_C, norm_eps=1e-9),
        "UPGrad": UPGradWeighting(projector=exact),
    }


def _outcomes(history: Array, time: int) -> dict[str, Outcome]:
    points = history[_row(time)]
    return {name: Outcome(points[:, index].T) for index, name in enumerate(RULES)}


def _row(time: int) -> int:
    """Return the row of the history after so many steps; the last may be a shorter one."""
    return -(-time // EVERY)


def observations(outcome: dict[str, Outcome]) -> dict[str, bool]:
    """Return what the papers' pictures show, and whether it is so here."""
    stuck = {index for index, (_, x2) in enumerate(outcome["Sum"].points) if x2 > 0}
    pcgrad = outcome["PCGrad"]
    far_apart = float(np.ptp(pcgrad.points[:, 0])) > 1
    return {
        "the sum is in a valley from both starts at the top": stuck == set(AT_THE_TOP),
        "MGDA is in the Pareto set from every start": bool(outcome["MGDA"].reached.all()),
        "Nash-MTL is in the Pareto set from every start": bool(outcome["Nash-MTL"].reached.all()),
        "CAGrad is at the point of least mean loss from every start": bool(
            (outcome["CAGrad"].to_least_mean < NEAR).all()
        ),
        "PCGrad is in the Pareto set from every start, at different points": bool(
            pcgrad.reached.all() and far_apart
        ),
    }


def summary(outcomes: dict[int, dict[str, Outcome]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each method."""
    heads = [f"in the Pareto set after {time:,} steps" for time in outcomes]
    heads += [f"distance to the least mean after {max(outcomes):,} steps, by start"]
    yield "| method | " + " | ".join(heads) + " |"
    yield "|---|" + "---:|" * len(heads)
    for name in RULES:
        counts = [f"{outcome[name].reached.sum()} of 5" for outcome in outcomes.values()]
        far = _spaced(outcomes[max(outcomes)][name].to_least_mean)
        yield f"| {name} | " + " | ".join([*counts, far]) + " |"


def end_points(outcomes: dict[int, dict[str, Outcome]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each method and start."""
    yield "| method | start | " + " | ".join(f"after {time:,} steps" for time in outcomes) + " |"
    yield "|---|---|" + "---|" * len(outcomes)
    for name in RULES:
        for index, start in enumerate(STARTS):
            cells = [
                f"{_pair(outcome[name].points[index], 2)} {outcome[name].place(index)}"
                for outcome in outcomes.values()
            ]
            yield f"| {name} | {_pair(start, 1)} | " + " | ".join(cells) + " |"


def draw(history: Array, outcomes: dict[int, dict[str, Outcome]], path: Path) -> None:
    """Draw one panel a method: contours of the mean loss, the way from each start, its end."""
    figure = new_figure((12, 8.6))
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for index, (name, panel) in enumerate(zip(RULES, axes.flat, strict=True)):
        _landscape(panel)
        _ways(panel, history[:, :, index], min(outcomes))
        counts = [str(outcome[name].reached.sum()) for outcome in outcomes.values()]
        panel.set_title(f"{name}: {', then '.join(counts)} of 5")
    for panel in axes[1]:
        panel.set_xlabel("$x_1$")
    for panel in axes[:, 0]:
        panel.set_ylabel("$x_2$")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    times = ", then in ".join(f"{time:,}" for time in outcomes)
    figure.suptitle(f"How many of five starts reach the Pareto set in {times} steps")
    save_png(figure, path)


def _landscape(panel: "Axes") -> None:
    grid = np.linspace(-11, 11, 400)
    mean = losses(np.stack(np.meshgrid(grid, grid))).mean(0)
    levels = [*range(-14, 0, 2), *np.arange(0.5, 9)]
    panel.contour(grid, grid, mean, levels, colors="#999999", linewidths=0.8, linestyles="solid")
    x1 = np.linspace(-7, 7, 50)
    panel.plot(
        *(x1, pareto_x2(x1)), color="#bbbbbb", lw=9, solid_capstyle="butt", label="Pareto set"
    )
    panel.plot(*LEAST_MEAN, "*", color="black", mec="white", ms=14, zorder=6, label="least mean")
    panel.set(xlim=(-11, 11), ylim=(-11, 11), aspect="equal")
    panel.set(xticks=(-10, -5, 0, 5, 10), yticks=(-10, -5, 0, 5, 10))


def _ways(panel: "Axes", history: Array, middle: int) -> None:
    """Draw the ways of one method.

    :param history: times by 2 by starts.
    :param middle: marks where each start is after so many steps.
    """
    for index, way in enumerate(history.transpose(2, 1, 0)):
        color = COLORS[index]
        panel.plot(*way, color=color, lw=2, zorder=3)
        marks: dict[str, tuple[int, dict[str, Any]]] = {
            "start": (0, {"marker": "o", "ms": 8}),
            f"after {middle:,} steps": (_row(middle), {"marker": "D", "ms": 7, "mfc": "white"}),
            "end": (-1, {"marker": "X", "ms": 10, "mec": "black"}),
        }
        for label, (time, style) in marks.items():
            style["label"] = label if index == 0 else None
            panel.plot(*way[:, time], color=color, ls="none", zorder=4, **style)


def _pair(values: Array, digits: int) -> str:
    # Adding zero turns -0.0 into 0.0.
    return "({}, {})".format(
        *(f"{round(float(value), digits) + 0.0:.{digits}f}" for value in values)
    )


def _spaced(values: Array) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS:,} steps only")
    parser.add_argument("--steps", type=int, default=CAGRAD_STEPS, help="steps of each method")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--plot", type=Path, help="write the picture to this file (PNG)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; give 1 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
