"""The active shape is the model's: every adapter follows it, copied, loaded, added or activated later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from amoeba_plugin.errors import AdapterError, ShapeError
from amoeba_plugin.smol import SmolConfig

SHAPE = "2x1/2"
SmolMaker = Callable[..., PeftModel]


@torch.no_grad()
def logits(model: PeftModel, tokens: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens).logits
    return found


def copy_parameters(model: PeftModel, name: str, other: str) -> None:
    parameters = dict(model.named_parameters())
    for path, value in parameters.items():
        if f".{name}" in path:
            parameters[path.replace(f".{name}", f".{other}")].data.copy_(value.data)


def test_an_adapter_that_is_added_and_filled_computes_what_it_was_copied_from(
    smol_model: SmolMaker, tokens: Tensor
) -> None:
    """As trainers make their frozen reference of an adapter."""
    model = smol_model()
    largest = logits(model, tokens)
    model.set_shape(SHAPE, [0, 3])
    expected = logits(model, tokens)
    assert not torch.allclose(expected, largest, atol=1e-3)
    model.add_adapter("ref", model.peft_config["default"])
    copy_parameters(model, "default", "ref")
    model.set_adapter("ref")
    assert str(model.shape) == SHAPE
    assert torch.equal(logits(model, tokens), expected)
    model.set_shape("4x1")  # while the other one is not active
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), largest)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: ForkingPickler.loads(ForkingPickler.dumps(model))])
def test_a_copied_model_is_at_the_same_shape(
    smol_model: SmolMaker, tokens: Tensor, copied: Callable[[PeftModel], PeftModel]
) -> None:
    model = smol_model()
    model.set_shape(SHAPE)
    expected = logits(model, tokens)
    other = copied(model)
    assert torch.equal(logits(other, tokens), expected)
    other.set_shape("4x1")
    assert torch.equal(logits(model, tokens), expected)


def test_an_adapter_that_is_loaded_later_follows(smol_model: SmolMaker, tokens: Tensor, tmp_path: Path) -> None:
    model = smol_model()
    model.save_pretrained(tmp_path)
    model.set_shape(SHAPE)
    expected = logits(model, tokens)
    model.load_adapter(str(tmp_path), "again")
    model.set_adapter("again")
    assert torch.equal(logits(model, tokens), expected)


def test_an_adapter_that_was_not_made_for_the_shape_refuses_to_run(
    smol_model: SmolMaker, smol_config: Callable[..., SmolConfig], tokens: Tensor
) -> None:
    model = smol_model()
    model.set_shape(SHAPE)
    model.add_adapter("whole", smol_config(depths=[4], widths=["1"], kept_layers=None))
    model.set_adapter("whole")
    assert str(model.shape) == SHAPE
    with pytest.raises(ShapeError, match=r"active shape is 2x1/2, and this adapter was made for depths \{4\} x widths"):
        logits(model, tokens)
    assert model.base_model.lora_factors("4x1")  # at a shape of its own it can be handed out
    model.set_shape("4x1")
    assert logits(model, tokens).isfinite().all()


def test_a_merged_adapter_keeps_the_model_where_it_is(smol_model: SmolMaker) -> None:
    """Also where another one is active beside it: its update is in the weights that both run on."""
    model = smol_model()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    model.set_shape(SHAPE)
    model.merge_adapter(["default"])
    with pytest.raises(AdapterError, match="adapter 'default' is merged at shape 2x1/2, so 3x1 cannot be set"):
        model.set_shape("3x1")
    model.set_shape(SHAPE)
    model.unmerge_adapter()
    model.set_shape("3x1")
    assert {str(model.base_model.router.weights(name).state.shape) for name in ("default", "other")} == {"3x1"}


def train(base: LlamaForCausalLM, config: SmolConfig, directory: Path, resume: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    rows = torch.randint(0, 50, (12, 8), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        str(directory), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.05, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row.clone()} for row in rows])
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2") if resume else None)
    found: dict[str, Tensor] = get_peft_model_state_dict(model)
    return {name: value.clone() for name, value in found.items()}


def test_a_training_that_is_resumed_draws_the_noise_that_it_would_have_drawn(
    base_model: Callable[..., LlamaForCausalLM], smol_config: Callable[..., SmolConfig], tmp_path: Path
) -> None:
    whole = train(base_model(), smol_config(), tmp_path, resume=False)
    resumed = train(base_model(), smol_config(), tmp_path, resume=True)
    other = train(base_model(), smol_config(router_seed=1), tmp_path / "other", resume=False)
    assert whole.keys() == resumed.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []
    assert any(not torch.equal(value, other[name]) for name, value in whole.items())


def test_adapters_of_earlier_versions_load(smol_model: SmolMaker, tokens: Tensor, tmp_path: Path) -> None:
    """They have no count of draws."""
    model = smol_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    counts = [key for key in tensors if key.endswith("draws")]
    assert len(counts) == 1
    save_file({key: value for key, value in tensors.items() if key not in counts}, path, {"format": "pt"})
    again = PeftModel.from_pretrained(copy.deepcopy(model).unload(), str(tmp_path))
    assert torch.equal(logits(again.eval(), tokens), logits(model, tokens))
