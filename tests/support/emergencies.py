"""A caller whose calls end when the test says so, and an emergency controller around it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from esper.leyline import EmergencySignal, Level
from esper.tolaria.emergency import (
    Broadcasts,
    EmergencyController,
    EmergencyWord,
    Identity,
    TokenBucket,
)


@dataclass
class Reply:
    ok: bool
    detail: str = ""
    latency_ms: float | None = 1.0


class ByHand:
    """Carries a call out when it is told how the call ends."""

    def __init__(self) -> None:
        self.refuses = False
        self.asked: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self.reply: Reply | None = None

    def submit_async(self, function: Callable[..., Any], *arguments: Any) -> bool:
        assert self.asked is None, "one call at a time"
        if self.refuses:
            return False
        self.asked = function, arguments
        return True

    def poll(self) -> Reply | None:
        reply, self.reply = self.reply, None
        return reply

    def end(self, ok: bool = True) -> None:
        if self.asked is None:
            return
        function, arguments = self.asked
        self.asked = None
        if ok:
            function(*arguments)
        self.reply = Reply(ok, "" if ok else "no line")


@dataclass
class Stage:
    """Everything around a controller, by hand."""

    per_minute: int = 3
    word: EmergencyWord = field(default_factory=lambda: EmergencyWord(None))
    now: float = 0.0
    listens: bool = True
    events: list[tuple[str, Level]] = field(default_factory=list)
    published: list[EmergencySignal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.caller = ByHand()
        publish = self.published.append if self.listens else None
        self.broadcasts = Broadcasts(self.caller, publish, self.announce, lambda: self.now)
        self.bucket = TokenBucket(self.per_minute, lambda: self.now)
        identity = Identity("run", lambda: 7)
        self.controller = EmergencyController(
            self.word, self.broadcasts, identity, self.bucket, self.announce
        )

    def announce(self, name: str, message: str, level: Level, data: dict[str, Any]) -> None:
        assert message
        assert all(isinstance(key, str) for key in data)
        self.events.append((name, level))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]
