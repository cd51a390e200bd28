"""Three doors to one training: the Trainer, a recipe in `oneshot`, and a session that another Trainer drives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainingArguments

import amoeba_plugin  # noqa: F401  # registers the modifiers
from amoeba_plugin.data.collator import PaddingCollator
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import SubnetStrategy
from amoeba_plugin.errors import ArtifactError, DataError, TrainingError
from amoeba_plugin.modifiers import (
    OneForAllDistillationModifier,
    TrainingEventsCallback,
    begin_session,
    external,
)
from amoeba_plugin.modifiers.external import ExternalSteps
from amoeba_plugin.training.one_for_all.train import train_one_for_all
from amoeba_plugin.training.one_for_all.trainer import OneForAllTrainer
from support.batches import tensor_rows
from support.recipes import TRAIN_FIELDS, SessionTrainer, run_on_rows, training_recipe

TinyModel = Callable[..., PreTrainedModel]


pytestmark = pytest.mark.usefixtures("fresh_session")


def adapter_of(elastic: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(elastic / "adapter/adapter_model.safetensors")
    return found


def arguments_of(modifier: OneForAllDistillationModifier, directory: Path) -> TrainingArguments:
    arguments = modifier.arguments(directory)
    arguments.disable_tqdm = True
    return arguments


@pytest.mark.parametrize("adapter", [TRAIN_FIELDS["adapter"], {"type": "lora", "r": 2}])
def test_three_doors_give_the_same_weights(base: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    run_on_rows(base, training_recipe(tmp_path / "recipe", adapter=adapter))
    by_recipe = adapter_of(tmp_path / "recipe")

    modifier = OneForAllDistillationModifier(**TRAIN_FIELDS | {"adapter": adapter})
    strategy = SubnetStrategy.load(tmp_path / "recipe")
    elastic = ElasticModel(AutoModelForCausalLM.from_pretrained(base), strategy)
    torch.manual_seed(modifier.seed)
    peft_model = modifier.attach(elastic)
    assert peft_model is not None
    arguments = arguments_of(modifier, tmp_path / "scratch")
    train_one_for_all(elastic, peft_model, tensor_rows(), modifier.options(), arguments)
    peft_model.save_pretrained(str(tmp_path / "trainer/adapter"))
    by_trainer = adapter_of(tmp_path / "trainer")

    model = AutoModelForCausalLM.from_pretrained(base)
    text = training_recipe(tmp_path / "session", adapter=adapter)
    trained = begin_session(text, model, DataLoader(tensor_rows(), batch_size=4), tensor_rows())
    SessionTrainer(
        model=trained, args=arguments_of(modifier, tmp_path / "scratch"), train_dataset=tensor_rows(),
        data_collator=PaddingCollator(), callbacks=[TrainingEventsCallback()],
    ).train()  # fmt: skip
    by_session = adapter_of(tmp_path / "session")

    assert by_recipe.keys() == by_trainer.keys() == by_session.keys()
    assert any(bool(value.any()) for name, value in by_recipe.items() if "B" in name)
    for name, value in by_recipe.items():
        assert torch.equal(by_trainer[name], value)
        # the session's Trainer has the largest subnet's logits at all positions: products of another size
        torch.testing.assert_close(by_session[name], value, rtol=0, atol=1e-4)


def test_a_trainer_of_ones_own_takes_no_step_after_its_last(base: Path, tmp_path: Path) -> None:
    modifier = OneForAllDistillationModifier(**TRAIN_FIELDS | {"checkpoint_dir": "kept", "save_steps": 1})
    for directory, resume in (("once", False), ("twice", True)):
        text = training_recipe(tmp_path / directory)
        model = begin_session(
            text, AutoModelForCausalLM.from_pretrained(base), DataLoader(tensor_rows(), batch_size=4), tensor_rows()
        )
        SessionTrainer(
            model=model, args=arguments_of(modifier, tmp_path / "scratch"), train_dataset=tensor_rows(),
            data_collator=PaddingCollator(), callbacks=[TrainingEventsCallback()],
        ).train(resume_from_checkpoint=resume)  # fmt: skip
    once, twice = (adapter_of(tmp_path / directory) for directory in ("once", "twice"))
    assert all(torch.equal(twice[name], value) for name, value in once.items())


def test_a_trainer_of_ones_own_distils_every_token_of_a_step_alike(base: Path, tmp_path: Path) -> None:
    """Rows with few targets, and rows without one, weigh by their tokens."""
    uneven = tensor_rows()
    for number, row in enumerate(uneven):
        row["labels"][: 4 * (number % 4)] = -100
    text = training_recipe(tmp_path / "session", distill_all_tokens=True, kd_weight=0.5)
    batches = DataLoader(uneven, batch_size=4)
    oneshot(model=str(base), recipe=text.replace("session", "recipe"), dataset=batches, num_calibration_samples=8)
    modifier = OneForAllDistillationModifier(**TRAIN_FIELDS)
    reset_session()
    trained = begin_session(text, AutoModelForCausalLM.from_pretrained(base), batches, uneven)
    SessionTrainer(
        model=trained, args=arguments_of(modifier, tmp_path / "scratch"), train_dataset=uneven,
        data_collator=PaddingCollator(), callbacks=[TrainingEventsCallback()],
    ).train()  # fmt: skip
    expected, found = (adapter_of(tmp_path / name) for name in ("recipe", "session"))
    for name, value in expected.items():  # rows weighed alike are 1e-2 away
        torch.testing.assert_close(found[name], value, rtol=0, atol=3e-4)


@pytest.mark.parametrize("adapter", [{"type": "lora", "r": 2}, "none"])
def test_other_adapters_train_and_extract_in_a_recipe(base: Path, tmp_path: Path, adapter: Any) -> None:
    text = training_recipe(tmp_path / "elastic", adapter=adapter)
    text += yaml.safe_dump({"x_stage": {"x_modifiers": {"SubnetExtractionModifier": {"shape": "3x1/2"}}}})
    subnet = oneshot(
        model=str(base), recipe=text, dataset=DataLoader(tensor_rows(), batch_size=4), num_calibration_samples=8,
        max_seq_length=12,
    )  # fmt: skip
    elastic, peft_model = load_elastic(tmp_path / "elastic")
    assert (peft_model is None) == (adapter == "none")
    tokens = torch.arange(10)[None]
    with elastic.active("3x1/2") as model, torch.no_grad():
        torch.testing.assert_close(subnet(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_recipe_trains_on_the_text_it_names(base: Path, tmp_path: Path) -> None:
    texts = [{"title": f"w{row}", "body": " ".join(f"w{row + word}" for word in range(8))} for row in range(20)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(text) for text in texts))
    fields = {"dataset": str(path), "num_samples": 8, "max_seq_length": 8, "max_steps": 1}
    with pytest.raises(DataError, match="its columns are title, body: name the one with the text in text_column"):
        run_on_rows(base, training_recipe(tmp_path / "elastic", **fields))
    assert not (tmp_path / "elastic").exists()
    reset_session()
    with mock.patch.object(OneForAllTrainer, "__init__", autospec=True, side_effect=OneForAllTrainer.__init__) as made:
        run_on_rows(base, training_recipe(tmp_path / "elastic", text_column="body", **fields))
    tokenizer = AutoTokenizer.from_pretrained(base)
    stream = 2 * [token for text in texts for token in (*tokenizer(text["body"])["input_ids"], tokenizer.eos_token_id)]
    windows = [stream[start : start + 8] for start in range(len(stream) // 2)]
    found = [row["input_ids"].tolist() for row in made.call_args.kwargs["train_dataset"]]
    assert len(found) == 8
    assert all(tokens in windows for tokens in found)


def test_training_on_the_calibration_data_over_and_over_is_told(caplog: pytest.LogCaptureFixture) -> None:
    steps = TRAIN_FIELDS | {"max_steps": 200}  # of 2 x 2 rows
    OneForAllDistillationModifier(**steps).tell_repetition(80)
    OneForAllDistillationModifier(**steps, dataset="text.jsonl").tell_repetition(8)
    assert not caplog.text
    OneForAllDistillationModifier(**steps).tell_repetition(8)
    assert "sees the 8 sequences of the calibration data 100 times over" in caplog.text


def test_a_trainer_of_ones_own_with_several_processes_is_refused(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    trained = begin_session(
        training_recipe(tmp_path / "elastic"), model, DataLoader(tensor_rows(), batch_size=4), tensor_rows()
    )
    arguments = arguments_of(OneForAllDistillationModifier(**TRAIN_FIELDS), tmp_path / "scratch")
    trainer = SessionTrainer(
        model=trained, args=arguments, train_dataset=tensor_rows(), data_collator=PaddingCollator(),
        callbacks=[TrainingEventsCallback()],
    )  # fmt: skip
    with (
        mock.patch.object(external, "world_size", return_value=2),
        pytest.raises(TrainingError, match="trains in one process, and there are 2; use OneForAllTrainer"),
    ):
        trainer.train()
    assert not (tmp_path / "elastic").exists()


def test_an_interrupted_recipe_goes_on_where_it_was(base: Path, tmp_path: Path) -> None:
    run_on_rows(base, training_recipe(tmp_path / "whole"))
    fields = {"checkpoint_dir": str(tmp_path / "checkpoints"), "save_steps": 1}
    steps = []
    original = OneForAllTrainer.training_step

    def step(self: OneForAllTrainer, *args: Any, **kwargs: Any) -> Tensor:
        steps.append(self.state.global_step)
        if len(steps) == 5:  # two micro-batches each: in the third step
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with mock.patch.object(OneForAllTrainer, "training_step", step):
        with pytest.raises(KeyboardInterrupt):
            run_on_rows(base, training_recipe(tmp_path / "resumed", **fields))
        reset_session()
        run_on_rows(base, training_recipe(tmp_path / "resumed", **fields))
    assert steps == [0, 0, 1, 1, 2, 2, 2]
    expected, found = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "resumed")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    reset_session()
    with pytest.raises(ArtifactError, match="its learning_rate is 0.01, here it is 0.5"):
        run_on_rows(base, training_recipe(tmp_path / "resumed", learning_rate=0.5, **fields))


def test_a_trainer_of_ones_own_with_replicas_of_the_model_is_refused() -> None:
    """As Trainer makes them where one process sees several GPUs."""
    steps = ExternalSteps(mock.Mock(), mock.Mock())
    with pytest.raises(TrainingError, match="one process with several GPUs"):
        steps.step(torch.zeros(()), model=torch.nn.DataParallel(torch.nn.Linear(1, 1)))


def test_the_steps_of_a_trainer_of_ones_own_count_and_not_the_recipes(base: Path, tmp_path: Path) -> None:
    """With max_steps: 0 a recipe trains nothing itself, and what was trained is kept all the same."""
    model = AutoModelForCausalLM.from_pretrained(base)
    text = training_recipe(tmp_path / "elastic", adapter="none", max_steps=0)
    trained = begin_session(text, model, DataLoader(tensor_rows(), batch_size=4), tensor_rows())
    arguments = arguments_of(OneForAllDistillationModifier(**TRAIN_FIELDS), tmp_path / "scratch")
    SessionTrainer(
        model=trained, args=arguments, train_dataset=tensor_rows(), data_collator=PaddingCollator(),
        callbacks=[TrainingEventsCallback()],
    ).train()  # fmt: skip
    elastic, _ = load_elastic(tmp_path / "elastic")
    untrained = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert not torch.equal(elastic.model.lm_head.weight, untrained["lm_head.weight"])
    assert torch.equal(elastic.model.lm_head.weight, model.lm_head.weight)


def test_a_recipe_in_one_process_takes_one_of_several_gpus(tmp_path: Path) -> None:
    """Trainer would replicate the model on all of them, which one-for-all training refuses, after the selection."""

    def two_gpus(self: TrainingArguments) -> torch.device:
        vars(self).setdefault("_n_gpu", 2)
        return torch.device("cpu")

    with mock.patch.object(TrainingArguments, "_setup_devices", property(two_gpus)):
        assert TrainingArguments(output_dir=str(tmp_path)).n_gpu == 2
        arguments = OneForAllDistillationModifier(batch_size=3).arguments(tmp_path)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_largest": False, "adapter": "none"}, "train_largest: false wants SMOL"),
        ({"train_largest": False, "adapter": {"type": "lora"}}, "train_largest: false wants SMOL"),
        ({"adapter": {"type": "lora", "num_experts": 3}}, "adapter.num_experts is SMOL's"),
    ],
)
def test_what_an_adapter_cannot_do_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):  # pydantic's, around ours
        OneForAllDistillationModifier(**fields)
