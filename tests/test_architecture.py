"""The floors of the package: who may import whom, where each heavy library lives, and how long a file may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nicprune

ROOT = Path(nicprune.__file__).parent

FLOORS: dict[str, int] = {
    **dict.fromkeys(("errors", "registry", "files", "settings", "progress", "runtime", "memory", "kernel_faults"), 0),
    **dict.fromkeys(("codecs", "cdf", "operations", "following", "tracing", "channels", "levels", "sampling"), 1),
    **dict.fromkeys(("layers", "masks", "surgery", "cost", "budget", "precision", "optimizers", "targets", "hooks"), 2),
    **dict.fromkeys(("gates", "skipping", "slicing", "schedule"), 2),
    **dict.fromkeys(("methods/*", "checkpoint", "profile"), 3),
    **dict.fromkeys(("training", "evaluation", "recipe", "data", "export", "container"), 4),
    **dict.fromkeys(("run", "jobs", "measuring", "report/*", "classical", "bench", "optimizer_bench", "timing"), 5),
    **dict.fromkeys(("__init__", "__main__", "cli"), 6),
}
"""The floor of each file; a file imports from its own floor or below."""

HOMES: dict[str, tuple[str, ...]] = {
    "torch_pruning": ("layers",),
    "fvcore": ("cost",),
    "pandas": ("report/*",),
    "matplotlib": ("report/*",),
    "jinja2": ("report/*",),
    "bjontegaard": ("report/*",),
    "typer": ("cli",),
    "lightning_fabric": ("training",),
    "lightning": (),
    "pytorch_optimizer": ("optimizers",),
    "safetensors": ("checkpoint",),
    "onnx": ("export",),
    "pytorch_msssim": ("evaluation",),
    "compressai": ("cdf", "codecs", "tracing", "layers", "surgery"),
}
"""The only files that may import each heavy library."""

FILES = sorted(path for path in ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    """A file's name in the tables above: its stem, or its folder with a star."""
    relative = path.relative_to(ROOT).with_suffix("")
    return f"{relative.parts[0]}/*" if len(relative.parts) > 1 else relative.name


def imports(path: Path) -> list[str]:
    """Every module that a file imports, anywhere in it, as dotted names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            found.append(node.module or "")
            if node.module == "nicprune":  # `from nicprune import cost` imports a file too
                found += [f"nicprune.{alias.name}" for alias in node.names if (ROOT / f"{alias.name}.py").exists() or (ROOT / alias.name).is_dir()]
    return found


def target_of(module: str) -> str:
    """The file, as named in the tables, that `nicprune.x.y` stands for."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    return f"{parts[0]}/*" if (ROOT / parts[0]).is_dir() else parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_from_its_own_floor_or_below(path: Path) -> None:
    name = name_of(path)
    assert name in FLOORS, f"{path.name} is new: state its floor in FLOORS of {Path(__file__).name}"
    for module in imports(path):
        if module.split(".")[0] != "nicprune" or (module == "nicprune" and FLOORS[name] == 6):
            continue
        target = target_of(module)
        assert target in FLOORS, f"{name} imports {module}, whose floor is not stated"
        assert FLOORS[target] <= FLOORS[name], f"{name} (floor {FLOORS[name]}) imports {module} (floor {FLOORS[target]}) from above"


def test_methods_never_import_each_other() -> None:
    machinery = ("base", "coding", "attached", "teaching")  # no methods themselves, each on those before it
    for path in (ROOT / "methods").glob("*.py"):
        if path.stem == "__init__":
            continue
        below = machinery[: machinery.index(path.stem)] if path.stem in machinery else ("base",)
        others = {m for m in imports(path) if m.startswith("nicprune.methods") and m not in [f"nicprune.methods.{name}" for name in below]}
        assert not others, f"{path.name} imports {others}; methods know only methods.base"


def test_no_imports_go_in_a_circle() -> None:
    graph = {name_of(p): {target_of(m) for m in imports(p) if m.startswith("nicprune.")} - {name_of(p)} for p in FILES if "*" not in name_of(p)}
    for start in graph:
        reached: set[str] = set()
        todo = [start]
        while todo:
            for target in graph.get(todo.pop(), ()):
                assert target != start, f"{start} imports itself in a circle"
                if target not in reached:
                    reached.add(target)
                    todo.append(target)


@pytest.mark.parametrize("library", sorted(HOMES))
def test_a_heavy_library_lives_in_its_own_file(library: str) -> None:
    users = {name_of(path) for path in FILES if any(m.split(".")[0] == library for m in imports(path))}
    assert users <= set(HOMES[library]), f"{library} is imported in {sorted(users - set(HOMES[library]))}, its home is {HOMES[library]}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_over_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_public_names_are_things_and_not_modules() -> None:
    import importlib
    import types

    for path in FILES:
        if path.stem != "__main__":
            importlib.import_module(".".join(["nicprune", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"))
    for name in nicprune.__all__:
        assert not isinstance(getattr(nicprune, name), types.ModuleType), f"a file of the same name hides nicprune.{name}"
