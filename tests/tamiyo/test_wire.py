"""The messages between a run and a policy server."""

import json
import math
from typing import Any

import msgspec
import pytest

from esper.leyline import (
    Gain,
    NoChange,
    Offer,
    ScaleLearningRate,
    SeedCommand,
    SeedOperation,
    Stage,
)
from esper.tamiyo.wire import PolicyRequest, Rejected, read_reply, sendable
from tamiyo.making import GOOD, dormant, seed, state

REQUEST = PolicyRequest(1, "id", "run", 188, 3, 1000.0, state(0, {}, version=3))
GOOD_REPLY: dict[str, Any] = {
    "schema": 1,
    "request_id": "id",
    "architecture_version": 3,
    "command": {
        "type": "seed",
        "seed": "a",
        "operation": "germinate",
        "blueprint": "conv",
        "planting": {"arguments": {"rank": 2}},
        "explanation": {"rule": "r", "reason": "s", "values": {"anything": 1.0}},
    },
}


def changed(**more: Any) -> dict[str, Any]:
    return GOOD_REPLY | {"command": GOOD_REPLY["command"] | more}


def test_a_reply_in_order_is_read() -> None:
    command = read_reply(json.dumps(GOOD_REPLY).encode(), REQUEST)
    assert isinstance(command, SeedCommand)
    assert command.operation is SeedOperation.GERMINATE
    assert command.planting.arguments == {"rank": 2}
    reply = GOOD_REPLY | {"command": {"type": "scale_learning_rate", "factor": 0.5}}
    assert read_reply(json.dumps(reply).encode(), REQUEST) == ScaleLearningRate(0.5)
    reply = GOOD_REPLY | {"command": {"type": "no_change"}}
    assert read_reply(json.dumps(reply).encode(), REQUEST) == NoChange()


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (GOOD_REPLY | {"schema": 2}, "schema"),
        (GOOD_REPLY | {"request_id": "other"}, "stale"),
        (GOOD_REPLY | {"architecture_version": 2}, "stale"),
        (changed(version=2), "stale"),
        (GOOD_REPLY | {"more": 1}, "malformed"),
        (changed(more=1), "malformed"),
        (changed(planting={"more": 1}), "malformed"),
        (changed(explanation={"rule": "r", "reason": "s", "more": 1}), "malformed"),
        (changed(operation="explode"), "malformed"),
        (changed(type="field_report"), "malformed"),
        (changed(seed=5), "malformed"),
        ({"schema": 1}, "malformed"),
        ([], "malformed"),
        (None, "malformed"),
    ],
)
def test_a_reply_that_is_not_in_order_is_rejected(reply: Any, reason: str) -> None:
    with pytest.raises(Rejected) as raised:
        read_reply(json.dumps(reply).encode(), REQUEST)
    assert raised.value.reason == reason


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"schema": NaN}'])
def test_what_is_no_json_is_malformed(body: bytes) -> None:
    with pytest.raises(Rejected) as raised:
        read_reply(body, REQUEST)
    assert raised.value.reason == "malformed"


def test_values_that_json_has_no_word_for_are_left_out() -> None:
    seeds = {
        "a": seed(Stage.TRAINING, Gain(0.1, -math.inf, math.inf, 1), residual=math.nan),
        "b": seed(Stage.TRAINING, GOOD),
        "c": dormant(odd=Offer(10, math.inf), even=Offer(10, 1.0)),
    }
    metrics = {"a": math.inf, "b": 1.0}
    sent = sendable(state(0, seeds, metrics=metrics, gradient_norm=math.nan))
    arrived = msgspec.json.decode(msgspec.json.encode(sent), type=type(sent))
    assert arrived == sent
    assert sent.growth is not None
    found = sent.growth.seeds
    assert (found["a"].gain, found["a"].residual, found["b"].gain) == (None, None, GOOD)
    assert list(found["c"].offers) == ["even"]
    assert sent.metrics == {"b": 1.0}
    assert sent.gradient_norm is None


def test_a_finite_state_is_sent_as_it_is() -> None:
    shown = state(0, {"a": seed(Stage.TRAINING, GOOD), "b": dormant()})
    assert sendable(shown) == shown


def test_a_state_without_what_has_to_be_there_is_not_sent() -> None:
    with pytest.raises(Rejected) as raised:
        sendable(state(0, {}, time=math.nan))
    assert raised.value.reason == "not_asked"
