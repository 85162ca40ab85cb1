"""JSON Schema of a runbook, for editors: generated from the models and the actions there are.

It says what can be said of one value at a time. Conditions, references and what must fit together is the loader's.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from flyball.core.plans import DURATION_PATTERN, SHARE_PATTERN, Actions, format_duration
from flyball.runbooks.schema import RATE_PATTERN, RunbookModel

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_REFERENCE: Final = {"type": "string", "pattern": r"^\$params\.[a-z][a-z0-9_]*$"}


class _AsWritten(GenerateJsonSchema):
    """Defaults as a person would write them, nothing that may be left empty, no titles made of field names."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        inner = dict(self.generate_inner(schema["schema"]))
        default = _written(schema.get("default"), inner)
        if default is not None:
            inner["default"] = default
        return inner

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def runbook_schema(actions: Actions) -> dict[str, Any]:
    """The schema of one runbook, with the parameters of every action."""
    schema = RunbookModel.model_json_schema(schema_generator=_AsWritten)
    definitions: dict[str, Any] = schema["$defs"]
    for definition in [schema, *definitions.values()]:
        definition.pop("title", None)
    step = definitions["StepModel"]
    step["description"] = "One step: exactly one action, and how it is proved and taken back."
    for kind in actions.kinds():
        action = actions.get(kind)
        definitions[f"{kind}_params"] = _params(action.Params, definitions)
        step["properties"][kind] = {
            "description": (action.__doc__ or kind).strip().split("\n\n")[0].replace("\n", " "),
            "$ref": f"#/$defs/{kind}_params",
        }
    step["oneOf"] = [{"required": [kind]} for kind in actions.kinds()]
    return {
        "$schema": DIALECT,
        "title": "A runbook of Flyball",
        **{k: v for k, v in schema.items() if k != "$defs"},
        "$defs": dict(sorted(definitions.items())),
    }


def _params(model: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """An action's parameters; each may be `$params.NAME` instead."""
    schema: dict[str, Any] = model.model_json_schema(schema_generator=_AsWritten)
    definitions.update(schema.pop("$defs", {}))
    schema.pop("title", None)
    for name, value in schema.get("properties", {}).items():
        told = {k: value.pop(k) for k in ("description", "default") if k in value}
        options = value["anyOf"] if set(value) == {"anyOf"} else [value]
        schema["properties"][name] = {**told, "anyOf": [*options, _REFERENCE]}
    return schema if schema.get("required") else {**schema, "type": ["object", "null"]}


def _written(value: Any, schema: dict[str, Any]) -> Any:
    """A default in the form in which it would be written; None when it is better not told."""
    pattern = schema.get("pattern")
    if isinstance(value, float) and pattern == DURATION_PATTERN:
        return format_duration(value)
    if isinstance(value, float) and pattern == SHARE_PATTERN:
        return f"{value * 100:g}%"
    if pattern == RATE_PATTERN and value is not None:
        return f"{value.count}/{format_duration(value.per_s)}"
    if isinstance(value, tuple):
        many: dict[str, Any] = next(
            (s for s in schema.get("anyOf", [schema]) if s.get("type") == "array"), {}
        )
        return [_written(v, many.get("items", {})) for v in value] or None
    return value if isinstance(value, str | int | float | bool) and value != "" else None
