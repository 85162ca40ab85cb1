"""The house stands as DESIGN says: one direction of imports, pure parts pure, no dead rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("core", "streams", "detectors", "incidents", "runbooks", "remediation", "lab", "app")
PURE = ("core", "detectors", "incidents", "runbooks")
CLOCKS = {
    "time.time", "time.monotonic", "time.perf_counter", "time.sleep", "datetime.now", "datetime.utcnow",
    "datetime.datetime.now", "datetime.datetime.utcnow", "date.today", "os.getenv", "os.environ", "random.random",
    "np.random.seed", "numpy.random.seed", "np.random.rand", "uuid.uuid4", "open",
}  # fmt: skip


def sources(*parts: str) -> Iterator[Path]:
    for part in parts:
        yield from sorted((ROOT / part / "flyball").rglob("*.py"))


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return ".".join(relative.with_suffix("").parts[1:]).removesuffix(".__init__")


def test_the_namespace_root_has_no_init_file() -> None:
    """One `flyball/__init__.py` would hide every other part of the namespace."""
    assert [p for part in PARTS for p in (ROOT / part / "flyball").glob("__init__.py")] == []


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_marked_as_typed(part: str) -> None:
    assert (ROOT / part / "flyball" / part / "py.typed").exists()


def test_pure_parts_read_no_clock_no_environment_and_no_hidden_randomness() -> None:
    found = []
    for path in sources(*PURE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in CLOCKS:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}")
    assert found == []


def test_broad_excepts_stay_below_one_in_a_thousand_lines() -> None:
    lines, broad = 0, []
    for path in sources(*PARTS):
        text = path.read_text()
        lines += text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and (
                node.type is None or getattr(node.type, "id", "") in {"Exception", "BaseException"}
            ):
                broad.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(broad) <= max(1, lines // 1000), broad


def test_no_module_is_dead() -> None:
    """Every module is imported by another, is found by a registry, or is an entry point."""
    registries = ("detectors/flyball/detectors", "formats", "notifiers", "actions", "migrations", "versions")
    entry_points = {"flyball.app.cli", "flyball.app.__main__"}
    text = {
        p: p.read_text()
        for p in [*sources(*PARTS), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    }
    dead = []
    for path in sources(*PARTS):
        name = module_name(path)
        parent, _, leaf = name.rpartition(".")
        if (
            path.name == "__init__.py"
            or name in entry_points
            or any(path.parent.as_posix().endswith(r) for r in registries)
        ):
            continue
        used = (f"import {name}", f"from {name} ", f"from {parent} import", f'"{name}')
        if not any(
            any(u in t for u in used[:2]) or (used[2] in t and leaf in t) or used[3] in t
            for p, t in text.items()
            if p != path and "tests" not in p.parts
        ):
            dead.append(name)
    assert dead == []


def test_importing_core_is_quick_because_it_loads_little() -> None:
    """Counts modules instead of seconds: a time would depend on the machine."""
    code = (
        "import sys, flyball.core.events, flyball.core.incident, flyball.core.ports;"
        "print([m for m in ('numpy', 'pydantic', 'httpx', 'sqlalchemy', 'river', 'yaml') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_nothing_names_a_package_registry_or_a_path_of_one_machine() -> None:
    hosts = (
        "pypi" + ".org",
        "pythonhosted" + ".org",
        "npmjs" + ".org",
        "repo.maven" + ".apache.org",
        "/work" + "/",
    )
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    found = []
    for name in tracked:
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 2_000_000:
            content = path.read_bytes()
            found += [f"{name}: {h}" for h in hosts if h.encode() in content]
    assert found == []
