"""Reads the YAML of a config file: `key: value` lines, each value a scalar or a list of scalars.

YAML 1.1 reads some plain texts as something else than what they look like: `0123` as 83, `1:30` as 90, `yes`
as true, `1e-4` as a text. So this file decides itself what a plain text is: an int in decimal digits, a float
such as 0.1 or 1e-4, true or false, nothing (null), or else the text itself. What a config does not need is
refused: a key twice, nested values, anchors, aliases, tags, several documents. Nothing here is recursive.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from util.errors import UserError
from util.files import special_file, user_path

INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
MAX_BYTES = 100_000


def read_mapping(path: str) -> dict[str, Any]:
    """Return the keys of a config file with their values: int, float, bool, None, str, or a list of these.
    Raises UserError, which names the file and the line.
    """
    text = _read_text(path)
    if "\0" in text:
        raise UserError(f"config file {path} has a NUL character: it is not a text file")
    try:
        return _mapping(_supported(yaml.parse(text, yaml.SafeLoader)))
    except _Refused as refused:
        raise UserError(f"config file {path}, {refused}") from None
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None


def to_text(values: dict[str, Any]) -> str:
    """Return YAML that `read_mapping`, and any other reader of YAML, reads back as `values`."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Also quotes the texts that are numbers for `read_mapping`, but not in YAML 1.1, such as 1e-4."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"{FLOAT.pattern}\Z"), [*"-+.0123456789"]
)


class _Refused(Exception):
    def __init__(self, event: yaml.Event, why: str):
        super().__init__(f"line {_line(event)}: {why}")


def _read_text(path: str) -> str:
    file = user_path(path)
    if special := special_file(file):
        raise UserError(f"config file {path} is {special}, not a regular file; configs/ has examples")
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise UserError(f"config file {path} has {size:,} bytes; at most {MAX_BYTES:,} are read")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}; configs/ has examples") from None
    except ValueError:
        raise UserError(f"config file {path} is not a text file in UTF-8") from None


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _supported(events: Iterator[yaml.Event]) -> Iterator[yaml.Event]:
    for event in events:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused(event, "anchors and aliases (& and *) are not supported: write the value itself")
        if tag := getattr(event, "tag", None):
            raise _Refused(event, f"tags such as {tag} are not supported: write a plain value")
        yield event


def _mapping(events: Iterator[yaml.Event]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    next(events)  # the start of the stream
    if isinstance(next(events), yaml.StreamEndEvent):
        return values
    event = next(events)
    if not isinstance(event, yaml.MappingStartEvent):
        if isinstance(event, yaml.ScalarEvent) and _scalar(event) is None:
            return values
        kind = "list" if isinstance(event, yaml.SequenceStartEvent) else "text"
        raise _Refused(event, f"expected lines of the form 'key: value', got a {kind}")
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        if not isinstance(event, yaml.ScalarEvent):
            raise _Refused(event, "expected a line of the form 'key: value'")
        key = event.value
        if key in values:
            raise _Refused(event, f"the key {key!r} is already in line {lines[key]}: remove one of them")
        values[key], lines[key] = _value(key, events), _line(event)
    next(events)  # the end of the document
    if not isinstance(event := next(events), yaml.StreamEndEvent):
        raise _Refused(event, "a second document begins: a config file has one")
    return values


def _value(key: str, events: Iterator[yaml.Event]) -> Any:
    event = next(events)
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event)
    values = []
    if isinstance(event, yaml.SequenceStartEvent):
        while isinstance(event := next(events), yaml.ScalarEvent):
            values.append(_scalar(event))
    if not isinstance(event, yaml.SequenceEndEvent):
        raise _Refused(event, f"the value of {key!r} is nested: expected a value, or a list of values")
    return values


def _scalar(event: yaml.ScalarEvent) -> Any:
    return plain_value(event.value) if event.implicit[0] else event.value  # else it is quoted


def plain_value(text: str) -> Any:
    """Return the value of a plain text: int, float, bool, None, or else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in ("", "~", "null"):
        return None
    if INT.fullmatch(text):
        return int(text)
    return float(text) if FLOAT.fullmatch(text) else text
