"""What is found in runbooks before they run: everything that loading refuses, and what would load but is not finished.

Beyond the loader's codes: RB116 an operation that does not say how it is taken back, RB117 not tested, RB118 a param that nothing uses, RB121 a
fault that the lab does not have, RB122 an argument that the fault does not take.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from flyball.core.errors import ConfigError
from flyball.core.plans import Actions
from flyball.runbooks.loader import Runbook, check_document, place_of, read_texts
from flyball.runbooks.rehearsal import parse_scenario
from flyball.runbooks.yaml_nodes import Document, parse

_USE_OF_PARAM: Final = re.compile(r"\bparams\.([a-z0-9_]+)", re.ASCII)
_SHOWS_RESTRAINT: Final = ("refuse", "hold", "nothing")


def lint_paths(paths: Sequence[str | Path], *, actions: Actions) -> tuple[int, list[ConfigError]]:
    """How many runbooks there are in files and folders, and everything that is wrong with them, in the order of the files."""
    texts, errors = read_texts(paths)
    return len(texts), [*errors, *lint_texts(texts, actions=actions)]


def lint_texts(texts: Mapping[str, bytes], *, actions: Actions) -> list[ConfigError]:
    """Everything that is wrong with these runbooks, by path; each on its own, and names that are taken twice."""
    errors: list[ConfigError] = []
    taken: dict[str, str] = {}
    for path, text in texts.items():
        try:
            document = parse(text, path)
        except ConfigError as e:
            errors.append(e)
            continue
        runbook, wrong = check_document(document, actions)
        errors += wrong
        if runbook is None:
            continue
        if runbook.name in taken:
            what = f"{runbook.name!r} is taken by {taken[runbook.name]}; rename one"
            errors.append(document.error("RB111", what, *document.place(("name",))))
        taken.setdefault(runbook.name, path)
        errors += unfinished(runbook, document)
    return errors


def unfinished(runbook: Runbook, document: Document) -> list[ConfigError]:
    """What is missing in a runbook that loads."""
    errors: list[ConfigError] = []
    words = [word for test in runbook.model.tests for word in test.expect]
    if not words:
        what = "no tests; write one in which it acts, and one in which it refuses"
        errors.append(document.error("RB117", what, *document.place(("tests",))))
    elif not any(word.startswith(_SHOWS_RESTRAINT) for word in words):
        what = "no test in which it does not act; add one that expects refuse(…), hold(…) or nothing"
        errors.append(document.error("RB117", what, *document.place(("tests",))))
    for i, test in enumerate(runbook.model.tests):
        try:
            parse_scenario(test.lab)
        except ConfigError as e:
            errors.append(document.error(e.code, e.what, *document.place(("tests", i, "lab"))))
    for i, (written, step) in enumerate(zip(runbook.model.steps, runbook.steps, strict=True)):
        if step.implementation.effect == "operation" and written.undo is None:
            what = "nothing says how it is taken back; write `undo: hook`, or `undo: none` and an `approval`"
            errors.append(document.error("RB116", what, *document.place(("steps", i, step.action), key=True)))
    used = set(_USE_OF_PARAM.findall(runbook.text))
    for name in runbook.model.params:
        if name not in used:
            what = f"nothing uses params.{name}; use it, or leave it out"
            errors.append(document.error("RB118", what, *document.place(("params", name), key=True)))
    return sorted(errors, key=place_of)
