"""Hashes of Python code that a user writes: of a module's file, and of the files that it imports.

Libraries are left out: their versions stand in records. So is this package.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

OWN = __name__.partition(".")[0]
"""This package."""


def source_digests(modules: Iterable[str]) -> dict[str, str]:
    """Return hashes of the code of modules and of what they import, by the names of modules.

    Comments and the layout of lines do not count.

    Args:
        modules: dotted names; those without a file are left out. The package of the first is the
            user's, even where it is installed beside libraries.
    """
    waiting = list(modules)
    roots = {name.partition(".")[0] for name in waiting[:1]}
    found: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name.partition(".")[0] == OWN:
            continue
        seen.add(name)
        file = _file(name)
        if file is None or not (name.partition(".")[0] in roots or _is_own(file)):
            continue
        found[name], imported = _read(file, name)
        waiting += imported
    return dict(sorted(found.items()))


def _file(name: str) -> Path | None:
    """Return the file of a module, without importing it: what has been imported so far must make
    no difference.
    """
    root, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(root)
    except (ImportError, ValueError):  # a module without a specification, such as __main__
        told = getattr(sys.modules.get(root), "__file__", None)
        return Path(told) if told and not rest else None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for place in spec.submodule_search_locations or ():
        path = Path(place, *rest)
        for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _is_own(file: Path) -> bool:
    """Return whether a file lies outside the folders of Python's library and of packages."""
    places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not any(file.resolve().is_relative_to(Path(place).resolve()) for place in places)


def _read(file: Path, name: str) -> tuple[str, list[str]]:
    """Return a hash of a file's code, and the names of what it may import."""
    try:
        content = file.read_bytes()
    except OSError:
        return "", []
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # imported by a function that has not run
        return hashlib.sha256(content).hexdigest(), []
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), list(_imports(tree, package))


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # above the package
                continue
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
