"""The sub-commands of ``esper checkpoint``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from esper.cli.errors import guarded
from esper.cli.options import DebugOption, RunsOption

checkpoint_app = typer.Typer(
    no_args_is_help=True,
    help="Look at the checkpoints of a run, check them, take weights out and in.",
    epilog="Damaged checkpoints are never loaded: a resume takes the newest that is whole.",
)

RunArgument = Annotated[str, typer.Argument(help="Path of a run, or its name.")]


@checkpoint_app.command("ls", epilog="[bold]Example[/]: esper checkpoint ls RUN --history")
def ls(
    run: RunArgument,
    history: Annotated[
        bool, typer.Option("--history", help="What became of all there ever were.")
    ] = False,
    runs: RunsOption = None,
    debug: DebugOption = False,
) -> None:
    """List the checkpoints of a run, newest first."""
    from esper.cli.checkpoint import list_checkpoints

    sys.exit(guarded(lambda: list_checkpoints(run, runs, history=history), debug=debug))


@checkpoint_app.command("verify", epilog="[bold]Example[/]: esper checkpoint verify RUN")
def verify(run: RunArgument, runs: RunsOption = None, debug: DebugOption = False) -> None:
    """Read every checkpoint and compare it with its digests; changes nothing.

    Ends with an error when one is damaged.
    """
    from esper.cli.checkpoint import verify_checkpoints

    sys.exit(guarded(lambda: verify_checkpoints(run, runs), debug=debug))


@checkpoint_app.command(
    "export", epilog="[bold]Example[/]: esper checkpoint export RUN --safetensors weights.st"
)
def export(
    run: RunArgument,
    safetensors: Annotated[Path, typer.Option(help="File to write.", metavar="FILE")],
    step: Annotated[int | None, typer.Option(help="Of which step; the newest by default.")] = None,
    runs: RunsOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the model's weights as a plain safetensors file, which any tool opens."""
    from esper.cli.checkpoint import export_weights

    sys.exit(guarded(lambda: export_weights(run, runs, safetensors, step), debug=debug))


@checkpoint_app.command(
    "import", epilog="[bold]Example[/]: esper checkpoint import RUN --torch weights.pt"
)
def import_(
    run: RunArgument,
    torch: Annotated[Path, typer.Option(help="What torch.save wrote.", metavar="FILE")],
    runs: RunsOption = None,
    debug: DebugOption = False,
) -> None:
    """Put the weights of a torch file into a run, which then continues from them.

    Moments, schedule and all else stay those of the newest checkpoint. No code in the file is run.
    """
    from esper.cli.checkpoint import import_weights

    sys.exit(guarded(lambda: import_weights(run, runs, torch), debug=debug))


@checkpoint_app.command("pin", epilog="[bold]Example[/]: esper checkpoint pin RUN 1200")
def pin(
    run: RunArgument,
    step: Annotated[int, typer.Argument(help="Its step.")],
    release: Annotated[bool, typer.Option("--release", help="Let it go again.")] = False,
    runs: RunsOption = None,
    debug: DebugOption = False,
) -> None:
    """Keep a checkpoint of a run that has ended, whatever the run writes when it is resumed."""
    from esper.cli.checkpoint import pin_checkpoint

    sys.exit(guarded(lambda: pin_checkpoint(run, runs, step, pinned=not release), debug=debug))
