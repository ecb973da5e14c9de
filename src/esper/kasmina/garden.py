"""All slots of a model with their lives, on the clock of optimizer steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from esper.core.config import GrowthConfig
from esper.kasmina.blueprints import offers
from esper.kasmina.lifecycle import BLENDED, LIVE, Life
from esper.kasmina.measure import Survey, gradient_at, survey
from esper.kasmina.probe import quietly
from esper.kasmina.shadow import Losses
from esper.kasmina.slot import Passage, Slot
from esper.kasmina.structure import Architecture, live_flow
from esper.leyline import GrowthError, GrowthState, Offer, SeedState, Stage

Loss = Callable[[Any], Losses]
_RESTLESS = frozenset({Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.CULLED})
_WAITING = frozenset({Stage.EMBARGOED, Stage.RESETTING, Stage.FOSSILISED})


class Garden:
    """Knows where each seed stands, moves their shares, and measures what they gain.

    :param model: the host.
    :param architecture: has the slots.
    :param blueprints: names of those that are offered; None for all.
    :ivar clock: optimizer steps taken since the slots were attached.
    :ivar lives: of every slot by name.
    :ivar restless: whether a stage may follow by itself at the next step.
    """

    def __init__(
        self, model: nn.Module, architecture: Architecture, blueprints: Sequence[str] | None
    ) -> None:
        self.clock = 0
        self.architecture = architecture
        self.lives: dict[str, Life] = {name: Life() for name in architecture.slots}
        self.restless = False
        self.found = Survey()
        self._model = model
        self._blueprints = blueprints
        self._offers: dict[str, dict[str, Offer]] = {}
        self._ramping: list[str] = []
        self._held: tuple[Loss, Any] | None = None

    def slot(self, name: str) -> Slot:
        """Return an open slot.

        :raises GrowthError: there is none of this name.
        """
        slots = self.architecture.slots
        if name not in slots:
            known = ", ".join(map(repr, slots)) or "none"
            raise GrowthError(f"there is no open slot {name!r}; open are: {known}")
        return slots[name]

    def named(self, *stages: Stage) -> list[str]:
        """Return the names of the slots in one of these stages."""
        return [name for name, life in self.lives.items() if life.stage in stages]

    def tick(self) -> None:
        """Count one optimizer step, and move the shares of the seeds that blend."""
        self.clock += 1
        for name in self._ramping:
            self.architecture.slots[name].alpha.fill_(self.lives[name].alpha(self.clock))

    def resettle(self) -> None:
        """After stages have changed: let every forward pass do what they ask for."""
        for name, slot in self.architecture.slots.items():
            slot.go(Passage.BLENDED if self.lives[name].stage in BLENDED else Passage.HOST)
        self._ramping = self.named(Stage.BLENDING)
        self.restless = bool(self.named(*_RESTLESS, *_WAITING))

    def measure(self, loss: Loss, batches: Sequence[Any]) -> None:
        """Measure on held-out batches; see :func:`~esper.kasmina.measure.survey`."""
        if batches:
            self._held = loss, batches[0]
        apart = self.named(Stage.TRAINING)
        slots = self.architecture.slots
        self.found = survey(self._model, loss, batches, slots, apart, self.named(*BLENDED))
        for name, life in self.lives.items():
            life.residual = self.found.residuals.get(name)
            if name in self.found.gains:
                life.gain = self.found.gains[name]

    def pull(self, name: str) -> tuple[Any, Any]:
        """Return a seed's input and the loss gradient at its slot's output, on a held-out batch.

        :raises GrowthError: nothing was measured yet, or the loss has no gradient there.
        """
        if self._held is None:
            raise GrowthError("this initialiser needs held-out data; call survey() before")
        loss, batch = self._held
        with quietly(self._model, training=False):
            return gradient_at(loss, batch, self.slot(name))

    def describe(self, config: GrowthConfig, steps_left: int | None) -> GrowthState:
        """Return what a policy sees."""
        return GrowthState(
            version=self.architecture.version,
            seeds={name: self._describe(name, config) for name in self.lives},
            parameters=self.parameters(),
            parameter_budget=config.max_parameters,
            held_out=dict(self.found.held_out),
            steps_left=steps_left,
        )

    def parameters(self) -> int:
        """Return the number of parameters of the model, seeds included."""
        return sum(parameter.numel() for parameter in self._model.parameters())

    def offers(self, name: str) -> dict[str, Offer]:
        """Return what may germinate in a slot."""
        if name not in self._offers:
            found = offers(live_flow(self.slot(name)))
            wanted = self._blueprints
            self._offers[name] = {n: o for n, o in found.items() if wanted is None or n in wanted}
        return self._offers[name]

    def forget_offers(self, name: str) -> None:
        """After something else flows through a slot: find out anew what fits."""
        self._offers.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """Return clock and lives, of JSON types."""
        lives = {name: life.to_json() for name, life in self.lives.items()}
        return {"clock": self.clock, "lives": lives}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        self.clock = state_dict["clock"]
        self.lives = {name: Life.from_json(saved) for name, saved in state_dict["lives"].items()}
        self._offers.clear()
        self.resettle()

    def metrics(self) -> dict[str, float]:
        """Return the newest values by name; what was not measured is absent."""
        metrics = {
            "kasmina.architecture_version": float(self.architecture.version),
            "kasmina.parameters": float(self.parameters()),
            "kasmina.seeds_live": float(len(self.named(*LIVE))),
        }
        for name, life in self.lives.items():
            if life.gain is not None:
                metrics[f"kasmina.gain.{name}"] = life.gain.mean
        return metrics

    def _describe(self, name: str, config: GrowthConfig) -> SeedState:
        life, slot = self.lives[name], self.architecture.slots.get(name)
        age = self.clock - life.since
        offered = {} if slot is None or life.stage is not Stage.DORMANT else self.offers(name)
        seeded = slot is not None and slot.planted
        embargoed = life.stage is Stage.EMBARGOED
        return SeedState(
            stage=life.stage,
            age=age,
            blueprint=life.blueprint,
            alpha=life.alpha(self.clock) if life.stage in BLENDED else 0.0,
            parameters=sum(p.numel() for p in slot.own_parameters()) if slot and seeded else 0,
            flops=self._flops(name) if seeded else None,
            residual=life.residual,
            gain=life.gain,
            fading=life.fading,
            embargo_left=max(0, config.embargo_steps - age) if embargoed else 0,
            offers=offered,
        )

    def _flops(self, name: str) -> float | None:
        offer = self.offers(name).get(self.lives[name].blueprint)
        return None if offer is None else offer.flops
