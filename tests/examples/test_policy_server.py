"""The reference server as a real process, killed and started again in the middle of a run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import msgspec
import pytest

from esper.core import BreakerState, CircuitBreaker
from esper.leyline import AdaptationCommand
from esper.tamiyo import PolicyReply, RemotePolicy, RulesPolicy
from tamiyo.simulated import GrowthProcess, Slot

SERVER = Path(__file__).parent.parent.parent / "examples" / "policy_server.py"
Start = Callable[..., tuple["subprocess.Popen[str]", str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a server; return its process and the URL that it printed."""
    running: list[subprocess.Popen[str]] = []

    def begin(port: int = 0, token: str = "") -> tuple["subprocess.Popen[str]", str]:
        process = subprocess.Popen(
            [sys.executable, str(SERVER), "--port", str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"ESPER_POLICY_TOKEN": token},
        )  # fmt: skip
        running.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:")
        return process, line.removeprefix("listening on ").strip()

    yield begin
    for process in running:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def decided(policy: RemotePolicy, process: GrowthProcess) -> AdaptationCommand:
    state = process.train()
    command = anyio.run(policy.decide, state)
    process.apply(command, state)
    return command


def is_local(command: AdaptationCommand) -> bool:
    assert command.explanation is not None
    return "decided locally" in command.explanation.reason


def slots() -> dict[str, Slot]:
    return {"good": Slot({"conv": 0.25}, 2.0), "bad": Slot({"conv": -0.2}, 1.5)}


@pytest.mark.fault
@pytest.mark.timeout(60)
def test_a_run_survives_the_death_of_its_policy_server(start: Start) -> None:
    server, url = start()
    breaker = CircuitBreaker("policy server", failures=1, cooldown_s=0.3, max_cooldown_s=0.3)
    policy = RemotePolicy(url, 5.0, run="run", breaker=breaker)
    process = GrowthProcess(slots())
    assert not any(is_local(decided(policy, process)) for _ in range(3))
    server.send_signal(signal.SIGKILL)
    server.wait()
    assert is_local(decided(policy, process))
    assert is_local(decided(policy, process))
    assert policy.counts == {"answered": 3, "unreachable": 1, "breaker_open": 1}
    start(port=int(url.rsplit(":", 1)[1].split("/")[0]))
    deadline = time.monotonic() + 20
    while policy.breaker is BreakerState.OPEN:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not is_local(decided(policy, process))
    assert policy.breaker is BreakerState.CLOSED
    while process.epoch + 1 < process.epochs:
        decided(policy, process)
    assert policy.counts["answered"] == process.epochs - 2
    done = [(what, name) for _, what, name, _ in process.applied]
    assert done.count(("advance", "good")) == 2
    assert ("cull", "bad") in done


@pytest.mark.timeout(60)
def test_it_decides_as_the_rules_do_and_keeps_runs_apart(start: Start) -> None:
    _, url = start()
    first, second = (RemotePolicy(url, 5.0, run=name) for name in ("first", "second"))
    local, process = RulesPolicy(), GrowthProcess(slots())
    for _ in range(6):
        state = process.train()
        command = local.decide(state)
        assert anyio.run(first.decide, state) == command
        process.apply(command, state)
    fresh = anyio.run(second.decide, process.state())
    assert fresh.explanation is not None
    assert "too little was seen" in fresh.explanation.reason


@pytest.mark.timeout(60)
def test_it_refuses_who_does_not_know_the_token(start: Start) -> None:
    _, url = start(token="right")
    state = GrowthProcess(slots()).train()
    for token, expected in (("right", "answered"), ("wrong", "status"), ("", "status")):
        policy = RemotePolicy(url, 5.0, token=token)
        anyio.run(policy.decide, state)
        assert policy.counts == {expected: 1}


@pytest.mark.timeout(60)
def test_it_answers_what_is_no_question_with_a_status(start: Start) -> None:
    import http.client

    _, url = start()
    address, _, path = url.removeprefix("http://").partition("/")

    def post(body: bytes, target: str = f"/{path}", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(address, timeout=10)
        connection.request("POST", target, body, headers)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    assert post(b"{}") == (400, b"{}")
    assert post(b'{"schema": 9}') == (400, b"{}")
    assert post(b"{}", "/other") == (404, b"{}")
    assert post(b"", **{"Content-Length": "9" * 13})[0] == 411
    assert post(b"", **{"Content-Length": "9" * 12})[0] == 413
    state = msgspec.to_builtins(GrowthProcess(slots()).train())
    question = {
        "schema": 1, "request_id": "id", "run": "r", "step": 1, "architecture_version": 0,
        "deadline_ms": 1.0, "state": state,
    }  # fmt: skip
    status, body = post(msgspec.json.encode(question))
    assert status == 200
    assert msgspec.json.decode(body, type=PolicyReply).request_id == "id"
    assert post(msgspec.json.encode(question | {"schema": 2}))[0] == 400
