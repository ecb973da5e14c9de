"""The tensors of a model: which are saved, and which are one and the same."""

import hashlib
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from esper.leyline import GrowthError

_CHUNK = 1 << 20


class Weights:
    """The parameters and buffers of a model under the keys of its state dict.

    :param model: whose tensors they are.
    :ivar saved: what the state dict holds, each tensor once, under the first of its names.
    :ivar tied: further names of a tensor that has several, each with the first one.
    :ivar unsaved: buffers that the state dict leaves out.
    :raises GrowthError: the state dict holds more than parameters and buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.saved: dict[str, Tensor] = {}
        self.tied: dict[str, str] = {}
        self.unsaved: dict[str, Tensor] = {}
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.persistent = dict(_persistent_buffers(model))
        first: dict[Hashable, str] = {}
        for name, tensor in {**self.parameters, **self.persistent}.items():
            known = first.setdefault(_identity(name, tensor), name)
            if known == name:
                self.saved[name] = tensor.detach()
            else:
                self.tied[name] = known
        for name, tensor in model.named_buffers(remove_duplicate=False):
            if name not in self.persistent:
                self.unsaved[name] = tensor.detach()
        for name in sorted(model.state_dict().keys() - self.saved.keys() - self.tied.keys()):
            raise GrowthError(
                f"the state dict of {type(model).__name__} holds {name}, which is no parameter and "
                "no buffer; only these can be exported"
            )

    @property
    def total(self) -> int:
        """Number of the parameters' elements; a shared one counts once."""
        return sum(t.numel() for name, t in self.saved.items() if name in self.parameters)


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors as a safetensors file."""
    file.touch()
    mode = file.stat().st_mode
    save_file({name: _own(t) for name, t in tensors.items()}, file, metadata={"format": "pt"})
    # safetensors lets nobody but the owner read.
    file.chmod(mode)


def digest(file: Path) -> str:
    """Return the SHA-256 digest of a file, which ``sha256sum`` prints, too."""
    found = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield f"{path}.{key}" if path else key, buffer


def _identity(name: str, tensor: Tensor) -> Hashable:
    """Return what is equal for names of one and the same tensor, also where it is wrapped twice."""
    if not tensor.numel():
        return name
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*place, tensor.shape, tensor.stride(), tensor.dtype)


def _own(tensor: Tensor) -> Tensor:
    """Return a dense tensor that shares its memory with no other."""
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensor.detach().contiguous()
