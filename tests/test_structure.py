"""How the package is built: its rooms, the sizes of modules and functions, and tests that stand on their own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

import amoeba_plugin

ROOT = Path(__file__).parent.parent
PACKAGE = Path(amoeba_plugin.__file__).parent
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py") if "benchmarks" not in path.parts)
LONGEST_FUNCTION, LONGEST_MODULE, MOST_ARGUMENTS = 50, 350, 7
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, list[str]]]:
    """Yield where every function of the package stands, itself, and the lines of its module."""
    for path in MODULES:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, FUNCTIONS):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node, text.splitlines()


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Count a function's lines without its docstring, comments and blank lines."""
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node)
    docstring = range(first.lineno, (first.end_lineno or 0) + 1) if documented else range(0)
    numbered = enumerate(lines[node.lineno - 1 : node.end_lineno], start=node.lineno)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and number not in docstring for number, line in numbered)


def test_the_top_of_the_package_holds_what_everybody_uses():
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {
        "__init__.py", "__main__.py", "_version.py", "cli.py", "cli_deployment.py", "cli_serving.py",
        "cli_training.py",
        "errors.py", "py.typed", "shape.py",
    }  # fmt: skip


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_says_what_comes_in_and_what_goes_out(room: Path):
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    assert said.splitlines()[1:], "a few lines"
    assert "In: " in said
    assert "Out: " in said


def test_functions_are_short():
    long = {where: count for where, node, lines in functions() if (count := code_lines(node, lines)) > LONGEST_FUNCTION}
    assert long == {}


def test_functions_take_few_arguments_but_what_a_user_sets_by_name():
    many = [
        where
        for where, node, _ in functions()
        if len([each for each in node.args.args if each.arg not in ("self", "cls")]) > MOST_ARGUMENTS
        and not where.startswith("cli")  # Typer makes an option of each
    ]
    assert many == []


def test_modules_are_one_topic():
    sizes = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: size for name, size in sizes.items() if size > LONGEST_MODULE} == {}
    assert median(sizes.values()) <= 120


def test_no_test_needs_another_tests_file():
    found = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text()))
        for module in (
            [node.module or ""] if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        )
        if module.rpartition(".")[2].startswith("test_") or module == "conftest"
    ]  # fmt: skip
    assert found == []
