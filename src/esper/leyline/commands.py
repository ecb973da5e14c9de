"""What a policy may ask for, and what came of it."""

from enum import StrEnum

import msgspec


class ScaleLearningRate(msgspec.Struct, frozen=True, tag_field="type", tag="scale_learning_rate"):
    """Multiply the learning rate of every parameter group.

    :param factor: positive multiplier.
    """

    factor: float


class SeedOperation(StrEnum):
    """What may be asked of a seed, a slot where the model grows."""

    GERMINATE = "germinate"
    ADVANCE = "advance"
    CULL = "cull"


class SeedCommand(msgspec.Struct, frozen=True, tag_field="type", tag="seed"):
    """Do something with one seed.

    :param seed: name of the seed.
    :param operation: what to do.
    :param blueprint: what to germinate.
    """

    seed: str
    operation: SeedOperation
    blueprint: str = ""


AdaptationCommand = ScaleLearningRate | SeedCommand


class FieldReport(msgspec.Struct, frozen=True, tag_field="type", tag="field_report"):
    """What one command did.

    :param command: the command's tag.
    :param applied: whether it took effect.
    :param detail: what changed, or why it was refused.
    """

    command: str
    applied: bool
    detail: str
