"""A policy that asks a server: against real sockets, well-behaved and not."""

import asyncio
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from esper.core import BreakerState, CircuitBreaker
from esper.leyline import AdaptationCommand, ConfigError, NoChange, SeedCommand, Stage
from esper.tamiyo import NoPolicy, RemotePolicy, RulesPolicy
from tamiyo.making import GOOD, dormant, seed, state

Answer = Callable[[dict[str, Any]], bytes | None]
SHOWN = state(0, {"a": seed(Stage.TRAINING, GOOD)}, version=7)


class Server:
    """Takes questions on a thread; what it says is up to the test."""

    def __init__(self, answer: Answer, tls: ssl.SSLContext | None) -> None:
        self.heads: list[str] = []
        self.questions: list[dict[str, Any]] = []
        self.hung_up = threading.Event()
        self.port = 0
        self._answer, self._tls = answer, tls
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._take, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()
        pending = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
            question = json.loads(await reader.readexactly(length))
            self.heads.append(head)
            self.questions.append(question)
            answer = self._answer(question)
            if answer is None:
                await reader.read()
                self.hung_up.set()
            else:
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@contextmanager
def served(answer: Answer, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server = Server(answer, tls)
    try:
        yield server
    finally:
        server.stop()


def http(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


def reply(question: dict[str, Any], **more: Any) -> bytes:
    message = {
        "schema": 1,
        "request_id": question["request_id"],
        "architecture_version": question["architecture_version"],
        "command": {"type": "seed", "seed": "a", "operation": "hold"},
    }
    return json.dumps(message | more).encode()


def well(question: dict[str, Any]) -> bytes:
    return http(reply(question))


def ask(policy: RemotePolicy, shown: Any = SHOWN) -> AdaptationCommand:
    return anyio.run(policy.decide, shown)


def remote(server: Server, timeout_s: float = 5.0, **more: Any) -> RemotePolicy:
    return RemotePolicy(f"http://127.0.0.1:{server.port}/v1/decide", timeout_s, run="r", **more)


def reason(command: AdaptationCommand) -> str:
    assert command.explanation is not None
    return command.explanation.reason


def test_the_servers_command_is_taken_over() -> None:
    with served(well) as server:
        policy = remote(server)
        command = ask(policy)
    assert isinstance(command, SeedCommand)
    assert (command.operation, command.version) == ("hold", 7)
    assert reason(command)
    assert policy.counts == {"answered": 1}
    assert policy.metrics()["tamiyo.remote.latency_p95_ms"] > 0
    (question,) = server.questions
    assert {name: question[name] for name in ("schema", "run", "step", "deadline_ms")} == {
        "schema": 1, "run": "r", "step": 188, "deadline_ms": 5000.0,
    }  # fmt: skip
    assert question["state"]["growth"]["seeds"]["a"]["gain"]["mean"] == GOOD.mean
    assert server.heads[0].startswith("POST /v1/decide HTTP/1.1\r\n")


REJECTED: list[tuple[str, Answer]] = [
    ("stale", lambda q: http(reply(q, request_id="x"))),
    ("stale", lambda q: http(reply(q, architecture_version=6))),
    ("schema", lambda q: http(reply(q, schema=2))),
    ("malformed", lambda q: http(reply(q, extra=1))),
    ("malformed", lambda q: http(b"no json")),
    ("malformed", lambda q: b"SSH-2.0-server\r\n\r\n"),
    ("malformed", lambda q: b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{}"),
    ("malformed", lambda q: b"HTTP/1.1 200 OK\r\n\r\n{}"),
    ("malformed", lambda q: http(b"{}", more="Transfer-Encoding: chunked\r\n")),
    ("malformed", lambda q: b""),
    ("malformed", lambda q: b"HTTP/1.1 \xb2\xb2\xb2 OK\r\nContent-Length: 2\r\n\r\n{}"),
    ("malformed", lambda q: b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\n{}"),
    ("malformed", lambda q: b"HTTP/1.1 " + b"9" * 5000 + b" OK\r\n\r\n{}"),
    ("status", lambda q: http(b"{}", "500 Internal Server Error")),
    ("status", lambda q: http(b"", "302 Found", "Location: http://127.0.0.1/\r\n")),
    ("too_large", lambda q: http(b" " * 65537)),
    ("too_large", lambda q: b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n"),
    ("too_large", lambda q: b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000),
]


@pytest.mark.parametrize(("expected", "answer"), REJECTED)
def test_a_reply_that_is_not_in_order_is_counted_and_decided_locally(
    expected: str, answer: Answer
) -> None:
    with served(answer) as server:
        policy = remote(server)
        command = ask(policy)
    assert policy.counts == {expected: 1}
    assert isinstance(command, SeedCommand)
    assert command.operation == "advance", "what the rules decide"
    assert f"decided locally, {expected}: " in reason(command)


def test_a_server_that_is_silent_is_not_waited_for() -> None:
    with served(lambda q: None) as server:
        policy = remote(server, 0.2)
        began = time.monotonic()
        command = ask(policy)
        assert time.monotonic() - began < 2
        assert server.hung_up.wait(5), "the connection is closed"
    assert policy.counts == {"late": 1}
    assert "late" in reason(command)


def test_the_engines_deadline_cancels_the_question_and_counts_against_the_server() -> None:
    async def cut_short() -> bool:
        with anyio.move_on_after(0.2) as scope:
            await policy.decide(SHOWN)
        return scope.cancelled_caught

    with served(lambda q: None) as server:
        policy = remote(server, 60.0, breaker=CircuitBreaker("p", failures=1))
        assert anyio.run(cut_short)
        assert server.hung_up.wait(5)
    assert policy.counts == {"cancelled": 1}
    assert policy.breaker is BreakerState.OPEN


def test_a_server_that_fails_is_left_alone_and_tried_again_later() -> None:
    now, broken = [0.0], [True]

    def answer(question: dict[str, Any]) -> bytes:
        return http(b"", "503 Busy") if broken[0] else well(question)

    breaker = CircuitBreaker("p", failures=2, cooldown_s=30, clock=lambda: now[0])
    with served(answer) as server:
        policy = remote(server, breaker=breaker)
        for epoch in range(4):
            ask(policy, state(epoch, {}))
        assert policy.counts == {"status": 2, "breaker_open": 2}
        assert len(server.questions) == 2
        now[0], broken[0] = 31.0, False
        ask(policy, state(4, {}))
    assert policy.counts["answered"] == 1
    assert policy.breaker is BreakerState.CLOSED


def test_nobody_listening_is_unreachable() -> None:
    with served(well) as server:
        pass
    policy = remote(server)
    ask(policy)
    assert policy.counts == {"unreachable": 1}


def test_a_state_without_finite_losses_is_decided_locally() -> None:
    with served(well) as server:
        policy = remote(server)
        command = ask(policy, state(0, {}, losses={"a": float("nan")}))
        assert isinstance(command, NoChange)
        assert "unmeasured" in str(command.explanation)
        assert server.questions == []
    assert policy.counts == {"not_asked": 1}


def test_the_local_policy_has_seen_what_the_server_decided_about() -> None:
    answers = [True, False]

    def answer(question: dict[str, Any]) -> bytes:
        body = reply(question, command={"type": "no_change"})
        return http(body) if answers.pop(0) else http(b"", "500 Error")

    with served(answer) as server:
        policy = remote(server, fallback=RulesPolicy())
        ask(policy, state(0, {}, loss=2.0))
        command = ask(policy, state(1, {"a": dormant()}, loss=1.5))
    assert isinstance(command, SeedCommand), "it needs two states to germinate"
    assert command.operation == "germinate"


def test_its_state_is_saved() -> None:
    with served(well) as server:
        first, second = remote(server), remote(server)
        ask(first)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        stateless = remote(server, fallback=NoPolicy())
        stateless.load_state_dict(json.loads(json.dumps(stateless.state_dict())))
    assert second.counts == {"answered": 1}
    assert second.state_dict() == first.state_dict()


def test_the_token_is_sent_and_shown_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_POLICY_TOKEN", "from-the-environment")
    with served(lambda q: http(b"", "401 Unauthorized")) as server:
        for policy, token in (
            (remote(server), "from-the-environment"),
            (remote(server, token="given"), "given"),
        ):
            told = ask(policy).explanation
            assert f"\r\nAuthorization: Bearer {token}\r\n" in server.heads[-1]
            shown = f"{told} {policy!r} {policy.state_dict()} {policy.metrics()}"
            assert token not in shown
    assert not any("token" in json.dumps(question) for question in server.questions)


def test_a_signed_command_is_left_as_it_is() -> None:
    command = {"type": "seed", "seed": "a", "operation": "hold", "signature": "ab"}
    with served(lambda q: http(reply(q, command=command))) as server:
        found = ask(remote(server))
    assert isinstance(found, SeedCommand)
    assert (found.version, found.explanation, found.signature) == (-1, None, "ab")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "server.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(path),
         "-out", str(tmp_path / "public.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + (tmp_path / "public.pem").read_text())
    return path


def test_tls_reaches_a_server_that_is_trusted_and_no_other(certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=str(certificate.parent / "public.pem"))
    with served(well, context) as server:
        url = f"https://localhost:{server.port}/"
        known, unknown = RemotePolicy(url, 5.0, tls=trusting), RemotePolicy(url, 5.0)
        assert ask(known)
        assert ask(unknown)
    assert known.counts == {"answered": 1}
    assert unknown.counts == {"unreachable": 1}


@pytest.mark.parametrize(
    ("url", "more", "words"),
    [
        ("ftp://host/", {}, "give http"),
        ("http://", {}, "give http"),
        ("http://host:99999/", {}, "policy URL"),
        ("http://user:secret@host/", {}, "credentials"),
        ("http://host/a b", {}, "encode"),
        ("http://host/", {"timeout_s": 0.0}, "timeout_s"),
        ("http://host/", {"token": "t"}, "unencrypted"),
        ("https://host/", {"token": "t\r\nX: y"}, "visible"),
    ],
)
def test_what_cannot_be_used_is_refused(url: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        RemotePolicy(url, **more)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["http://localhost/", "http://127.0.0.2:1/", "http://[::1]:1/x?y=z"]
)
def test_this_machine_may_be_sent_a_token_unencrypted(url: str) -> None:
    assert RemotePolicy(url, token="t")
