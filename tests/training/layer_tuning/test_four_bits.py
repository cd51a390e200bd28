"""Layer tuning of a LoRA beside weights that bitsandbytes keeps in four bits (QLoRA)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from amoeba_plugin.errors import TrainingError
from amoeba_plugin.runtime.compat import keep_differentiable
from amoeba_plugin.training.layer_tuning.exits import Exits
from amoeba_plugin.training.layer_tuning.files import load_tuned
from amoeba_plugin.training.layer_tuning.options import LayerTuningOptions
from amoeba_plugin.training.layer_tuning.trainer import AdaptiveLayerTuningTrainer
from support.batches import make_rows
from support.models import make_tiny_model, require_close, save_base
from support.training import make_arguments

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
FOUR = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def test_windows_of_a_lora_are_trained_beside_four_bits(tmp_path: Path):
    base = save_base(make_tiny_model("llama"), tmp_path / "base")
    packed = AutoModelForCausalLM.from_pretrained(base, quantization_config=FOUR, dtype=torch.float32)
    exits = Exits(packed, [2, 4])
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=exits.modules_to_save)
    model = get_peft_model(packed, config)
    rows = make_rows(8, targets=11)
    options = LayerTuningOptions(policy="cyclic", bottom_dtype="same", cache_gib=0.1)
    arguments = make_arguments(tmp_path / "training", max_steps=40, learning_rate=0.02)
    trainer = AdaptiveLayerTuningTrainer(model, exits, options, args=arguments, train_dataset=rows)
    before = trainer.evaluate(rows)
    trainer.train()
    after = trainer.evaluate(rows)
    for depth in (2, 4):
        assert after[f"eval_loss_exit_{depth}"] < 0.95 * before[f"eval_loss_exit_{depth}"]
    trainer.save_model(str(tmp_path / "tuned"))
    again, found = load_tuned(tmp_path / "tuned", quantization_config=FOUR, dtype=torch.float32)
    keep_differentiable(again)  # its evaluations then do not round to bf16 either
    tokens = torch.arange(3, 15)[None]
    for depth in (2, 4):
        with torch.no_grad(), exits.active(depth), found.active(depth):
            expected = model.eval()(tokens, use_cache=False).logits
            require_close(again(tokens, use_cache=False).logits, expected, 1e-4)


def test_weights_that_lie_for_inference_are_refused(tmp_path: Path):
    base = save_base(make_tiny_model("llama"), tmp_path / "base")
    packed = AutoModelForCausalLM.from_pretrained(base, quantization_config=FOUR, dtype=torch.float32)
    linear = packed.model.layers[0].self_attn.q_proj
    if not linear.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no bf16 instructions, by which bitsandbytes lays weights out")
    with torch.no_grad():
        packed.eval()(torch.arange(3, 15)[None])
    with pytest.raises(TrainingError, match="load the model anew and train it first"):
        keep_differentiable(packed)
