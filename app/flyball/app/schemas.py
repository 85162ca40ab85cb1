"""JSON Schemas, generated from the types themselves."""

from __future__ import annotations

from typing import Any

import msgspec

from flyball.core.events import EVENT_TYPES, TYPE_NAMES


def events_schema() -> dict[str, Any]:
    """One schema for every native event; `type` tells which."""
    (_, *_), components = msgspec.json.schema_components(EVENT_TYPES, ref_template="#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Flyball native events, one JSON object a line",
        "oneOf": [{"$ref": f"#/$defs/{t.__name__}"} for t in EVENT_TYPES],
        "discriminator": {
            "propertyName": "type",
            "mapping": {TYPE_NAMES[t]: f"#/$defs/{t.__name__}" for t in EVENT_TYPES},
        },
        "$defs": components,
    }


def runbook_schema() -> dict[str, Any]:
    """One runbook, with every action that is installed."""
    from flyball.remediation.actions import registry
    from flyball.runbooks.jsonschema import runbook_schema as schema_of

    return schema_of(registry())
