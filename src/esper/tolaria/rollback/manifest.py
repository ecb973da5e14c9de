"""What a checkpoint says about itself, and whether that is true."""

from pathlib import Path

import msgspec
import xxhash

from esper.leyline import CheckpointError
from esper.tolaria.rollback.durable import DISK, FileSystem, synced_file

FORMAT = 1
NAME = "MANIFEST.json"


class UnknownFormatError(CheckpointError):
    """A checkpoint is whole, but of a layout that this version does not know."""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and xxh3-128 digest of one file.

    The digest of a tensor file is taken over its header and its tensors' digests.
    """

    size: int
    xxh3_128: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ``MANIFEST.json``.

    :param step: steps taken in the state.
    :param healthy: whether the divergence guard had no doubt about it.
    :param created: seconds since the Unix epoch.
    :param metrics: validation metrics of this state, by name; empty when none were measured.
    :param files: the other files of the checkpoint, by name.
    :param tensors: xxh3-128 digest of each tensor's bytes, by name.
    :param format: version of the layout.
    :param digest: xxh3-128 digest of the text of this manifest with an empty digest.
    """

    step: int
    healthy: bool
    created: float
    files: dict[str, FileEntry]
    tensors: dict[str, str]
    metrics: dict[str, float] = {}
    format: int = FORMAT
    digest: str = ""


class _Version(msgspec.Struct):
    format: int


def write_manifest(directory: Path, manifest: Manifest, disk: FileSystem = DISK) -> None:
    """Write the manifest, digest included; this is what completes a checkpoint."""
    digest = _digest(_text_of(manifest), "")
    with synced_file(directory / NAME, disk) as file:
        file.write(_text_of(msgspec.structs.replace(manifest, digest=digest)))


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest itself.

    :raises CheckpointError: it is missing or damaged.
    :raises UnknownFormatError: it is of a layout that is not known.
    """
    path = directory / NAME
    try:
        text = path.read_bytes()
        _require_format(path, text)
        manifest = msgspec.json.decode(text, type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if manifest.digest != _digest(text, manifest.digest):
        raise CheckpointError(f"{path} does not match its own digest")
    return manifest


def _require_format(path: Path, text: bytes) -> None:
    """Tell what another version wrote, whatever fields it has, from damage."""
    version = msgspec.json.decode(text, type=_Version).format
    if version == FORMAT:
        return
    sealed = msgspec.json.decode(text).get("digest")
    if isinstance(sealed, str) and sealed == _digest(text, sealed):
        raise UnknownFormatError(f"{path} has format {version}; this Esper reads {FORMAT}")


def _text_of(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def _digest(text: bytes, seal: str) -> str:
    # Over the bytes of the file, not the decoded values: two spellings can mean the same number.
    bare = text.replace(f'"digest": "{seal}"'.encode(), b'"digest": ""')
    return xxhash.xxh3_128_hexdigest(bare)
