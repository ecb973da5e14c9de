"""The report page: one file that needs nothing else."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from esper.leyline import Event, Level, RunError, SystemState
from esper.nissa.jsonl import read_records
from esper.nissa.report.series import Chart
from esper.nissa.report.story import Story

# What stands in for a value that was not measured.
_ABSENT = "\u2013"
_NOTES = {
    "loss": "Thin: each step. Bold: smoothed. Dashed red: steps that a rollback took back.",
    "conflict": "Share of steps whose task gradients point against each other, smoothed.",
    "cosine": "Below zero the tasks pull the shared parameters in opposing directions.",
}
_ROUTINE = {"checkpoint_saved", "run_started", "run_ended"}


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run directory.

    :returns: its path.
    :raises RunError: the run's events are missing or damaged, or the page cannot be written.
    """
    story = Story.of(read_records(run / "events.jsonl"))
    config = run / "config.toml"
    settings = config.read_text(encoding="utf-8") if config.is_file() else ""
    path = run / "report.html"
    temporary = run / "report.html.tmp"
    try:
        temporary.write_text(render(story, run.name, settings), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from error
    return path


def render(story: Story, name: str, settings: str) -> str:
    """Return the page.

    :param name: of the run.
    :param settings: its configuration, as text.
    """
    charts = story.charts()
    data = {"charts": [chart.to_json() for chart in charts], "marks": story.marks()}
    parts = {
        "TITLE": escape(name),
        "STYLE": _asset("uplot.css") + _asset("report.css"),
        "HEADER": _header(story, name),
        "FIGURES": _figures(story),
        "CHARTS": "".join(_figure(chart) for chart in charts),
        "TIMINGS": _timings(story.timings()),
        "EVENTS": _events(story.events),
        "EPOCHS": _epochs(story.epochs),
        "SETTINGS": escape(settings),
        # Inside a script element only "</" could end it early.
        "DATA": json.dumps(data, allow_nan=False).replace("</", "<\\/"),
        "SCRIPT": _asset("uplot.js") + _asset("report.js"),
    }
    page = _asset("template.html")
    before, *rest = page.split("{{")
    filled = [before]
    for piece in rest:
        key, text = piece.split("}}", 1)
        filled += [parts[key], text]
    return "".join(filled)


def _header(story: Story, name: str) -> str:
    outcome = story.outcome
    facts = []
    if story.started is not None:
        data = story.started.data
        began = datetime.fromtimestamp(story.started.time, UTC)
        versions = " · ".join(f"{key} {value}" for key, value in data["versions"].items())
        facts = [
            f"{began:%Y-%m-%d %H:%M} UTC",
            f"{data['parameters']:,} parameters on {data['device']}",
            f"{data['samples']:,} samples",
            f"seed {data['seed']}",
            versions,
        ]
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f'<h1>{escape(name)} <span class="badge {escape(outcome)}">{escape(outcome)}</span></h1>'
        f'<p class="story">{escape(story.sentence())}</p><ul class="facts">{items}</ul>'
    )


def _figures(story: Story) -> str:
    ended = story.ended.data if story.ended is not None else {}
    share = story.conflict_share()
    milliseconds = sum(story.timings().values())
    figures = {name: f"{value:.4g}" for name, value in story.validation.items()}
    figures |= {
        "rollbacks": str(len(story.named("rollback"))),
        "skipped updates": str(ended.get("skipped", len(story.named("step_skipped")))),
        "task pairs in conflict": _ABSENT if share is None else f"{share:.0%}",
        "a step": f"{milliseconds:.2f} ms" if milliseconds else _ABSENT,
        "checkpoints": str(len(story.named("checkpoint_saved"))),
    }
    return "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in figures.items()
    )


def _figure(chart: Chart) -> str:
    toggle = (
        f'<button type="button" data-log="{chart.key}" aria-pressed="false">log</button>'
        if chart.log
        else ""
    )
    note = _NOTES.get(chart.key, "")
    labels = ", ".join(dict.fromkeys(series.label for series in chart.series))
    return (
        f"<figure><figcaption><h3>{escape(chart.title)}</h3>{toggle}</figcaption>"
        f'<div class="chart" id="chart-{chart.key}" role="img" '
        f'aria-label="{escape(chart.title)} over steps: {escape(labels)}"></div>'
        f'<p class="note">{escape(note)}</p></figure>'
    )


def _timings(timings: dict[str, float]) -> str:
    total = sum(timings.values())
    rows = [
        (
            escape(phase),
            f'<span class="bar" style="width:{milliseconds / total:.1%}"></span>',
            f"{milliseconds:.3f} ms",
            f"{milliseconds / total:.0%}",
        )
        for phase, milliseconds in timings.items()
        if total > 0
    ]
    return _table(("phase", "", "a step", "share"), rows, "timings")


def _events(events: Sequence[Event]) -> str:
    rows = []
    for event in events:
        routine = event.name in _ROUTINE and event.level is Level.INFO
        moment = datetime.fromtimestamp(event.time, UTC).strftime("%H:%M:%S")
        badge = f'<span class="level {event.level}">{escape(event.name)}</span>'
        rows.append((moment, f"{event.step:,}", badge, escape(event.message), routine))
    return _table(
        ("time", "step", "event", "what happened"),
        [row[:4] for row in rows],
        "events",
        ["routine" if row[4] else "" for row in rows],
    )


def _epochs(epochs: Sequence[SystemState]) -> str:
    if not epochs:
        return ""
    tasks = list(epochs[-1].losses)
    metrics = list(epochs[-1].validation)
    head = ["epoch", "steps", *(f"{task} loss" for task in tasks), *metrics, "conflicts", "rate"]
    rows = [
        [
            str(state.epoch + 1),
            f"{state.step:,}",
            *(_number(state.losses.get(task)) for task in tasks),
            *(_number(state.validation.get(metric)) for metric in metrics),
            _ABSENT if state.conflict_share is None else f"{state.conflict_share:.0%}",
            _number(state.learning_rate),
        ]
        for state in epochs
    ]
    return _table([escape(cell) for cell in head], rows, "epochs")


def _table(
    head: Iterable[str],
    rows: Sequence[Sequence[str]],
    name: str,
    classes: Sequence[str] = (),
) -> str:
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr class="{classes[index] if classes else ""}">'
        + "".join(f"<td>{cell}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f'<table class="{name}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'


def _number(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.4g}"


def _asset(name: str) -> str:
    return files("esper.nissa.report").joinpath("assets", name).read_text(encoding="utf-8")
