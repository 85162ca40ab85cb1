"""Dead letters keep what helps, never prompts."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from flyball.app.scrub import scrub

SECRET = "the patient said"


def test_prompts_answers_and_arguments_are_removed_at_any_depth() -> None:
    body = {
        "at": "wrong",
        "model": "m",
        "messages": [{"role": "user", "content": SECRET}],
        "response": {"choices": [{"message": {"content": SECRET}}]},
        "list": [{"arguments": {"x": SECRET}}],
    }
    clean = json.loads(scrub(json.dumps(body).encode()))
    assert SECRET not in json.dumps(clean)
    assert clean["model"] == "m"
    assert clean["at"] == "wrong"


def test_content_attributes_of_otlp_json_are_removed() -> None:
    body = {"attributes": [{"key": "gen_ai.input.messages", "value": {"stringValue": SECRET}}]}
    assert SECRET.encode() not in scrub(json.dumps(body).encode())


def test_a_prompt_version_is_a_label_and_stays() -> None:
    assert json.loads(scrub(b'{"prompt": "checkout@3"}')) == {"prompt": "checkout@3"}


@given(st.binary(max_size=300))
def test_bytes_that_do_not_parse_are_kept_as_they_are(body: bytes) -> None:
    try:
        json.loads(body)
    except ValueError:
        assert scrub(body) == body
