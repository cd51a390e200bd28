"""The page for PEFT users says what the code does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, InitVar, fields
from pathlib import Path

import pytest
from peft import PeftConfig

import amoeba_plugin
from amoeba_plugin.errors import ConfigError
from amoeba_plugin.smol import SmolConfig

PACKAGE = Path(amoeba_plugin.__file__).parent
PAGE = (PACKAGE / "smol" / "README.md").read_text()


def table(heading: str) -> Iterator[list[str]]:
    """The cells of the rows below a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    for line in re.findall(r"^\| `.*\|$", section, flags=re.MULTILINE):
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_every_field_is_named_with_its_default():
    documented = {name.strip("`"): default.strip("`") for name, _, default, *_ in table("Fields of `SmolConfig`")}
    own = [f for f in fields(SmolConfig) if f.name not in {f.name for f in fields(PeftConfig)}]
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in own}
    assert documented == {name: repr(value).replace("'", '"') for name, value in defaults.items()}
    aliases = [name for name, kind in SmolConfig.__annotations__.items() if InitVar.__name__ in str(kind)]
    assert aliases
    assert [name for name in aliases if f"`{name}`" not in PAGE] == []


def test_every_message_is_one_of_ours():
    sources = [*(PACKAGE / "smol").glob("*.py"), PACKAGE / "shape.py"]
    code = " ".join(path.read_text() for path in sources)
    code = re.sub(r'"\s+f?"', "", code)  # literals that go on in the next line
    messages = [message.strip("`") for message, _ in table("Limits and messages")]
    assert len(messages) > 5
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in code, message


def test_fields_that_the_page_denies_are_refused():
    (text,) = [what for message, what in table("Limits and messages") if "which LoRA has" in message]
    for name in ["use_dora", *re.findall(r"`(\w+)`", text)]:
        with pytest.raises(ConfigError, match=f"SMOL has no {name}, which LoRA has"):
            SmolConfig(**{name: True})
