"""What a policy may ask for, and what came of it."""

import msgspec


class ScaleLearningRate(msgspec.Struct, frozen=True, tag_field="type", tag="scale_learning_rate"):
    """Multiply the learning rate of every parameter group.

    :param factor: positive multiplier.
    """

    factor: float


AdaptationCommand = ScaleLearningRate


class FieldReport(msgspec.Struct, frozen=True, tag_field="type", tag="field_report"):
    """What one command did.

    :param command: the command's tag.
    :param applied: whether it took effect.
    :param detail: what changed, or why it was refused.
    """

    command: str
    applied: bool
    detail: str
