"""What it costs to combine the gradients of several tasks with PCGrad, beside other packages.

    python benchmarks/aggregation.py [gradients] [steps] [--quick] [--markdown FILE] [--plot FILE]

``gradients``: n task gradients that are there already, as lists of 60 parameter tensors, become
one. Each figure stands beside the floor, two products on one contiguous matrix (its Gramian, and
its weighted sum into memory that is there), and beside merely reading the matrix twice.

``steps``: a whole training step with n heads, as a multiple of the step with one summed backward
pass, and the memory that a step needs at its peak.

All in one process, in turns, medians; on all threads of torch, each bound to a core, with freed
memory kept by the allocator.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torchjd.aggregation import PCGrad as TorchJDPCGrad
from torchjd.autojac import jac_to_grad

sys.path.insert(0, str(Path(__file__).parent))

from combining import steps
from combining.measures import Call, medians, peak_megabytes, settle
from combining.networks import TRUNKS, MultiTask
from combining.peers import flatten, libmtl, optimizer_wrapper, textbook
from drawing import COLORS, new_figure, save_png
from esper.tolaria.aggregation import PCGrad, describe_kernels, kernels

PARAMETERS = 60
TASKS = (2, 4, 8, 16, 32)
ELEMENTS = (10_000, 100_000, 1_000_000, 10_000_000)
HEADS = (2, 4, 8, 16)
FLOOR, READ, OURS = "floor", "read twice", "Esper"
PEERS = (
    "textbook",
    "torchjd",
    "torchjd, Gramian",
    "LibMTL's formulation",
    "optimizer wrapper's",
)
# LibMTL's and the wrapper's loops take minutes beyond this many numbers.
LOOPS_UP_TO = 40_000_000
NUMBERS_UP_TO = 160_000_000

Table = dict[tuple[object, ...], dict[str, float]]


def main() -> int:
    options = _options()
    settle()
    lines: list[str] = []
    if "gradients" in options.parts:
        table = combine_gradients(quick=options.quick)
        lines += [*gradients_table(table), "", *memory_table(quick=options.quick), ""]
    if "steps" in options.parts:
        times, memory = take_steps(quick=options.quick)
        for kind in TRUNKS:
            lines += [f"**{kind}**", "", *steps_table(kind, times, memory), ""]
        if options.plot:
            draw(times, options.plot)
    text = "\n".join([*lines, machine()])
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    return 0


# ---- gradients that are there ----


def make_gradients(tasks: int, elements: int) -> list[list[Tensor]]:
    """Return gradients of parameters of very different sizes; every third is a vector."""
    sizes = np.random.default_rng(0).lognormal(0, 1.5, PARAMETERS)
    lengths = np.maximum(1, (sizes / sizes.sum() * elements).astype(int))
    shapes = [
        (int(length),) if place % 3 == 2 else (max(1, int(length) // 8), 8)
        for place, length in enumerate(lengths)
    ]
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(tasks)]


def gradient_arms(gradients: list[list[Tensor]], *, loops: bool = True) -> dict[str, Call]:
    matrix = torch.stack(flatten(gradients))
    tasks, elements = matrix.shape
    gramian, out, weights = torch.empty(tasks, tasks), torch.empty(elements), torch.rand(tasks)
    columns, aggregator = range(len(gradients[0])), PCGrad()

    def floor() -> None:
        torch.mm(matrix, matrix.T, out=gramian)
        torch.mv(matrix.T, weights, out=out)

    def read_twice() -> None:
        matrix.sum()
        torch.mv(matrix.T, weights, out=out)

    def ours() -> list[Tensor]:
        selection = kernels.select(kernels.dense(gradients), columns)
        return selection.combine(aggregator.weights(selection.gramian()))

    def by_textbook() -> list[Tensor]:
        return textbook(gradients, torch.rand(tasks, tasks).argsort(1).tolist())

    arms: dict[str, Call] = {FLOOR: floor, READ: read_twice, OURS: ours}
    peers: tuple[Call, ...] = (
        by_textbook,
        TorchJD(gradients, gramian=False),
        TorchJD(gradients, gramian=True),
        lambda: libmtl(gradients),
        lambda: optimizer_wrapper(gradients),
    )
    return arms | dict(zip(PEERS if loops else PEERS[:3], peers, strict=False))


class TorchJD:
    """Give torchjd its own form, a matrix for each parameter; making it is not timed."""

    def __init__(self, gradients: list[list[Tensor]], *, gramian: bool) -> None:
        self._parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients[0]]
        self._jacobians = [torch.stack(column) for column in zip(*gradients, strict=True)]
        self._aggregator = TorchJDPCGrad()
        self._gramian = gramian

    def __call__(self) -> None:
        for parameter, jacobian in zip(self._parameters, self._jacobians, strict=True):
            parameter.grad = None
            parameter.jac = jacobian  # type: ignore[attr-defined]
        jac_to_grad(self._parameters, self._aggregator, optimize_gramian_computation=self._gramian)

    def without_trace(self) -> None:
        """Drop the result, as the other ways do when nobody takes it."""
        self()
        for parameter in self._parameters:
            parameter.grad = None


def combine_gradients(*, quick: bool) -> Table:
    check()
    table: Table = {}
    for elements in ELEMENTS[:2] if quick else ELEMENTS:
        for tasks in TASKS[:3] if quick else TASKS:
            if tasks * elements > NUMBERS_UP_TO:
                continue
            gradients = make_gradients(tasks, elements)
            arms = gradient_arms(gradients, loops=tasks * elements <= LOOPS_UP_TO)
            table[elements, tasks] = medians(arms, seconds=0.2 if quick else 2.0)
            print(f"measured {tasks} gradients of {elements:,}", file=sys.stderr)
    return table


def check() -> None:
    """Compare with the textbook's vectors in float64 before anything is timed."""
    random.seed(0)
    gradients = make_gradients(6, 20_000)
    orders = PCGrad()._orders(6)
    exact = textbook([[g.double() for g in row] for row in gradients], orders.tolist())
    selection = kernels.select(gradients, range(PARAMETERS))
    result = selection.combine(PCGrad().weights(selection.gramian()))
    for found, expected in zip(result, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def gradients_table(table: Table) -> Iterator[str]:
    heads = ["elements", "n", *(f"{name}, ms" for name in (FLOOR, READ, OURS, *PEERS))]
    heads += ["Esper to floor", "Esper to reading", "best peer to Esper", "textbook to Esper"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---:|" * len(heads)
    for (elements, tasks), times in table.items():
        cells = [f"{elements:,}", str(tasks)]
        cells += [_milliseconds(times.get(name)) for name in (FLOOR, READ, OURS, *PEERS)]
        ours = times[OURS]
        best = min(times[name] for name in PEERS if name in times)
        cells += [f"{ours / times[FLOOR]:.2f}", f"{ours / times[READ]:.2f}"]
        cells += [f"{best / ours:.2f}", f"{times['textbook'] / ours:.1f}"]
        yield "| " + " | ".join(cells) + " |"


def memory_table(*, quick: bool) -> Iterator[str]:
    """Yield the peak memory of a combination, in multiples of one output gradient."""
    names = (OURS, *PEERS)
    yield "| elements | n | " + " | ".join(names) + " |"
    yield "|" + "---:|" * (len(names) + 2)
    for tasks, elements in ((8, 1_000_000),) if quick else ((8, 1_000_000), (4, 10_000_000)):
        arms = gradient_arms(make_gradients(tasks, elements))
        output = elements * 4 / 2**20
        calls = [arms[name] for name in names]
        peaks = [
            peak_megabytes(call.without_trace if isinstance(call, TorchJD) else call)
            for call in calls
        ]
        cells = ["" if peak is None else f"{peak / output:.2f}" for peak in peaks]
        yield f"| {elements:,} | {tasks} | " + " | ".join(cells) + " |"


# ---- whole steps ----


def take_steps(*, quick: bool) -> tuple[Table, Table]:
    times: Table = {}
    memory: Table = {}
    for kind in TRUNKS:
        for tasks in HEADS[:2] if quick else HEADS:
            # A network for each arm: torchjd's engine leaves hooks in its own.
            arms = {name: make(MultiTask(kind, tasks)) for name, make in steps.ARMS.items()}
            times[kind, tasks] = medians(arms, seconds=0.3 if quick else 5.0)
            memory[kind, tasks] = {
                name: peak
                for name, arm in arms.items()
                if (peak := peak_megabytes(arm)) is not None
            }
            print(f"measured {kind} with {tasks} heads", file=sys.stderr)
    return times, memory


def steps_table(kind: str, times: Table, memory: Table) -> Iterator[str]:
    heads = [tasks for found, tasks in times if found == kind]
    yield "| step | " + " | ".join(f"n = {n}" for n in heads) + " | peak MiB, n = 8 |"
    yield "|---|" + "---:|" * (len(heads) + 1)
    shown = 8 if 8 in heads else heads[-1]
    for name in steps.ARMS:
        cells = [
            f"{times[kind, n][name] * 1e3:.1f} ms"
            if name == steps.SUM
            else f"{times[kind, n][name] / times[kind, n][steps.SUM]:.2f}"
            for n in heads
        ]
        peak = memory[kind, shown].get(name)
        yield f"| {name} | " + " | ".join(cells) + f" | {'' if peak is None else f'{peak:.0f}'} |"


def draw(times: Table, path: Path) -> None:
    """Draw the cost of a step over the number of tasks, a panel for each network."""
    figure = new_figure((12, 5.6))
    panels = figure.subplots(1, len(TRUNKS))
    exact = min(steps.EXACT, key=lambda name: sum(row[name] for row in times.values()))
    chosen = [*steps.ESPER, *list(steps.PEERS)[:3], "n backward passes, textbook"]
    for panel, kind in zip(panels, TRUNKS, strict=True):
        heads = [tasks for found, tasks in times if found == kind]
        for place, name in enumerate(chosen):
            ratios = [times[kind, n][name] / times[kind, n][steps.SUM] for n in heads]
            style = "-" if name in steps.ESPER else "--"
            width = 3 if name == exact else 1.8
            color = COLORS[place % len(COLORS)]
            panel.plot(heads, ratios, style, color=color, lw=width, marker="o", label=name)
        panel.set(title=kind, xlabel="tasks", xscale="log", yscale="log", xticks=heads)
        panel.set_xticks(heads, labels=[str(n) for n in heads])
        panel.minorticks_off()
        panel.set_yticks([1, 2, 5, 10, 20, 50], labels=["1", "2", "5", "10", "20", "50"])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time of one summed backward step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    save_png(figure, path)


def machine() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("esper", "torch", "torchjd"))
    return (
        f"{psutil.cpu_count()} cores, {torch.get_num_threads()} threads of torch; {packages}; "
        f"Esper's kernels: {describe_kernels()}."
    )


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3f}" if seconds < 1e-3 else f"{seconds * 1e3:.1f}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parts: Sequence[str] = ("gradients", "steps")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(parts)}; or all")
    parser.add_argument("--quick", action="store_true", help="few sizes, few rounds")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--plot", type=Path, help="draw the steps to this file (PNG)")
    options = parser.parse_args()
    unknown = set(options.parts) - set(parts)
    if unknown:
        parser.error(f"unknown part {min(unknown)!r}; give {' or '.join(parts)}")
    options.parts = options.parts or parts
    return options


if __name__ == "__main__":
    sys.exit(main())
