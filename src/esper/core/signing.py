"""Signing commands: HMAC-SHA256 over all that a command says.

Whoever may send commands to a run may change its model. With a key on both sides, a command that
somebody else sends, or that was altered on its way, is refused.
"""

import hashlib
import hmac
import os

import msgspec

from esper.leyline import ConfigError, SeedCommand

KEY_VARIABLE = "ESPER_COMMAND_KEY"
_SHORTEST = 16


def command_key() -> bytes | None:
    """Return the key of the environment variable ``ESPER_COMMAND_KEY``, if it is set.

    :raises ConfigError: it is shorter than 16 bytes.
    """
    text = os.environ.get(KEY_VARIABLE)
    if not text:
        return None
    key = text.encode()
    if len(key) < _SHORTEST:
        raise ConfigError(f"{KEY_VARIABLE} has {len(key)} bytes; give at least {_SHORTEST}")
    return key


def sign(command: SeedCommand, key: bytes) -> SeedCommand:
    """Return the command with its signature."""
    return msgspec.structs.replace(command, signature=_signature(command, key))


def is_signed(command: SeedCommand, key: bytes) -> bool:
    """Whether the command is just as it was signed with this key."""
    return hmac.compare_digest(command.signature, _signature(command, key))


def _signature(command: SeedCommand, key: bytes) -> str:
    bare = msgspec.structs.replace(command, signature="")
    return hmac.new(key, msgspec.json.encode(bare, order="sorted"), hashlib.sha256).hexdigest()
