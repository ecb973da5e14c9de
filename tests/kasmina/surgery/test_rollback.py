"""Surgery and snapshots together: going back to a time before the model grew."""

from typing import Any

from torch import nn
from torch.optim import AdamW, lr_scheduler

from esper.kasmina.surgery import OptimizerSurgeon
from esper.tolaria.rollback import FastRollbackCache
from esper.tolaria.state import TrainState
from kasmina.surgery.builders import all_facts, parameter, step


def test_undone_and_restored_training_repeats_itself_to_the_bit() -> None:
    """Going back across a growth: undo its structure, then restore a snapshot of before."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = AdamW(model.parameters(), 0.1)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    surgeon = OptimizerSurgeon(optimizer, scheduler)
    state = TrainState(model, optimizer, {"schedule": scheduler})

    def train(steps: range) -> list[Any]:
        for number in steps:
            step(optimizer, number)
            scheduler.step()
        return all_facts(optimizer, scheduler)

    train(range(3))
    cache = FastRollbackCache(10)
    snapshot = cache.put(3, state)
    once = train(range(3, 6))
    assert snapshot is not None
    cache.restore(snapshot, state)
    old, wide = model[1].weight, parameter(2, 6)
    undos = [
        surgeon.add_group("seed", nn.Linear(4, 4).parameters(), warmup_steps=2),
        surgeon.replace_parameters([(old, wide)]),
    ]
    train(range(3, 5))
    undos.append(surgeon.merge_group("seed"))
    train(range(5, 8))
    for undo in reversed(undos):
        undo.undo()
    state.refresh()
    cache.restore(snapshot, state)
    again = train(range(3, 6))
    assert bits_only(again) == bits_only(once)


def bits_only(facts: Any) -> Any:
    """Return facts without identities: a restored state may hold new tensors."""
    if isinstance(facts, tuple) and len(facts) == 5:
        return (facts[0], *facts[2:])
    if isinstance(facts, list | tuple):
        return [bits_only(fact) for fact in facts]
    return facts
