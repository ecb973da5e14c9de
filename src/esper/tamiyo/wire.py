"""What goes over the wire between a run and a policy server, version 1."""

import math
from typing import Any

import msgspec

from esper.leyline import (
    AdaptationCommand,
    EsperError,
    SeedCommand,
    SystemState,
)

SCHEMA = 1


class PolicyRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question.

    :param schema: version of these messages.
    :param request_id: to be echoed.
    :param run: name of the run; a server keeps what it remembers apart by it.
    :param step: steps taken.
    :param architecture_version: to be echoed; -1 where nothing grows the model.
    :param deadline_ms: time for the answer; a later one is dropped.
    :param state: to decide about.
    """

    schema: int
    request_id: str
    run: str
    step: int
    architecture_version: int
    deadline_ms: float
    state: SystemState


class PolicyReply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Its answer.

    :param schema: version of these messages.
    :param request_id: of the question.
    :param architecture_version: of the question.
    :param command: what to do.
    """

    schema: int
    request_id: str
    architecture_version: int
    command: AdaptationCommand


class Rejected(EsperError):  # noqa: N818 - not an error of this program
    """A policy server did not answer as it has to.

    :ivar reason: one word, which such cases are counted by.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def sendable(state: SystemState) -> SystemState:
    """Return a state without the values that JSON has no word for: NaN and the infinities.

    A value that is not there was not measured. An interval without end takes its gain with it.

    :raises Rejected: a value that has to be there is not finite.
    """
    bare = _finite(msgspec.to_builtins(state))
    for seed in bare.get("growth", {}).get("seeds", {}).values():
        if len(seed.get("gain", {})) < 4:
            seed.pop("gain", None)
        offers = seed.get("offers", {})
        seed["offers"] = {name: offer for name, offer in offers.items() if len(offer) == 2}
    try:
        return msgspec.convert(bare, SystemState)
    except msgspec.ValidationError as error:
        raise Rejected("not_asked", f"the state cannot be sent: {error}") from error


def read_reply(body: bytes, request: PolicyRequest) -> AdaptationCommand:
    """Return the command of a reply.

    :raises Rejected: it is malformed, of another schema, or answers something else.
    """
    try:
        raw = msgspec.json.decode(body)
        reply = msgspec.convert(raw, PolicyReply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected("malformed", f"the reply is malformed: {error}") from error
    if reply.schema != SCHEMA:
        raise Rejected("schema", f"the reply is of schema {reply.schema}; {SCHEMA} is spoken here")
    unknown = sorted(_unknown(raw["command"], reply.command))
    if unknown:
        raise Rejected("malformed", f"the reply has unknown fields: {', '.join(unknown)}")
    if reply.request_id != request.request_id:
        raise Rejected("stale", "the reply answers another question")
    version = request.architecture_version
    command = reply.command
    meant = command.version if isinstance(command, SeedCommand) else -1
    if reply.architecture_version != version or meant not in (-1, version):
        raise Rejected("stale", f"the reply is not for architecture version {version}")
    return command


def _finite(value: Any) -> Any:  # noqa: ANN401 - JSON types
    if isinstance(value, dict):
        return {
            name: _finite(entry)
            for name, entry in value.items()
            if not (isinstance(entry, float) and not math.isfinite(entry))
        }
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return value


def _unknown(raw: Any, decoded: Any) -> set[str]:  # noqa: ANN401 - JSON types and structs
    """Return the fields of a reply that no struct has; they would be ignored otherwise."""
    if not isinstance(raw, dict) or not isinstance(decoded, msgspec.Struct):
        return set()
    known = {field.encode_name: field.name for field in msgspec.structs.fields(decoded)}
    found = set(raw) - set(known) - {decoded.__struct_config__.tag_field}
    for name in set(raw) & set(known):
        found |= _unknown(raw[name], getattr(decoded, known[name]))
    return {str(name) for name in found}
