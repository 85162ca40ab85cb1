"""The schema for editors says what the loader says, as far as a schema can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from flyball.remediation.actions import registry
from flyball.runbooks import loader
from flyball.runbooks.jsonschema import runbook_schema
from flyball.runbooks.template import new_runbook
from flyball.runbooks.yaml_nodes import parse
from tests.runbooks._jsonschema import errors
from tests.runbooks.test_fuzz import RUNBOOKS
from tests.runbooks.test_lint import FILES

SCHEMA = runbook_schema(registry())
CHECKED_IN = Path(__file__).parents[2] / "docs" / "runbook.schema.json"
LIBRARY = sorted((Path(loader.__file__).parent / "library").glob("*.yaml"))
SEEN = ("field_misspelt", "share_a", "rate_w", "rate_of", "rate_the", "attempts_", "hold_without", "hold_unknown", "action_two", "action_unknown",
        "action_missing", "version_", "mode_", "name_", "undo_unknown", "release_", "on_failure_", "tests_unknown_outcome")  # fmt: skip
"""Mistakes of the corpus that an editor sees as well."""


def wrong(document: Any) -> list[str]:
    return list(errors(document, SCHEMA, SCHEMA))


def test_the_schema_that_is_checked_in_is_current() -> None:
    assert json.loads(CHECKED_IN.read_text()) == SCHEMA, "run `make docs`"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.stem))
def test_a_shipped_runbook_fits_the_schema(path: Path) -> None:
    assert wrong(parse(path.read_text(), path.name).root.plain()) == []


def test_the_runbook_that_new_writes_fits_the_schema() -> None:
    assert wrong(parse(new_runbook("first-steps"), "f.yaml").root.plain()) == []


@given(RUNBOOKS)
@settings(max_examples=50, deadline=None)
def test_what_loads_fits_the_schema(document: dict[str, Any]) -> None:
    assert wrong(document) == []


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith(SEEN)], ids=lambda p: str(p.stem))
def test_an_editor_sees_what_is_wrong_with_one_value(path: Path) -> None:
    assert wrong(parse(path.read_text(), path.name).root.plain()) != []


def test_every_field_has_a_description_and_a_default_as_it_is_written() -> None:
    for name, definition in {"": SCHEMA, **SCHEMA["$defs"]}.items():
        for field, value in definition.get("properties", {}).items():
            assert value.get("description"), f"{name}.{field}"
            if "default" in value:
                assert list(errors(value["default"], value, SCHEMA)) == [], f"{name}.{field}"
            assert "null" not in json.dumps(value), f"{name}.{field} may not be left empty"


def test_every_action_is_in_it_with_its_parameters() -> None:
    step = SCHEMA["$defs"]["StepModel"]
    assert [one["required"] for one in step["oneOf"]] == [[kind] for kind in registry().kinds()]
    for kind in registry().kinds():
        fields = registry().get(kind).Params.model_fields
        names = {f.alias or name for name, f in fields.items()}
        assert set(SCHEMA["$defs"][f"{kind}_params"]["properties"]) == names
