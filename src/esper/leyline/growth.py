"""What is told about growth: seeds, their stages and gates, budgets, reports from the field."""

from enum import StrEnum

import msgspec


class Stage(StrEnum):
    """Where a seed slot stands in its life.

    Below ``blending`` the model's forward pass does not call the seed.
    """

    DORMANT = "dormant"
    GERMINATED = "germinated"
    TRAINING = "training"
    BLENDING = "blending"
    HOLDING = "holding"
    FOSSILISED = "fossilised"
    CULLED = "culled"
    EMBARGOED = "embargoed"
    RESETTING = "resetting"


class Gate(StrEnum):
    """A check before a seed may go on.

    ``G0`` germinate: the blueprint fits. ``G1`` train: the model's output is unchanged, and the
    seed receives gradients. ``G2`` blend: it gains on held-out data. ``G3`` hold: its ramp has
    ended and it is finite. ``G4`` fossilise: the model is better with it than without. ``G5`` fold:
    the plain module gives the same outputs.
    """

    G0 = "G0"
    G1 = "G1"
    G2 = "G2"
    G3 = "G3"
    G4 = "G4"
    G5 = "G5"


class GateResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one gate measured.

    :param gate: which one.
    :param passed: whether the seed may go on.
    :param reason: one sentence with the values behind it.
    :param values: what was measured, by name; what was not measured is absent.
    """

    gate: Gate
    passed: bool
    reason: str
    values: dict[str, float] = {}


class Offer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A blueprint that may be germinated in a slot, and its price.

    :param parameters: that it adds.
    :param flops: floating-point operations that a forward pass of one sample costs more.
    """

    parameters: int
    flops: float


class Gain(msgspec.Struct, frozen=True, omit_defaults=True):
    """How much lower a loss is with a seed than without, over held-out batches in pairs.

    :param mean: of loss without minus loss with it; above zero is better with it.
    :param low: lower end of the 95 % confidence interval of the mean.
    :param high: upper end.
    :param batches: pairs that were measured.
    """

    mean: float
    low: float
    high: float
    batches: int


class SeedState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One seed slot as a policy sees it. A value that was not measured is absent.

    :param stage: where it stands.
    :param age: optimizer steps in this stage.
    :param blueprint: what grows in it; empty when nothing does.
    :param alpha: share of the seed in the model's output, 0 to 1.
    :param parameters: of the seed.
    :param flops: of a forward pass of one sample through the seed.
    :param residual: norm of the loss's gradient at the slot's output times the norm of the output,
        on held-out data: how much there is to gain here, to first order.
    :param gain: below ``blending``, what the fully blended seed would gain, measured beside the
        model; from then on what it does gain, alpha as it is against alpha 0.
    :param fading: whether it is being culled, its share on the way to zero.
    :param embargo_left: optimizer steps until something may germinate here again.
    :param offers: what may germinate here, by blueprint.
    """

    stage: Stage
    age: int = 0
    blueprint: str = ""
    alpha: float = 0.0
    parameters: int = 0
    flops: float | None = None
    residual: float | None = None
    gain: Gain | None = None
    fading: bool = False
    embargo_left: int = 0
    offers: dict[str, Offer] = {}


class GrowthState(msgspec.Struct, frozen=True, omit_defaults=True):
    """The growing model as a policy sees it.

    :param version: of the architecture; every structural change counts it up.
    :param seeds: every slot by name.
    :param parameters: of the model, seeds included.
    :param parameter_budget: most parameters that the model may have; absent without a limit.
    :param held_out: loss by task on the held-out batches, isolated seeds left out.
    :param steps_left: training steps until the planned end.
    """

    version: int
    seeds: dict[str, SeedState]
    parameters: int
    parameter_budget: int | None = None
    held_out: dict[str, float] = {}
    steps_left: int | None = None


class FieldReport(
    msgspec.Struct, frozen=True, tag_field="type", tag="field_report", omit_defaults=True
):
    """What one command did, or what became of a seed without one.

    :param command: the command's tag; ``rollback`` for what a rollback took back, ``engine`` for
        what happened by itself.
    :param applied: whether it took effect.
    :param detail: what changed, or why it was refused.
    :param id: of the command.
    :param seed: the slot that it concerned.
    :param operation: what was asked of the seed.
    :param blueprint: what grows or grew there.
    :param before: stage before.
    :param after: stage after.
    :param version: of the architecture afterwards.
    :param step: steps taken when it happened.
    :param gates: what the gates measured.
    """

    command: str
    applied: bool
    detail: str
    id: str = ""
    seed: str = ""
    operation: str = ""
    blueprint: str = ""
    before: Stage | None = None
    after: Stage | None = None
    version: int = 0
    step: int = 0
    gates: list[GateResult] = []
