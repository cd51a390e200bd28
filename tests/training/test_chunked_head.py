"""Losses taken where the head stands, against the model's own logits and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedModel

from amoeba_plugin.training import next_token
from amoeba_plugin.training.chunked_head import ChunkedHead, chunked_head, has_plain_head
from support.models import tiny_llama

TOKENS = torch.arange(1, 19).view(2, 9)
COLUMNS, ROWS = torch.tensor([1, 2, 5, 7]), torch.tensor([0, 2, 3, 5, 6])  # rows of (2 * 4)
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


def with_bias(model: PreTrainedModel) -> PreTrainedModel:
    head = model.get_output_embeddings()
    biased = nn.Linear(head.in_features, head.out_features)
    biased.weight = head.weight
    model.set_output_embeddings(biased)
    return model


def row_loss(logits: Tensor, place: slice) -> Tensor:
    labels = torch.arange(3, 3 + len(ROWS))[place]
    return nn.functional.cross_entropy(logits, labels, reduction="none") * (1 + labels)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_value_and_gradients_are_those_of_the_logits(
    monkeypatch: pytest.MonkeyPatch, chunk: int, tied: bool, bias: bool, frozen: bool
) -> None:
    monkeypatch.setattr(next_token, "CHUNK_ELEMENTS", {"cpu": 61 * chunk})
    model = tiny_llama(tie_word_embeddings=tied)
    model = (with_bias(model) if bias else model).double()
    model.get_output_embeddings().requires_grad_(not frozen)
    expected = row_loss(model(TOKENS).logits[:, COLUMNS].flatten(0, 1)[ROWS], slice(None)).sum()
    (2 * expected).backward()
    expected_gradients = gradients(model)
    head = model.get_output_embeddings()
    with chunked_head(model, ROWS, row_loss):
        found = model(TOKENS, logits_to_keep=COLUMNS).logits
    assert model.get_output_embeddings() is head
    (2 * found).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(model), expected_gradients)
    assert frozen != (("model.embed_tokens.weight" if tied else "lm_head.weight") in expected_gradients)


def test_half_precision_is_kept_where_autocast_asks_for_it() -> None:
    model = tiny_llama()
    with torch.autocast("cpu", torch.bfloat16):
        expected = row_loss(model(TOKENS).logits[:, COLUMNS].flatten(0, 1)[ROWS].float(), slice(None)).sum()
        expected.backward()
        expected_gradients = gradients(model)
        with chunked_head(model, ROWS, row_loss):
            found = model(TOKENS, logits_to_keep=COLUMNS).logits
        found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name, value in gradients(model).items():
        assert value.dtype == torch.float32
        scale = float(expected_gradients[name].abs().max())
        torch.testing.assert_close(value, expected_gradients[name], rtol=0, atol=0.05 * scale)


def test_a_second_backward_is_refused() -> None:
    model = tiny_llama()
    with chunked_head(model, ROWS, row_loss):
        loss = model(TOKENS, logits_to_keep=COLUMNS).logits
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_only_logits_that_nothing_follows_are_taken_apart() -> None:
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=5.0))
    assert not has_plain_head(capped)
    assert not has_plain_head(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)))
    model = tiny_llama().train()
    model.model.layers[1].eval()
    assert has_plain_head(model)
    assert model.training
    assert not model.model.layers[1].training
    model.lm_head = nn.Sequential(model.lm_head)
    assert not has_plain_head(model)


def test_fp16_keeps_the_small_gradients_of_a_mean_over_many_positions() -> None:
    """Mixed precision scales the loss against that, but only the backward sees the scaled one."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(32, 2048, bias=False), torch.randn(16, 32)
    with torch.no_grad():  # the student is nearly there
        teacher = torch.softmax(head(hidden) + 0.05 * torch.randn(16, 2048), dim=-1)

    def mean(logits: Tensor, place: slice) -> Tensor:
        return -(teacher[place] * logits.log_softmax(-1)).sum(-1) / 8192

    found = []
    for half in (False, True):
        for whole in (False, True):
            states = hidden.clone().requires_grad_()
            with torch.autocast("cpu", torch.float16, enabled=half):
                if whole:
                    loss = next_token.sum_over_rows(mean, head(states), torch.arange(16))
                else:
                    loss = ChunkedHead(head, torch.arange(16), mean)(states)
            (2.0**16 * loss).backward()  # what a GradScaler starts with
            found.append(states.grad)
    for gradient in found[2:]:
        assert float((gradient - found[0]).norm() / found[0].norm()) < 0.03  # 1 where all are lost
