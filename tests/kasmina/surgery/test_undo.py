import gc
import weakref

import pytest
import torch

from esper.kasmina.surgery import OptimizerSurgeon
from esper.kasmina.surgery.undo import Journal
from esper.leyline import GrowthError
from kasmina.surgery.builders import all_facts, parameter, step


def test_operations_are_taken_back_in_reverse_order_only() -> None:
    journal, done = Journal(), []
    first = journal.enter("adding a", lambda: done.append("a"))
    second = journal.enter("adding b", lambda: done.append("b"))
    assert journal.operations == ["adding a", "adding b"]
    with pytest.raises(GrowthError, match="adding a cannot be undone before adding b"):
        first.undo()
    assert done == []
    second.undo()
    first.undo()
    assert done == ["b", "a"]
    assert journal.operations == []


def test_an_operation_is_taken_back_once() -> None:
    journal = Journal()
    undo = journal.enter("adding a", lambda: None)
    undo.undo()
    with pytest.raises(GrowthError, match="adding a cannot be undone: it was undone or committed"):
        undo.undo()


def test_one_that_cannot_be_taken_back_now_can_be_later() -> None:
    journal, hurdles = Journal(), [GrowthError("not now")]

    def back() -> None:
        if hurdles:
            raise hurdles.pop()

    undo = journal.enter("adding a", back)
    with pytest.raises(GrowthError, match="not now"):
        undo.undo()
    assert journal.operations == ["adding a"]
    undo.undo()
    assert journal.operations == []


def test_out_of_order_nothing_of_the_optimizer_is_touched() -> None:
    optimizer = torch.optim.Adam([first := parameter(2)], 0.1)
    step(optimizer, 0)
    surgeon = OptimizerSurgeon(optimizer)
    added = surgeon.add_group("seed", [parameter(3)])
    surgeon.replace_parameters([(first, parameter(4))])
    before = all_facts(optimizer)
    with pytest.raises(GrowthError, match="before replacing parameters, which came later"):
        added.undo()
    assert all_facts(optimizer) == before


def test_committing_lets_go_of_old_moments() -> None:
    optimizer = torch.optim.Adam([first := parameter(2)], 0.1)
    step(optimizer, 0)
    surgeon = OptimizerSurgeon(optimizer)
    moment = weakref.ref(optimizer.state[first]["exp_avg"])
    undo = surgeon.replace_parameters([(first, parameter(4))])
    gc.collect()
    assert moment() is not None
    surgeon.commit()
    with pytest.raises(GrowthError, match="committed"):
        undo.undo()
    del undo
    gc.collect()
    assert moment() is None
