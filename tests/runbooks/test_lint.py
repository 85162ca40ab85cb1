"""A corpus of broken runbooks: each is refused with the right code at the right line and column, and says what would be right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flyball.core.errors import ConfigError
from flyball.remediation.actions import registry
from flyball.runbooks import loader
from flyball.runbooks.lint import lint_paths, lint_texts
from flyball.runbooks.template import new_runbook

ACTIONS = registry()
CORPUS = Path(__file__).parent / "corpus"
"""One mistake a file; the first line says what is expected: `# expected: RB104 at 5:32`."""
FILES = sorted(CORPUS.glob("*.yaml"))
RIGHT = re.compile(r"; |\bmust\b|\bneeds\b|never read as all|stops one of|lie between")
GOOD = new_runbook("first-steps")

SPECIAL = {
    "nothing": (b"", "RB001", "1:1"),
    "only comments": (b"# when it burns\n", "RB001", "1:1"),
    "no utf-8": (GOOD.replace("platform", "plat\xe9forme").encode("latin-1"), "RB001", "10:12"),
    "utf-16": (GOOD.encode("utf-16"), "RB001", "1:1"),
    "a null byte": (GOOD.replace("platform", "plat\x00form").encode(), "RB001", "10:12"),
    "a bell": (GOOD.replace("platform", "plat\x07form").encode(), "RB001", "10:12"),
    "a line break that editors do not count": (GOOD.replace("platform", "pl\u2028at").encode(), "RB001", "10:10"),
    "too long": ((GOOD + "# " + "x" * 70_000 + "\n").encode(), "RB001", "1:1"),
    "too deep": (("runbook: " + "[" * 30 + "]" * 30 + "\n").encode(), "RB004", "1:34"),
    "a key that is a list": (b"? [runbook]\n: v1\n", "RB005", "1:3"),
    "not closed": (GOOD.replace("[25%, 100%]", "[25%, 100%").encode(), "RB001", "41:93"),
    "colon in plain text": (GOOD.replace("'errors({", "errors({").replace("0.1'", "0.1").encode(), "RB001", "28:30"),
    "what no escape gives": (b'runbook: "\\UFFFFFFFF"\n', "RB001", "1:13"),
    "a directive": (b"%YAML 9.9\n---\nrunbook: v1\n", "RB001", "1:1"),
    "one brace": (b"{", "RB001", "2:1"),
}  # fmt: skip


def first_line(path: Path) -> tuple[str, str]:
    found = re.match(r"# expected: (RB\d{3}) at (\d+:\d+)\n", path.read_text("utf-8"))
    assert found, f"{path.name} does not say what is expected"
    return found[1], found[2]


def told(errors: list[ConfigError]) -> list[str]:
    return [f"{e.code} {e.where.partition(':')[2]}" for e in errors]


def test_the_corpus_is_large_and_no_two_of_it_are_the_same() -> None:
    assert len(FILES) >= 150
    assert len({p.read_text().partition("\n")[2] for p in FILES}) == len(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.stem))
def test_a_broken_runbook_is_refused_with_its_code_at_its_place(path: Path) -> None:
    code, place = first_line(path)
    errors = lint_texts({path.name: path.read_bytes()}, actions=ACTIONS)
    assert f"{code} {place}" in told(errors)
    assert len(errors) <= 2, "one mistake is not told as many"
    for e in errors:
        assert RIGHT.search(e.what), f"says what is wrong, and not what would be right: {e}"
        assert "\n" not in str(e)


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_hardly_a_file_is_refused_in_one_sentence(name: str) -> None:
    data, code, place = SPECIAL[name]
    errors = lint_texts({"f.yaml": data}, actions=ACTIONS)
    assert told(errors) == [f"{code} {place}"], str(errors[0])
    assert RIGHT.search(errors[0].what)


def test_every_code_that_the_loader_documents_is_in_the_corpus() -> None:
    documented = set(re.findall(r"RB\d{3}", loader.__doc__ or ""))
    met = {first_line(p)[0] for p in FILES} | {code for _, code, _ in SPECIAL.values()}
    assert documented - met == {"RB120"}, "RB120 is of the disk"
    assert met <= documented


def test_what_lint_alone_finds_does_not_keep_a_runbook_from_running() -> None:
    untested = GOOD.partition("# Faults of the lab")[0] + "params: {unused: 1}\n"
    runbook, errors = loader.check_runbook(untested, "f.yaml", ACTIONS)
    assert (runbook is not None, errors) == (True, [])
    assert [e.code for e in lint_texts({"f.yaml": untested.encode()}, actions=ACTIONS)] == ["RB117", "RB118"]


def test_the_runbook_that_new_writes_is_right() -> None:
    assert lint_texts({"f.yaml": GOOD.encode()}, actions=ACTIONS) == []


def test_the_shipped_runbooks_are_without_a_finding() -> None:
    folder = Path(loader.__file__).parent / "library"
    count, errors = lint_paths([folder], actions=ACTIONS)
    assert count >= 1
    assert [str(e) for e in errors] == []


def test_two_of_one_name_are_told_at_the_second(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(GOOD)
    count, errors = lint_paths([tmp_path], actions=ACTIONS)
    assert (count, told(errors)) == (2, ["RB111 9:7"])
    assert "a.yaml" in errors[0].what


def test_what_cannot_be_read_is_told_and_the_rest_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.replace("HIGH", "HIHG"))
    count, errors = lint_paths([tmp_path / "gone.yaml", "/dev/zero", tmp_path], actions=ACTIONS)
    assert (count, [e.code for e in errors]) == (1, ["RB120", "RB120", "RB104"])


def test_a_mistake_in_one_param_is_told_once_for_each_place_that_uses_it() -> None:
    text = GOOD.replace("hold: 0s ", "params: {who: '$(id)'}\nhold: 0s ").replace(
        "best_healthy", "$params.who"
    )
    (error,) = lint_texts({"f.yaml": text.encode()}, actions=ACTIONS)
    assert error.code == "RB114"
