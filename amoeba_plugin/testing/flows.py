"""What every deployment flow must satisfy, as tests that a flow's author subclasses.

It is part of the package, so that a plugin's tests can import it; it needs pytest to run, not to be imported. A plugin
writes::

    class TestMine(FlowConformance):
        flow = MyFlow()

and gets: every scheme exports a subnet whose heads do not fill the hidden size, and runs it; exact ones compute what
torch computes, also of layers that differ, or refuse those; the engine makes the same tokens of fifty texts, writes the
same chat, and answers; it says what it is; and what it cannot do is an error of that flow, with the process gone. Norms
and biases are random: defaults of one and zero hide what is not read.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from amoeba_plugin.deployment.engine_parity import EngineParity, measure_engine
from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.flow import DeploymentFlow, Export, Point
from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import SubnetStrategy, WidthStrategy
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.testing.random_models import random_model, random_strategy

VOCABULARY = 512
CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 256, "vocab_size": VOCABULARY,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
SHAPE, WHOLE = "3x1/2", "4x1"
TEMPLATE = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>{% endfor %}<turn>assistant\n"


class FlowConformance:
    """Tests of one flow; subclass it, with a name that your test runner collects.

    Attributes:
        flow: To be tested.
        worst_kl: Nats per token that a scheme which is not exact may be off, on random weights, where rounding hurts
            most.
    """

    flow: ClassVar[DeploymentFlow]
    worst_kl: ClassVar[float] = 0.5

    def schemes(self) -> list[str]:
        """Return the schemes of subnets that run on this machine."""
        return [scheme for scheme in self.flow.schemes if not self.flow.runs_elastic(scheme)]

    def test_every_scheme_exports_and_runs(self, tmp_path: Path) -> None:
        """Every scheme runs; exact ones compute what torch does."""
        subnet = save_subnet(tmp_path / "subnet")
        for scheme in self.schemes():
            parity, export = self.measured(subnet, scheme, tmp_path / scheme)
            assert parity.engine
            assert parity.same_tokens == len(shipped_texts().all)
            assert parity.same_template is True
            assert export.bytes > 0
            assert sum(export.tensor_types.values()) > 0
            if scheme in self.flow.exact:
                parity.require_close(exact=True)
                assert parity.same_top > 0.95
            else:
                assert parity.mean_kl < self.worst_kl

    def test_layers_that_differ_are_computed_or_refused(self, tmp_path: Path) -> None:
        """An engine without layers of unlike sizes says so."""
        subnet = save_subnet(tmp_path / "subnet", alike=False)
        for scheme in sorted(self.flow.exact):
            try:
                parity, _ = self.measured(subnet, scheme, tmp_path / scheme)
            except DeploymentError as error:
                assert "differ" in str(error)  # noqa: PT017  # it may also not be raised
            else:
                parity.require_close(exact=True)

    def test_it_answers_and_what_fails_ends_its_process_alone(self, tmp_path: Path) -> None:
        """What is asked of an engine while it is measured, and what cannot be."""
        subnet = save_subnet(tmp_path / "subnet")
        scheme = min(self.flow.exact)
        (tmp_path / "out").mkdir()
        export = self.flow.export(subnet, scheme, tmp_path / "out")
        with EngineProcess(self.flow.name, self.flow.command()) as engine:
            sizes = {"threads": 1, "context": 64, "batch": 1}
            path = str(tmp_path / "out" / export.entry)
            engine.ask("load", path=path, **sizes, **self.flow.options(scheme))
            tokens = [each for text in shipped_texts().all for each in tokenizer()(text)["input_ids"]]
            tokens, behind = tokens[::20][:48], list(range(1, 48, 3))  # bytes of many scripts among them
            rows = engine.ask("log_probabilities", tokens=tokens, behind=behind).value
            told = engine.ask("token_log_probabilities", tokens=tokens, behind=behind).value
            whole = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
            picked = [float(row[tokens[at]]) for row, at in zip(whole, behind, strict=True)]
            assert told == pytest.approx(picked, abs=1e-4)
            assert isinstance(engine.ask("generate", prompt="The", count=4).value, str)
            prefill = engine.ask("prefill", prompts=[[5, 6, 7, 8]])
            assert prefill.wall > 0
            assert engine.ask("decode", count=3).cpu >= 0
            assert engine.ask("peak").value > export.bytes
            with pytest.raises(DeploymentError, match=self.flow.name):
                engine.ask("load", path=str(tmp_path / "nothing"), **sizes, **self.flow.options(scheme))
        assert self.flow.command()  # and another one can be started

    def measured(self, subnet: Path, scheme: str, directory: Path) -> tuple[EngineParity, Export]:
        """Return what the engine makes of a subnet."""
        directory.mkdir()
        export = self.flow.export(subnet, scheme, directory)
        return measure_engine(self.flow, Point(self.flow.name, scheme), export, directory, subnet), export


def save_subnet(directory: Path, alike: bool = True) -> Path:
    """Save a random Llama that was cut to three layers of half the width, with a tokenizer that has a chat template.

    Args:
        directory: To save it in.
        alike: Whether its layers have the same sizes.
    """
    model = random_model(CONFIG)
    strategy = random_strategy(model)
    subnet: PreTrainedModel = extract(ElasticModel(model, strategy if alike else unlike(strategy)), SHAPE)
    with torch.no_grad():  # random ones are too loud: predictions of one token alone tell little of the others
        subnet.get_output_embeddings().weight.mul_(0.2)
    subnet.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def unlike(strategy: SubnetStrategy) -> SubnetStrategy:
    """Return a strategy whose first layer keeps one unit more of every group at the narrow widths."""
    widths = strategy.width
    units = {
        share: {key: count + (share != 1 and key.startswith("0.")) for key, count in of.items()}
        for share, of in widths.units.items()
    }
    return replace(strategy, width=WidthStrategy(units, widths.order, widths.mean_input, "random", "global"))


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with the two ends of a text and of a turn, learned on the texts that engines read."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "<end>", "<turn>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(shipped_texts().all, trainer)
    found = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<end>", pad_token="<end>")
    found.chat_template = TEMPLATE
    return found
