"""A policy that asks a server, and decides by itself where the server does not."""

import inspect
import os
import ssl
import time
import uuid
from collections import Counter
from typing import Any

import anyio
import msgspec

from esper.core import BreakerState, CircuitBreaker
from esper.core.latency import LatencyHistogram
from esper.leyline import (
    AdaptationCommand,
    ConfigError,
    Explanation,
    NoChange,
    Policy,
    SeedCommand,
    Stateful,
    SystemState,
)
from esper.tamiyo.memory import evaluation_of
from esper.tamiyo.post import Target, post
from esper.tamiyo.rules import RulesPolicy
from esper.tamiyo.wire import SCHEMA, PolicyRequest, Rejected, read_reply, sendable

TOKEN_VARIABLE = "ESPER_POLICY_TOKEN"
MOST_REPLY_BYTES = 64 * 1024


class RemotePolicy:
    """Asks a policy server over HTTP, and falls back on a local policy.

    One JSON message each way, as in :mod:`esper.tamiyo.wire`. A reply that is late, malformed, too
    large, or that answers something else is rejected and counted by its reason; after several in a
    row a circuit breaker stops asking for a while. Whatever is decided locally says so and why.

    ``decide`` is a coroutine: the engine's deadline cancels it. Give a ``timeout_s`` below that
    deadline, since only then the local answer is in time.

    :param url: of the server, ``http`` or ``https``.
    :param timeout_s: for one question, connecting included.
    :param fallback: decides where the server does not; it is shown every state. The rules by
        default.
    :param run: name of the run, which servers tell runs apart by; a random one by default.
    :param token: sent as a bearer token; that of the environment variable ``ESPER_POLICY_TOKEN`` by
        default. It is sent unencrypted to this machine only.
    :param breaker: when the server is left alone.
    :param tls: trusts whom; the system's authorities by default.
    :ivar counts: answers by what became of the question: ``answered``, or why it was not.
    :raises ConfigError: the URL, the timeout or the token cannot be used.
    """

    isolation = "async"

    def __init__(
        self,
        url: str,
        timeout_s: float = 1.0,
        *,
        fallback: Policy | None = None,
        run: str = "",
        token: str | None = None,
        breaker: CircuitBreaker | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if not 0 < timeout_s < float("inf"):
            raise ConfigError(f"timeout_s is {timeout_s}; give seconds above 0")
        self.counts: Counter[str] = Counter()
        self._target = Target.of(url)
        self._timeout_s = timeout_s
        self._fallback = fallback or RulesPolicy()
        self._run = run or uuid.uuid4().hex
        self._headers = _authorisation(token, self._target)
        self._breaker = breaker or CircuitBreaker("policy server")
        self._tls = tls
        self._latency = LatencyHistogram()

    @property
    def breaker(self) -> BreakerState:
        """Whether the server is asked at present."""
        return self._breaker.state

    async def decide(self, state: SystemState) -> AdaptationCommand:
        """Answer with the server's command, or with a local one."""
        if evaluation_of(state) is None:
            return await self._locally(state, "not_asked", "a loss is missing or not finite")
        permit = self._breaker.admit()
        if permit is None:
            return await self._locally(state, "breaker_open", "the policy server is left alone")
        try:
            command = await self._ask(state)
        except Rejected as error:
            self._breaker.settle(permit, ok=False, error=str(error))
            return await self._locally(state, error.reason, str(error))
        except anyio.get_cancelled_exc_class():
            self.counts["cancelled"] += 1
            self._breaker.settle(permit, ok=False, error="cancelled by the deadline of the engine")
            raise
        except BaseException:
            self._breaker.release(permit)
            raise
        self._breaker.settle(permit, ok=True)
        self.counts["answered"] += 1
        observe = getattr(self._fallback, "observe", None)
        if observe is not None:
            observe(state)
        return command

    def metrics(self) -> dict[str, float]:
        """Return the newest values by name."""
        metrics = {f"tamiyo.remote.{name}_total": float(n) for name, n in self.counts.items()}
        p95 = self._latency.quantile(0.95)
        if p95 is not None:
            metrics["tamiyo.remote.latency_p95_ms"] = p95 * 1e3
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the local policy's state, of JSON types."""
        fallback = self._fallback.state_dict() if isinstance(self._fallback, Stateful) else {}
        return {"counts": dict(self.counts), "fallback": fallback}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Continue from :meth:`state_dict`."""
        self.counts = Counter(state_dict["counts"])
        if isinstance(self._fallback, Stateful):
            self._fallback.load_state_dict(state_dict["fallback"])

    async def _ask(self, state: SystemState) -> AdaptationCommand:
        request = PolicyRequest(
            schema=SCHEMA,
            request_id=uuid.uuid4().hex,
            run=self._run,
            step=state.step,
            architecture_version=-1 if state.growth is None else state.growth.version,
            deadline_ms=self._timeout_s * 1e3,
            state=sendable(state),
        )
        began = time.monotonic()
        try:
            with anyio.fail_after(self._timeout_s):
                body = await post(
                    self._target,
                    msgspec.json.encode(request),
                    self._headers,
                    most_bytes=MOST_REPLY_BYTES,
                    tls=self._tls,
                )
        except TimeoutError as error:
            raise Rejected("late", f"no answer within {self._timeout_s:g} s") from error
        self._latency.add(time.monotonic() - began)
        return _addressed(read_reply(body, request), request.architecture_version)

    async def _locally(self, state: SystemState, reason: str, message: str) -> AdaptationCommand:
        """Let the local policy decide, and note why it has to."""
        self.counts[reason] += 1
        found = self._fallback.decide(state)
        command = (await found if inspect.isawaitable(found) else found) or NoChange()
        told = command.explanation or Explanation("local", "the local policy gave no reason")
        noted = f"{told.reason} (decided locally, {reason}: {message})"
        return msgspec.structs.replace(
            command, explanation=msgspec.structs.replace(told, reason=noted)
        )


def _addressed(command: AdaptationCommand, version: int) -> AdaptationCommand:
    """Fill in what a server may leave out: the version that it decided about, and a reason."""
    if isinstance(command, SeedCommand):
        if command.signature:
            return command
        command = msgspec.structs.replace(command, version=version)
    if command.explanation is None:
        told = Explanation("remote", "the policy server gave no reason")
        command = msgspec.structs.replace(command, explanation=told)
    return command


def _authorisation(token: str | None, target: Target) -> dict[str, str]:
    if token is None:
        token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        return {}
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(f"the policy token ({TOKEN_VARIABLE}) may have visible ASCII signs only")
    if not target.tls and not target.is_here:
        raise ConfigError(
            f"the policy token would travel unencrypted to {target.host}; give an https URL"
        )
    return {"Authorization": f"Bearer {token}"}
