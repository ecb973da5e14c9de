"""The rule that cuts the learning rate."""

from collections.abc import Iterator

from esper.leyline import ScaleLearningRate
from esper.tamiyo.view import Found, View, above, below, why

_RULE = "cut the rate"


def may_cut(view: View) -> bool:
    """Whether the number of cuts, and the time since the last one, allow another."""
    cuts, limits = view.memory.cuts, view.limits
    if len(cuts) >= limits.most_cuts:
        return False
    return not cuts or view.state.epoch - cuts[-1][0] >= limits.cut_epochs


def cut_rate(view: View) -> Iterator[Found]:
    """Cut the learning rate when an over-fitting model makes no progress any more."""
    memory, limits, trend = view.memory, view.limits, view.trend
    high = None if trend is None else trend.high
    values = {
        "gap": view.gap,
        "progress": None if trend is None else trend.slope,
        "progress.high": high,
        "cuts": float(len(memory.cuts)),
    }
    thresholds = {
        "gap": limits.over_fit_gap,
        "progress.high": limits.slow_progress,
        "cuts": float(limits.most_cuts),
    }
    plateau = high is not None and high < limits.slow_progress
    if memory.fit != "over":
        reason, lacks = "the model does not over-fit", above("gap", view.gap, limits.over_fit_gap)
    elif not plateau:
        reason = "the held-out loss may still fall"
        lacks = below("progress.high", high, limits.slow_progress)
    elif not may_cut(view):
        reason = (
            f"the rate was cut {len(memory.cuts)} times, lastly in epoch {memory.cuts[-1][0] + 1}"
        )
        lacks = f"fewer than {limits.most_cuts} cuts, and {limits.cut_epochs} epochs since the last"
    else:
        told = why(
            _RULE,
            "the model over-fits, and the held-out loss does not fall any more",
            values,
            thresholds,
            below("gap", view.gap, limits.over_fit_gap)
            + " or "
            + above("progress.high", high, limits.slow_progress),
        )
        yield ScaleLearningRate(limits.rate_factor, told)
        return
    yield why(_RULE, reason, values, thresholds, lacks)
