"""From a module of torch.nn to the call that builds one like it."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.kasmina.export.layout import Group, Text, literal, prefixed, suffixed

# Of no consequence once weights are loaded, or old names of other arguments.
_LEFT_OUT = {"self", "device", "dtype", "args", "kwargs", "init", "_weight", "_freeze"}
_LEFT_OUT |= {"min_value", "max_value"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_RNN = {
    "input_size": inspect.Parameter.empty,
    "hidden_size": inspect.Parameter.empty,
    "num_layers": 1,
    "nonlinearity": "tanh",
    "bias": True,
    "batch_first": False,
    "dropout": 0.0,
    "bidirectional": False,
    "proj_size": 0,
}
_ACTIVATIONS = {nn.functional.relu: "relu", nn.functional.gelu: "gelu"}
# A whole tuple of one number is written as this number where these are meant.
_SIZES = {"kernel_size", "stride", "padding", "dilation", "output_padding"}
_Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class Construction:
    """The call that builds a module.

    :param name: of the class in torch.nn.
    :param positional: arguments that have no default, in order.
    :param keywords: arguments that differ from their default.
    :param cast: type of all floating-point tensors, where it is not torch's default.
    """

    name: str
    positional: dict[str, Any]
    keywords: dict[str, Any]
    cast: torch.dtype | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name."""
        return {**self.positional, **self.keywords}

    def text(self) -> Text:
        """Return the call as Python code."""
        items = [_text(value) for value in self.positional.values()]
        items += [prefixed(f"{name}=", _text(value)) for name, value in self.keywords.items()]
        call = Group(f"nn.{self.name}(", items)
        return call if self.cast is None else suffixed(call, f".to({self.cast})")

    def facts(self) -> dict[str, Any]:
        """Return the arguments, of JSON types."""
        facts = {name: _fact(value) for name, value in self.arguments.items()}
        return facts if self.cast is None else {**facts, "dtype": str(self.cast)}


def construction_of(module: nn.Module) -> Construction | None:
    """Return how a module can be built; None where it is not one of torch.nn, or was changed since.

    The call is tried: what it builds has to be like the module in everything but its weights.
    """
    cls = type(module)
    if getattr(nn, cls.__name__, None) is not cls or not is_as_built(module):
        return None
    try:
        positional, keywords = _arguments(module)
        built = _build(cls, positional, keywords)
        if not _alike(module, built):
            return None
        cast = _cast(module, built)
    # Whatever the constructor says: a module that it does not build is written otherwise.
    except Exception:  # noqa: BLE001
        return None
    return Construction(cls.__name__, positional, keywords, cast)


def is_as_built(module: nn.Module) -> bool:
    """Whether neither hooks nor a ``forward`` of its own change what a module's class does."""
    return "forward" not in vars(module) and not any(getattr(module, key) for key in _HOOKS)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the public attributes of a module that are plain values."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _arguments(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    readers = _readers(type(module))
    positional, keywords = {}, {}
    for name, default in _parameters(type(module)).items():
        value = readers[name](module) if name in readers else _read(module, name)
        if default is inspect.Parameter.empty:
            positional[name] = value
        elif not _equal(value, default):
            keywords[name] = value
    return positional, keywords


def _parameters(cls: type[nn.Module]) -> dict[str, Any]:
    if issubclass(cls, nn.RNNBase):
        missing = {nn.LSTM: {"nonlinearity"}, nn.GRU: {"nonlinearity", "proj_size"}}
        left_out = missing.get(cls, {"proj_size"})
        return {name: default for name, default in _RNN.items() if name not in left_out}
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _LEFT_OUT}


def _read(module: nn.Module, name: str) -> Any:  # noqa: ANN401 - any argument
    value = getattr(module, name)
    if isinstance(value, torch.Size):
        value = tuple(value)
    if name == "bias" and not isinstance(value, bool):
        return value is not None
    if isinstance(value, tuple) and _stands_for_one(name, value):
        return value[0]
    if not (_is_plain(value) or isinstance(value, tuple | list)):
        raise TypeError(f"{name} is a {type(value).__name__}")
    return value


def _stands_for_one(name: str, value: tuple[Any, ...]) -> bool:
    if name == "normalized_shape":
        return len(value) == 1
    return name in _SIZES and len(set(value)) == 1


def _readers(cls: type[nn.Module]) -> dict[str, _Reader]:
    """Return how arguments are read off a module that keeps them under other names."""
    if cls is nn.MultiheadAttention:
        return {
            "bias": lambda m: m.in_proj_bias is not None,
            "add_bias_kv": lambda m: m.bias_k is not None,
            "kdim": lambda m: None if m.kdim == m.embed_dim else m.kdim,
            "vdim": lambda m: None if m.vdim == m.embed_dim else m.vdim,
        }
    if cls in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        return {
            "d_model": lambda m: m.self_attn.embed_dim,
            "nhead": lambda m: m.self_attn.num_heads,
            "dim_feedforward": lambda m: m.linear1.out_features,
            "dropout": lambda m: m.dropout.p,
            "activation": lambda m: _ACTIVATIONS[m.activation],
            "layer_norm_eps": lambda m: m.norm1.eps,
            "batch_first": lambda m: m.self_attn.batch_first,
            "bias": lambda m: m.linear1.bias is not None,
        }
    if cls in (nn.TransformerEncoder, nn.TransformerDecoder):
        layer = "encoder_layer" if cls is nn.TransformerEncoder else "decoder_layer"
        return {layer: lambda m: _known(m.layers[0]), "norm": lambda m: m.norm and _known(m.norm)}
    return {}


def _known(module: nn.Module) -> Construction:
    found = construction_of(module)
    if found is None:
        raise TypeError(f"{type(module).__name__} cannot be built by a call")
    return found


def _build(cls: type[nn.Module], positional: dict[str, Any], keywords: dict[str, Any]) -> nn.Module:
    def live(value: Any) -> Any:  # noqa: ANN401
        if not isinstance(value, Construction):
            return value
        return _build(getattr(nn, value.name), value.positional, value.keywords)

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(
            *map(live, positional.values()), **{key: live(value) for key, value in keywords.items()}
        )


def _alike(module: nn.Module, built: nn.Module) -> bool:
    pairs = (dict(module.named_modules()), dict(built.named_modules()))
    if pairs[0].keys() != pairs[1].keys():
        return False
    return all(_one_alike(module, pairs[1][path]) for path, module in pairs[0].items())


def _one_alike(module: nn.Module, built: nn.Module) -> bool:
    if type(module) is not type(built) or not is_as_built(module):
        return False
    if not _equal(_state(module), _state(built)):
        return False
    return module.extra_repr() == built.extra_repr() and _shapes(module) == _shapes(built)


def _state(module: nn.Module) -> dict[str, Any]:
    functions = {n: v for n, v in vars(module).items() if inspect.isroutine(v)}
    return attributes_of(module) | functions


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tensor.shape for name, tensor in tensors}


def _cast(module: nn.Module, built: nn.Module) -> torch.dtype | None:
    """Return the type to cast to; None where none is needed.

    :raises TypeError: one cast does not do.
    """
    own, others = (*module.parameters(), *module.buffers()), (*built.parameters(), *built.buffers())
    kinds = set()
    for tensor, other in zip(own, others, strict=True):
        if other.is_floating_point():
            kinds.add(tensor.dtype)
        elif tensor.dtype != other.dtype:
            raise TypeError(f"a tensor is {tensor.dtype}")
    if len(kinds) > 1 or not all(kind.is_floating_point for kind in kinds):
        raise TypeError(f"the tensors are of types {kinds}")
    return next((kind for kind in kinds if kind != torch.float32), None)


def _equal(first: Any, second: Any) -> bool:  # noqa: ANN401
    return type(first) is type(second) and bool(first == second)


def _is_plain(value: Any) -> bool:  # noqa: ANN401
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)


def _text(value: Any) -> Text:  # noqa: ANN401
    return value.text() if isinstance(value, Construction) else literal(value)


def _fact(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Construction):
        return {"class": f"torch.nn.{value.name}", "arguments": value.facts()}
    return value
