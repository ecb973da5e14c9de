"""Answering a verdict that is no plain commit: tell, roll back, or end the run."""

from typing import Any

from esper.leyline import Action, EmergencyLevel, Level, StepRecord, Verdict
from esper.tolaria.caution import Caution
from esper.tolaria.data import Batch
from esper.tolaria.emergency import EmergencyController
from esper.tolaria.ending import Ending, Outcome
from esper.tolaria.incident import IncidentRecorder
from esper.tolaria.keeper import Keeper
from esper.tolaria.recorder import Recorder
from esper.tolaria.recovery import Recovered, Recovery


class Rescue:
    """Carries out the guard's remedies and tells about each.

    :param recovery: rolls back.
    :param keeper: makes the restored state durable.
    :param recorder: told of every remedy.
    :param ending: asked to end the run when no remedy is left.
    :param caution: counts every step, and is told of rollbacks.
    :param emergency: escalated when no remedy is left.
    :param incidents: told of everything that is no plain commit.
    """

    def __init__(
        self,
        recovery: Recovery,
        keeper: Keeper,
        recorder: Recorder,
        ending: Ending,
        caution: Caution,
        emergency: EmergencyController,
        incidents: IncidentRecorder,
    ) -> None:
        self.incidents = incidents
        self._recovery = recovery
        self._keeper = keeper
        self._recorder = recorder
        self._ending = ending
        self._caution = caution
        self._emergency = emergency

    def answer(self, record: StepRecord, batch: Batch, verdict: Verdict) -> None:
        """Remember the step's batch, and carry out whatever its verdict asks for besides.

        :param record: of the step.
        """
        step, incidents = record.step, self.incidents
        self._recovery.trail.note(step, batch)
        self._caution.note(verdict)
        incidents.course.append(record)
        if verdict.suspicious:
            incidents.suspect(step, batch)
        if verdict.action is not Action.COMMIT:
            # Before anything is done about it: the states that led here are still there.
            incidents.begin(record, verdict)
            self._remedy(step, verdict)
        else:
            if incidents.busy:
                incidents.follow(record)
            if verdict.reason:
                message = f"step {step}: {verdict.reason}"
                self._recorder.event(
                    "guard_suspicious", message, Level.WARNING, step=step, **_trigger(verdict)
                )

    def _remedy(self, step: int, verdict: Verdict) -> None:
        if verdict.action is Action.SKIP:
            self._recovery.log.skipped_updates += 1
            message = f"step {step}: update skipped, {verdict.reason}"
            self._recorder.event(
                "step_skipped",
                message,
                Level.WARNING,
                reason=verdict.reason,
                skipped_updates=self._recovery.log.skipped_updates,
                **_trigger(verdict),
            )
        elif verdict.action is Action.ROLLBACK:
            self._roll_back(step, verdict)
        else:
            self._halt(verdict.reason, verdict)

    def _roll_back(self, step: int, verdict: Verdict) -> None:
        recovered = self._recovery.roll_back(verdict)
        result = recovered.rollback
        self.incidents.rolled_back(recovered)
        if result.deadline_exceeded:
            self._recorder.event(
                "rollback_deadline_exceeded",
                f"a rollback missed a deadline: {result.error}",
                Level.WARNING,
                latency_ms=result.latency_ms,
                reason=result.error,
            )
        if result.tier is None:
            reason = f"{verdict.reason}; no state to roll back to: {result.error}"
            self._halt(reason, verdict)
            return
        self._recorder.event(
            "rollback",
            _story(step, verdict, recovered),
            Level.WARNING,
            tier=result.tier.value,
            from_step=step,
            to_step=result.step,
            reason=verdict.reason,
            latency_ms=result.latency_ms,
            skipped_batches=[list(identity) for identity in recovered.skipped],
            skipped_samples=[
                sample
                for identity in recovered.skipped
                for sample in self._recovery.samples_of(*identity)
            ],
            rate_factor=verdict.rate_factor,
            rewarm_from=verdict.rewarm_from,
            rewarm_steps=verdict.rewarm_steps,
            **_trigger(verdict),
            fallback=result.error,
        )
        self._caution.enter("rollback")
        self._keeper.keep_restored()

    def _halt(self, reason: str, verdict: Verdict) -> None:
        message = f"training is halted: {reason}"
        self._recorder.event(
            "guard_halted", message, Level.CRITICAL, reason=reason, **_trigger(verdict)
        )
        self.incidents.halted(reason)
        self._ending.ask(Outcome.HALTED, reason)
        self._emergency.escalate(EmergencyLevel.CRITICAL, message)


def _story(step: int, verdict: Verdict, recovered: Recovered) -> str:
    result, batches = recovered.rollback, len(recovered.skipped)
    story = (
        f"diverged at step {step} ({verdict.reason}); rolled back to step {result.step} from "
        f"{result.tier} in {result.latency_ms:.1f} ms, {batches} batches skipped"
    )
    if verdict.rate_factor != 1.0:
        story += f", learning rate x {verdict.rate_factor:g}"
    if verdict.rewarm_steps:
        story += (
            f", learning rate x {verdict.rewarm_from:g} climbing back in "
            f"{verdict.rewarm_steps} steps"
        )
    return story


def _trigger(verdict: Verdict) -> dict[str, Any]:
    """Return what an event tells about why."""
    return {"signal": verdict.signal, "trigger": verdict.trigger}
