"""The newest value of every metric, by name, for whoever asks."""

from esper.tolaria.assembly import Assembly


def collect_metrics(parts: Assembly) -> dict[str, float]:
    """Return what has been measured; a metric that has not is absent."""
    metrics = {
        "tolaria.step.total": float(parts.run.update.progress.step),
        "tolaria.step.skipped_total": float(parts.log.skipped_updates),
        "tolaria.step.learning_rate": parts.run.update.learning_rate,
        "tolaria.rollback.total": float(parts.log.rollbacks),
        "tolaria.rollback.skipped_batches_total": float(parts.log.skipped_batches),
    }
    metrics.update(parts.run.keeper.metrics())
    metrics.update(parts.rollback.metrics())
    metrics.update(parts.boundary.metrics())
    metrics.update(_from_meter(parts))
    return metrics


def _from_meter(parts: Assembly) -> dict[str, float]:
    meter = parts.run.recorder.meter
    named = {
        "tolaria.step.gradient_norm": meter.mean("gradient_norm"),
        "tolaria.grad_agg.conflict_ratio": meter.mean("conflict_rate"),
        "tolaria.grad_agg.conflict_share": meter.mean("conflict_share"),
    }
    named.update({f"tolaria.step.loss.{t}": loss for t, loss in meter.means("loss").items()})
    last = parts.run.epochs.last
    if last is not None:
        named.update({f"tolaria.validation.{k}": v for k, v in last.validation.items()})
    return {name: value for name, value in named.items() if value is not None}
