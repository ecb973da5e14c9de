"""The verdict on a step, given before its update is committed."""

from enum import StrEnum

import msgspec


class Action(StrEnum):
    """What the engine does with the gradients of one step."""

    COMMIT = "commit"
    SKIP = "skip"
    ROLLBACK = "rollback"
    HALT = "halt"


class Tier(StrEnum):
    """Where a rollback takes its state from."""

    MEMORY = "memory"
    DISK = "disk"


class Verdict(msgspec.Struct, frozen=True, gc=False):
    """The guard's answer between backward pass and optimizer step.

    :param action: what to do with this step.
    :param reason: one sentence with the values that triggered it; empty for a commit.
    :param suspicious: the step may be the start of a divergence; a state saved now is unproven.
    :param first_suspect: for a rollback or halt, the step at which the suspicion began.
    :param before_step: only states of this step or an older one are trusted then.
    :param tier: for a rollback, the tier to restore from.
    :param rate_factor: for a rollback, the learning rate is multiplied by this afterwards.
    :param rewarm_from: for a rollback, the learning rate begins at this share of itself afterwards
        and climbs back in ``rewarm_steps`` steps.
    :param rewarm_steps: for a rollback, 0 leaves the rate as it is.
    :param signal: the series that the verdict is about, such as ``loss`` or ``gradient_norm``;
        ``loss.`` and a task's name for the loss of a task.
    :param trigger: the values that led to it, by name.
    """

    action: Action
    reason: str = ""
    suspicious: bool = False
    first_suspect: int = -1
    before_step: int = -1
    tier: Tier = Tier.MEMORY
    rate_factor: float = 1.0
    rewarm_from: float = 1.0
    rewarm_steps: int = 0
    signal: str = ""
    trigger: dict[str, float] = {}


COMMIT = Verdict(Action.COMMIT)
