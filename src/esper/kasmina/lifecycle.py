"""The life of a slot: which stage may follow which, and what is remembered of a stage."""

from typing import Any

import msgspec

from esper.kasmina.ramp import Ramp
from esper.leyline import Gain, GrowthError, Planting, Stage

FOLLOWS: dict[Stage, frozenset[Stage]] = {
    Stage.DORMANT: frozenset({Stage.GERMINATED}),
    Stage.GERMINATED: frozenset({Stage.TRAINING, Stage.BLENDING, Stage.CULLED}),
    Stage.TRAINING: frozenset({Stage.BLENDING, Stage.CULLED}),
    Stage.BLENDING: frozenset({Stage.HOLDING, Stage.CULLED}),
    Stage.HOLDING: frozenset({Stage.BLENDING, Stage.FOSSILISED, Stage.CULLED}),
    Stage.FOSSILISED: frozenset({Stage.DORMANT}),
    Stage.CULLED: frozenset({Stage.EMBARGOED}),
    Stage.EMBARGOED: frozenset({Stage.RESETTING}),
    Stage.RESETTING: frozenset({Stage.DORMANT}),
}
LIVE = frozenset({Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING})
BLENDED = frozenset({Stage.BLENDING, Stage.HOLDING})


class Life(msgspec.Struct):
    """What is known of one slot besides its weights.

    :ivar stage: where it stands.
    :ivar since: optimizer step at which the stage began.
    :ivar blueprint: what grows here; kept until the slot is dormant again.
    :ivar planting: how.
    :ivar ramp: the last one that began.
    :ivar ramp_began: optimizer step at which it did.
    :ivar fading: whether it is being culled: its share goes to zero first.
    :ivar gain: measured last.
    :ivar residual: measured last.
    :ivar nonfinite: shadow steps in a row that gave no finite gradient.
    :ivar growths: seeds that were fossilised here.
    """

    stage: Stage = Stage.DORMANT
    since: int = 0
    blueprint: str = ""
    planting: Planting = Planting()
    ramp: Ramp | None = None
    ramp_began: int = 0
    fading: bool = False
    gain: Gain | None = None
    residual: float | None = None
    nonfinite: int = 0
    growths: int = 0

    def go(self, stage: Stage, clock: int) -> Stage:
        """Go on to a stage; return the one before.

        :raises GrowthError: it does not follow on this one.
        """
        if stage not in FOLLOWS[self.stage]:
            allowed = ", ".join(sorted(FOLLOWS[self.stage]))
            raise GrowthError(f"a seed cannot go from {self.stage} to {stage}, only to {allowed}")
        before, self.stage, self.since = self.stage, stage, clock
        if stage is Stage.DORMANT:
            self.blueprint, self.planting, self.ramp = "", Planting(), None
        if stage is Stage.CULLED:
            self.fading = False
        if before in BLENDED or stage in BLENDED or stage is Stage.DORMANT:
            # Measured of another course of the forward pass.
            self.gain = None
        return before

    def start_ramp(self, ramp: Ramp, clock: int) -> None:
        """Let the share of the seed begin to change."""
        self.ramp, self.ramp_began = ramp, clock

    def alpha(self, clock: int) -> float:
        """Return the share that the ramp gives after so many optimizer steps."""
        return 0.0 if self.ramp is None else self.ramp.value(clock - self.ramp_began)

    def ramp_ended(self, clock: int) -> bool:
        """Whether the ramp has come to its target."""
        return self.ramp is not None and clock - self.ramp_began >= self.ramp.steps

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        found: dict[str, Any] = msgspec.to_builtins(
            {
                "stage": self.stage,
                "since": self.since,
                "blueprint": self.blueprint,
                "planting": self.planting,
                "ramp": None
                if self.ramp is None
                else [self.ramp.start, self.ramp.target, self.ramp.steps, str(self.ramp.curve)],
                "ramp_began": self.ramp_began,
                "fading": self.fading,
                "gain": self.gain,
                "residual": self.residual,
                "nonfinite": self.nonfinite,
                "growths": self.growths,
            }
        )
        return found

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Life":
        """Return what :meth:`to_json` described."""
        ramp = saved["ramp"]
        return cls(
            stage=Stage(saved["stage"]),
            since=saved["since"],
            blueprint=saved["blueprint"],
            planting=msgspec.convert(saved["planting"], Planting),
            ramp=None if ramp is None else Ramp(*ramp),
            ramp_began=saved["ramp_began"],
            fading=saved["fading"],
            gain=None if saved["gain"] is None else msgspec.convert(saved["gain"], Gain),
            residual=saved["residual"],
            nonfinite=saved["nonfinite"],
            growths=saved["growths"],
        )
