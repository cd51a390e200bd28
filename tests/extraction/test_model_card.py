"""The card of a subnet has the licence of what it was cut from."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from amoeba_plugin.extraction.model_card import write_model_card


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        ("---\nlicense: llama3.2\nlicense_name: a name\nlanguage: en\n---\n# Base\n", ("llama3.2", "a name")),
        ("---\nlicense: [\n---\n# Damaged\n", (None, None)),
        ("# No metadata\n", (None, None)),
        (None, (None, None)),
    ],
)
def test_the_licence_of_the_base_goes_along(tmp_path: Path, card: str | None, wanted: tuple[str | None, str | None]):
    base, subnet = tmp_path / "base", tmp_path / "subnet"
    base.mkdir()
    subnet.mkdir()
    if card is not None:
        (base / "README.md").write_text(card)
    (subnet / "config.json").write_text("{}")
    write_model_card(subnet, {"base model": str(base)})
    found = ModelCard.load(subnet / "README.md").data
    assert (found.get("license"), found.get("license_name")) == wanted
    assert found.get("language") is None


def test_of_a_model_of_the_hub_that_was_never_downloaded_nothing_is_known(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    write_model_card(tmp_path, {"base model": "nobody/never-downloaded"})
    assert ModelCard.load(tmp_path / "README.md").data.get("license") is None
