"""Docstrings: every public function and class has one, and none begins like a question."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nicprune

ROOT = Path(nicprune.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

QUESTION = re.compile(r"(What|How|Whether|Where|Which|Why|When)\b")
"""A docstring says what a thing does or is: "Return whether ...", "Largest ..."."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef


def public(node: ast.Module | ast.ClassDef, path: str) -> Iterator[tuple[str, Documented]]:
    """The public classes, functions and methods in a file or class, by name, and itself."""
    yield path, node
    for child in node.body:
        name = f"{path}:{child.name}" if hasattr(child, "name") else path
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public(child, name)
        elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            yield name, child


def strings(node: ast.AST) -> Iterator[str]:
    """Every docstring in a file, those below assignments included."""
    for parent in ast.walk(node):
        body = getattr(parent, "body", None)
        for child in body if isinstance(body, list) else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                value = child.value.value
                if isinstance(value, str):
                    yield inspect.cleandoc(value)


def inherits(path: Path, name: str) -> bool:
    """Whether a method has the docstring of the one that it overrides."""
    *_, qualified = name.split(":", 1)
    module = ".".join(["nicprune", *path.relative_to(ROOT).with_suffix("").parts])
    found: object = __import__(module.removesuffix(".__init__"), fromlist=["_"])
    for part in qualified.split(":"):
        found = getattr(found, part)
    return inspect.getdoc(found) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_public_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = [
        name
        for name, node in public(tree, path.stem)
        if ast.get_docstring(node) is None and not (":" in name and inherits(path, name))
    ]
    assert not bare, f"{bare}: no docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_docstring_begins_like_a_question(path: Path) -> None:
    for text in strings(ast.parse(path.read_text(encoding="utf-8"))):
        assert not QUESTION.match(text), f"{text.splitlines()[0]!r}: say what it does, or is"
