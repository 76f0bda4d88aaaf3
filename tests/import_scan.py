"""Reads which module imports which, from the source alone: nothing is executed. Used by test_layout."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("gr", "kernels", "launch")
LINKED = ("kernels", "launch")


@dataclass(frozen=True)
class Import:
    """One import statement: ``module`` (in ``path``, at ``line``) imports ``target``, both dotted."""

    path: Path
    line: int
    module: str
    target: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line} ({self.module}) imports {self.target}"


def python_files(root: Path, folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    """Python files below ``folders``, each once: links such as gr/kernels are not followed."""
    found = []
    for folder in folders:
        for here, names, files in os.walk(root / folder, followlinks=False):
            names[:] = [name for name in names if name != "__pycache__" and not name.startswith(".")]
            found += [Path(here) / name for name in files if name.endswith(".py")]
    return sorted(found)


def module_name(root: Path, path: Path) -> str:
    """Dotted name under which ``path`` is imported; kernels/ and launch/ live below ``gr``."""
    parts = path.relative_to(root).with_suffix("").parts
    if parts[0] in LINKED:
        parts = ("gr", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node below, bodies of functions included, of ``if TYPE_CHECKING:`` excluded."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for other in child.orelse:
                yield other
                yield from _statements(other)
            continue
        yield child
        yield from _statements(child)


def _targets(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    """Pairs (module named, name taken from it or ""). ``package`` resolves relative imports."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        yield from ((base, alias.name) for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            yield node.args[0].value, ""


def imports(root: Path, folders: tuple[str, ...] = FOLDERS) -> list[Import]:
    """All imports, those inside functions and ``import_module("literal")`` too."""
    files = python_files(root, folders)
    known = {module_name(root, path) for path in files}
    found = []
    for path in files:
        module = module_name(root, path)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            for base, name in _targets(node, package):
                inner = f"{base}.{name}"
                # `from gr import flops` takes a module, `from gr.flops import peak` a name out of one.
                part = base == "gr" and name and not name.startswith("__")
                target = inner if name and (inner in known or part) else base
                found.append(Import(path.relative_to(root), node.lineno, module, target))
    return found


def first_circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle in a graph as a list that starts and ends with the same node; empty if there is none."""
    state: dict[str, int] = {}

    def visit(node: str, trail: list[str]) -> list[str]:
        state[node] = 1
        for other in sorted(edges.get(node, ())):
            if state.get(other) == 1:
                return [*trail[trail.index(other) :], other]
            if other not in state and (circle := visit(other, [*trail, other])):
                return circle
        state[node] = 2
        return []

    for start in sorted(edges):
        if start not in state and (circle := visit(start, [start])):
            return circle
    return []
