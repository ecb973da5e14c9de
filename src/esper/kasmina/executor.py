"""Kasmina: carries out growth commands on a live model, and says what came of each."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from esper.core.config import GrowthConfig
from esper.core.signing import command_key
from esper.kasmina.admission import Admission
from esper.kasmina.attach import Site, attach_at, locate
from esper.kasmina.blueprints import get
from esper.kasmina.compiled import CompiledBlocks
from esper.kasmina.garden import Garden, Loss
from esper.kasmina.lifecycle import LIVE
from esper.kasmina.operations import Operations
from esper.kasmina.probe import Probe, Sample
from esper.kasmina.reports import refused
from esper.kasmina.shadow import Losses, ShadowTraining
from esper.kasmina.slot import Slot
from esper.kasmina.structure import Architecture, GroupOptions, live_flow
from esper.kasmina.surgery import OptimizerSurgeon
from esper.leyline import (
    AdaptationCommand,
    FieldReport,
    GrowthError,
    GrowthState,
    SeedCommand,
    SeedOperation,
    Stage,
)


class Kasmina:
    """Grows a model while it trains. Works in any loop; Esper's engine drives it by itself.

    In a loop of one's own: :meth:`train_seeds` between backward pass and optimizer step,
    :meth:`settle` after it, :meth:`survey` now and then, and :meth:`apply` for what is decided.

    :param model: the host; its slots are attached here.
    :param optimizer: over the model's parameters. Its step is hooked: shares are counted in steps.
    :param slots: names of modules, or of pairs such as ``fc1>fc2``; see
        :func:`~esper.kasmina.attach`.
    :param sample: a real input of the model, kept: outputs on it are compared at every change.
    :param scheduler: of the optimizer.
    :param blueprints: names of those that may be offered; all that fit by default.
    :param config: how seeds grow; None leaves that to the engine, or to the defaults.
    :raises GrowthError: a slot cannot be attached, or optimizer or schedule cannot grow; the model
        is as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        slots: Sequence[str],
        sample: Sample,
        scheduler: LRScheduler | None = None,
        blueprints: Sequence[str] | None = None,
        config: GrowthConfig | None = None,
    ) -> None:
        _require_one_process()
        self._configured = config is not None
        self.config = config or GrowthConfig()
        surgeon = OptimizerSurgeon(optimizer, scheduler)
        surgeon.require_growable(rate_factor=self.config.rate_factor)
        probe = Probe(model, sample)
        architecture = Architecture(
            model,
            optimizer,
            surgeon,
            {name: locate(model, name) for name in slots},
            partial(_open, model, probe),
            GroupOptions(self.config.rate_factor, self.config.warmup_steps),
        )
        self._architecture = architecture
        self._model = model
        self._garden = Garden(model, architecture, blueprints)
        self._operations = Operations(self._garden, probe, self.config)
        self._shadow = ShadowTraining(model, probe)
        self._admission = Admission(command_key())
        self._compiled: CompiledBlocks | None = None
        self._counts = {"applied": 0, "refused": 0}
        optimizer.register_step_post_hook(self._after_step)

    @property
    def version(self) -> int:
        """Version of the architecture; every structural change counts it up."""
        return self._architecture.version

    @property
    def stages(self) -> dict[str, Stage]:
        """The stage of every slot by name."""
        return {name: life.stage for name, life in self._garden.lives.items()}

    def compile(self, names: Sequence[str], backend: str = "inductor") -> CompiledBlocks:
        """Compile blocks of the model each on its own, also what growth puts in their place.

        :param names: of the modules, such as ``layers.0``.
        :param backend: of ``torch.compile``, by name.
        :raises GrowthError: there is no such module.
        """
        self._compiled = CompiledBlocks(self._model, names, backend)
        return self._compiled

    def configure(self, config: GrowthConfig) -> None:
        """Take over the engine's configuration, unless one was given at the start."""
        if not self._configured:
            self.config = self._operations.config = config
            self._architecture.options = GroupOptions(config.rate_factor, config.warmup_steps)

    def prepare(self, command: AdaptationCommand) -> None:
        """Load and check the blueprint beside training; the model is not touched.

        :raises GrowthError: there is no such blueprint, or it does not fit.
        """
        if isinstance(command, SeedCommand) and command.operation is SeedOperation.GERMINATE:
            slot = self._garden.slot(command.seed)
            get(command.blueprint).check(live_flow(slot))

    def apply_prepared(self, command: AdaptationCommand, prepared: object) -> FieldReport:
        """Carry out a command that was prepared; see :meth:`apply`."""
        del prepared
        return self.apply(command)

    def apply(self, command: AdaptationCommand) -> FieldReport:
        """Carry out one command between two steps, wholly or not at all.

        :returns: what changed, or why it was refused, with what the gates measured.
        """
        if not isinstance(command, SeedCommand):
            detail = "Kasmina carries out commands that concern seeds only"
            return FieldReport(type(command).__name__, applied=False, detail=detail)
        refusal = self._admission.refusal(command, self.version)
        self._shadow.replay.stop()
        report = (
            refused(self._garden, command, refusal)
            if refusal
            else self._operations.carry_out(command)
        )
        self._refresh()
        if report.applied:
            self._admission.note(command)
        self._counts["applied" if report.applied else "refused"] += 1
        return report

    def train_seeds(
        self, loss: Callable[[], Losses], scale: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Fill the gradients of the seeds that train in isolation, once the host's are there.

        :param loss: runs the model on the batch of this step and returns its losses.
        :param scale: the loss scale of mixed precision.
        """
        garden = self._garden
        for name in self._due(garden.clock):
            finite = self._shadow.train(garden.slot(name), loss, scale or _unscaled)
            life = garden.lives[name]
            life.nonfinite = 0 if finite else life.nonfinite + 1
        self._listen(garden.clock + 1)

    def settle(self) -> list[FieldReport]:
        """After a step: let stages follow that follow by themselves; return what came of it."""
        reports = self._operations.settle() if self._garden.restless else []
        if reports:
            self._refresh()
        return reports

    def survey(self, loss: Loss, batches: Sequence[Any], steps_left: int | None) -> GrowthState:
        """Measure on held-out batches what each seed gains, and where there is most to gain.

        :param loss: of one batch.
        :param batches: held out from training.
        :param steps_left: training steps until the planned end.
        """
        self._shadow.replay.rest()
        self._garden.measure(loss, batches)
        self._listen(self._garden.clock)
        return self._garden.describe(self.config, steps_left)

    def release(self) -> nn.Module:
        """Take all slots off; the model is a plain module then.

        :raises GrowthError: a seed is neither fossilised nor culled.
        """
        live = [name for name, life in self._garden.lives.items() if life.stage in LIVE]
        if live:
            raise GrowthError(f"seeds still grow at {live}; advance or cull them first")
        self._shadow.replay.stop()
        self._architecture.close()
        return self._model

    def finish(self) -> nn.Module:
        """End growth: fold the seeds that the model contains, remove the others and all slots.

        :returns: the model, of plain modules, with the outputs that it had.
        :raises GrowthError: a fold would change the outputs beyond the tolerance.
        """
        self._shadow.replay.stop()
        self._operations.finish()
        return self.release()

    def structure(self) -> dict[str, Any]:
        """Return how the model was changed so far, of JSON types."""
        return self._architecture.describe()

    def rebuild(self, structure: dict[str, Any]) -> bool:
        """Change the model until it is built as was described; weights are not restored.

        :returns: whether anything had to be changed.
        :raises GrowthError: it cannot be; the model is built as before then.
        """
        changed = not self._architecture.is_at(structure)
        self._shadow.replay.stop()
        self._architecture.rebuild(structure)
        if changed:
            self._refresh()
        return changed

    def state_dict(self) -> dict[str, Any]:
        """Return the stages and what is remembered besides, of JSON types."""
        return self._garden.state_dict() | {"done": self._admission.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`, in a model that was rebuilt."""
        self._garden.load_state_dict(state_dict)
        self._admission.load_state_dict(state_dict["done"])
        self._refresh()

    def metrics(self) -> dict[str, float]:
        """Return the newest values by name."""
        compiled = {} if self._compiled is None else self._compiled.metrics()
        return (
            self._garden.metrics()
            | compiled
            | {
                "kasmina.commands_applied_total": float(self._counts["applied"]),
                "kasmina.commands_refused_total": float(self._counts["refused"]),
            }
        )

    def _due(self, clock: int) -> list[str]:
        """Return the seeds that learn in isolation at a step."""
        every = self.config.shadow_every
        training = self._garden.named(Stage.TRAINING)
        return [name for index, name in enumerate(training) if (clock + index) % every == 0]

    def _listen(self, clock: int) -> None:
        """Let the host's pass be kept for the seeds that will learn from it."""
        if self._due(clock):
            self._shadow.replay.listen()
        else:
            self._shadow.replay.rest()

    def _refresh(self) -> None:
        """After stages or structure have changed: see anew what shadow passes need."""
        if self._compiled is not None:
            self._compiled.refresh()
        self._shadow.refresh()
        sites = self._architecture.sites
        training = self._garden.named(Stage.TRAINING)
        self._shadow.replay.prepare({name: sites[name].path for name in training})

    def _after_step(self, *_: object) -> None:
        self._garden.tick()


def _open(model: nn.Module, probe: Probe, site: Site) -> Slot:
    return attach_at(model, site, probe)


def _unscaled(loss: Tensor) -> Tensor:
    return loss


def _require_one_process() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        processes = distributed.get_world_size()
        if processes > 1:
            raise GrowthError(
                f"growth over {processes} processes is not supported yet: each would grow a model "
                "of its own"
            )
