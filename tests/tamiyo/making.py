"""States for the tests of policies, with everything that does not matter filled in."""

from typing import Any

from esper.leyline import FieldReport, Gain, GrowthState, Offer, SeedState, Stage, SystemState

CONV = Offer(800, 20_000.0)
GOOD = Gain(0.2, 0.1, 0.3, 8)
BAD = Gain(-0.2, -0.3, -0.1, 8)
UNSURE = Gain(0.01, -0.1, 0.12, 8)
TINY = Gain(1e-4, 0.5e-4, 1.5e-4, 8)


def dormant(residual: float | None = 1.0, **offers: Offer) -> SeedState:
    """A slot that offers a convolution, or what is given."""
    return SeedState(Stage.DORMANT, residual=residual, offers=offers or {"conv": CONV})


def seed(stage: Stage, gain: Gain | None = None, **more: Any) -> SeedState:
    """A seed of a convolution."""
    values = {"age": 188, "parameters": 800, "flops": 20_000.0, "blueprint": "conv", **more}
    if stage is Stage.HOLDING:
        values.setdefault("alpha", 1.0)
    return SeedState(stage, gain=gain, **values)


def state(
    epoch: int,
    seeds: dict[str, SeedState],
    *,
    loss: float = 1.0,
    held_out: float | None = None,
    version: int = 0,
    steps_left: int | None = 5000,
    budget: int | None = None,
    reports: list[FieldReport] | None = None,
    **more: Any,
) -> SystemState:
    """A state at the end of an epoch of 188 steps."""
    growth = GrowthState(
        version=version,
        seeds=seeds,
        parameters=4000,
        parameter_budget=budget,
        held_out={"a": loss if held_out is None else held_out},
        steps_left=steps_left,
    )
    values: dict[str, Any] = {
        "epoch": epoch,
        "step": (epoch + 1) * 188,
        "attempt": 0,
        "time": 0.0,
        "losses": {"a": loss},
        "growth": growth,
        "reports": reports or [],
        **more,
    }
    return SystemState(**values)
