"""What may be done with a seed, and what follows by itself."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from esper.core.config import GrowthConfig
from esper.kasmina import gates
from esper.kasmina.blueprints import get, initialise, needs_gradient
from esper.kasmina.garden import Garden
from esper.kasmina.lifecycle import BLENDED, LIVE
from esper.kasmina.probe import Probe
from esper.kasmina.ramp import Ramp
from esper.kasmina.reports import done, refused
from esper.kasmina.slot import Passage
from esper.kasmina.structure import Fold, Plant, Uproot, live_flow, seed_of_change
from esper.leyline import (
    FieldReport,
    Gate,
    GateResult,
    GrowthError,
    Planting,
    SeedCommand,
    SeedOperation,
    Stage,
)


class RefusedError(GrowthError):
    """An operation is not carried out; its gates say why.

    :param results: what they measured.
    """

    def __init__(self, reason: str, results: list[GateResult] | None = None) -> None:
        super().__init__(reason)
        self.results = results or []


class Operations:
    """Carries out operations on seeds; each takes effect wholly or not at all.

    :param garden: all slots.
    :param probe: runs the model on the kept sample.
    :param config: limits and lengths.
    """

    def __init__(self, garden: Garden, probe: Probe, config: GrowthConfig) -> None:
        self.config = config
        self._garden = garden
        self._architecture = garden.architecture
        self._probe = probe
        self._operations: dict[SeedOperation, Callable[[SeedCommand], list[GateResult]]] = {
            SeedOperation.GERMINATE: self._germinate,
            SeedOperation.ADVANCE: lambda command: self._advance(command.seed),
            SeedOperation.HOLD: self._hold,
            SeedOperation.RETARGET: self._retarget,
            SeedOperation.CULL: lambda command: self._fade(command.seed),
        }

    def carry_out(self, command: SeedCommand) -> FieldReport:
        """Carry out one command; the report says what changed, or why nothing did."""
        life = self._garden.lives.get(command.seed)
        if life is None:
            known = ", ".join(map(repr, self._garden.lives)) or "none"
            return refused(
                self._garden, command, f"there is no slot {command.seed!r}; there are: {known}"
            )
        if life.fading:
            return refused(self._garden, command, "it is being culled and fades out")
        before, blueprint = life.stage, life.blueprint or command.blueprint
        try:
            results = self._operations[command.operation](command)
        except RefusedError as refusal:
            return refused(self._garden, command, str(refusal), refusal.results, blueprint)
        except GrowthError as error:
            return refused(self._garden, command, str(error), blueprint=blueprint)
        finally:
            self._garden.resettle()
        return done(self._garden, command.seed, before, results, blueprint, command)

    def settle(self) -> list[FieldReport]:
        """Let stages follow that follow by themselves; return what came of it."""
        reports = []
        for name, life in list(self._garden.lives.items()):
            before, blueprint = life.stage, life.blueprint
            results = self._follow(name)
            if life.stage is not before:
                self._garden.resettle()
                reports.append(done(self._garden, name, before, results, blueprint))
        return reports

    def finish(self) -> None:
        """Fold every seed that the model contains, at its share; remove the others.

        :raises GrowthError: a fold would change the model's outputs.
        """
        garden = self._garden
        for name, life in garden.lives.items():
            if life.stage in BLENDED:
                self._fold(name, life.alpha(garden.clock), reopened=False, earlier=[])
                if life.stage is Stage.BLENDING:
                    life.go(Stage.HOLDING, garden.clock)
                life.go(Stage.FOSSILISED, garden.clock)
            elif life.stage in LIVE:
                self._cull(name)
        garden.resettle()

    def _follow(self, name: str) -> list[GateResult]:
        garden, life = self._garden, self._garden.lives[name]
        if life.stage in LIVE:
            return self._follow_seed(name)
        age, clock = garden.clock - life.since, garden.clock
        if life.stage is Stage.CULLED:
            life.go(Stage.EMBARGOED, clock)
        elif life.stage is Stage.EMBARGOED and age >= self.config.embargo_steps:
            life.go(Stage.RESETTING, clock)
        elif life.stage is Stage.RESETTING or self._may_reopen(name):
            garden.forget_offers(name)
            life.go(Stage.DORMANT, clock)
        return []

    def _follow_seed(self, name: str) -> list[GateResult]:
        garden, life, clock = self._garden, self._garden.lives[name], self._garden.clock
        if life.stage is Stage.GERMINATED:
            life.go(Stage.TRAINING, clock)
        elif life.stage is Stage.TRAINING and life.nonfinite >= self.config.nonfinite_patience:
            self._cull(name)
            reason = f"no finite gradient in {self.config.nonfinite_patience} steps in a row"
            return [GateResult(Gate.G1, False, reason)]
        elif life.fading and life.ramp_ended(clock):
            self._cull(name)
        elif life.stage is Stage.BLENDING:
            result = gates.settled(life, garden.slot(name).seed, clock)
            if result.passed:
                life.go(Stage.HOLDING, clock)
                return [result]
        return []

    def _may_reopen(self, name: str) -> bool:
        fossilised = self._garden.lives[name].stage is Stage.FOSSILISED
        return fossilised and name in self._architecture.slots

    def _germinate(self, command: SeedCommand) -> list[GateResult]:
        name, planting, garden = command.seed, command.planting, self._garden
        life = garden.lives[name]
        if life.stage is not Stage.DORMANT:
            raise RefusedError(f"it is {life.stage}, not dormant")
        flow, blueprint = live_flow(garden.slot(name)), get(command.blueprint)
        results = [_require(gates.fits(blueprint, flow))]
        inserted = _training_of(planting.training) == "insert"
        # The ramp to come is made now, too: a planting that has none is refused before it grows.
        self._ramp(planting, 0.0, 1.0)
        ramp = Ramp(1.0, 1.0, 1, planting.ramp) if inserted else None
        before, parameters = self._probe.outputs(), garden.parameters()
        change = Plant(
            name,
            command.blueprint,
            blueprint.version,
            planting,
            seed_of_change(name, self._architecture.version),
        )
        self._architecture.make(change, self._initial(planting.initialiser, name))
        try:
            added = garden.parameters() - parameters
            results.append(
                _require(gates.affordable(parameters, added, self.config.max_parameters), results)
            )
            slot = garden.slot(name)
            slot.alpha.fill_(float(inserted))
            with slot.passing(Passage.BLENDED if inserted else Passage.HOST):
                results.append(_require(gates.unchanged(before, self._probe.outputs()), results))
        except BaseException:
            self._architecture.take_back()
            raise
        life.go(Stage.GERMINATED, garden.clock)
        life.blueprint, life.planting, life.nonfinite = command.blueprint, planting, 0
        if ramp is not None:
            life.go(Stage.BLENDING, garden.clock)
            life.start_ramp(ramp, garden.clock)
        return results

    def _advance(self, name: str) -> list[GateResult]:
        garden, life = self._garden, self._garden.lives[name]
        if life.stage is Stage.TRAINING:
            age = garden.clock - life.since
            result = _require(gates.gains(life, age, self.config))
            if not gates.is_finite(garden.slot(name).seed):
                raise RefusedError("a weight of the seed is not finite", [result])
            life.go(Stage.BLENDING, garden.clock)
            self._start_ramp(name, 0.0, 1.0)
            return [result]
        if life.stage is Stage.HOLDING:
            return self._fossilise(name)
        if life.stage is Stage.BLENDING:
            raise RefusedError(
                "it is blending", [gates.settled(life, garden.slot(name).seed, garden.clock)]
            )
        raise RefusedError(f"it is {life.stage}; nothing follows that can be asked for")

    def _fossilise(self, name: str) -> list[GateResult]:
        garden, life = self._garden, self._garden.lives[name]
        alpha = life.alpha(garden.clock)
        results = [_require(gates.worthwhile(life, alpha))]
        reopened = life.growths + 1 < self.config.growths_per_slot
        results.append(self._fold(name, alpha, reopened=reopened, earlier=results))
        life.go(Stage.FOSSILISED, garden.clock)
        life.growths += 1
        return results

    def _fold(
        self, name: str, alpha: float, *, reopened: bool, earlier: list[GateResult]
    ) -> GateResult:
        before = self._probe.outputs()
        self._architecture.make(Fold(name, alpha, reopened))
        try:
            result = gates.same(before, self._probe.outputs(), self.config.fold_tolerance)
            return _require(result, earlier)
        except BaseException:
            self._architecture.take_back()
            raise

    def _hold(self, command: SeedCommand) -> list[GateResult]:
        garden, life = self._garden, self._garden.lives[command.seed]
        alpha = life.alpha(garden.clock)
        if life.stage is not Stage.BLENDING:
            raise RefusedError(f"it is {life.stage}, not blending")
        life.go(Stage.HOLDING, garden.clock)
        life.start_ramp(Ramp(alpha, alpha, 1, life.planting.ramp), garden.clock)
        return []

    def _retarget(self, command: SeedCommand) -> list[GateResult]:
        garden, life = self._garden, self._garden.lives[command.seed]
        if life.stage is not Stage.HOLDING:
            raise RefusedError(f"it is {life.stage}; a ramp is retargeted from holding only")
        if not 0.0 <= command.target <= 1.0:
            raise RefusedError(f"target is {command.target!r}; give a number from 0 to 1")
        alpha = life.alpha(garden.clock)
        life.go(Stage.BLENDING, garden.clock)
        self._start_ramp(command.seed, alpha, command.target)
        return []

    def _fade(self, name: str) -> list[GateResult]:
        """Cull a seed; one that the model relies on lets go of it step by step first."""
        garden, life = self._garden, self._garden.lives[name]
        alpha = life.alpha(garden.clock) if life.stage in BLENDED else 0.0
        if alpha == 0.0 or not gates.is_finite(garden.slot(name).seed):
            return self._cull(name)
        if life.stage is Stage.HOLDING:
            life.go(Stage.BLENDING, garden.clock)
        self._start_ramp(name, alpha, 0.0)
        life.fading = True
        return []

    def _cull(self, name: str) -> list[GateResult]:
        life = self._garden.lives[name]
        if life.stage not in LIVE:
            raise RefusedError(f"it is {life.stage}; there is no seed to cull")
        self._architecture.make(Uproot(name))
        life.go(Stage.CULLED, self._garden.clock)
        return []

    def _start_ramp(self, name: str, start: float, target: float) -> None:
        life = self._garden.lives[name]
        life.start_ramp(self._ramp(life.planting, start, target), self._garden.clock)
        self._garden.slot(name).alpha.fill_(start)

    def _ramp(self, planting: Planting, start: float, target: float) -> Ramp:
        return Ramp(start, target, planting.ramp_steps or self.config.ramp_steps, planting.ramp)

    def _initial(self, initialiser: str, name: str) -> Callable[[nn.Module], None]:
        inputs = gradient = None
        if needs_gradient(initialiser):
            inputs, gradient = self._garden.pull(name)
        return partial(_initialise, initialiser, inputs, gradient)


def _require(result: GateResult, earlier: list[GateResult] | None = None) -> GateResult:
    if not result.passed:
        raise RefusedError(f"gate {result.gate}: {result.reason}", [*(earlier or []), result])
    return result


def _training_of(training: str) -> str:
    if training not in ("shadow", "insert"):
        raise RefusedError(f"training is {training!r}; give 'shadow' or 'insert'")
    return training


def _initialise(name: str, inputs: Tensor | None, gradient: Tensor | None, seed: nn.Module) -> None:
    initialise(name, seed, inputs=inputs, gradient=gradient)
