"""The first rules: when to leave everything as it is."""

from collections.abc import Iterator

from esper.leyline import NoChange
from esper.tamiyo.view import Found, View, several, why

CONSERVATIVE = "tolaria.mode.conservative"


def conservative(view: View) -> Iterator[Found]:
    """Change nothing while the engine takes no risks."""
    mode = view.state.metrics.get(CONSERVATIVE, 0.0)
    if mode == 1.0:
        yield NoChange(
            why(
                "conservative",
                "the engine is in conservative mode",
                {"mode": mode},
                {"mode": 1.0},
                "the engine leaves conservative mode",
            )
        )


def stale(view: View) -> Iterator[Found]:
    """Change nothing for a state that is older than one that was seen."""
    state, memory = view.state, view.memory
    if memory.is_stale(state):
        yield NoChange(
            why(
                "stale",
                f"the state of step {state.step} is older than that of step {memory.step}",
                {"attempt": state.attempt, "step": state.step},
                {"attempt": memory.attempt, "step": memory.step},
                f"a state from step {memory.step} on, or of a later attempt",
            )
        )


def unmeasured(view: View) -> Iterator[Found]:
    """Change nothing while a loss is missing or not finite."""
    if view.evaluation is not None:
        return
    losses = {f"loss.{task}": loss for task, loss in view.state.losses.items()}
    held = {f"held_out.{task}": loss for task, loss in view.growth.held_out.items()}
    told = why(
        "unmeasured",
        "a loss is not finite" if losses else "no loss was measured",
        losses | held,
        {},
        "finite losses: not finite are "
        + (
            ", ".join(sorted(set(losses | held) - set(_finite(losses | held))))
            or "none, but none is there"
        ),
    )
    yield NoChange(told)


def not_growing(view: View) -> Iterator[Found]:
    """Change nothing in a model that has no slots, or whose losses are not held out."""
    if view.state.growth is None:
        reason, otherwise = "nothing grows this model", "an executor with slots"
    elif not view.growth.held_out:
        reason, otherwise = "nothing was measured on held-out data", "validation data"
    else:
        return
    slots = {"slots": float(len(view.growth.seeds))}
    yield NoChange(why("not growing", reason, slots, {}, otherwise))


def pending(view: View) -> Iterator[Found]:
    """Change nothing until there is word of what was asked last."""
    asked = view.memory.asked
    if asked is None:
        return
    waited, most = view.state.epoch - asked.epoch, view.limits.pending_epochs
    yield NoChange(
        why(
            "pending",
            f"there is no word yet of {asked.operation} seed {asked.seed!r}",
            {"epochs": waited},
            {"epochs": most},
            f"a report of it, or {several(most - waited + 1, 'epoch')} more",
        )
    )


def _finite(values: dict[str, float]) -> dict[str, float]:
    return why("", "", values, {}, "").values


CAREFUL = (conservative, stale, unmeasured, not_growing, pending)
