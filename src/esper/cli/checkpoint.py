"""``esper checkpoint``: look at the checkpoints of a run, check them, take weights out and in."""

import pickle  # noqa: TID251 - only for the name of the error that torch raises
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file
from torch import Tensor

from esper.cli.options import gather
from esper.cli.run_directory import find_run
from esper.leyline import CheckpointError
from esper.tolaria.rollback import CheckpointInfo, CheckpointStore
from esper.tolaria.state import Capture

_MODEL = "model/"
_NESTED = ("state_dict", "model_state_dict", "model")


class Imported:
    """A checkpoint's content with other weights, to be saved."""

    def __init__(self, content: Capture) -> None:
        self._content = content

    def capture(self) -> Capture:
        """Return the content."""
        return self._content


def list_checkpoints(run: str, runs: Path | None, *, history: bool) -> None:
    """Print the checkpoints of a run, newest first, or what became of all there ever were.

    :raises RunError: there is no such run.
    """
    store, console = _store(run, runs), Console(highlight=False)
    if history:
        _print_history(store, console)
        return
    infos = store.list()
    if not infos:
        console.print(f"no checkpoints in {store.directory}")
        return
    table = _table("step", "written", "size", "guard", "", "validation")
    for info in infos:
        table.add_row(*_cells(info))
    console.print(table)
    for aside in sorted(store.directory.glob("*.damaged*")):
        console.print(f"set aside as damaged: {aside.name}", style="yellow")


def verify_checkpoints(run: str, runs: Path | None) -> None:
    """Compare every checkpoint of a run with its digests, and print what is found.

    :raises CheckpointError: one is damaged.
    """
    store, console = _store(run, runs), Console(highlight=False)
    reports = store.verify()
    for report in reports:
        text = Text("whole", style="green") if report.valid else Text(report.problem, style="red")
        console.print(Text(f"step {report.step:>9,}  ").append(text))
    damaged = sum(not report.valid for report in reports)
    if damaged:
        raise CheckpointError(
            f"{damaged} of {len(reports)} checkpoints are damaged; a resume passes over them"
        )
    console.print(f"{len(reports)} checkpoints, all whole" if reports else "no checkpoints")


def export_weights(run: str, runs: Path | None, file: Path, step: int | None) -> None:
    """Write the model's weights of a checkpoint as a plain safetensors file.

    :param step: of the checkpoint; None takes the newest.
    :raises CheckpointError: there is no whole checkpoint of this step, or it cannot be written.
    """
    store = _store(run, runs)
    info, content = store.read_latest(before_step=step)
    if step is not None and info.step != step:
        raise CheckpointError(
            f"there is no whole checkpoint of step {step} in {store.directory}; the nearest "
            f"older one is of step {info.step}"
        )
    weights = {
        name.removeprefix(_MODEL): tensor.contiguous()
        for name, tensor in content.tensors.items()
        if name.startswith(_MODEL)
    }
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        save_file(weights, temporary, metadata={"format": "pt", "step": str(info.step)})
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {file}: {error}") from error
    Console(highlight=False).print(
        f"{file}: {len(weights)} tensors of step {info.step}, "
        f"{sum(t.nbytes for t in weights.values()) / 2**20:.2f} MiB"
    )


def import_weights(run: str, runs: Path | None, file: Path) -> None:
    """Make a checkpoint with the weights of a file that ``torch.save`` wrote.

    Everything else is that of the newest checkpoint, which is pinned. No code in the file is run.

    :raises CheckpointError: the file holds no weights of this model, or the run has no checkpoint.
    """
    store = _store(run, runs)
    info, content = store.read_latest()
    weights = _load(file)
    tensors = dict(content.tensors)
    names = {name.removeprefix(_MODEL) for name in tensors if name.startswith(_MODEL)}
    for name in sorted(names ^ weights.keys()):
        where = "the file" if name in names else "the model"
        raise CheckpointError(f"{file} does not fit: {where} lacks {name}")
    for name, tensor in weights.items():
        own = tensors[_MODEL + name]
        if own.shape != tensor.shape:
            raise CheckpointError(
                f"{file} does not fit: {name} is {tuple(tensor.shape)}, "
                f"in the model {tuple(own.shape)}"
            )
        tensors[_MODEL + name] = tensor.to(own.dtype)
    with store:
        store.pin(info.step)
        saved = store.save(Imported(Capture(tensors, content.values)), step=info.step)
    Console(highlight=False).print(
        f"{saved.path.name}: the weights of {file}, all else of step {info.step}; the run "
        f"continues from it, and {info.path.name} stays, pinned"
    )


def pin_checkpoint(run: str, runs: Path | None, step: int, *, pinned: bool) -> None:
    """Keep a checkpoint for good, or let it go again.

    :raises CheckpointError: there is none of this step, or the run is being written.
    """
    with _store(run, runs) as store:
        info = store.pin(step, pinned=pinned)
    state = "pinned" if pinned else "no longer pinned"
    Console(highlight=False).print(f"{info.path.name}: {state}")


def _store(run: str, runs: Path | None) -> CheckpointStore:
    settings = gather(None, None, {"run.directory": (runs, "--runs")}).settings
    # What is kept is the run's own business: nothing is retired by looking after it.
    directory = find_run(run, settings.run.directory) / "checkpoints"
    return CheckpointStore(directory, keep=10**9)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(  # noqa: TID251 - a file of the user, whose code is not run
            file, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as a torch file: {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and plain values, and no code in it is run; save "
            "model.state_dict() alone"
        ) from error
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{file} holds no state_dict; save model.state_dict()")
    return {str(name): tensor for name, tensor in loaded.items()}


def _print_history(store: CheckpointStore, console: Console) -> None:
    table = _table("when", "what", "step", "why")
    for entry in store.history():
        step = "-" if entry.step < 0 else f"{entry.step:,}"
        table.add_row(_when(entry.time), entry.event, step, entry.reason)
    console.print(table)


def _cells(info: CheckpointInfo) -> tuple[str | Text, ...]:
    return (
        f"{info.step:,}",
        _when(info.created),
        f"{info.bytes / 2**20:.2f} MiB",
        Text("healthy", style="green") if info.healthy else Text("doubtful", style="yellow"),
        "pinned" if info.pinned else "",
        "  ".join(f"{name} {value:.4f}" for name, value in info.metrics.items()),
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in ("step", "size") else "left")
    return table


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
