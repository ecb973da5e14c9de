"""A sink that keeps what a run tells."""

from esper.leyline import Event, Record


class Memory:
    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass

    def events(self, name: str) -> list[Event]:
        return [r for r in self.records if isinstance(r, Event) and r.name == name]
