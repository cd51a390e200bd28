"""What every deployment flow must satisfy, as tests that a flow's author subclasses.

It is part of the package, so that a plugin's tests can import it; it needs pytest to run, not to be imported. A plugin
writes::

    class TestMine(FlowConformance):
        flow = MyFlow()

and gets: every scheme exports a subnet whose heads do not fill the hidden size, and runs it; exact ones compute what
torch computes; other kinds of subnets are computed as well, or refused, by the engine as by the flow's rules; the
engine makes the same tokens of fifty texts, writes the same chat, and answers; it says what it is; and what it cannot
do is an error of that flow, with the process gone. Norms and biases are random: defaults of one and zero hide what is
not read.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from amoeba_plugin.deployment.engine_parity import EngineParity, measure_engine
from amoeba_plugin.deployment.engines.process import EngineProcess
from amoeba_plugin.deployment.flow import DeploymentFlow, Export, Point
from amoeba_plugin.deployment.rules import candidate, engine_rules, findings
from amoeba_plugin.deployment.tokenizers import shipped_texts
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.elastic.strategy import DepthStrategy, SubnetStrategy, WidthStrategy
from amoeba_plugin.errors import DeploymentError
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.registry import architecture_for
from amoeba_plugin.runtime.model_files import load_config
from amoeba_plugin.testing.random_models import random_model, random_strategy

VOCABULARY = 512
CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 256, "vocab_size": VOCABULARY,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
SHAPE, WHOLE, HALVES = "3x1/2", "4x1", "2.5x1/2"
ALIKE, BIASED = "layers alike", "compensating biases"
UNLIKE, ALONE = "layers of different sizes", "layers with attention or MLP alone"
PADDED = ", `portable`"
KINDS = (ALIKE, BIASED, UNLIKE, UNLIKE + PADDED, ALONE, ALONE + PADDED)
TEMPLATE = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>{% endfor %}<turn>assistant\n"


class FlowConformance:
    """Tests of one flow; subclass it, with a name that your test runner collects.

    Attributes:
        flow: To be tested.
        worst_kl: Nats per token that a scheme which is not exact may be off, on random weights, where rounding hurts
            most.
        holds: Which kinds of subnets it computes, where that was promised.
    """

    flow: ClassVar[DeploymentFlow]
    worst_kl: ClassVar[float] = 0.5
    holds: ClassVar[Mapping[str, bool]] = MappingProxyType({})

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

    @pytest.mark.parametrize("kind", KINDS[1:])
    def test_other_kinds_are_computed_or_refused_as_the_rules_say(self, kind: str, tmp_path: Path) -> None:
        """An engine computes what torch does, or the subnet is refused; rules, and ``holds``, say which."""
        subnet, computes = save_subnet(tmp_path / "subnet", kind), True
        for scheme in sorted(self.flow.exact):
            try:
                parity, _ = self.measured(subnet, scheme, tmp_path / scheme)
                parity.require_close(exact=True)
            except DeploymentError:
                computes = False
        if self.flow.name in engine_rules():
            assert computes == allowed(subnet, self.flow.name)
        assert computes == self.holds.get(kind, computes)

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


def save_subnet(directory: Path, kind: str = ALIKE) -> Path:
    """Save a random Llama that was cut to three layers of half the width, with a tokenizer that has a chat template.

    Args:
        directory: To save it in.
        kind: One of ``KINDS``.
    """
    model = random_model(CONFIG)
    strategy = random_strategy(model, bias_compensation=kind == BIASED)
    if kind.startswith(UNLIKE):
        strategy = unlike(strategy)
    if kind.startswith(ALONE):
        strategy = replace(strategy, depth=DepthStrategy({4: (0, 1, 2, 3), 2.5: (0, 2, 3)}, lost={2.5: {2: "mlp"}}))
    shape = HALVES if kind.startswith(ALONE) else SHAPE
    subnet: PreTrainedModel = extract(ElasticModel(model, strategy), shape, portable=kind.endswith(PADDED))
    with torch.no_grad():  # random ones are too loud: predictions of one token alone tell little of the others
        subnet.get_output_embeddings().weight.mul_(0.2)
    subnet.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def allowed(subnet: Path, engine: str) -> bool:
    """Tell whether the rules of an engine let a subnet pass that was saved here."""
    config = load_config(str(subnet))
    found = findings(candidate(config, architecture_for("llama"), engine), engine)
    return not any(each.rule.level == "refuse" for each in found)


def promised(page: Path, flow: str) -> dict[str, bool]:
    """Return which kinds of subnets a page says that a flow holds, in a table of kinds by flows."""
    rows = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in page.read_text("utf-8").splitlines()]
    (titles,) = [row for row in rows if f"`{flow}`" in row and row[0] == "a subnet with"]
    return {row[0]: row[titles.index(f"`{flow}`")] == "yes" for row in rows if row[0] in KINDS}


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
