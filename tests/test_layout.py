"""Imports go downwards only, and files stay small enough to read."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["core", "datasets", "modeling", "roi_data", "utils", "nn", "ops"]  # highest first
# May be imported by every room.
FREE = {"core.config", "core.config_yaml", "core.defaults", "core.errors", "core.attr_dict"}
FILES = sorted((ROOT / "lib").rglob("*.py"))


def imported_modules(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module in ROOMS:
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names.append(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "lib")))
def test_a_room_imports_only_from_rooms_below_it(path):
    room = path.relative_to(ROOT / "lib").parts[0]
    for name in imported_modules(path):
        target = name.split(".")[0]
        if target in ROOMS and name not in FREE:
            assert ROOMS.index(target) >= ROOMS.index(room), f"{room} imports {name}"
            assert not (room == "ops" and target == "utils")


def test_no_source_file_is_over_600_lines():
    sources = [p for p in ROOT.rglob("*") if p.suffix in {".py", ".cpp", ".cu", ".h"}]
    own = [p for p in sources if p.relative_to(ROOT).parts[0] in {"lib", "tools", "tests"}]
    generated = {p.with_suffix(s) for p in own for s in (".c", ".cpp") if p.suffix == ".pyx"}
    long = {str(p): len(p.read_text().splitlines()) for p in own if p not in generated}
    assert not {p: n for p, n in long.items() if n > 600}
