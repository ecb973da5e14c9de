"""What a policy may ask for."""

from enum import StrEnum

import msgspec


class Explanation(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a policy decided as it did.

    :param rule: name of the rule that decided.
    :param reason: one sentence for a person.
    :param values: what it looked at, by name.
    :param thresholds: what it compared them with, by the same names where there is one.
    :param otherwise: what would have changed the decision.
    """

    rule: str
    reason: str
    values: dict[str, float] = {}
    thresholds: dict[str, float] = {}
    otherwise: str = ""


class NoChange(msgspec.Struct, frozen=True, tag_field="type", tag="no_change", omit_defaults=True):
    """Leave training as it is, and say why.

    :param explanation: why.
    """

    explanation: Explanation | None = None


class ScaleLearningRate(
    msgspec.Struct, frozen=True, tag_field="type", tag="scale_learning_rate", omit_defaults=True
):
    """Multiply the learning rate of every parameter group.

    :param factor: positive multiplier.
    :param explanation: why.
    """

    factor: float
    explanation: Explanation | None = None


class SeedOperation(StrEnum):
    """What may be asked of a seed, a slot where the model grows.

    ``germinate`` puts a blueprint into a dormant slot. ``advance`` asks for the next stage, whose
    gate decides. ``hold`` stops a ramp where it is; ``retarget`` starts one from there. ``cull``
    removes the seed; one that the model contains fades out first.
    """

    GERMINATE = "germinate"
    ADVANCE = "advance"
    HOLD = "hold"
    RETARGET = "retarget"
    CULL = "cull"


class Planting(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a seed is to grow.

    :param arguments: of the blueprint, by name.
    :param blend: how its output joins the model's: ``add``, ``multiply``, ``gate`` or ``channel``.
    :param training: ``shadow`` trains it beside the model first; ``insert`` puts it in at once,
        which asks for a blueprint that begins at zero.
    :param ramp: curve of its share while it blends: ``linear``, ``cosine`` or ``sigmoid``.
    :param ramp_steps: optimizer steps of that; 0 takes the configured number.
    :param initialiser: of the seed's weights.
    """

    arguments: dict[str, int | float | str] = {}
    blend: str = "add"
    training: str = "shadow"
    ramp: str = "cosine"
    ramp_steps: int = 0
    initialiser: str = "zero_out"


class SeedCommand(msgspec.Struct, frozen=True, tag_field="type", tag="seed", omit_defaults=True):
    """Do something with one seed.

    :param seed: name of the seed.
    :param operation: what to do.
    :param blueprint: what to germinate.
    :param planting: how it grows.
    :param target: of a ramp that is retargeted, 0 to 1.
    :param id: a command of an id that was carried out is not carried out again; empty for none.
    :param version: of the architecture that it was meant for; -1 for whatever there is.
    :param deadline: seconds since the Unix epoch after which it must not be applied; 0 for none.
    :param signature: of all other fields, in hexadecimal; see :mod:`esper.core.signing`.
    :param explanation: why.
    """

    seed: str
    operation: SeedOperation
    blueprint: str = ""
    planting: Planting = Planting()
    target: float = 1.0
    id: str = ""
    version: int = -1
    deadline: float = 0.0
    signature: str = ""
    explanation: Explanation | None = None


AdaptationCommand = NoChange | ScaleLearningRate | SeedCommand
