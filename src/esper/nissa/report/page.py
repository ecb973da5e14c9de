"""The report page: one file that needs nothing else."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from esper.leyline import Event, Level, RunError, SystemState
from esper.nissa.jsonl import read_records
from esper.nissa.report.comparison import Comparison, read_comparison
from esper.nissa.report.comparison_page import comparison_section
from esper.nissa.report.html import ABSENT, number, table
from esper.nissa.report.lanes import life_of_seeds
from esper.nissa.report.series import Chart
from esper.nissa.report.story import Story
from esper.nissa.report.why import why

_NOTES = {
    "loss": "Thin: each step. Bold: smoothed. Dashed red: steps that a rollback took back.",
    "conflict": "Share of steps whose task gradients point against each other, smoothed.",
    "gain": "How much lower the held-out loss is with the seed, in its 95 % confidence interval.",
    "cosine": "Below zero the tasks pull the shared parameters in opposing directions.",
}
_ROUTINE = {"checkpoint_saved", "run_started", "run_ended"}


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run directory.

    :returns: its path.
    :raises RunError: the run's events or its comparison with baselines are missing or damaged, or
        the page cannot be written.
    """
    story = Story.of(read_records(run / "events.jsonl"))
    config = run / "config.toml"
    settings = config.read_text(encoding="utf-8") if config.is_file() else ""
    page = render(story, run.name, settings, read_comparison(run))
    path = run / "report.html"
    temporary = run / "report.html.tmp"
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}") from error
    return path


def render(story: Story, name: str, settings: str, comparison: Comparison | None = None) -> str:
    """Return the page.

    :param name: of the run.
    :param settings: its configuration, as text.
    :param comparison: with models of fixed size.
    """
    charts = story.charts()
    data = {"charts": [chart.to_json() for chart in charts], "marks": story.marks()}
    parts = {
        "TITLE": escape(name),
        "STYLE": _asset("uplot.css") + _asset("report.css"),
        "HEADER": _header(story, name),
        "FIGURES": _figures(story),
        "CHARTS": "".join(_figure(chart) for chart in charts),
        "GROWTH": _growth(story),
        "COMPARISON": comparison_section(comparison),
        "TIMINGS": _timings(story.timings()),
        "EVENTS": _events(story),
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
        "task pairs in conflict": ABSENT if share is None else f"{share:.0%}",
        "a step": f"{milliseconds:.2f} ms" if milliseconds else ABSENT,
        "checkpoints": str(len(story.named("checkpoint_saved"))),
    }
    if story.growth.parameters and story.growth.present:
        figures["parameters at the end"] = f"{story.growth.parameters[-1][1]:,}"
    return "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>"
        for label, value in figures.items()
    )


def _growth(story: Story) -> str:
    """Return what became of the seeds and why; nothing where the model could not grow."""
    if not story.growth.present:
        return ""
    section = (
        '<section class="growth"><h2>Life of the seeds</h2><p class="hint">Every slot on the way '
        "through training. The height of a blending seed is its share in the model; point at a "
        f"bar for the reason.</p>{life_of_seeds(story.growth)}</section>"
    )
    if story.growth.decisions:
        section += (
            '<section><h2>Why</h2><p class="hint">Decisions of the policy, newest first.</p>'
            f"{why(story.growth)}</section>"
        )
    return section


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
    return table(("phase", "", "a step", "share"), rows, "timings")


def _events(story: Story) -> str:
    rows = []
    for event in story.events:
        routine = _is_routine(event, growing=story.growth.present)
        moment = datetime.fromtimestamp(event.time, UTC).strftime("%H:%M:%S")
        badge = f'<span class="level {event.level}">{escape(event.name)}</span>'
        rows.append((moment, f"{event.step:,}", badge, escape(event.message), routine))
    return table(
        ("time", "step", "event", "what happened"),
        [row[:4] for row in rows],
        "events",
        ["routine" if row[4] else "" for row in rows],
    )


def _is_routine(event: Event, *, growing: bool) -> bool:
    # Where a model grows, the page has a list of the policy's decisions.
    routine = event.name in _ROUTINE or (growing and event.name == "policy_decided")
    return routine and event.level is Level.INFO


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
            *(number(state.losses.get(task)) for task in tasks),
            *(number(state.validation.get(metric)) for metric in metrics),
            ABSENT if state.conflict_share is None else f"{state.conflict_share:.0%}",
            number(state.learning_rate),
        ]
        for state in epochs
    ]
    return table([escape(cell) for cell in head], rows, "epochs")


def _asset(name: str) -> str:
    return files("esper.nissa.report").joinpath("assets", name).read_text(encoding="utf-8")
