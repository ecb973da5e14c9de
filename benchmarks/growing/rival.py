"""GroMo's growing perceptron on the same task, as its documentation has one do it.

Source: Verbockhaven et al., "Growing Tiny Networks: Spotting Expressivity Bottlenecks and Fixing
Them Optimally", 2024; package gromo.
"""

import importlib.util
import math
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from growing.meter import Meter
from growing.task import Task, parameters
from growing.training import Run, Setting

FIRST, STEP, SAMPLES = 16, 12, 1000
_FACTORS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
Batch = tuple[Tensor, Tensor]


def installed() -> bool:
    """Whether GroMo is there."""
    return importlib.util.find_spec("gromo") is not None


def fits(task: Task) -> bool:
    """Whether GroMo has what the task needs: a perceptron, made of its own layers."""
    return task.key == "B" and installed()


def train(task: Task, setting: Setting, seed: int) -> Run:
    """Train a perceptron of the same sizes; its outer hidden layers grow in turn, by 12 units.

    An optimizer knows nothing of new units, so that there is a new one after each growth; the
    schedule goes on where it was.
    """
    from gromo.containers.growing_mlp import GrowingMLP

    torch.manual_seed(seed)
    split, meter = task.data(), Meter()
    model = GrowingMLP(40, 10, FIRST, 3, nn.ReLU(), device=torch.device("cpu"))
    inputs, labels = split.training.tensors  # type: ignore[attr-defined]
    growths, source = _growths(task.epochs), torch.Generator().manual_seed(seed)
    total = task.epochs * -(-len(labels) // task.batch)
    optimizer = _optimizer(model, setting)
    taken, validation, story = 0, [], []
    for epoch in range(task.epochs):
        for chosen in torch.randperm(len(labels), generator=source).split(task.batch):
            rate = setting.rate * (1 + math.cos(math.pi * taken / total)) / 2
            step = partial(_step, model, optimizer, (inputs[chosen], labels[chosen]), rate)
            meter.step(("step", parameters(model)), step)
            taken += 1
        validation.append(task.evaluate(model, split.validation))
        if epoch in growths:
            batch = inputs[:SAMPLES], labels[:SAMPLES]
            meter.step(("grow", epoch), partial(_grow, model, growths[epoch], batch))
            optimizer = _optimizer(model, setting)
            story.append(f"{taken}: layer {growths[epoch]} grown: {parameters(model)} parameters")
    return Run(
        test=task.evaluate(model, split.test),
        validation=validation,
        parameters=parameters(model),
        flops=meter.flops(),
        seconds=meter.seconds(),
        story=story,
    )


def _growths(epochs: int) -> dict[int, int]:
    """Return what grows after which epoch: four times, as with the other fixed period."""
    return {epochs * (index + 1) // 10: 2 * (index % 2) for index in range(4)}


def _optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), setting.rate, weight_decay=setting.decay)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def _grow(model: Any, layer: int, batch: Batch) -> None:
    """Add units where GroMo finds that they help most, at the scale with the lowest loss."""
    inputs, labels = batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_growing_layers(index=layer)
        model.init_computation()
        model.zero_grad()
        functional.cross_entropy(model(inputs), labels, reduction="sum").backward()
        model.update_computation()
        # The settings that the package gives for its own method, TINY.
        model.compute_optimal_updates(maximum_added_neurons=STEP, compute_delta=False)
        model.reset_computation()
        model.dummy_select_update()
        losses = {}
        for factor in _FACTORS:
            model.set_scaling_factor(factor)
            model.currently_updated_layer.previous_module.output_extension_scaling = factor
            with torch.no_grad():
                outputs = model.extended_forward(inputs)
            losses[factor] = float(functional.cross_entropy(outputs, labels))
        best = min(losses, key=lambda factor: losses[factor])
        model.set_scaling_factor(best)
        model.currently_updated_layer.previous_module.output_extension_scaling = best
        model.apply_change()
    model.zero_grad()
