"""What pydantic finds wrong with a field, in words that say what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, get_args, get_origin

from pydantic import BaseModel

from flyball.core.errors import did_you_mean
from flyball.runbooks.schema import NAME_PATTERN

_WANTED: Final = {
    "int_type": "is no whole number; write for example 20",
    "int_from_float": "is no whole number; write for example 20",
    "float_type": "is no number; write for example 20 or 0.5",
    "bool_type": "is neither; write true or false, without quotes",
    "string_type": "is no text; write it in quotes",
    "list_type": "is no list; begin each line of it with `- `",
    "tuple_type": "is no list; write [a, b]",
    "dict_type": "is no mapping; write {name: value}",
    "model_type": "is no mapping; write {name: value}",
}
_BOUNDS: Final = {
    "greater_than_equal": ("ge", "is too small; write at least {}"),
    "greater_than": ("gt", "is too small; write more than {}"),
    "less_than_equal": ("le", "is too large; write at most {}"),
    "less_than": ("lt", "is too large; write less than {}"),
    "string_too_short": ("min_length", "is too short; write at least {} character"),
    "string_too_long": ("max_length", "is too long; write at most {} characters"),
    "too_short": ("min_length", "is too short; write at least {}"),
    "too_long": ("max_length", "is too long; write at most {}"),
}


def told(detail: Mapping[str, Any]) -> str:
    """One of pydantic's errors, as `'automatic' is unknown; write observe, suggest, approve or auto`."""
    kind, given, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    if kind in _WANTED:
        return f"{_short(given)} {_WANTED[kind]}"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = context[name]
        return f"{_short(given)} {words.format(f'{bound:g}' if isinstance(bound, float) else bound)}"
    if kind == "literal_error":
        words = str(context["expected"]).replace("'", "")
        close = did_you_mean(str(given), words.replace(" or ", ", ").split(", "))
        return f"{_short(given)} is unknown; write {words}{close if 'did you mean' in close else ''}"
    if kind == "string_pattern_mismatch":
        dashed = context["pattern"] == NAME_PATTERN
        example = "-, such as slow-provider" if dashed else "_, such as still_failing"
        return f"{_short(given)} is no name; write lower case words joined by {example}"
    said = str(detail["msg"]).removeprefix("Value error, ")
    return said if kind == "value_error" else f"{said[:1].lower()}{said[1:]}"


def _short(given: Any) -> str:
    if isinstance(given, list | dict):
        return "a list" if isinstance(given, list) else "a mapping"
    if isinstance(given, bool):
        return str(given).lower()
    return repr(given)[:60]


def fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the mapping at a path of field names and indexes within a model."""
    for word in location:
        if isinstance(word, str):
            fields = {f.alias or name: f.annotation for name, f in model.model_fields.items()}
            model = _inner(fields.get(word)) or model
    return [f.alias or name for name, f in model.model_fields.items()]


def _inner(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    return next((m for a in get_args(annotation) if (m := _inner(a)) is not None), None)
