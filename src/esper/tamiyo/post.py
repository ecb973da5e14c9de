"""One HTTP/1.1 POST over a connection of its own, strict about the answer.

A coroutine on anyio rather than a client of the standard library on a thread: when the engine's
deadline cancels it, it ends at once, wherever it stands, and closes its connection. A connection
is not kept, since one question an epoch does not pay for what a kept one may be stuck in.
"""

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit

import anyio
from anyio.abc import ByteStream
from anyio.streams.buffered import BufferedByteReceiveStream

from esper.leyline import ConfigError
from esper.tamiyo.wire import Rejected

_MOST_HEAD_BYTES = 16 * 1024
_MOST_DIGITS = 12
_OK = "200"


@dataclass(frozen=True)
class Target:
    """Where to post.

    :param host: name or address.
    :param port: number.
    :param path: with the query, from the slash on.
    :param tls: whether the connection is encrypted.
    """

    host: str
    port: int
    path: str
    tls: bool

    @classmethod
    def of(cls, url: str) -> "Target":
        """Return the target of a URL.

        :raises ConfigError: it is not one of ``http`` or ``https``, or has credentials in it.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"policy URL {url!r}: {error}") from error
        _check(url, parts)
        tls = parts.scheme == "https"
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(str(parts.hostname), port or (443 if tls else 80), path, tls)

    @property
    def is_here(self) -> bool:
        """Whether it is this very machine."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


async def post(
    target: Target,
    body: bytes,
    headers: Mapping[str, str],
    *,
    most_bytes: int,
    tls: ssl.SSLContext | None = None,
) -> bytes:
    """Return the body of the answer.

    :param headers: besides those of HTTP itself.
    :param most_bytes: that the answer may have.
    :param tls: trusts whom; the system's authorities by default.
    :raises Rejected: there is no connection, or the answer is not a plain 200 within its limits.
    """
    try:
        async with await _connect(target, tls) as stream:
            await stream.send(_head(target, len(body), headers) + body)
            return await _answer(BufferedByteReceiveStream(stream), most_bytes)
    except (anyio.EndOfStream, anyio.IncompleteRead) as error:
        raise Rejected("malformed", "the answer ends too early") from error
    except TimeoutError:
        raise
    except (OSError, anyio.BrokenResourceError) as error:
        told = f"{type(error).__name__}: {error}"
        raise Rejected("unreachable", f"{target.host}:{target.port}: {told}") from error


async def _connect(target: Target, tls: ssl.SSLContext | None) -> ByteStream:
    if not target.tls:
        return await anyio.connect_tcp(target.host, target.port)
    context = tls or ssl.create_default_context()
    # Content-Length tells where the answer ends: many servers do not close TLS in form.
    return await anyio.connect_tcp(
        target.host, target.port, ssl_context=context, tls_standard_compatible=False
    )


def _head(target: Target, length: int, headers: Mapping[str, str]) -> bytes:
    host = f"[{target.host}]" if ":" in target.host else target.host
    lines = [
        f"POST {target.path} HTTP/1.1",
        f"Host: {host}:{target.port}",
        "Content-Type: application/json",
        "Accept: application/json",
        "Connection: close",
        f"Content-Length: {length}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


async def _answer(stream: BufferedByteReceiveStream, most_bytes: int) -> bytes:
    try:
        head = await stream.receive_until(b"\r\n\r\n", _MOST_HEAD_BYTES)
    except anyio.DelimiterNotFound as error:
        raise Rejected(
            "too_large", f"the answer's head has over {_MOST_HEAD_BYTES} bytes"
        ) from error
    length = _length(head.decode("latin-1"))
    if len(length) > _MOST_DIGITS or int(length) > most_bytes:
        raise Rejected("too_large", f"the answer has {length[:20]} bytes; {most_bytes} are taken")
    return await stream.receive_exactly(int(length)) if int(length) else b""


def _length(head: str) -> str:
    """Return the digits of the Content-Length of an answer that is in order."""
    first, *lines = head.split("\r\n")
    status = first.split(" ")
    if not re.fullmatch("HTTP/1\\.[01] [1-5][0-9][0-9]", " ".join(status[:2])):
        raise Rejected("malformed", "the answer is not HTTP/1.1")
    if status[1] != _OK:
        raise Rejected("status", f"the server answered with status {status[1]}")
    fields = [line.partition(":") for line in lines]
    values = {name.strip().lower(): value.strip() for name, _, value in fields}
    length = values.get("content-length", "")
    if "transfer-encoding" in values or not (length.isascii() and length.isdigit()):
        raise Rejected("malformed", "the answer has no plain Content-Length")
    return length


def _check(url: str, parts: SplitResult) -> None:
    if parts.username is not None or parts.password is not None:
        raise ConfigError("the policy URL has credentials in it; give a token instead")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"policy URL {url!r} is none; give http://host:port/path or https")
    if not url.isascii() or any(sign.isspace() for sign in url):
        raise ConfigError(f"policy URL {url!r} has blanks or foreign letters; encode them")
