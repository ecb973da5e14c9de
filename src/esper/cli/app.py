"""The ``esper`` command and what it can do."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from esper._version import __version__
from esper.cli.checkpoint_app import checkpoint_app
from esper.cli.errors import guarded
from esper.cli.options import ConfigOption, DebugOption, RunsOption, SetOption

app = typer.Typer(
    name="esper",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train PyTorch models that change while they train, and never lose a run.",
    epilog="Start with [bold]esper train[/]: it needs nothing but a minute.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at the configuration.")
app.add_typer(config_app, name="config")
app.add_typer(checkpoint_app, name="checkpoint")
incident_app = typer.Typer(
    no_args_is_help=True, help="See what went wrong in a run, and go through it again."
)
app.add_typer(incident_app, name="incident")

_TRAIN_EPILOG = """[bold]Examples[/]

esper train                                   the built-in job, with a fire drill

esper train my_module:build --epochs 20       your own model

esper train --set guard.margin=16             any setting; see esper config show

esper train --resume runs/20261124-101500-digits

esper train --baselines 5                     is growth worth it? 15 more trainings
"""


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show versions and exit.")] = False,
) -> None:
    """Train PyTorch models that change while they train, and never lose a run."""
    if version:
        import platform
        from importlib.metadata import version as version_of

        typer.echo(
            f"esper {__version__} (torch {version_of('torch')}, python {platform.python_version()})"
        )
        raise typer.Exit


@app.command(epilog=_TRAIN_EPILOG)
def train(
    target: Annotated[
        str | None,
        typer.Argument(help="module:function that returns a TrainingJob.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and weights.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    runs: RunsOption = None,
    assignments: SetOption = None,
    resume: Annotated[
        str | None, typer.Option(help="Continue a run, to the bit.", metavar="RUN")
    ] = None,
    drill: Annotated[
        bool | None,
        typer.Option("--drill/--no-drill", help="Inject one divergence, to watch it taken back."),
    ] = None,
    baselines: Annotated[
        int,
        typer.Option(min=0, help="Compare with models of fixed size over so many seeds."),
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    debug: DebugOption = False,
) -> None:
    """Train a model, guarded against divergence, and write a report.

    Without TARGET it trains the built-in job: two overlaid handwritten digits, read by one network
    with two heads. Ctrl-C finishes the step, saves and stops; --resume continues from there.
    """
    from esper.cli.train import TrainRequest, run_training

    flags = {
        "run.target": (target, "TARGET"),
        "train.epochs": (epochs, "--epochs"),
        "train.seed": (seed, "--seed"),
        "train.device": (device, "--device"),
        "train.threads": (threads, "--threads"),
        "run.name": (name, "--name"),
        "run.directory": (runs, "--runs"),
        "run.drill": (drill, "--drill" if drill else "--no-drill"),
    }
    request = TrainRequest(config, flags, assignments or [], resume, quiet, baselines)
    sys.exit(guarded(lambda: run_training(request), debug=debug))


@app.command(epilog="[bold]Example[/]: esper report runs/20261124-101500-digits")
def report(
    run: Annotated[str, typer.Argument(help="Path of a run, or its name.")],
    runs: RunsOption = None,
    debug: DebugOption = False,
) -> None:
    """Write report.html of a run anew, also while it is still running."""
    from esper.cli.report import rebuild_report

    sys.exit(guarded(lambda: rebuild_report(run, runs), debug=debug))


@app.command(name="runs", epilog="[bold]Example[/]: esper runs --runs experiments")
def list_all_runs(runs: RunsOption = None, debug: DebugOption = False) -> None:
    """List the runs with what became of them, newest first."""
    from esper.cli.runs import show_runs

    sys.exit(guarded(lambda: show_runs(runs), debug=debug))


_EMERGENCY_EPILOG = """[bold]Levels[/]

minor       multiply the learning rate by guard.rate_cut

major       roll back to a checkpoint on disk

severe      roll back to a snapshot in memory

critical    stand still before the next optimizer step, until cleared or lowered

[bold]Examples[/]

esper emergency RUN                            what is the matter at present

esper emergency RUN --level critical --reason "power is failing"

esper emergency RUN --clear                    it is over; training goes on
"""


@app.command(epilog=_EMERGENCY_EPILOG)
def emergency(
    run: Annotated[str, typer.Argument(help="Path of a run, or its name.")],
    level: Annotated[
        str | None, typer.Option(help="minor, major, severe or critical.", metavar="LEVEL")
    ] = None,
    reason: Annotated[str, typer.Option(help="One sentence for whoever reads of it.")] = "",
    clear: Annotated[bool, typer.Option("--clear", help="End the emergency.")] = False,
    runs: RunsOption = None,
    debug: DebugOption = False,
) -> None:
    """Tell a running job of an emergency, from another terminal, or end one.

    The job acts before its next optimizer step; this waits until it has said so. Without --level
    and --clear it shows the present level.
    """
    from esper.cli.emergency import EmergencyRequest, handle_emergency

    request = EmergencyRequest(run, level, reason, clear, runs)
    sys.exit(guarded(lambda: handle_emergency(request), debug=debug))


_PROFILE_EPILOG = """[bold]Examples[/]

esper profile RUN                              five steps, about as long as they take

esper profile RUN --steps 20 --timeout 300     steps that take long

The trace lies in RUN/profiles; open it in https://ui.perfetto.dev or in chrome://tracing.
"""


@app.command(epilog=_PROFILE_EPILOG)
def profile(
    run: Annotated[str, typer.Argument(help="Path of a run, or its name.")],
    steps: Annotated[int, typer.Option(help="Steps to record.")] = 5,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the trace.")] = 60.0,
    runs: RunsOption = None,
    debug: DebugOption = False,
) -> None:
    """Have a running job profile its next steps, from another terminal; print the trace's path.

    The job goes on training, with the same numbers. Several requests are carried out one after the
    other; Ctrl-C takes this one back.
    """
    from esper.cli.profile import ProfileRequest, profile_run

    request = ProfileRequest(run, steps, timeout, runs)
    sys.exit(guarded(lambda: profile_run(request), debug=debug))


@app.command(epilog="[bold]Example[/]: esper doctor --runs /data/runs")
def doctor(runs: RunsOption = None, debug: DebugOption = False) -> None:
    """Examine this machine: versions, devices, memory and disk; what will work and what won't."""
    from esper.cli.doctor import examine

    sys.exit(guarded(lambda: examine(runs), debug=debug))


@config_app.command("show", epilog="[bold]Example[/]: esper config show --set train.epochs=3")
def config_show(
    config: ConfigOption = None,
    assignments: SetOption = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print TOML, to start a file with.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show every setting, its value, and where the value came from.

    In rising order: defaults, esper.toml, .env, ESPER_... variables, flags.
    """
    from esper.cli.config import show_config

    sys.exit(guarded(lambda: show_config(config, assignments, as_toml=toml), debug=debug))


RunArgument = Annotated[str, typer.Argument(help="Path of a run, or its name.")]
IncidentArgument = Annotated[str, typer.Argument(help="Name of the incident, or its number.")]


_EXPORT_EPILOG = """[bold]Examples[/]

esper export runs/20261124-101500-digits       model.py and weights, torch.export, ONNX

esper export RUN --format safetensors --directory reader
"""


@app.command(epilog=_EXPORT_EPILOG)
def export(
    run: RunArgument,
    directory: Annotated[
        Path | None, typer.Option(help="To make; RUN/export by default.", show_default=False)
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="safetensors, torch or onnx; may be repeated."),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; the newest one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    runs: RunsOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the model of a run so that it can be used where Esper is not installed.

    Seeds that the model contains are folded into plain modules. Every form is loaded again and its
    outputs are compared with the model's. The job is built anew, from the working directory that
    the run was started in.
    """
    from esper.cli.export import export_run

    sys.exit(
        guarded(
            lambda: export_run(run, runs, directory, formats, step=step, overwrite=overwrite),
            debug=debug,
        )
    )


@incident_app.command(
    "ls", epilog="[bold]Example[/]: esper incident ls runs/20261124-101500-digits"
)
def incident_ls(run: RunArgument, runs: RunsOption = None, debug: DebugOption = False) -> None:
    """List the incidents of a run: what was done about each, and what came of it."""
    from esper.cli.incident import list_incidents

    sys.exit(guarded(lambda: list_incidents(run, runs), debug=debug))


@incident_app.command(
    "show", epilog="[bold]Example[/]: esper incident show runs/20261124-101500-digits 1"
)
def incident_show(
    run: RunArgument,
    incident: IncidentArgument,
    runs: RunsOption = None,
    debug: DebugOption = False,
) -> None:
    """Show the record of one incident: trigger, steps before it, remedy, outcome, what is kept."""
    from esper.cli.incident import show_incident

    sys.exit(guarded(lambda: show_incident(run, incident, runs), debug=debug))


_REPLAY_EPILOG = """[bold]Examples[/]

esper incident replay RUN 1                    name the first operation that goes wrong

esper incident replay RUN 1 --from healthy     tell whether the batch alone causes it
"""


@incident_app.command("replay", epilog=_REPLAY_EPILOG)
def incident_replay(
    run: RunArgument,
    incident: IncidentArgument,
    start: Annotated[
        str | None,
        typer.Option("--from", help="healthy: run the batch on the healthy state, too."),
    ] = None,
    runs: RunsOption = None,
    debug: DebugOption = False,
) -> None:
    """Take the steps that led to an incident again, to the bit, and watch every operation.

    Names the first module and the first operation whose output or gradient is not finite, or else
    breaks the trend, with the ranges of its inputs. The job is built anew, from the working
    directory that the run was started in.
    """
    from esper.cli.incident import replay_incident

    sys.exit(guarded(lambda: replay_incident(run, incident, start, runs), debug=debug))


def main() -> None:
    """Run the command line."""
    app()
