"""The parts of PEFT that SMOL relies on without a promise."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from amoeba_plugin.errors import PluginError
from amoeba_plugin.smol import SmolConfig, SmolModel, host, register_with_peft


def test_smol_is_a_member_like_any_other() -> None:
    member = PeftType("SMOL")
    assert member is PeftType["SMOL"] is PeftType.SMOL
    assert member in list(PeftType)
    assert (member.name, member.value, member == "SMOL", hash(member)) == ("SMOL", "SMOL", True, hash("SMOL"))
    assert pickle.loads(pickle.dumps(member)) is member  # noqa: S301  # bytes of our own
    assert copy.deepcopy(member) is member
    assert json.dumps({"peft_type": member}) == '{"peft_type": "SMOL"}'
    assert host.extend_peft_type("LORA") is PeftType.LORA


def test_registering_twice_changes_nothing() -> None:
    count = len(PeftType)
    register_with_peft()
    assert len(PeftType) == count
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SMOL] is SmolConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SMOL] is SmolModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SMOL] == "smol_"


def test_a_second_provider_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stranger:
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.SMOL, Stranger)
    with pytest.raises(PluginError, match=r"'smol' is registered by .*Stranger"):
        register_with_peft()


def test_an_untested_peft_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING):
        monkeypatch.delitem(mapping, PeftType.SMOL)
    monkeypatch.delitem(PEFT_TYPE_TO_PREFIX_MAPPING, "SMOL")
    monkeypatch.setattr(peft, "__version__", "9.9.9")
    with pytest.warns(UserWarning, match=r"PEFT 9.9.9 is outside the versions SMOL was tested with \(0.20, 0.21\)"):
        register_with_peft()
