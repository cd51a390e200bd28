"""Train the demo's language model from nothing: ``python -m amoeba_plugin.demo.pretrain OUT``.

About an hour on two CPU cores. Writes the model (bf16 safetensors), its tokenizer, ``training_log.json`` and
``held_out.json``: bits per byte on the held-out modules beside what ``xz -9e`` needs for the same files.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from amoeba_plugin.demo.corpus import SourceFile, part_files, token_blocks

SEED = 20240611
BLOCK_SIZE = 256
VOCABULARY = 4096


def train_tokenizer(files: list[SourceFile]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of ``VOCABULARY`` entries; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=BLOCK_SIZE
    )


def demo_config() -> LlamaConfig:
    """Return the demo model's architecture: 12 layers, 8 KV groups of 2 heads, an MLP of 512, about 4 M parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=16,
        max_position_embeddings=BLOCK_SIZE,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        rms_norm_eps=1e-5,
    )


def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, files: list[SourceFile], batch_size: int = 16
) -> float:
    """Return the cross-entropy of the files in bits per byte of their UTF-8 encoding.

    End-of-file tokens count; the last, incomplete block is billed at the mean of the others.
    """
    blocks = token_blocks(files, tokenizer, BLOCK_SIZE)
    nats, tokens = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(blocks), batch_size):
            ids = torch.tensor(blocks[start : start + batch_size]["input_ids"])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            ).item()
            tokens += ids[:, 1:].numel()
    stream = sum(len(tokenizer(file.text, add_special_tokens=False)["input_ids"]) + 1 for file in files)
    return nats / tokens * stream / math.log(2) / sum(len(file.text.encode()) for file in files)


def xz_bits_per_byte(files: list[SourceFile]) -> float:
    """Return what ``xz -9e`` needs for the same files, one stream, in bits per byte."""
    data = "".join(file.text for file in files).encode()
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def training_arguments(out: Path, steps: int, batch_size: int, learning_rate: float) -> TrainingArguments:
    """Return how the model is trained: AdamW, a cosine schedule, a checkpoint every 200 steps, on a CPU."""
    return TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=200,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=400,
        per_device_eval_batch_size=16,
        seed=SEED,
        use_cpu=True,
        report_to=[],
    )


def parsed_options() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train the model, measure it on held-out modules beside ``xz``, and save all of it under ``out``."""
    options = parsed_options()
    set_seed(SEED)
    train_files, held_out_files = part_files("train"), part_files("held_out")
    random.Random(SEED).shuffle(train_files)
    tokenizer = train_tokenizer(train_files)
    train, held_out = (token_blocks(files, tokenizer, BLOCK_SIZE) for files in (train_files, held_out_files))
    print(f"train {len(train)} blocks, held out {len(held_out)} blocks", flush=True)
    model = LlamaForCausalLM(demo_config())
    arguments = training_arguments(options.out, options.steps, options.batch_size, options.learning_rate)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=held_out, data_collator=default_data_collator
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    model.eval()
    figures = {
        "seed": SEED,
        "steps": options.steps,
        "train_tokens": options.steps * options.batch_size * BLOCK_SIZE,
        "held_out_bytes": sum(len(file.text.encode()) for file in held_out_files),
        "held_out_loss": trainer.evaluate()["eval_loss"],
        "bits_per_byte": bits_per_byte(model, tokenizer, held_out_files),
        "xz_bits_per_byte": xz_bits_per_byte(held_out_files),
    }
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "training_log.json").write_text(json.dumps(trainer.state.log_history, indent=1))
    (options.out / "held_out.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
