"""Structural changes in any order: taken back and made again, model and optimizer agree."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.kasmina.structure import Fold, Plant, Uproot
from esper.leyline import Planting
from support.growth import Loop, batch

SLOTS = ("trunk.6", "head")
ACTIONS = st.lists(st.tuples(st.sampled_from(SLOTS), st.booleans(), st.integers(0, 3)), max_size=8)


def _shapes(loop: Loop) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in loop.model.state_dict().items()}


def _assert_whole(loop: Loop) -> None:
    groups = loop.optimizer.param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in loop.model.parameters())
    assert {id(p) for p in loop.optimizer.state} <= set(held)
    assert bool(torch.isfinite(loop.model(batch()[0])).all())


@settings(max_examples=25, deadline=None)
@given(ACTIONS, st.lists(st.integers(0, 8), max_size=6))
def test_every_architecture_on_the_way_can_be_rebuilt_from_every_other(
    actions: list[tuple[str, bool, int]], visits: list[int]
) -> None:
    loop = Loop(SLOTS)
    architecture = loop.kasmina._architecture
    described, shapes = [copy.deepcopy(architecture.describe())], [_shapes(loop)]
    for name, folds, steps in actions:
        if not architecture.slots[name].planted:
            change: Plant | Uproot | Fold = Plant(name, "mlp", 1, Planting(), 7)
        else:
            change = Fold(name, 0.5, reopened=True) if folds else Uproot(name)
        architecture.make(change)
        loop.kasmina._shadow.refresh()
        loop.step(steps)
        _assert_whole(loop)
        described.append(copy.deepcopy(architecture.describe()))
        shapes.append(_shapes(loop))
    for visit in visits:
        index = visit % len(described)
        versions = architecture.version
        loop.kasmina.rebuild(described[index])
        assert architecture.version >= versions
        assert _shapes(loop) == shapes[index]
        assert architecture.is_at(described[index])
        loop.step(1)
        _assert_whole(loop)
    fresh = Loop(SLOTS)
    fresh.kasmina.rebuild(described[-1])
    assert _shapes(fresh) == shapes[-1]
    assert fresh.kasmina.version == described[-1]["version"]
