"""What is told about an operation on a seed."""

from esper.kasmina.garden import Garden
from esper.leyline import FieldReport, GateResult, SeedCommand, Stage

_TAG = "seed"
_ENGINE = "engine"


def refused(
    garden: Garden,
    command: SeedCommand,
    reason: str,
    results: list[GateResult] | None = None,
    blueprint: str = "",
) -> FieldReport:
    """Return the report of a command that is not carried out."""
    life = garden.lives.get(command.seed)
    stage = None if life is None else life.stage
    return FieldReport(
        _TAG,
        applied=False,
        detail=f"{command.operation} seed {command.seed!r} refused: {reason}",
        id=command.id,
        seed=command.seed,
        operation=command.operation.value,
        blueprint=blueprint or command.blueprint,
        before=stage,
        after=stage,
        version=garden.architecture.version,
        gates=results or [],
    )


def done(
    garden: Garden,
    name: str,
    before: Stage,
    results: list[GateResult],
    blueprint: str,
    command: SeedCommand | None = None,
) -> FieldReport:
    """Return the report of what a command did, or of what followed by itself.

    :param before: the stage before.
    """
    after = garden.lives[name].stage
    told = "; ".join(result.reason for result in results)
    return FieldReport(
        _TAG if command else _ENGINE,
        applied=True,
        detail=f"seed {name!r} ({blueprint}): {before} -> {after}" + (f"; {told}" if told else ""),
        id=command.id if command else "",
        seed=name,
        operation=command.operation.value if command else "",
        blueprint=blueprint,
        before=before,
        after=after,
        version=garden.architecture.version,
        gates=results,
    )
