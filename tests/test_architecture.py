"""The folders of the package: who may import whom, and where each heavy library lives."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import nicprune

ROOT = Path(nicprune.__file__).parent

FOLDERS = [
    "cli",
    "bench",
    "experiments",
    "report",
    "runtime",
    "storage",
    "evaluation",
    "methods",
    "training",
    "pruning",
    "channels",
    "codecs",
    "data",
    "common",
]
"""From top to bottom: a file imports from its own folder or from those below it. The files at the
root are above all.
"""

HOMES: dict[str, tuple[str, ...]] = {
    "torch_pruning": ("codecs.*",),
    "fvcore": ("pruning.cost", "pruning.operators"),
    "pandas": ("report.*",),
    "matplotlib": ("report.*",),
    "jinja2": ("report.*",),
    "bjontegaard": ("report.*",),
    "typer": ("cli.*",),
    "lightning_fabric": ("training.environment",),
    "lightning": (),
    "pytorch_optimizer": ("training.optimizers",),
    "safetensors": ("storage.checkpoint",),
    "onnx": ("storage.export",),
    "pytorch_msssim": ("evaluation.quality",),
    "compressai": ("codecs.*", "channels.tracer", "pruning.removal", "evaluation.padding"),
    "numba": ("codecs.kernels",),
    "av": ("data.video_frames",),
    "psutil": ("common.machine",),
}
"""The only files that may import each heavy library."""

FILES = sorted(path for path in ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    """A file's dotted name below the package; of a folder's `__init__`, the folder's."""
    return (
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    )


MODULES = {module_of(path): path for path in FILES}


@functools.cache
def imports(path: Path) -> list[str]:
    """Every module that a file imports, anywhere in it, as dotted names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            module = node.module or ""
            for alias in node.names:  # `from nicprune.report import plots` imports a file too
                inner = f"{module}.{alias.name}"
                found.append(inner if inner.removeprefix("nicprune.") in MODULES else module)
    return list(dict.fromkeys(found))


def own_imports(path: Path) -> list[str]:
    """The files of this package that a file imports, by their names in `MODULES`."""
    return [
        module.removeprefix("nicprune").lstrip(".")
        for module in imports(path)
        if module.split(".")[0] == "nicprune"
    ]


def rank(module: str) -> int:
    """0 for the files at the root, then by `FOLDERS`."""
    return 0 if module in ("", "__main__") else 1 + FOLDERS.index(module.split(".")[0])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_from_its_own_folder_or_below(path: Path) -> None:
    module = module_of(path)
    assert module in ("", "__main__") or module.split(".")[0] in FOLDERS, (
        f"{path.name} lies in no folder of FOLDERS"
    )
    for target in own_imports(path):
        if target == "" and module:
            assert module.startswith("cli") or rank(module) <= 3, (
                f"{module} imports the package itself"
            )
            continue
        assert rank(target) >= rank(module), f"{module} imports {target} from above"


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.stem == "__init__"], ids=lambda p: module_of(p) or "nicprune"
)
def test_a_folder_says_what_lives_in_it(path: Path) -> None:
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert told and (path.parent == ROOT or "May use" in told), (
        f"{path}: say in one sentence what lives here, and what it may use"
    )


def test_methods_never_import_each_other() -> None:
    machinery = {
        "methods.contract",
        "methods.levels",
        "methods.loop_check",
        "methods.points",
        "methods.trained_part",
        "methods.operating_point",
        "methods.widths",
        "methods.domains",
        "methods.bitstream",
        "methods.compatibility",
        "methods.attaching",
        "methods.composition",
        "methods.hardening",
        "methods.with_teacher",
    }
    parts = {  # of one method, in several files
        "methods.gating.method": {"methods.gating.gate", "methods.gating.execution"},
        "methods.gating.execution": {"methods.gating.gate"},
        "methods.multi_width.slimmable": {"methods.multi_width.lambda_schedule"},
        "methods.composition": {"methods.multi_width.lambda_schedule"},
        "methods.pruners.mask_decay": {"methods.pruners.gradual"},
        "methods.pruners.group_lasso": {"methods.pruners.gradual"},
    }
    adapting = {m for m in MODULES if m.startswith("methods.adaptation.")}
    parts |= {m: adapting - {m, "methods.adaptation.method"} for m in adapting}
    modulators = [m for m in MODULES if m.startswith("methods.variable_rate.")]
    parts |= {m: {"methods.variable_rate.modulation"} for m in modulators}
    for module, path in MODULES.items():
        if module.startswith("methods."):
            others = (
                {target for target in own_imports(path) if target.startswith("methods")}
                - machinery
                - parts.get(module, set())
            )
            assert not others, f"{module} imports {others}; methods know only the contract"


def test_no_imports_go_in_a_circle() -> None:
    graph = {module: set(own_imports(path)) - {module} for module, path in MODULES.items()}
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
    users = {
        module
        for module, path in MODULES.items()
        if any(m.split(".")[0] == library for m in imports(path))
    }
    strangers = {
        user
        for user in users
        if not any(user == home or home == f"{user.split('.')[0]}.*" for home in HOMES[library])
    }
    assert not strangers, (
        f"{library} is imported in {sorted(strangers)}, its home is {HOMES[library]}"
    )


LAYER_CLASSES = set(
    "GDN GDN1 MaskedConv2d CheckerboardMaskedConv2d EntropyBottleneck EntropyBottleneckVbr"
    " GaussianConditional LowerBound Conv2d ConvTranspose2d BatchNorm2d LayerNorm".split()
)
LAYER_ATTRIBUTES = set(
    "gamma_reparam beta_reparam quantiles mask in_channels out_channels in_features".split()
)
KNOWS_LAYERS = {
    "codecs.evc": "is an architecture, built of layers",
    "codecs.temporal": "is an architecture, built of layers",
    "codecs.fast_coding": "replaces a method of the Gaussian conditional while it codes",
}


def layer_words(path: Path) -> set[str]:
    """Classes of layers that a file names, and attributes that only some layers have."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name | ast.alias):
            found |= LAYER_CLASSES & {node.id if isinstance(node, ast.Name) else node.name}
        elif isinstance(node, ast.Attribute):
            found |= (LAYER_CLASSES | LAYER_ATTRIBUTES) & {node.attr}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= (LAYER_CLASSES | LAYER_ATTRIBUTES) & {node.value}
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute):
            found |= {"groups"} & {node.left.attr} if ast.unparse(node).endswith((" 1",)) else set()
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_layer_types_are_known_in_one_place(module: str) -> None:
    if not module.startswith("codecs.layer_kinds") and module not in KNOWS_LAYERS:
        found = layer_words(MODULES[module])
        assert not found, f"{module} knows of layers: {sorted(found)}; ask codecs.layer_kinds"


def test_public_names_are_things_and_not_modules() -> None:
    import importlib
    import types

    for path in FILES:
        if path.stem != "__main__":
            importlib.import_module(
                ".".join(["nicprune", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(
                    ".__init__"
                )
            )
    for name in nicprune.__all__:
        assert not isinstance(getattr(nicprune, name), types.ModuleType), (
            f"a file of the same name hides nicprune.{name}"
        )
