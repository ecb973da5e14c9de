"""A policy server for `RemotePolicy`: `python examples/policy_server.py --port 0`.

Each run gets a policy of its own, which is told from others by the run's name. With the environment
variable ESPER_POLICY_TOKEN set, questions without that bearer token are refused.
"""

import argparse
import hmac
import os
import threading
from collections import OrderedDict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from esper.tamiyo import PolicyReply, PolicyRequest, RulesPolicy

PATH = "/v1/decide"
SCHEMA = 1
MOST_BYTES = 4 * 1024 * 1024
MOST_DIGITS = 12
MOST_RUNS = 64
TOKEN = os.environ.get("ESPER_POLICY_TOKEN", "")


class Policies:
    """The policies of the runs asked about last. A run that is forgotten begins anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: OrderedDict[str, RulesPolicy] = OrderedDict()

    def decide(self, request: PolicyRequest) -> PolicyReply:
        """Answer one question; the lock keeps those of a run in order."""
        with self._lock:
            policy = self._runs.pop(request.run, None) or RulesPolicy()
            self._runs[request.run] = policy
            if len(self._runs) > MOST_RUNS:
                self._runs.popitem(last=False)
            command = policy.decide(request.state)
        return PolicyReply(SCHEMA, request.request_id, request.architecture_version, command)


class Handler(BaseHTTPRequestHandler):
    """Answers one POST."""

    timeout = 10.0
    policies = Policies()

    def do_POST(self) -> None:
        """Decide about the state in the body."""
        length = self.headers.get("Content-Length", "")
        if self.path != PATH:
            return self._answer(HTTPStatus.NOT_FOUND)
        if not self._is_allowed():
            return self._answer(HTTPStatus.UNAUTHORIZED)
        if not length.isdecimal() or len(length) > MOST_DIGITS:
            return self._answer(HTTPStatus.LENGTH_REQUIRED)
        if int(length) > MOST_BYTES:
            return self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        try:
            request = msgspec.json.decode(self.rfile.read(int(length)), type=PolicyRequest)
        except msgspec.MsgspecError:
            return self._answer(HTTPStatus.BAD_REQUEST)
        if request.schema != SCHEMA:
            return self._answer(HTTPStatus.BAD_REQUEST)
        return self._answer(HTTPStatus.OK, msgspec.json.encode(self.policies.decide(request)))

    def _is_allowed(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        return not TOKEN or hmac.compare_digest(given, f"Bearer {TOKEN}".encode())

    def _answer(self, status: HTTPStatus, body: bytes = b"{}") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8732, help="0 takes any that is free")
    arguments = parser.parse_args()
    with ThreadingHTTPServer((arguments.host, arguments.port), Handler) as server:
        host, port = server.server_address[:2]
        print(f"listening on http://{host!s}:{port}{PATH}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
