"""``esper incident``: what went wrong in a run, and going through it again."""

from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from esper.cli.options import gather
from esper.cli.run_directory import find_run, read_config
from esper.cli.target import build_job
from esper.cli.train import seed_generators
from esper.core.settings import EsperSettings
from esper.leyline import ConfigError
from esper.tolaria.incident import (
    Incident,
    find_incident,
    incident_directories,
    read_incident,
    read_unrecorded,
)
from esper.tolaria.incident.observer import Finding
from esper.tolaria.incident.ranges import Range
from esper.tolaria.incident.record import CourseStep, Number
from esper.tolaria.incident.replay import BatchLook, Replay, StepLook, replay

_COLOURS = {"recovered": "green", "under way": "cyan", "run ended": "yellow"}


def list_incidents(reference: str, runs: Path | None) -> None:
    """Print a table of a run's incidents, oldest first.

    :raises RunError: there is no such run, or a record cannot be read.
    """
    run = _find_run(reference, runs)
    console = _console()
    found = [read_incident(path) for path in incident_directories(run)]
    if not found:
        console.print(f"no incidents in {run}")
    else:
        _print_list(console, found)
    unrecorded = read_unrecorded(run)
    if unrecorded.count:
        console.print(
            f"{unrecorded.count} more between step {unrecorded.first_step} and step "
            f"{unrecorded.last_step} were not recorded (incidents.max_records)"
        )


def show_incident(reference: str, incident: str, runs: Path | None) -> None:
    """Print the record of one incident.

    :raises RunError: there is no such run or incident, or the record cannot be read.
    """
    found = read_incident(find_incident(_find_run(reference, runs), incident))
    console = _console()
    console.print(Text(f"{found.id}  {found.job} in {found.run}, {_time(found.time)}", "bold"))
    facts = _facts()
    for trigger in found.triggers:
        facts.add_row(f"step {trigger.step}", f"{trigger.action}: {trigger.reason}")
        if trigger.values:
            facts.add_row("", Text(_values(trigger.values), style="dim"))
    for title, text in (*_what_followed(found), *_what_is_kept(found)):
        facts.add_row(title, text)
    console.print(facts)
    console.print(_table_of(found.course))


def replay_incident(reference: str, incident: str, start: str | None, runs: Path | None) -> None:
    """Go through an incident again and print what went wrong first.

    :param start: ``healthy`` to run the batch on the healthy state as well.
    :raises ConfigError: there is no such start.
    :raises RunError: there is no such run or incident, or it cannot be gone through.
    :raises JobError: the job cannot be built any more.
    """
    if start not in (None, "healthy"):
        raise ConfigError(f"--from is {start!r}; the one start there is besides none is healthy")
    run = _find_run(reference, runs)
    directory = find_incident(run, incident)
    settings = EsperSettings(**read_config(run))
    seed_generators(settings)
    job = build_job(settings.run.target)
    _print_replay(_console(), replay(directory, job, from_healthy=start is not None))


def _print_list(console: Console, found: list[Incident]) -> None:
    width = max(len(incident.id) for incident in found)
    head = f"{'incident':<{width}}  {'time':<19}  epoch  batch  action    outcome"
    console.print(Text(head, style="bold"))
    for incident in found:
        outcome = incident.followed.outcome
        line = Text(f"{incident.id:<{width}}  {_time(incident.time)}  ")
        line.append(f"{incident.epoch + 1:>5}  {incident.batch:>5}  {incident.action:<8}  ")
        console.print(line.append(outcome, style=_COLOURS.get(outcome, "red")))
        why = Text(incident.triggers[-1].reason, style="dim")
        console.print(Padding(why, (0, 0, 0, 2), expand=False))


def _table_of(course: list[CourseStep]) -> Table:
    tasks = list(dict.fromkeys(task for step in course for task in step.losses))
    # The loss of a single task is the loss.
    tasks = tasks if len(tasks) > 1 else []
    table = _table("step", "epoch", "batch", "action", "rate", "norm", "loss", *tasks)
    for step in course:
        style = "bold red" if step.action != "commit" else "yellow" if step.suspicious else ""
        numbers = (step.rate, step.gradient_norm, step.loss, *map(step.losses.get, tasks))
        table.add_row(
            *(str(step.step), str(step.epoch + 1), str(step.batch), step.action),
            *("-" if number is None else _number(number, 4) for number in numbers),
            style=style,
        )
    return table


def _print_replay(console: Console, result: Replay) -> None:
    incident, look = result.incident, result.offending
    console.print(Text(f"{incident.id}  {incident.job} in {incident.run}", "bold"))
    console.print(_exactness(result))
    _print_finding(console, look, result.baseline_steps)
    for part in look.batch:
        if part.unusual:
            console.print(f"the batch itself is out of the ordinary: {_describe_batch(part)}")
    if look.batch and not any(part.unusual for part in look.batch):
        console.print("the batch itself is as usual")
    sign = result.sign
    if sign is not None and sign.first is not None:
        console.print(f"already in step {sign.step}, {_describe(sign.first)}: {sign.first.output}")
    if result.healthy is not None:
        _print_cause(console, result)


def _exactness(result: Replay) -> str:
    incident, difference = result.incident, result.difference
    taken = f"{result.steps} steps again from the state of step {incident.state.step}"
    if difference is None:
        return f"exact: {taken}, every loss and gradient norm equal to the bit"
    reasons = "; ".join(result.reasons) or "the job, its data or its library is not as it was then"
    replayed = "none" if difference.replayed is None else f"{difference.replayed:.17g}"
    return (
        f"not exact: {taken}; the {difference.what} of step {difference.step} was "
        f"{difference.recorded} and is {replayed} ({reasons})"
    )


def _print_finding(console: Console, look: StepLook, baseline_steps: int) -> None:
    finding = look.first
    if finding is None:
        console.print(
            f"step {look.step}: none of its {look.operations} operations is out of the ordinary"
        )
        return
    console.print(f"step {look.step}: {_describe(finding)}")
    table = _table("", "values", "lowest", "highest", "rms", "nan, inf")
    for tensor in finding.inputs:
        table.add_row(*_cells(tensor, "input"))
    table.add_row(*_cells(finding.output, "output"), style="bold red")
    console.print(table)
    if finding.usual is not None:
        low, high = finding.usual
        console.print(
            f"usual rms of the output: {low:.4g} to {high:.4g} in {baseline_steps} steps before"
        )
    earlier = look.out_of_trend
    if look.not_finite is not None and earlier is not None and earlier.number < finding.number:
        console.print(f"before that, {_describe(earlier)}: {earlier.output}")


def _print_cause(console: Console, result: Replay) -> None:
    step, healthy = result.incident.state.step, result.healthy
    if result.cause == "batch":
        console.print(
            f"on the healthy state of step {step} it goes wrong again: the batch alone causes it"
        )
    elif result.cause == "batch and state":
        console.print(
            f"on the healthy state of step {step} nothing of the kind happens: batch and state "
            "together cause it"
        )
    if healthy is not None and healthy.first is not None:
        console.print(f"there, {_describe(healthy.first)}: {healthy.first.output}")


def _describe(finding: Finding) -> str:
    what = "is not finite" if finding.kind == "not finite" else "breaks the trend"
    of = f" (gradient of {finding.forward})" if finding.forward else ""
    noun = "output" if finding.phase == "forward" else "gradient"
    return (
        f"{noun} of {finding.module} {what} first, in the {finding.phase} pass: "
        f"{finding.operation}{of}"
    )


def _describe_batch(part: BatchLook) -> str:
    usual = ""
    if part.usual is not None:
        low, high = part.usual
        usual = f"; rms {part.range.rms:.4g}, usual {low:.4g} to {high:.4g}"
    return f"{part.range}{usual}"


def _what_followed(incident: Incident) -> list[tuple[str, str]]:
    followed = incident.followed
    facts = []
    if followed.restored_step >= 0:
        facts.append(
            (
                "done",
                f"back to step {followed.restored_step} from {followed.tier} in "
                f"{followed.latency_ms:.1f} ms, {len(followed.skipped)} batches skipped",
            )
        )
    if followed.note:
        facts.append(("note", followed.note))
    losses = ""
    if followed.loss_before is not None and followed.loss_after is not None:
        before, after = _number(followed.loss_before), _number(followed.loss_after)
        losses = f"; median loss {before} before, {after} over {followed.steps} steps after"
    return [*facts, ("outcome", f"{followed.outcome}{losses}")]


def _what_is_kept(incident: Incident) -> list[tuple[str, str]]:
    state, environment = incident.state, incident.environment
    kept = f"of step {state.step}, {state.bytes / 2**20:.2f} MiB in {state.path}"
    facts = [("state", kept if state.path else state.note)]
    if state.path and state.note:
        facts.append(("", state.note))
    for entry in incident.batches:
        content = f"kept in {entry.file}" if entry.file else f"not kept: {entry.note}"
        tensors = ", ".join(entry.tensors)
        facts.append(
            (
                "batch",
                f"{entry.number} of epoch {entry.epoch + 1}, {len(entry.samples)} samples "
                f"({tensors}), {content}",
            )
        )
    facts.append(
        (
            "made with",
            f"esper {environment.esper}, torch {environment.torch}, python {environment.python}, "
            f"{environment.device}, {environment.threads} threads",
        )
    )
    return facts


def _values(values: dict[str, Number]) -> str:
    return "  ".join(f"{name} {_number(value)}" for name, value in values.items())


def _number(value: Number, digits: int = 6) -> str:
    return value if isinstance(value, str) else f"{value:.{digits}g}"


def _cells(tensor: Range, role: str) -> tuple[str, ...]:
    numbers = (tensor.low, tensor.high, tensor.rms)
    return (
        tensor.name or role,
        f"{tensor.dtype} {tensor.shape}",
        *("-" if value != value else f"{value:.4g}" for value in numbers),
        str(tensor.not_finite),
    )


def _find_run(reference: str, runs: Path | None) -> Path:
    directory = gather(None, None, {"run.directory": (runs, "--runs")}).settings.run.directory
    return find_run(reference, directory)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "incident")
    return table


def _facts() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
