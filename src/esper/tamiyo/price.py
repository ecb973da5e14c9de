"""What growing costs and what it can be expected to bring, as shares of the held-out loss."""

import math

from esper.leyline import GrowthState, SeedState
from esper.tamiyo.limits import RuleLimits

_OPERATIONS_PER_PARAMETER = 2.0


def price_share(
    parameters: int, flops: float | None, host_parameters: int, limits: RuleLimits
) -> float:
    """Return the share of the held-out loss that a seed must take away for what it costs.

    :param parameters: of the seed.
    :param flops: that a forward pass of one sample costs more; None where it was not measured.
    :param host_parameters: of the model without it.
    :param limits: the prices.
    """
    host = max(1, host_parameters)
    more = flops if flops is not None and math.isfinite(flops) else 0.0
    return limits.parameter_price * parameters / host + limits.flop_price * more / (
        _OPERATIONS_PER_PARAMETER * host
    )


def price_of_seed(seed: SeedState, growth: GrowthState, limits: RuleLimits) -> float:
    """Return the price of a seed that grows, as :func:`price_share`."""
    host = growth.parameters - seed.parameters
    return price_share(seed.parameters, seed.flops, host, limits)


def expected_share(parameters: int, host_parameters: int, limits: RuleLimits) -> float:
    """Return the share of the held-out loss that a seed of a size can be expected to take away.

    Source: the loss falls with a power of the number of parameters (Hoffmann et al., 2022).

    :param parameters: of the seed.
    :param host_parameters: of the model without it.
    :param limits: the exponent.
    """
    return 1.0 - float((1.0 + parameters / max(1, host_parameters)) ** -limits.expected_exponent)


def payback_steps(life: float, price: float, expected: float) -> float:
    """Return the steps after which a seed has paid for itself; infinity for never.

    It costs from the first step on, but gains only once it has blended in: over ``n`` steps it
    gains the share ``(n - life) / n`` of what it is expected to. That has to reach its price.

    :param life: steps from germination to the end of its ramp.
    :param price: as a share of the held-out loss.
    :param expected: gain, as a share of the held-out loss.
    """
    if expected <= price:
        return math.inf
    return life / (1.0 - price / expected)
