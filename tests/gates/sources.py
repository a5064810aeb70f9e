"""Which files make up the package, and what outside names does one refer to?"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "shardpoint"


def package_files() -> list[Path]:
    """Return every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def shipped_files() -> list[Path]:
    """Return every Python file that users run: the package, the examples and the compat distributions."""
    return package_files() + sorted(path for folder in ("examples", "compat") for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """Return the dotted name of one of `package_files()`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def references(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield `("os.fsync", node)` for every use of an imported name, under whatever local name it was imported."""
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                origins[alias.asname or top] = alias.name if alias.asname else top
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                origins[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", node
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in origins:
                yield ".".join([origins[inner.id], *reversed(parts)]), node


def place(path: Path, node: ast.AST) -> str:
    """Return `file:line` of a node, for a failure's message."""
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
