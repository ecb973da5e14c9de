"""Records as lines of JSON: the file that every run leaves, and that reports are made from.

JSON has no NaN: the fast encoder writes a number that is not finite as null. A record that holds
one is written with the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"`` instead. They are read
back as numbers where the record has numbers.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from esper.leyline import Event, Record, RunError

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


class JsonlSink:
    """Appends each record to a file as one line.

    :param path: the file; made if it does not exist. A line that a killed process left unfinished
        at its end is cut off first.
    """

    def __init__(self, path: Path) -> None:
        _cut_torn_line(path)
        self._file = path.open("ab")

    def write(self, record: Record) -> None:
        """Add one line."""
        self._file.write(encode_record(record) + b"\n")

    def flush(self) -> None:
        """Hand the lines to the operating system, so that a killed process loses none."""
        self._file.flush()

    def close(self) -> None:
        """Write what is left and close the file."""
        self._file.close()


def encode_record(record: Record) -> bytes:
    """Return one line of JSON, without its end."""
    line = _encoder.encode(record)
    # None is left out as a default, so a null may stand for a number; a text with it is rare.
    if b"null" in line and not isinstance(record, Event):
        return json.dumps(_name_numbers(msgspec.to_builtins(record))).encode()
    return line


def read_records(path: Path) -> Iterator[Record]:
    """Read the records of a run, oldest first. An unfinished last line is left out.

    :raises RunError: the file is missing, or another line is damaged.
    """
    if not path.is_file():
        raise RunError(f"{path} does not exist; is {path.parent} the directory of a run?")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield _decode(line, path, number)


def _decode(line: bytes, path: Path, number: int) -> Record:
    try:
        if b'"NaN"' in line or b'Infinity"' in line:
            # Not strict: a text is taken for a number where, and only where, one belongs.
            restored: Record = msgspec.convert(json.loads(line), Record, strict=False)
            return restored
        record: Record = _decoder.decode(line)
    except (msgspec.MsgspecError, json.JSONDecodeError) as error:
        raise RunError(
            f"{path} line {number} is damaged ({error}); remove that line to read the rest"
        ) from error
    return record


def _name_numbers(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: _name_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_name_numbers(item) for item in value]
    return value


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
