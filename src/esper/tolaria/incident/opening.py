"""Makes what records the incidents of a run, or what records none."""

from pathlib import Path

from esper.core.config import TolariaConfig
from esper.core.worker import AsyncWorker
from esper.tolaria.dependency import Dependency, Surroundings
from esper.tolaria.incident.listener import IncidentRecorder, NoIncidents
from esper.tolaria.incident.recorder import Incidents, Sources
from esper.tolaria.recorder import Recorder


def open_incidents(
    directory: Path | None,
    job: str,
    config: TolariaConfig,
    sources: Sources,
    worker: AsyncWorker,
    recorder: Recorder,
) -> IncidentRecorder:
    """Return who is told of incidents.

    :param directory: of the run; without one nothing is recorded.
    :param job: name of the job.
    :param worker: writes.
    """
    if directory is None or not config.incidents.enabled:
        return NoIncidents()
    # A record that cannot be written is told of; it is no reason to train more carefully.
    surroundings = Surroundings(worker, config.breaker, recorder.announce, _take_no_notice)
    writer = Dependency("incident", config.incidents.write_deadline_ms / 1e3, surroundings)
    return Incidents(directory, job, config, sources, writer, recorder)


def _take_no_notice(reason: str) -> None:
    """Leave the mode of training as it is."""
