"""Loads runbooks: YAML to nodes, nodes to models, conditions compiled, actions' parameters checked. All or nothing.

Codes:
    RB001 not YAML        RB002 duplicate key      RB003 anchor, tag, second document   RB004 too deep
    RB005 key is no text  RB006 ambiguous word     RB101 unknown field                  RB102 missing field
    RB103 condition cannot be read                 RB104 unknown name in a condition    RB105 types do not fit
    RB106 condition is not true or false           RB107 value that never occurs        RB108 wrong value
    RB109 unknown action  RB110 expectation cannot be read        RB111 name taken                     RB112 not exactly one action
    RB113 unknown reference                        RB114 template where none is rendered
    RB115 can never run, or proves nothing         RB116 no way back                    RB119 duration or pattern cannot be read
    RB120 cannot be read from disk
Found by lint alone (`flyball.runbooks.lint`):     RB117 not tested                     RB118 param that nothing uses
    RB121 fault that the lab does not have         RB122 argument that the fault does not take
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ValidationError

from flyball.core.errors import ConfigError, did_you_mean
from flyball.core.plans import MODES, Action, Actions, Mode, Retry, StepApproval, Verify
from flyball.runbooks.conditions import Condition, ConditionError, compile_condition, compile_expectation
from flyball.runbooks.field_errors import fields_at, told
from flyball.runbooks.schema import RunbookModel, StepModel
from flyball.runbooks.yaml_nodes import MAX_BYTES, Document, Node, parse

Location = tuple[int | str, ...]
_STEP_FIELDS: Final = frozenset(StepModel.model_fields)
MAX_ERRORS: Final = 50
_REFERENCE: Final = re.compile(r"\$[A-Za-z_][\w.]*", re.ASCII)
_NOT_PLAIN: Final = re.compile(
    r"\{\{|\{%|\{#|\$\{|\$\(|<%|`|\$(?:incident|params)\b"
    r"|[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
"""Beginnings of templates and commands; control characters, and those that hide text or turn its direction."""
_SPLIT_CALL: Final = re.compile(r"[()=]")
_PARAM_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,39}", re.ASCII)
_RESERVED: Final = frozenset(
    ("as", "break", "const", "continue", "else", "false", "for", "function", "if", "import", "in", "let", "loop", "null",
     "package", "namespace", "return", "true", "var", "void", "while")
)  # fmt: skip
"""Words of CEL."""


class RunbookErrors(ConfigError):
    """Everything that is wrong with a set of runbooks; `errors` holds them one by one, in the order of the files."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(str(e) for e in errors))


@dataclass(frozen=True, slots=True)
class RunbookStep:
    id: str
    action: str
    implementation: type[Action]
    params: BaseModel
    verify: Verify
    timeout_s: float | None
    retry: Retry = field(default_factory=Retry)
    approval: StepApproval | None = None
    release: Literal["recovered", "resolved", "expiry"] | None = None
    """When its effect is let go; None leaves it to the action."""
    undo: Literal["release", "hook", "none"] = "release"
    """How its effect is taken back; `none`: it cannot be, so a person is always asked first."""


@dataclass(frozen=True, slots=True)
class Runbook:
    """A runbook that is right: compiled and checked."""

    model: RunbookModel
    mode: Mode
    condition: Condition
    preconditions: tuple[tuple[str, Condition], ...]
    steps: tuple[RunbookStep, ...]
    path: str
    text: str
    source: Literal["packaged", "directory"] = "directory"

    @property
    def name(self) -> str:
        return self.model.name


@dataclass(frozen=True, slots=True)
class RunbookSet:
    """Runbooks by name. Immutable: a reload makes a new set, or leaves the old one in place."""

    runbooks: tuple[Runbook, ...] = ()
    by_name: Mapping[str, Runbook] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.runbooks, key=lambda r: r.name))
        object.__setattr__(self, "runbooks", ordered)
        object.__setattr__(self, "by_name", {r.name: r for r in ordered})

    def __iter__(self) -> Iterator[Runbook]:
        return iter(self.runbooks)

    def __len__(self) -> int:
        return len(self.runbooks)


def check_runbook(
    text: str | bytes, path: str, actions: Actions, source: Literal["packaged", "directory"] = "directory"
) -> tuple[Runbook | None, list[ConfigError]]:
    """One runbook and everything that is wrong with it; the runbook is None when anything is."""
    try:
        document = parse(text, path)
    except ConfigError as e:
        return None, [e]
    return check_document(document, actions, source)


def check_document(
    document: Document, actions: Actions, source: Literal["packaged", "directory"] = "directory"
) -> tuple[Runbook | None, list[ConfigError]]:
    """As `check_runbook`, for one that is parsed already; errors from top to bottom."""
    runbook, errors = _Check(document, actions, source).run()
    return runbook, sorted(errors, key=place_of)


def place_of(error: ConfigError) -> tuple[int, int]:
    """Line and column of an error of a runbook."""
    _, line, column = error.where.rsplit(":", 2)
    return int(line), int(column)


def _is_name(param: str) -> bool:
    return _PARAM_NAME.fullmatch(param) is not None and param not in _RESERVED


class _TooMany(Exception):
    """More mistakes than anybody reads, and a way to keep the loader busy."""


class _Check:
    """The way of one document to a Runbook, collecting errors as it goes."""

    def __init__(
        self, document: Document, actions: Actions, source: Literal["packaged", "directory"]
    ) -> None:
        self._doc = document
        self._actions = actions
        self._source = source
        self._errors: list[ConfigError] = []
        self._params: dict[str, Any] = {}

    def run(self) -> tuple[Runbook | None, list[ConfigError]]:
        try:
            return self._run(), self._errors
        except _TooMany:
            what = f"more than {MAX_ERRORS} mistakes; mend these first"
            last = max(place_of(e) for e in self._errors)
            return None, [*self._errors, self._doc.error("RB108", what, *last)]

    def _run(self) -> Runbook | None:
        root = self._doc.root
        if not isinstance(root.value, dict):
            self._say("RB108", "this is no mapping; a runbook begins with `runbook: v1`", ())
            return None
        raw = root.plain()
        self._refuse_empty(root, ())
        calls = self._split_steps(raw)
        model = self._validate(RunbookModel, raw, ())
        if not isinstance(model, RunbookModel):
            self._read_conditions(raw)
            return None
        self._params = model.params
        self._check_params(model.params)
        condition = self._condition(model.when, ("when",))
        checks = [
            (p.id, self._condition(p.check, ("preconditions", i, "check")))
            for i, p in enumerate(model.preconditions)
        ]
        for i, (name, _) in enumerate(checks):
            if name in [other for other, _ in checks[:i]]:
                what = f"two preconditions are called {name!r}; rename one"
                self._say("RB111", what, ("preconditions", i, "id"))
        steps = [
            self._step(i, step, *call) for i, (step, call) in enumerate(zip(model.steps, calls, strict=True))
        ]
        self._cross_check(model, steps)
        if self._errors or condition is None:
            return None
        return Runbook(
            model=model,
            mode=model.mode,
            condition=condition,
            preconditions=tuple((name, c) for name, c in checks if c is not None),
            steps=tuple(s for s in steps if s is not None),
            path=self._doc.path,
            text=self._doc.text,
            source=self._source,
        )

    def _read_conditions(self, raw: dict[str, Any]) -> None:
        """Where fields are wrong, looks at the conditions all the same: one round of mending is enough."""
        params, checks = raw.get("params"), raw.get("preconditions")
        constants = params.items() if isinstance(params, dict) else ()
        self._params = {k: v for k, v in constants if isinstance(v, str | int | float) and _is_name(k)}
        if isinstance(raw.get("when"), str):
            self._condition(raw["when"], ("when",))
        for i, entry in enumerate(checks if isinstance(checks, list) else ()):
            if isinstance(entry, dict) and isinstance(entry.get("check"), str):
                self._condition(entry["check"], ("preconditions", i, "check"))

    def _refuse_empty(self, node: Node, location: Location) -> None:
        """A key without a value says nothing: `tenants:` must not be read as no limit. An action may stand without parameters."""
        if isinstance(node.value, dict):
            for name, inner in node.value.items():
                if not _SPLIT_CALL.search(name):  # an unquoted `f(a=1, b=2)`: told as an unknown field
                    self._refuse_empty(inner, (*location, name))
        elif isinstance(node.value, list):
            for i, inner in enumerate(node.value):
                self._refuse_empty(inner, (*location, i))
        elif node.value is None:
            bare = len(location) == 3 and location[0] == "steps" and location[2] in self._actions.kinds()
            if not bare:
                label = ".".join(p for p in location if isinstance(p, str)) or "it"
                self._say("RB108", f"{label} is empty; write a value, or leave it out", location)

    def _check_params(self, params: Mapping[str, Any]) -> None:
        for name in params:
            if not _is_name(name):
                what = f"param {name[:40]!r} is no name; use lower case letters, digits and _, and no word of CEL"
                self._say("RB108", what, ("params", name), key=True)

    def _say(self, code: str, what: str, location: Location, *, key: bool = False) -> None:
        self._say_at(code, what, self._doc.place(location, key=key))

    def _say_at(self, code: str, what: str, place: tuple[int, int]) -> None:
        if len(self._errors) >= MAX_ERRORS:
            raise _TooMany
        self._errors.append(self._doc.error(code, what, *place))

    # --- steps ----------------------------------------------------------------------------------------------------

    def _split_steps(self, raw: dict[str, Any]) -> list[tuple[str, Any]]:
        """Takes each step's action out of it, because which key it is depends on the actions there are."""
        calls: list[tuple[str, Any]] = []
        steps = raw.get("steps")
        if not isinstance(steps, list):
            return calls
        for i, step in enumerate(steps):
            if not isinstance(step, dict):
                calls.append(("", None))
                continue
            names = [name for name in step if name not in _STEP_FIELDS]
            known = [name for name in names if name in self._actions.kinds()]
            for name in names:
                if name not in known:
                    hint = did_you_mean(name[:64], [*self._actions.kinds(), *_STEP_FIELDS])
                    what = f"unknown action or field {name[:64]!r}{hint}"
                    self._say("RB109", what, ("steps", i, name), key=True)
            if not names:
                hint = ", ".join(self._actions.kinds())
                self._say("RB112", f"a step needs one action; write one of {hint}", ("steps", i))
            elif len(known) > 1:
                self._say(
                    "RB112", f"a step has one action, not {' and '.join(known)}; make two steps", ("steps", i)
                )
            calls.append((known[0], step[known[0]]) if len(known) == 1 else ("", None))
            for name in names:
                del step[name]
        return calls

    def _step(self, i: int, step: StepModel, kind: str, written: Any) -> RunbookStep | None:
        try:
            expect = compile_expectation(step.verify.expect)
        except ConditionError as e:
            self._condition_error(e, ("steps", i, "verify", "expect"))
            expect = ()
        if not kind:
            return None
        action: type[Action] = self._actions.get(kind)
        location: Location = ("steps", i, kind)
        said = len(self._errors)
        resolved = self._resolve(written if written is not None else {}, location, action.references)
        if len(self._errors) > said:
            return None
        params = self._validate(action.Params, resolved, location)
        if params is None:
            return None
        verify = Verify(
            within_s=step.verify.within,
            expect=expect,
            against=step.verify.against,
            min_calls=step.verify.min_calls,
        )
        asked = step.approval
        return RunbookStep(
            id=step.id or f"{kind}_{i + 1}",
            action=kind,
            implementation=action,
            params=params,
            verify=verify,
            timeout_s=step.timeout,
            retry=Retry(count=step.retry.count, backoff_s=step.retry.backoff) if step.retry else Retry(),
            approval=StepApproval(expires_s=asked.expires, on_expire=asked.on_expire) if asked else None,
            release=step.release,
            undo=step.undo or ("hook" if action.effect == "operation" else "release"),
        )

    def _resolve(self, value: Any, location: Location, known: frozenset[str]) -> Any:
        """Puts the runbook's own params in place of `$params.x`; text that something else could take for code is refused.

        known: words with a `$` that the action resolves itself.
        """
        if isinstance(value, dict):
            for key in value:
                self._plain_text(key, (*location, key), key=True)
            return {k: self._resolve(v, (*location, k), known) for k, v in value.items()}
        if isinstance(value, list):
            return [self._resolve(v, (*location, i), known) for i, v in enumerate(value)]
        if not isinstance(value, str):
            return value
        if value.startswith("$params."):
            name = value.removeprefix("$params.")
            if name not in self._params:
                self._say("RB113", f"unknown reference {value[:64]!r}{self._offer(value, known)}", location)
                return value
            if isinstance(self._params[name], str):
                self._plain_text(self._params[name], location)
            return self._params[name]
        if value.startswith("$") and value not in known and _REFERENCE.fullmatch(value):
            self._say("RB113", f"unknown reference {value[:64]!r}{self._offer(value, known)}", location)
        elif value not in known:
            self._plain_text(value, location)
        return value

    def _offer(self, value: str, known: frozenset[str]) -> str:
        return did_you_mean(value[:64], [*known, *(f"$params.{p}" for p in self._params)])

    def _plain_text(self, value: str, location: Location, *, key: bool = False) -> None:
        """Values reach gateways, hooks and people as they stand: nothing in them may look like a template, a command or a control."""
        found = _NOT_PLAIN.search(value)
        if found is None:
            return
        if found[0].isprintable():
            what = (
                f"{value[:40]!r} is a template or command; write a plain value, $incident.root or $params.…"
            )
        else:
            what = f"U+{ord(found[0]):04X} in text; write one line of plain characters"
        self._say("RB114", what, location, key=key)

    # --- conditions -----------------------------------------------------------------------------------------------

    def _condition(self, source: str, location: Location) -> Condition | None:
        mark = next((m for m in ("{{", "{%") if m in source), None)
        if mark:
            node = self._doc.node(*location)
            place = self._doc.inside(node, source.index(mark)) if node else self._doc.place(location)
            what = "a template in a condition; name the value itself, for example incident.root.name"
            self._say_at("RB114", what, place)
            return None
        try:
            return compile_condition(source, self._params)
        except ConditionError as e:
            self._condition_error(e, location)
            return None

    def _condition_error(self, error: ConditionError, location: Location) -> None:
        node = self._doc.node(*location)
        place = self._doc.inside(node, error.offset) if node is not None else self._doc.place(location)
        self._say_at(error.code, error.what, place)

    # --- models ---------------------------------------------------------------------------------------------------

    def _validate(self, model: type[BaseModel], raw: Any, base: Location) -> BaseModel | None:
        try:
            # As JSON, so that a strict model takes a list for a tuple, but not `"3"` for a number nor `true` for 1.
            return model.model_validate_json(json.dumps(raw))
        except ValidationError as e:
            details = e.errors(include_url=False)
            unknown = [d["loc"] for d in details if d["type"] == "extra_forbidden"]
            for detail in details:
                *parent, name = detail["loc"] or ("",)
                beside = [str(loc[-1]) for loc in unknown if list(loc[:-1]) == parent]
                if detail["type"] == "missing" and difflib.get_close_matches(
                    str(name), beside[:MAX_ERRORS], 1
                ):
                    continue  # it is there, misspelt
                self._model_error(model, base, detail)
            return None

    def _model_error(self, model: type[BaseModel], base: Location, detail: Mapping[str, Any]) -> None:
        loc: Location = detail["loc"]
        location = (*base, *loc)
        name = str(loc[-1]) if loc else ""
        if detail["type"] == "extra_forbidden":
            hint = did_you_mean(name[:64], fields_at(model, loc[:-1]))
            if _SPLIT_CALL.search(name):
                hint = "; quote text that contains a comma"
            self._say("RB101", f"unknown field {name[:64]!r}{hint}", location, key=True)
        elif detail["type"] == "missing":
            self._say("RB102", f"{name!r} is missing; write `{name}: …`", location[:-1])
        else:
            place = self._doc.place(location)
            # Each member of a union reports its own; what is empty is said already.
            if any(place_of(e) == place for e in self._errors):
                return
            label = ".".join(str(p) for p in location if isinstance(p, str)) or "runbook"
            self._say_at("RB108", f"{label[:120]}: {told(detail)}", place)

    def _cross_check(self, model: RunbookModel, steps: Sequence[RunbookStep | None]) -> None:
        if model.hold >= model.max_age:
            self._say(
                "RB115",
                "what has held this long is always stale; make hold shorter than max_age",
                ("hold",),
            )
        earlier: list[RunbookStep] = []
        for i, step in enumerate(steps):
            if step is None:
                continue
            if any(step.id == e.id for e in earlier):
                self._say("RB111", f"two steps are called {step.id!r}; rename one", ("steps", i, "id"))
            self._reachable(i, step, earlier)
            self._way_back(i, step)
            earlier.append(step)

    def _reachable(self, i: int, step: RunbookStep, earlier: Sequence[RunbookStep]) -> None:
        """That the step can come about, and can be verified before it ends."""
        lasts = getattr(step.params, "hold", None)
        if isinstance(lasts, float) and lasts <= step.verify.within_s:
            what = "the effect ends before it can be verified; make `for` longer than verify.within"
            self._say("RB115", what, ("steps", i, step.action, "for"))
        if step.timeout_s is not None and step.timeout_s < step.verify.within_s:
            what = "timeout is shorter than verify.within, which is then never reached; make it longer"
            self._say("RB115", what, ("steps", i, "timeout"))
        if step.verify.min_calls == 0 and any(
            t.measure in ("errors", "latency_s") for t in step.verify.expect
        ):
            what = "one call would prove it; write how many it takes, such as 20"
            self._say("RB115", what, ("steps", i, "verify", "min_calls"))
        same = next((e for e in earlier if e.action == step.action and e.params == step.params), None)
        if same is not None:
            what = f"does what step {same.id!r} has done already; change it, or leave it out"
            self._say("RB115", what, ("steps", i))

    def _way_back(self, i: int, step: RunbookStep) -> None:
        operation = step.implementation.effect == "operation"
        if step.undo == "none" and not operation:
            what = "a lease can always be let go; leave `undo` out"
        elif step.undo != "none" and (step.undo == "hook") != operation:
            right = "hook, or none" if operation else "release"
            what = f"{step.action} is not taken back by {step.undo}; write {right}"
        elif step.undo == "none" and step.approval is None:
            what = "what cannot be taken back asks a person first; give the step an `approval`"
        else:
            return
        self._say("RB116", what, ("steps", i, "undo"))


def load_texts(
    texts: Mapping[str, str | bytes],
    *,
    actions: Actions,
    source: Literal["packaged", "directory"] = "directory",
) -> RunbookSet:
    """Runbooks from texts by path; the pure half of `load_runbooks`.

    Raises: RunbookErrors with everything that is wrong in any of them.
    """
    found: dict[str, Runbook] = {}
    errors: list[ConfigError] = []
    for path, text in texts.items():
        runbook, wrong = check_runbook(text, path, actions, source)
        errors += wrong
        if runbook is None:
            continue
        if runbook.name in found:
            what = f"{runbook.name!r} is taken by {found[runbook.name].path}; rename one"
            errors.append(ConfigError(what, where=f"{path}:1:1", code="RB111"))
            continue
        found[runbook.name] = runbook
    if errors:
        raise RunbookErrors(errors)
    return RunbookSet(tuple(found.values()))


def library(*, actions: Actions) -> RunbookSet:
    """The runbooks that are shipped; each defaults to `suggest`."""
    folder = importlib.resources.files("flyball.runbooks") / "library"
    texts = {f"library/{f.name}": f.read_text("utf-8") for f in folder.iterdir() if f.name.endswith(".yaml")}
    return load_texts(dict(sorted(texts.items())), actions=actions, source="packaged")


def load_runbooks(
    paths: Sequence[str | Path] = (),
    *,
    actions: Actions,
    mode_override: Mapping[str, Mode] | None = None,
    packaged: bool = True,
) -> RunbookSet:
    """Runbooks of files and folders (`*.yaml`, `*.yml`), over those that are shipped: an equal name replaces the shipped one.

    Args:
        actions: what steps may do; `flyball.remediation.actions.registry()`.
        mode_override: mode by name, for demos, labs and tests; the environment's ceiling still holds.

    Raises: RunbookErrors with everything that is wrong; then nothing is loaded.
    """
    texts, errors = read_texts(paths)
    try:
        own = load_texts(texts, actions=actions)
    except RunbookErrors as e:
        errors += e.errors
    if errors:
        raise RunbookErrors(errors)
    merged = {r.name: r for r in library(actions=actions)} if packaged else {}
    merged.update(own.by_name)
    for name, mode in (mode_override or {}).items():
        if name not in merged:
            raise ConfigError(
                f"no runbook is called {name!r}{did_you_mean(name, merged)}", where="mode_override"
            )
        if mode not in MODES:
            raise ConfigError(f"unknown mode {mode!r}{did_you_mean(mode, MODES)}", where="mode_override")
        merged[name] = replace(merged[name], mode=mode)
    return RunbookSet(tuple(merged.values()))


def read_texts(paths: Sequence[str | Path]) -> tuple[dict[str, bytes], list[ConfigError]]:
    """The bytes of every `*.yaml` and `*.yml` of files and folders by path, in order; and what could not be read.

    Of a file that is too long only so much is read that `parse` refuses it.
    """
    texts: dict[str, bytes] = {}
    errors: list[ConfigError] = []
    for path in map(Path, paths):
        try:
            for file in _files(path):
                with file.open("rb") as f:
                    texts[str(file)] = f.read(4 * MAX_BYTES + 1)
        except OSError as e:
            what = f"cannot be read: {e.strerror or e}"
            errors.append(ConfigError(what, where=f"{path}:1:1", code="RB120"))
    return texts, errors


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(f for f in path.iterdir() if f.suffix in (".yaml", ".yml") and f.is_file())
    if path.exists() and not path.is_file():
        raise OSError(0, "neither a file nor a folder")
    return [path]


__all__ = [
    "Runbook", "RunbookErrors", "RunbookSet", "RunbookStep", "check_document", "check_runbook", "library", "load_runbooks",
    "load_texts", "place_of", "read_texts",
]  # fmt: skip
