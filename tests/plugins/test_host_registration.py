"""`import amoeba_plugin` is enough, whatever is imported when; each case in a Python of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

KNOWS_SMOL = "from peft import PeftType; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as k; k[PeftType.SMOL]"
KNOWS_MODIFIERS = (
    "from llmcompressor.modifiers import ModifierFactory as f; "
    "f.create('SubnetExtractionModifier', allow_registered=True, allow_experimental=False, shape='2x1')"
)


def run(*lines: str) -> str:
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "lines",
    [
        ("import amoeba_plugin", "import peft", KNOWS_SMOL),
        ("import peft", "import amoeba_plugin", KNOWS_SMOL),
        ("from peft import LoraConfig", "from amoeba_plugin import SmolConfig", KNOWS_SMOL),
        ("import amoeba_plugin", "from llmcompressor import oneshot", KNOWS_MODIFIERS, KNOWS_SMOL),
        ("from llmcompressor import oneshot", "import amoeba_plugin", KNOWS_MODIFIERS),
        ("import amoeba_plugin.modifiers", KNOWS_MODIFIERS),
        ("import amoeba_plugin", "import importlib.util as u", "u.find_spec('peft')", "u.find_spec('llmcompressor')"),
    ],
)
def test_hosts_know_what_is_ours(lines: tuple[str, ...]) -> None:
    run(*lines)


def test_importing_the_package_imports_neither_host_nor_torch() -> None:
    run("import sys, amoeba_plugin", "assert not {'torch', 'peft', 'llmcompressor', 'transformers'} & set(sys.modules)")


def test_a_host_keeps_its_own_loader() -> None:
    run(
        "import amoeba_plugin, peft, importlib",
        "assert type(peft.__spec__.loader) is type(peft.__loader__) is importlib.machinery.SourceFileLoader",
    )


def test_every_public_name_is_there() -> None:
    run("import amoeba_plugin as a", "assert all(getattr(a, name) is not None for name in a.__all__)", "assert dir(a)")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    run("import amoeba_plugin as a", "assert not hasattr(a, 'SmallConfig')")
