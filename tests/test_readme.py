"""Every example of the README and of the documentation runs, with fewer steps; commands exist and
do what is said.
"""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import typer
import yaml
from helpers_latency import table_of
from typer.testing import CliRunner

from nicprune.cli.application import app
from nicprune.common.config import StrictConfig
from nicprune.data import images as data
from nicprune.experiments.recipe_files import read_recipe
from nicprune.experiments.recipe_parser import parse_recipe
from nicprune.methods import METHODS, Method, contract
from nicprune.report import folder as report_folder

README = Path(__file__).parent.parent / "README.md"
pytest.importorskip("skimage", reason="the README's examples use scikit-image's photographs")


PAGES = {
    str(path.relative_to(README.parent)): path
    for path in (README, *sorted((README.parent / "docs").rglob("*.md")))
}


def blocks(language: str, page: Path = README) -> list[str]:
    """The code blocks of one language in a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


EXAMPLES = {
    f"{name}-{number}": code
    for name, path in PAGES.items()
    for number, code in enumerate(blocks("python", path))
    if not code.startswith(("# fault: do not run", "# own: "))
}
SMALL = 'optimizer="soap", patch_size=64, batch_size=1, progress=False'


@pytest.mark.parametrize(
    "example", sorted({code: name for name, code in EXAMPLES.items()}.values())
)
def test_python_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer and smaller steps; what stands on several pages runs once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NICPRUNE_CACHE", str(tmp_path / "cache"))
    # Times are made up: whether a budget can be met must not depend on what else the machine does.
    monkeypatch.setattr(
        "nicprune.runtime.latency.measure_latency", lambda codec, *_: table_of(codec)
    )
    monkeypatch.setattr(
        "nicprune.runtime.latency_refinement.seconds_of_parts",
        lambda codecs, table: [
            dict.fromkeys(table.parts, 1 / (1 + n)) for n, _ in enumerate(codecs)
        ],
    )
    code = EXAMPLES[example]
    few = 16 if "scalable_encoder" in code else 4  # four for each encoder
    code = re.sub(r'steps(=|": )\d+', rf"steps\g<1>{few}", code)
    exec(
        compile(code.replace('optimizer="soap", batch_size=2', SMALL), example, "exec"),
        {"__name__": "readme"},
    )


def test_a_method_of_ones_own_as_the_page_shows_it(tmp_path: Path) -> None:
    """In a process of its own, since what is registered stays."""
    for code in blocks("python", PAGES["docs/howto/add_a_method.md"]):
        file = tmp_path / code.splitlines()[0].removeprefix("# own: ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(code, encoding="utf-8")
    assert len((tmp_path / "my_methods" / "own_norm.py").read_text().splitlines()) <= 36
    use = tmp_path / "use.py"
    use.write_text(use.read_text() + "import my_methods.own_layer\n")
    done = elsewhere.run(
        f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path.insert(0, '')\n" + use.read_text()
    )
    assert done.returncode == 0, done.stderr[-800:]
    assert 9 < float(done.stdout) < 11.5  # half of 22.97, in multiples of 16


ROLES = [
    role
    for role in vars(contract).values()
    if isinstance(role, type) and issubclass(role, Method) and role.__module__ == contract.__name__
]


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.__name__)
def test_the_page_lists_what_each_role_has(role: type[Method]) -> None:
    page = PAGES["docs/howto/add_a_method.md"].read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", page, re.MULTILINE))
    told = set(re.findall(r"`(\w+)`", rows[role.__name__])) - {known.__name__ for known in ROLES}
    inherited = {name for base in role.__mro__[1:] for name in vars(base)}
    own = {name for name in vars(role) if not name.startswith("_")} - inherited
    if role is Method:
        own -= {"codec", "groups", "cost"}  # what a method is given
        declared = set(Method.__annotations__)
        assert all(f"`{name}`" in page for name in declared)
        own -= declared - {"Config"}
    assert own <= told
    assert all(hasattr(role, name) or name in role.__annotations__ for name in told)


def commands(page: str = "docs/command_line.md") -> list[list[str]]:
    """The commands of nicprune in a page."""
    lines = [line for block in blocks("console", PAGES[page]) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("nicprune ")]


@pytest.mark.parametrize("page", [name for name in PAGES if name != "docs/command_line.md"])
def test_commands_elsewhere_are_parsed(page: str) -> None:
    """Their names and options exist; those of the page on the command line are run below."""
    group: Any = typer.main.get_command(app)
    for _, name, *arguments in commands(page):
        group.commands[name].make_context(name, list(arguments))
        if name in ("run", "check"):
            sets = [value for flag, value in pairwise(arguments) if flag == "--set"]
            read_recipe(arguments[0], sets)


SLOW = {"bench"}
"""Measured elsewhere (tests/test_bench.py); here only that the README names it right."""


def test_commands_run_in_the_order_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    import nicprune as nip

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(README.parent / "recipes")
    nip.save(
        nip.attach(
            nip.load_codec("demo-hyperprior", 1), "magnitude", budget={"macs": 0.5}
        ).harden(),
        "demo-q3-2x.safetensors",
    )
    nip.save(
        nip.attach(nip.load_codec("demo-hyperprior", 3), "bit_rate_modulator", qualities=[1, 2, 3]),
        "demo-all-rates.safetensors",
    )
    ladder = nip.attach(
        nip.load_codec("demo-hyperprior", 3),
        "scalable_encoder",
        encoders=2,
        share=0.3,
        decay_steps=8,
    )
    nip.fit(ladder, "samples", steps=8, batch_size=1, patch_size=64, progress=False)
    nip.save(ladder.harden(), "demo-ladder.safetensors")
    data.write_png(
        data.read_image(data.sample_photographs("test")[0]).float() / 255, tmp_path / "photo.png"
    )
    (tmp_path / "reports").mkdir()
    shown = (
        "title: Reports\nsections:\n- {title: A codec, report: quickstart, rows: [{arm:"
        " mask_decay}]}\n"
    )
    (tmp_path / "reports" / "overview.yaml").write_text(shown, encoding="utf-8")
    monkeypatch.setattr(data, "SAMPLE_TEST", data.SAMPLE_TEST[:1])  # one photograph shows it
    plots = report_folder.plots_in_order
    request.getfixturevalue("undrawn")
    for command in commands():
        assert command[0] == "nicprune"
        arguments = command[1:]
        if arguments[0] in SLOW:
            arguments = [arguments[0], "--help"]
        if arguments[0] == "time":
            arguments += ["--seconds", "0"]
        if arguments[:2] == ["run", "recipes/quickstart.yaml"]:
            arguments += [
                "--quiet",
                "--set",
                "sparsify.steps=2",
                "--set",
                "finetune.steps=1",
                "--set",
                "qualities=[1]",
                "--set",
                "training.batch_size=1",
            ]
        if arguments[0] == "check":
            arguments += ["--set", "qualities=[3]"]
        if arguments[0] == "report":
            monkeypatch.setattr(report_folder, "plots_in_order", plots)  # once is enough
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0 and result.exception is None, (
            f"{' '.join(command)}: {result.output}{result.exception!r}"
        )
    assert (tmp_path / "reports" / "again" / "index.html").exists() and (
        tmp_path / "onnx" / "g_a.onnx"
    ).exists()
    assert "A codec" in (tmp_path / "reports" / "README.md").read_text(encoding="utf-8")


def cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def test_tables_of_reports_are_those_of_the_reports() -> None:
    """A table below a line that ends with `reports/NAME/` has that report's figures."""
    text = README.read_text(encoding="utf-8")
    tables = re.findall(r"\(`reports/(\w+)/`\):\n\n((?:\|.*\n)+)", text)
    assert {name for name, _ in tables} == {"evidence_hyperprior", "quickstart"}
    for name, table in tables:
        folder = README.parent / "reports" / name
        pages = "".join(
            page.read_text(encoding="utf-8")
            for page in (folder / "table.md", folder / "README.md")
            if page.exists()
        )
        there = {cells(line.replace("\\_", "_")) for line in pages.splitlines() if "|" in line}
        head, _, *rows = map(cells, table.splitlines())
        assert rows
        for row in (head, *rows):  # a page may have further columns to the right
            assert any(row == one[: len(row)] for one in there), (name, row)


def test_the_two_commands_are_those_that_ci_runs() -> None:
    ci = (README.parent / ".ci" / "run").read_text(encoding="utf-8")
    for line in blocks("console")[0].splitlines():
        install, _, command = line.partition(" && ")
        assert install.removeprefix("pip install ") in ci and command.split()[0] in ci


def test_the_page_of_recipes_has_a_recipe_and_the_settings_of_every_method() -> None:
    page = PAGES["docs/recipes.md"].read_text(encoding="utf-8")
    (example,) = blocks("yaml", PAGES["docs/recipes.md"])
    assert parse_recipe(yaml.safe_load(example) | {"name": "mine"}, "recipe").methods
    for name in METHODS:
        config: type = METHODS[name].Config
        while not vars(config).get("__annotations__") and config is not StrictConfig:
            config = config.__base__  # type: ignore[assignment]
        assert config is StrictConfig or re.search(rf"[\[ ]{config.__name__}[,\]]", page), name
