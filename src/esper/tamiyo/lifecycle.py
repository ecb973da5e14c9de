"""The rules about seeds that grow: which go on, which are held, which are culled."""

from collections.abc import Iterator

from esper.leyline import Explanation, Gain, SeedCommand, SeedOperation, SeedState, Stage
from esper.tamiyo.memory import Watch, measured
from esper.tamiyo.price import price_of_seed
from esper.tamiyo.view import Found, View, above, below, several, why

_GONE = 0.05


def cull_training(view: View) -> Iterator[Found]:
    """Cull a seed in training that harms beyond doubt, or that does not come to gain."""
    limits = view.limits
    for name, seed, watch in view.seeds(Stage.TRAINING):
        gain = measured(seed.gain)
        if gain is None:
            continue
        values = _values(gain) | {"harmful": watch.harmful, "evaluations": watch.evaluations}
        counted = several(watch.evaluations, "evaluation")
        thresholds = {
            "gain.low": 0.0,
            "gain.high": 0.0,
            "harmful": float(limits.rung_evaluations),
            "evaluations": float(limits.training_evaluations),
        }
        if watch.harmful >= limits.rung_evaluations:
            reason = f"seed {name!r} would make the loss higher, {watch.harmful} times in a row"
            needs = above(f"gain.high of {name!r}", gain.high, 0.0)
        elif gain.low <= 0 and watch.evaluations >= limits.training_evaluations:
            reason = f"seed {name!r} has gained nothing sure in {counted}"
            needs = above(f"gain.low of {name!r}", gain.low, 0.0)
        else:
            continue
        told = why("cull in training", reason, values, thresholds, needs)
        yield _ask(view, name, SeedOperation.CULL, told)


def advance_training(view: View) -> Iterator[Found]:
    """Let a seed blend in whose gain is above zero beyond doubt."""
    least = view.limits.training_steps
    for name, seed, _ in view.seeds(Stage.TRAINING):
        gain = measured(seed.gain)
        low = None if gain is None else gain.low
        values = _values(gain) | {"age": float(seed.age)}
        thresholds = {"gain.low": 0.0, "age": float(least)}
        if low is not None and low > 0 and seed.age >= least:
            told = why(
                "blend",
                f"seed {name!r} gains on held-out data beyond doubt",
                values,
                thresholds,
                below(f"gain.low of {name!r}", low, 0.0),
            )
            yield _ask(view, name, SeedOperation.ADVANCE, told)
            continue
        lacks = [above(f"gain.low of {name!r}", low, 0.0)] if low is None or low <= 0 else []
        if seed.age < least:
            lacks.append(above(f"age of {name!r}", float(seed.age), float(least)))
        yield why("blend", f"seed {name!r} trains on", values, thresholds, " and ".join(lacks))


def steer_blending(view: View) -> Iterator[Found]:
    """Hold a seed that harms while it blends, then send its share down, then cull it."""
    for name, seed, watch in view.seeds(Stage.BLENDING):
        gain = measured(seed.gain)
        if gain is not None and gain.high < 0 and not watch.descending:
            reason = f"seed {name!r} makes the loss higher as it blends"
            yield _steer(view, name, seed, SeedOperation.HOLD, reason, watch)
        else:
            goal = "down to 0" if watch.descending else "on"
            reason = f"the share of seed {name!r} goes {goal}"
            values = _values(gain) | {"alpha": seed.alpha}
            needs = below(f"gain.high of {name!r}", None if gain is None else gain.high, 0.0)
            yield why("blending", reason, values, {"gain.high": 0.0}, needs)
    for name, seed, watch in view.seeds(Stage.HOLDING):
        if seed.alpha < 1.0:
            yield _steer_held(view, name, seed, watch)


def settle_holding(view: View) -> Iterator[Found]:
    """Keep for good a blended seed that is worth its price; cull one that is not."""
    for name, seed, watch in view.seeds(Stage.HOLDING):
        gain = measured(seed.gain)
        if seed.alpha < 1.0:
            continue
        if gain is None:
            needs = "a gain measured on held-out data"
            yield why("keep", f"the gain of seed {name!r} is unknown", {}, {}, needs)
        else:
            yield _judge_held(view, name, seed, watch, gain)


def _judge_held(view: View, name: str, seed: SeedState, watch: Watch, gain: Gain) -> Found:
    limits = view.limits
    price = price_of_seed(seed, view.growth, limits) * view.scale
    values = _values(gain) | {
        "price": price,
        "paying": float(watch.paying),
        "harmful": float(watch.harmful),
        "evaluations": float(watch.evaluations),
    }
    thresholds = {
        "gain.mean": price,
        "gain.low": 0.0,
        "paying": float(limits.repeated_evaluations),
        "harmful": float(limits.rung_evaluations),
        "evaluations": float(limits.holding_evaluations),
    }
    paying = gain.mean > price
    worth = f"gain.mean of {name!r}"
    if watch.harmful >= limits.rung_evaluations or watch.evaluations > limits.holding_evaluations:
        counted = several(watch.evaluations, "evaluation")
        reason = f"seed {name!r} is not worth its price after {counted}"
        lacks = above(worth, gain.mean, price) + " and " + above("its low end", gain.low, 0.0)
        told = why("cull when held", reason, values, thresholds, lacks)
        return _ask(view, name, SeedOperation.CULL, told)
    if paying and (gain.low > 0 or watch.paying >= limits.repeated_evaluations):
        sure = "beyond doubt" if gain.low > 0 else f"{watch.paying} times in a row"
        told = why(
            "fossilise",
            f"seed {name!r} gains more than its price, {sure}",
            values,
            thresholds,
            below(worth, gain.mean, price),
        )
        return _ask(view, name, SeedOperation.ADVANCE, told)
    lacks = (
        above(f"gain.low of {name!r}", gain.low, 0.0) if paying else above(worth, gain.mean, price)
    )
    left = limits.holding_evaluations - watch.evaluations + 1
    otherwise = f"{lacks}; without it, it is culled in {several(left, 'evaluation')}"
    return why("keep", f"seed {name!r} is watched on", values, thresholds, otherwise)


def _steer_held(view: View, name: str, seed: SeedState, watch: Watch) -> Found:
    """Decide about a seed whose ramp was stopped."""
    gain = measured(seed.gain)
    if seed.alpha <= _GONE:
        told = why(
            "cull when faded",
            f"the share of seed {name!r} has come down",
            {"alpha": seed.alpha},
            {"alpha": _GONE},
            above(f"alpha of {name!r}", seed.alpha, _GONE),
        )
        return _ask(view, name, SeedOperation.CULL, told)
    if gain is not None and gain.low > 0:
        reason = f"seed {name!r} gains again at the share where it was held"
        return _steer(view, name, seed, SeedOperation.RETARGET, reason, watch, target=1.0)
    rung = view.limits.rung_evaluations
    if gain is not None and (gain.high < 0 or watch.evaluations >= rung):
        reason = f"seed {name!r} does not gain at the share where it was held"
        return _steer(view, name, seed, SeedOperation.RETARGET, reason, watch, target=0.0)
    values = _values(gain) | {"alpha": seed.alpha, "evaluations": float(watch.evaluations)}
    low = above(f"gain.low of {name!r}", None if gain is None else gain.low, 0.0)
    otherwise = f"{low}; without it, its share goes down after {rung - watch.evaluations} more"
    thresholds = {"gain.low": 0.0, "evaluations": float(rung)}
    return why("blending", f"seed {name!r} is held", values, thresholds, otherwise)


def _steer(
    view: View,
    name: str,
    seed: SeedState,
    operation: SeedOperation,
    reason: str,
    watch: Watch,
    *,
    target: float = 1.0,
) -> SeedCommand:
    gain = measured(seed.gain)
    values = _values(gain) | {"alpha": seed.alpha, "evaluations": float(watch.evaluations)}
    rising = operation is SeedOperation.RETARGET and target > 0
    end = None if gain is None else gain.low if rising else gain.high
    side = below if rising else above
    told = why(
        f"{operation} while blending",
        reason,
        values,
        {"gain.low": 0.0, "gain.high": 0.0},
        side(f"gain.{'low' if rising else 'high'} of {name!r}", end, 0.0),
    )
    return _ask(view, name, operation, told, target=target)


def _ask(
    view: View, name: str, operation: SeedOperation, told: Explanation, *, target: float = 1.0
) -> SeedCommand:
    return SeedCommand(
        name, operation, target=target, version=view.growth.version, explanation=told
    )


def _values(gain: Gain | None) -> dict[str, float]:
    if gain is None:
        return {}
    return {"gain.mean": gain.mean, "gain.low": gain.low, "gain.high": gain.high}


LIFECYCLE = (cull_training, advance_training, steer_blending, settle_holding)
