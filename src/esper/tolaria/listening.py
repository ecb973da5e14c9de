"""How a run hears and tells of emergencies: its word, and whoever is to be told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper.core.config import TolariaConfig
from esper.core.worker import Isolation
from esper.leyline import Level
from esper.tolaria.dependency import Answer, Dependency
from esper.tolaria.emergency import (
    Broadcasts,
    EmergencyController,
    EmergencyWord,
    Identity,
    Publish,
    TokenBucket,
)
from esper.tolaria.isolation import isolation_of
from esper.tolaria.outside import Outside
from esper.tolaria.recorder import Recorder

WORD = "emergency.word"


def open_emergency(
    publish: Publish | None,
    directory: Path | None,
    outside: Outside,
    config: TolariaConfig,
    recorder: Recorder,
) -> EmergencyController:
    """Make the controller of a run.

    :param publish: is called with each signal.
    :param directory: of the run; without one only this process can raise the level.
    :param outside: how it is called.
    """
    isolation = None
    if publish is not None:
        isolation, warning = isolation_of(publish)
        if warning:
            recorder.event("broadcast_unstoppable", warning, Level.WARNING)
    progress = recorder.update.progress
    return EmergencyController(
        _open_word(directory, recorder),
        Broadcasts(_Caller(outside.emergency, isolation), publish, recorder.announce),
        Identity(run="" if directory is None else directory.name, step=lambda: progress.step),
        TokenBucket(config.emergency.repeats_per_minute),
        recorder.announce,
    )


class _Caller:
    """A dependency that is always asked in the same isolation."""

    def __init__(self, dependency: Dependency, isolation: Isolation | None) -> None:
        self._dependency = dependency
        self._isolation = isolation

    def submit_async(self, function: Callable[..., Any], *arguments: Any) -> bool:  # noqa: ANN401
        return self._dependency.submit_async(function, *arguments, isolation=self._isolation)

    def poll(self) -> Answer[Any] | None:
        return self._dependency.poll()


def _open_word(directory: Path | None, recorder: Recorder) -> EmergencyWord:
    if directory is None:
        return EmergencyWord(None)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return EmergencyWord(directory / WORD)
    except OSError as error:
        message = f"no other process can tell this run of an emergency: {error}"
        recorder.event("emergency_word_failed", message, Level.WARNING, error=str(error))
        return EmergencyWord(None)
