import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from esper.kasmina import attach, detach
from esper.kasmina.slot import Passage, slots_of
from esper.leyline import GrowthError
from support.growth import Images, batch, facts

SAMPLE = batch()[0]


def test_the_model_is_as_it_was_but_for_the_slot() -> None:
    model, twin = Images(), Images()
    twin.load_state_dict(model.state_dict())
    keys, kind = list(model.state_dict()), type(model.head)
    slot = attach(model, "head", SAMPLE)
    assert list(model.state_dict()) == keys
    assert isinstance(model.head, nn.Linear)
    assert repr(type(model.head)) == repr(kind)
    assert model.head.weight is dict(model.named_parameters())["head.weight"]
    assert slot.flow.shape == (32, 3)
    for training in (True, False):
        model.train(training)
        twin.train(training)
        torch.manual_seed(3)
        expected = twin(SAMPLE)
        torch.manual_seed(3)
        assert torch.equal(model(SAMPLE), expected)
    assert all(map(torch.equal, facts(model).values(), facts(twin).values()))


def test_looking_leaves_no_trace() -> None:
    model = Images()
    before, stream = facts(model), torch.get_rng_state()
    attach(model, "trunk.0", SAMPLE)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(before[name], tensor) for name, tensor in facts(model).items())
    assert model.training


def test_detaching_gives_the_class_back() -> None:
    model = Images()
    attach(model, "head", SAMPLE)
    detach(model, "head")
    assert type(model.head) is nn.Linear
    assert not slots_of(model)
    with pytest.raises(GrowthError, match="there is no slot at 'head'"):
        detach(model, "head")


def test_a_sequential_means_its_last_child() -> None:
    model = Images()
    attach(model, "trunk", SAMPLE)
    assert type(model.trunk) is nn.Sequential
    assert len(model.trunk) == 7
    assert slots_of(model.trunk[6]).keys() == {"trunk"}


def test_a_copy_has_a_slot_of_its_own() -> None:
    model = Images()
    attach(model, "head", SAMPLE)
    twin = copy.deepcopy(model)
    ours, theirs = slots_of(model)["head"], slots_of(twin)["head"]
    assert ours is not theirs
    theirs.watching = True
    theirs.go(Passage.HOST)
    twin(SAMPLE)
    assert theirs.seen is not None
    assert ours.seen is None
    assert type(twin.head) is type(model.head)


def test_a_pickled_model_comes_back_with_its_slot() -> None:
    model = Images().eval()
    attach(model, "head", SAMPLE)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(SAMPLE), model(SAMPLE))
    assert slots_of(again).keys() == {"head"}
    detach(again, "head")
    assert type(again.head) is nn.Linear


def test_a_model_compiled_before_sees_what_the_slot_does() -> None:
    model = Images().eval()
    compiled = torch.compile(model, backend="eager")
    before = compiled(SAMPLE)
    slot = attach(model, "head", SAMPLE)
    assert torch.equal(compiled(SAMPLE), before)
    slot.plant(nn.Linear(3, 3), _Sum())
    slot.alpha.fill_(1.0)
    slot.go(Passage.BLENDED)
    assert not torch.equal(compiled(SAMPLE), before)
    assert torch.equal(compiled(SAMPLE), model(SAMPLE))
    torch.compiler.reset()


class _Sum(nn.Module):
    def forward(self, output: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
        return output + alpha * seed


def test_a_parametrised_layer_keeps_its_parametrisation() -> None:
    model = Images()
    parametrizations.weight_norm(model.head)
    before = model.eval()(SAMPLE)
    attach(model, "head", SAMPLE)
    assert torch.equal(model(SAMPLE), before)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.alias = self.shared
        self.twice = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.list = nn.ModuleList([nn.Linear(4, 4)])
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.only_training = nn.Identity()
        self.own = Own(nn.Linear(4, 4), nn.ReLU())
        self.replaced = nn.Linear(4, 4)
        self.replaced.forward = self.replaced.forward  # type: ignore[method-assign]
        self.index = Rounds()
        self.scripted = torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4), check_trace=False)
        self.parallel = nn.DataParallel(nn.Linear(4, 4))
        self.empty = nn.Sequential()
        self.dataless = Mean()

    def forward(self, x: Tensor) -> Tensor:
        x = self.list[0](self.twice(self.twice(self.shared(x))))
        x = self.own(self.replaced(self.scripted(self.parallel(x))))
        x = self.lstm(x[:, None])[0][:, 0] + self.index(x)
        self.dataless(x)
        return self.only_training(x) if self.training else x


class Own(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


class Rounds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round().long()


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "it is the whole model"),
        ("shared", "the same module is used as 'alias'"),
        ("twice", "calls it 2 times in one forward pass"),
        ("unused", "does not call it"),
        ("list", "a ModuleList is never called"),
        ("lstm", "returns a tuple; a seed needs one tensor"),
        ("only_training", "in evaluation mode the model does not call it"),
        ("own", "a Sequential of its own kind"),
        ("replaced", "its forward was replaced on the object"),
        ("index", "returns torch.int64"),
        ("scripted", "compiled by TorchScript"),
        ("parallel.module", "'parallel' is a DataParallel"),
        ("empty", "is an empty Sequential"),
        ("dataless", r"returns shape \(\); a seed needs a batch"),
        ("twise", "did you mean 'twice'"),
        ("a>b>c", "names 3 modules"),
        ("twice>unused", "does not|only be told inside|calls it"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_what_cannot_have_a_slot_is_refused_with_the_reason(name: str, reason: str) -> None:
    model = Odd()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(GrowthError, match=reason):
        attach(model, name, torch.randn(3, 4))
    assert [type(module) for module in model.modules()] == kinds


def test_a_quantised_layer_is_refused() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer: Any = nn.Linear(4, 4)
            self.layer.__class__ = type(
                "Linear", (nn.Linear,), {"__module__": "torch.ao.nn.quantized.modules.linear"}
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    with pytest.raises(GrowthError, match="which is quantised"):
        attach(Quantised(), "layer", torch.randn(2, 4))


def test_one_slot_at_a_place() -> None:
    model = Images()
    attach(model, "head", SAMPLE)
    with pytest.raises(GrowthError, match="has a slot already"):
        attach(model, "head", SAMPLE)


def test_a_fused_path_that_goes_round_a_layer_is_noticed() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(GrowthError, match="does not call it"):
        attach(nn.Sequential(encoder), "0.linear1", torch.randn(2, 3, 8))


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("0>2", "2>4", "2"),
        ("2>4", "0>2", "2"),
        ("0>2", "0", "0"),
        ("0", "0>2", "0"),
        ("0>2", "1", "1"),
        ("1", "0>2", "1"),
        ("0>4", "2>6", "2"),
        ("2>6", "0>4", "2"),
        ("0>4", "1>2", "1"),
    ],
)
def test_a_pair_shares_no_layer_with_another_slot(first: str, second: str, shared: str) -> None:
    layers = [nn.Linear(4, 4) if index % 2 == 0 else nn.ReLU() for index in range(7)]
    model, sample = nn.Sequential(*layers), torch.randn(3, 4)
    attach(model, first, sample)
    kinds = [type(module) for module in model]
    reason = f"slot '{second}' and slot '{first}' share '{shared}'"
    with pytest.raises(GrowthError, match=reason):
        attach(model, second, sample)
    assert [type(module) for module in model] == kinds
    assert slots_of(model).keys() == {first}


def test_slots_beside_a_pair_and_around_it_are_no_trouble() -> None:
    body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model, sample = nn.Sequential(Wrapped(body), nn.ReLU()), torch.randn(3, 4)
    before = model(sample)
    for name in ("0.body.0>0.body.2", "0.body.3", "0.body.4", "0", "1"):
        attach(model, name, sample)
    assert len(slots_of(model)) == 5
    assert torch.equal(model(sample), before)


class Wrapped(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)
