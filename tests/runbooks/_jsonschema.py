"""JSON Schema (2020-12), as much of it as our schemas use; an unknown keyword is an error, so that none is skipped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    "null": (type(None),),
}  # fmt: skip
TOLD = {"$schema", "$defs", "title", "description", "default"}


def errors(value: Any, schema: Any, root: dict[str, Any], path: str = "$") -> Iterator[str]:
    """What is wrong with a value, a line each."""
    if isinstance(schema, bool):
        if not schema:
            yield f"{path}: nothing is allowed here"
        return
    for keyword, wanted in schema.items():
        if keyword not in TOLD:
            yield from _keyword(keyword, wanted, value, schema, root, path)


def _keyword(
    keyword: str, wanted: Any, value: Any, schema: dict[str, Any], root: dict[str, Any], path: str
) -> Iterator[str]:
    if keyword == "$ref":
        yield from errors(value, root["$defs"][wanted.removeprefix("#/$defs/")], root, path)
    elif keyword in ("anyOf", "oneOf"):
        fitting = sum(not any(errors(value, one, root, path)) for one in wanted)
        if not fitting or (keyword == "oneOf" and fitting > 1):
            yield f"{path}: fits {fitting} of {keyword}"
    elif keyword == "properties":
        for name in wanted.keys() & value.keys() if isinstance(value, dict) else ():
            yield from errors(value[name], wanted[name], root, f"{path}.{name}")
    elif keyword == "additionalProperties":
        for name in value.keys() - schema.get("properties", {}).keys() if isinstance(value, dict) else ():
            yield from errors(value[name], wanted, root, f"{path}.{name}")
    elif keyword == "propertyNames":
        for name in value if isinstance(value, dict) else ():
            yield from errors(name, wanted, root, f"{path}.{name}")
    elif keyword == "items":
        for i, item in enumerate(value if isinstance(value, list) else ()):
            yield from errors(item, wanted, root, f"{path}[{i}]")
    elif not _holds(keyword, wanted, value):
        yield f"{path}: {value!r:.60} is not {keyword} {wanted!r:.80}"


def _holds(keyword: str, wanted: Any, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = isinstance(value, str)
    checks: dict[str, Callable[[], bool]] = {
        "type": lambda: any(_is(value, name) for name in (wanted if isinstance(wanted, list) else [wanted])),
        "enum": lambda: value in wanted,
        "const": lambda: value == wanted,
        "required": lambda: not isinstance(value, dict) or set(wanted) <= set(value),
        "pattern": lambda: not text or re.search(wanted, value) is not None,
        "minLength": lambda: not text or len(value) >= wanted,
        "maxLength": lambda: not text or len(value) <= wanted,
        "minItems": lambda: not isinstance(value, list) or len(value) >= wanted,
        "maxItems": lambda: not isinstance(value, list) or len(value) <= wanted,
        "minProperties": lambda: not isinstance(value, dict) or len(value) >= wanted,
        "maxProperties": lambda: not isinstance(value, dict) or len(value) <= wanted,
        "minimum": lambda: not number or value >= wanted,
        "maximum": lambda: not number or value <= wanted,
        "exclusiveMinimum": lambda: not number or value > wanted,
        "exclusiveMaximum": lambda: not number or value < wanted,
    }
    return checks[keyword]()


def _is(value: Any, name: str) -> bool:
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
