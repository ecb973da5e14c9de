"""The checks before a seed may go on: each measures, and says what."""

import torch
from torch import Tensor, nn

from esper.core.config import GrowthConfig
from esper.kasmina.blueprints import Blueprint, Flow
from esper.kasmina.lifecycle import Life
from esper.kasmina.probe import difference, equal
from esper.leyline import Gate, GateResult, GrowthError


def fits(blueprint: Blueprint, flow: Flow) -> GateResult:
    """G0: the blueprint can be built for what flows through the slot."""
    try:
        blueprint.check(flow)
    except GrowthError as error:
        return GateResult(Gate.G0, False, str(error))
    return GateResult(Gate.G0, True, "it fits")


def affordable(total: int, added: int, budget: int | None) -> GateResult:
    """G0: the model stays within its budget of parameters."""
    values = {"parameters": float(total), "added": float(added)}
    if budget is None or total + added <= budget:
        return GateResult(Gate.G0, True, f"{added:,} parameters more", values)
    reason = f"{total:,} parameters and {added:,} more are over growth.max_parameters = {budget:,}"
    return GateResult(Gate.G0, False, reason, values | {"budget": float(budget)})


def unchanged(before: list[Tensor], after: list[Tensor]) -> GateResult:
    """G1: the model's output with the seed in place is what it was, to the bit."""
    values = {"difference": difference(before, after)}
    if equal(before, after):
        return GateResult(Gate.G1, True, "the model's output is unchanged to the bit", values)
    reason = f"the model's output has changed by {values['difference']:.3g} of its largest value"
    return GateResult(Gate.G1, False, reason, values)


def gains(life: Life, age: int, config: GrowthConfig) -> GateResult:
    """G2: trained long enough, the seed lowers the loss on held-out data, beyond doubt."""
    values = {"age": float(age)}
    if age < config.min_training_steps:
        reason = f"it has trained for {age} steps of {config.min_training_steps}"
        return GateResult(Gate.G2, False, reason, values)
    return _positive(Gate.G2, life, values)


def settled(life: Life, seed: nn.Module, clock: int) -> GateResult:
    """G3: the ramp has come to its target, and the seed is finite."""
    if not life.ramp_ended(clock):
        left = 0 if life.ramp is None else life.ramp.steps - (clock - life.ramp_began)
        return GateResult(Gate.G3, False, f"its ramp goes on for {left} steps")
    if not is_finite(seed):
        return GateResult(Gate.G3, False, "a weight of the seed is not finite")
    return GateResult(Gate.G3, True, "its ramp has ended")


def worthwhile(life: Life, alpha: float) -> GateResult:
    """G4: blended in wholly, the seed makes the model better than it is without."""
    values = {"alpha": alpha}
    if alpha < 1.0:
        return GateResult(Gate.G4, False, f"its share is {alpha:.3g}, not 1", values)
    return _positive(Gate.G4, life, values)


def same(before: list[Tensor], after: list[Tensor], tolerance: float) -> GateResult:
    """G5: the folded model gives the outputs that it gave before."""
    found = difference(before, after)
    values = {"difference": found, "tolerance": tolerance}
    if found <= tolerance:
        return GateResult(Gate.G5, True, f"folded; outputs differ by {found:.2g}", values)
    reason = f"outputs differ by {found:.3g} of the largest value; {tolerance:g} is allowed"
    return GateResult(Gate.G5, False, reason, values)


def is_finite(module: nn.Module) -> bool:
    """Whether every weight is a number."""
    weights: list[Tensor] = list(module.parameters())
    return not weights or bool(torch.isfinite(torch.stack(torch._foreach_norm(weights))).all())


def _positive(gate: Gate, life: Life, values: dict[str, float]) -> GateResult:
    gain = life.gain
    if gain is None:
        return GateResult(gate, False, "its gain on held-out data was not measured yet", values)
    values |= {"gain": gain.mean, "low": gain.low, "high": gain.high}
    told = f"gain on held-out data {gain.mean:.4g} ({gain.low:.4g} to {gain.high:.4g})"
    if gain.low > 0:
        return GateResult(gate, True, told, values)
    return GateResult(gate, False, f"{told}; its lower end has to be above 0", values)
