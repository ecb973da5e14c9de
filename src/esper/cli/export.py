"""``esper export``: the model of a run in forms that are read without Esper."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from esper._version import __version__
from esper.cli.options import gather
from esper.cli.run_directory import find_run, read_config
from esper.cli.target import build_job
from esper.cli.train import seed_generators
from esper.core.settings import EsperSettings
from esper.kasmina import Kasmina
from esper.kasmina.export import FORMS, ExportReport, Sample, export_model
from esper.leyline import CheckpointError, JobError, RunError, StateError
from esper.tolaria.data import plan_data
from esper.tolaria.fetch import fetcher
from esper.tolaria.job import TrainingJob
from esper.tolaria.rollback import CheckpointInfo, CheckpointStore
from esper.tolaria.state import TrainState

_FOLDER = "export"


def export_run(
    reference: str,
    runs: Path | None,
    directory: Path | None,
    formats: Sequence[str] | None,
    *,
    step: int | None = None,
    overwrite: bool = False,
) -> None:
    """Export the model of a run's newest checkpoint, and print what was written.

    Seeds that the model contains are folded, and all other seeds and slots are taken out.

    :param reference: path or name of the run.
    :param directory: to make; ``export`` in the run's own by default.
    :param formats: some of ``safetensors``, ``torch`` and ``onnx``; all by default.
    :param step: of the checkpoint; None takes the newest.
    :param overwrite: replace a directory that is there.
    :raises RunError: there is no such run, or its checkpoint is of another job.
    :raises CheckpointError: there is no whole checkpoint.
    :raises JobError: the job cannot be built any more.
    :raises GrowthError: the model cannot be exported; nothing was written then.
    """
    run = _find_run(reference, runs)
    settings = EsperSettings(**read_config(run))
    seed_generators(settings)
    job = build_job(settings.run.target)
    info = _restore(job, run, step)
    if isinstance(job.executor, Kasmina):
        job.executor.finish()
    report = export_model(
        job.model,
        sample_of_job(job),
        directory or run / _FOLDER,
        formats=formats or FORMS,
        metadata=_metadata(run, settings, job, info),
        overwrite=overwrite,
    )
    _print(Console(highlight=False), report, info)


def sample_of_job(job: TrainingJob) -> Sample:
    """Return what a job's loss calls its model with, for the first batch of validation data.

    Without validation data, the first samples of the training data are used.

    :raises JobError: the loss does not call the model.
    """
    has_validation = job.validation is not None
    source, role = (job.validation, "validation") if has_validation else (job.data, "training")
    plan = plan_data(source, batch_size=job.batch_size, shuffle=False, role=role)
    count = min(plan.batch_size, plan.samples)
    batch = fetcher(plan.dataset, plan.collate)(list(range(count)))
    calls: list[Sample] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Sample(args, kwargs))

    was_training = job.model.training
    handle = job.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        job.model.eval()
        with torch.no_grad():
            job.loss(job.model, batch)
    finally:
        handle.remove()
        job.model.train(was_training)
    if not calls:
        raise JobError(
            f"the loss of job {job.name!r} does not call its model, so that its inputs are not "
            "known; have it call model(...), or use esper.kasmina.export.export_model"
        )
    return calls[0]


def _restore(job: TrainingJob, run: Path, step: int | None) -> CheckpointInfo:
    store = CheckpointStore(run / "checkpoints")
    info, content = store.read_latest(before_step=step)
    if step is not None and info.step != step:
        raise CheckpointError(
            f"there is no whole checkpoint of step {step} in {store.directory}; the nearest "
            f"older one is of step {info.step}"
        )
    grower = job.executor if isinstance(job.executor, Kasmina) else None
    components = {} if grower is None else {"kasmina": grower}
    state = TrainState(job.model, job.optimizer, components, structure=grower)
    try:
        state.restore(content)
    except StateError as error:
        raise RunError(
            f"the checkpoint of step {info.step} in {run} does not fit its job: {error}; was the "
            "job changed since?"
        ) from error
    return info


def _metadata(
    run: Path, settings: EsperSettings, job: TrainingJob, info: CheckpointInfo
) -> dict[str, Any]:
    return {
        "run": run.name,
        "job": job.name,
        "target": settings.run.target,
        "step": info.step,
        "healthy": info.healthy,
        "validation": dict(info.metrics),
        "esper": __version__,
    }


def _print(console: Console, report: ExportReport, info: CheckpointInfo) -> None:
    console.print(f"the model of step {info.step:,} in {report.directory}", style="bold")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("file", "size", "difference", "batch"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for form, paths in report.paths.items():
        difference = report.differences[form]
        told = "not verified" if difference is None else f"{difference:.2g}"
        for index, path in enumerate(paths):
            size = f"{path.stat().st_size / 2**10:,.1f} KiB"
            facts = (told, report.batch[form]) if index == 0 else ("", "")
            table.add_row(path.name, size, *facts)
    console.print(table)
    if report.generated is not None:
        origin = "modules" if report.generated == "fx" else "operations"
        console.print(f"model.py is made of the model's {origin}; it needs torch and safetensors")
    for note in report.notes:
        console.print(note, style="yellow")


def _find_run(reference: str, runs: Path | None) -> Path:
    directory = gather(None, None, {"run.directory": (runs, "--runs")}).settings.run.directory
    return find_run(reference, directory)
