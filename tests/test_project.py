"""The project as a whole: what the wheel holds, that layers and documents agree with the code."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import statistics
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import typer

import amoeba_plugin
from amoeba_plugin import cli, modifiers
from amoeba_plugin.plugins.commands import INTEGRATIONS
from amoeba_plugin.plugins.manager import modules_named
from amoeba_plugin.recipes.files import shipped_recipes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "recipes" / "README.md").read_text()
HOOKS = (ROOT / "amoeba_plugin" / "plugins" / "README.md").read_text()
RESULTS = ROOT / "tests" / "benchmarks" / "RESULTS.md"
SKIPPED = {".git", ".venv", "amoeba_demo", "build", "dist", "__pycache__"}


def imported(program: str) -> list[tuple[str, str]]:
    """Return the modules of this package that a program imports from, each with a name."""
    found = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.ImportFrom)]
    return [(each.module, name.name) for each in found if "amoeba_plugin" in str(each.module) for name in each.names]


def project_files(*suffixes: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:  # not a checkout
        paths = [path for path in ROOT.rglob("*") if not SKIPPED.intersection(path.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file() and path.suffix in suffixes]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(directory.glob("*.whl")))


def test_the_wheel_holds_the_recipes(wheel: zipfile.ZipFile):
    for name, path in shipped_recipes().items():
        assert wheel.read(f"amoeba_plugin/recipes/shipped/{name}.yaml") == path.read_bytes()


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile):
    held = set(wheel.namelist())
    package = [
        path.relative_to(ROOT).as_posix()
        for path in project_files(".py", ".j2", ".typed", ".json", ".safetensors", ".yaml", ".md")
    ]
    assert {path for path in package if path.startswith("amoeba_plugin/")} <= held
    assert not [name for name in held if name.startswith(("tests/", "recipes/"))]


def test_an_unpacked_wheel_finds_its_recipes(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path)
    program = (
        "import sys, types; package = types.ModuleType('amoeba_plugin'); "
        f"package.__path__ = [{str(tmp_path / 'amoeba_plugin')!r}]; sys.modules['amoeba_plugin'] = package; "
        "from amoeba_plugin.recipes.files import shipped_recipes; print(sorted(shipped_recipes().items()))"
    )
    command = [sys.executable, "-S", "-c", f"import sys; sys.path += {sys.path!r}; {program}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for name in shipped_recipes():
        assert str(tmp_path / "amoeba_plugin" / "recipes" / "shipped" / f"{name}.yaml") in done.stdout


def test_the_version_is_said_once():
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", amoeba_plugin.__version__)
    assert f"## [{amoeba_plugin.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_layers_hold():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", ["amoeba_plugin", "amoeba_plugin.modifiers", "amoeba_plugin.smol"])
def test_exported_names_exist_and_are_sorted(module: str):
    loaded = importlib.import_module(module)
    assert list(loaded.__all__) == sorted(loaded.__all__)
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []


def test_every_hook_is_documented():
    hooks = [
        name
        for module in modules_named("hooks")
        for name in vars(importlib.import_module(module))
        if name.startswith("amoeba_")
    ]
    assert hooks
    for hook in hooks:
        assert f"### `{hook}`" in HOOKS


def test_modules_that_moved_are_where_the_changelog_says():
    table = (ROOT / "CHANGELOG.md").read_text().partition("#### Moved modules\n")[2].partition("\n#")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    modules = {name for _, now in rows for name in re.findall(r"`([a-z_.]+)`", now)}
    assert len(modules) > 50
    assert [name for name in modules if not (ROOT / "amoeba_plugin" / f"{name.replace('.', '/')}.py").is_file()] == []


def printed_commands() -> list[list[str]]:
    """The words of every ``amoeba ...`` in a shell block of a page, without comments."""
    pages = "".join(path.read_text() for path in project_files(".md"))
    shell = "".join(re.findall(r"^```bash\n(.*?)^```", pages, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in shell.splitlines() if line.startswith("amoeba ")]


@pytest.mark.parametrize("words", printed_commands(), ids=" ".join)
def test_commands_and_options_that_pages_print_exist(words: list[str]):
    if words[0] in INTEGRATIONS:  # its own tests look at its options
        return
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known


def test_every_modifier_and_each_of_its_fields_is_documented():
    for name in modifiers.__all__:
        modifier = getattr(modifiers, name)
        if not hasattr(modifier, "model_fields"):
            continue
        own = set(modifier.model_fields) - set(modifier.__mro__[1].model_fields)
        documented = RECIPES.partition(f"## `{name}`")[2].partition("\n## ")[0]
        assert {field for field in own if f"`{field}`" not in documented} == set(), name
        assert {field for field in own if f"{field}:" not in (modifier.__doc__ or "")} == set(), name


def test_every_shipped_recipe_is_documented():
    for name in shipped_recipes():
        assert f"`{name}`" in README


def test_every_room_is_on_the_page_for_contributors():
    """In the order of the contract that ``make layers`` checks."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    rooms = [room for room in layers if room.isalpha()]  # (serving) may be missing, __main__ is one line
    picture = (ROOT / "CONTRIBUTING.md").read_text().partition("```\n")[2].partition("```")[0]
    drawn = [name for line in picture.splitlines() for name in line.partition("   ")[0].split(", ")]
    assert drawn == rooms


def test_readme_is_short():
    assert len(README.splitlines()) <= 220


def test_figures_of_readme_are_those_of_the_demo():
    block = RESULTS.read_text().partition("<!-- results:start -->")[2].partition("<!-- results:end -->")[0]
    rows = {cells[0]: cells for cells in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|", block, re.MULTILINE)}
    dense, half = float(rows["dense"][2]), rows["12x1/2"]
    before, after = (float(each) - dense for each in half[2].split(" → "))
    assert f"{before:.2f} nats per token above the dense model's when selected and repaired, and {after:.2f}" in joined(
        README
    )
    closed = [int(cells[3].removesuffix(" %")) for cells in rows.values() if cells[3].endswith(" %")]
    (said,) = re.findall(r"closes (\d+) % of the gap", joined(README))
    assert abs(statistics.median(closed) - int(said)) <= 1  # the table's shares are rounded
    size, perplexity = re.findall(r"takes ([\d.]+) MB instead of .* to ([\d.]+)\.$", block, re.MULTILINE)[0]
    assert f"take {size} MB" in README
    assert f"at a perplexity of {perplexity} instead of" in README


def joined(page: str) -> str:
    return re.sub(r"\s+", " ", page)


def test_the_picture_of_readme_shows_the_table():
    """``python docs/gap.py`` draws it; how matplotlib writes the rest may change."""
    spec = importlib.util.spec_from_file_location("gap", ROOT / "docs" / "gap.py")
    gap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gap)
    page, drawn = RESULTS.read_text(), gap.PICTURE.read_text()
    assert len(gap.points(page)) == 8
    assert f"{gap.described(gap.points(page))}</desc>" in drawn
    assert f"{gap.described(gap.points(page))}</desc>" in gap.picture(page)
    assert "var(" not in drawn
    assert f"]({gap.PICTURE.relative_to(ROOT)})" in README


@pytest.mark.parametrize("page", [path for path in project_files(".md")], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_pages_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors_of(linked), target


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_no_file_names_a_place_on_somebodys_machine():
    private = re.compile(r"/(?:home|Users|work|root)/[\w.-]+")
    for path in project_files(".py", ".md", ".toml", ".txt", ".yaml", ".j2", ".json", ".cfg"):
        text = path.read_text(errors="ignore")
        if path.name == "tokenizer.json" or path == Path(__file__):
            continue
        assert private.findall(text) == [], path


def test_benchmarks_and_pages_import_what_there_is():
    """Nothing else runs them in the tests."""
    scripts = [path.read_text() for path in project_files(".py") if "benchmarks" in path.parts]
    pages = [path.read_text() for path in project_files(".md")]
    blocks = [block for page in pages for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)]
    names = [pair for program in (*scripts, *blocks) for pair in imported(program)]
    assert len(names) > 50
    assert [pair for pair in names if not is_there(*pair)] == []


def is_there(module: str, name: str) -> bool:
    """Tell whether a module has a name, or a module of that name in it."""
    loaded = importlib.import_module(module)
    return hasattr(loaded, name) or importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.xdist_group("project")
def test_groups_of_tests_stay_on_one_worker(request: pytest.FixtureRequest) -> None:
    """What takes minutes to make would be made by every worker else, without a word."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("runs in one process")
    assert request.node.nodeid.endswith("@project")
