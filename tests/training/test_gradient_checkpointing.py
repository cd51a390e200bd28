"""Gradient checkpointing in one-for-all training changes nothing that is learned."""

from __future__ import annotations

from pathlib import Path

import torch

from support.training import PAPER, add_smol, make_elastic, make_trainer, parameters_of


def test_the_same_is_learned_with_gradient_checkpointing(tmp_path: Path):
    found = []
    for kwargs in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        elastic = make_elastic(attention_dropout=0.1)
        model = add_smol(elastic, lora_dropout=0.1)
        if not found:
            found.append(parameters_of(model))
        trainer = make_trainer(
            elastic, tmp_path, PAPER, model, gradient_checkpointing=kwargs is not None,
            gradient_checkpointing_kwargs=kwargs,
        )  # fmt: skip
        trainer.train()
        found.append(parameters_of(model))
    started, expected, *checkpointed = found
    assert all((expected[name] != value).any() for name, value in started.items() if name.endswith(".B"))
    for parameters in checkpointed:
        torch.testing.assert_close(parameters, expected, rtol=1e-4, atol=1e-5)
