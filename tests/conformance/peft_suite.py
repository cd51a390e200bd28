"""Run PEFT's own tests, of any version, with SmolConfig put into their matrices.

    pip download peft==0.21.2 --no-binary peft --no-deps --no-build-isolation && tar xzf peft-0.21.2.tar.gz
    python tests/conformance/peft_suite.py peft-0.21.2 --kwargs '{"router_noise": false}'

The PEFT under test is the one in the unpacked source distribution, whatever is installed; nothing is written there.
Our own tests run with it, too: ``PYTHONPATH=peft-0.20.0/src python -m pytest tests/smol``.

This file is the command line and the pytest plugin at once. The plugin

* replaces the ``parametrize`` values of each test that runs over PEFT's methods by cases of SmolConfig,
* binds ``LoraConfig`` to SmolConfig in tests that are written for LoRA but hold for any additive method,
* takes away PEFT's skips for models that SMOL can adapt and PEFT's list of methods does not know it can,
* with the router's noise on, leaves out the tests that want two forwards in training to be equal, and names them,
* deselects every other test.

No network: the hub's model names are directories with tiny random models below pytest's working directory. A package
that PEFT's tests import without need here (diffusers, scipy, parameterized) is replaced by an empty one when absent.
The quantization tests need bitsandbytes. Exit code: 0 if something passed, nothing failed, and nothing was skipped for
a reason not listed here.
"""
# ruff: noqa: T201  # a script: it prints its findings

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

#: Test file -> task type of the configs in its matrix.
MATRICES = {
    "test_custom_models.py": None,
    "test_decoder_models.py": "CAUSAL_LM",
    "test_encoder_decoder_models.py": "SEQ_2_SEQ_LM",
    "test_feature_extraction_models.py": "FEATURE_EXTRACTION",
    "test_seq_classifier.py": "SEQ_CLS",
    "test_config.py": None,
    "test_quantization.py": None,
    "test_other.py": None,
    "test_low_level_api.py": None,
}
#: Test file -> node ids of tests that are written for LoraConfig and hold for any additive method.
NEUTRAL = {
    "test_mapping.py": r"TestGetPeftModel",
    "test_initialization.py": (
        r"TestLowCpuMemUsage::test_(from_pretrained|load_adapter|inject_adapter)_low"
        r"|TestNamingConflictWarning|TestCustomModelConfigWarning"
    ),
    "test_low_level_api.py": (
        r"TestPeftStateDict::test_get_(peft_model_state_dict_removes_(adapter|non_defaul_adapter)_name$|and_set)"
        r"|TestPeftStateDict::test_(trained_modules_to_save|set_peft_model)|TestGetBaseModelStateDict"
    ),
    "test_tuners_utils.py": r"TestTargetedModuleNames::(?!.*realistic)|TestBaseTunerGetModelConfig",
    "test_custom_models.py": r"test_add_adapter_rejects_duplicate_name_without_mutation.False",
}
#: Functions of PEFT's tests that skip a test: for a Conv1D, which SMOL adapts; for Llama and Gemma, by mistake for all.
UNFOUNDED_SKIPS = ("_skip_if_conv1d_not_supported", "check_beft_config")
#: Why a test is skipped -> its name and message.
SKIPS = {
    "for prompt learning only": r"prompt_learning|prompt_tuning|passing_input_embeds",
    "weighted sums of adapters: LoRA and IA3 only": r"weighted_combination_of_adapters",
    "mixed adapter batches: refused by SMOL": r"mixed_adapter_batches",
    "warning about biases: skipped for every method": r"disable_adapter_with_bias_warns",
    "several adapters with modules_to_save: skipped for every method": r"active_adapter.*modules_to_save",
    "bitsandbytes 4-bit on a CPU: too inexact": r"merge_unmerge_unload.*4 bit quant with CPU",
    "bitsandbytes is not installed": r"got empty parameter set",
}
#: Tests that compare two forwards in training mode, which noise makes differ.
NOISE_DIFFERS = r"TestPeftStateDict::test_get_and_set"
TEXTS = ["Be yourself; everyone else is already taken.", "So many books, so little time."] * 6
SETTINGS = "SMOL_SUITE_SETTINGS"  # environment variable: JSON of the arguments of Injection

# ---------------------------------------------------------------------------------------------------- tiny hub


def tiny_models() -> dict[str, Callable[[], Any]]:
    """Return hub name -> function that makes a tiny random model of that architecture."""
    import transformers as tf

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=1100)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    decoder = sizes | special | dict(num_key_value_heads=2)
    encoder = sizes | dict(max_position_embeddings=64, pad_token_id=0)
    gpt = dict(n_embd=32, n_layer=3, n_head=4, vocab_size=1100, n_positions=128) | special
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64)
    bart = heads | dict(d_model=32, encoder_layers=2, decoder_layers=2, vocab_size=1100, max_position_embeddings=64)
    t5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=1100, decoder_start_token_id=0)

    def opt(width: int, layers: int) -> Any:
        size = dict(hidden_size=width, word_embed_proj_dim=width, ffn_dim=2 * width, num_hidden_layers=layers)
        return tf.OPTConfig(
            **size, num_attention_heads=4, vocab_size=1100, max_position_embeddings=128, **special | {"pad_token_id": 3}
        )

    own, hugging, trl = "peft-internal-testing", "hf-internal-testing", "trl-internal-testing"
    return {
        f"{own}/tiny-random-OPTForCausalLM": lambda: tf.OPTForCausalLM(opt(32, 3)),
        f"{own}/opt-125m": lambda: tf.OPTForCausalLM(opt(64, 12)),
        f"{own}/tiny-random-GPT2LMHeadModel": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**gpt)),
        f"{hugging}/tiny-random-gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**gpt)),
        f"{own}/tiny-random-GPTJForCausalLM": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**gpt, rotary_dim=4)),
        f"{trl}/tiny-random-LlamaForCausalLM": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**decoder)),
        f"{own}/tiny-dummy-qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**decoder)),
        f"{hugging}/tiny-random-Gemma3ForCausalLM": lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(**decoder, head_dim=8)
        ),
        f"{hugging}/tiny-random-MistralForCausalLM": lambda: tf.MistralForCausalLM(tf.MistralConfig(**decoder)),
        f"{own}/tiny-random-T5ForConditionalGeneration-calibrated": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(**t5, initializer_factor=0.5)
        ),
        f"{own}/tiny-random-BartForConditionalGeneration": lambda: tf.BartForConditionalGeneration(
            tf.BartConfig(**bart)
        ),
        f"{own}/tiny-random-BertModel": lambda: tf.BertModel(tf.BertConfig(**encoder)),
        f"{own}/tiny-random-RobertaModel": lambda: tf.RobertaModel(tf.RobertaConfig(**encoder)),
        f"{own}/tiny-random-DebertaModel": lambda: tf.DebertaModel(tf.DebertaConfig(**encoder)),
        f"{own}/tiny-random-DebertaV2Model": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**encoder)),
        f"{own}/tiny-random-BertForSequenceClassification": lambda: tf.BertForSequenceClassification(
            tf.BertConfig(**encoder)
        ),
        f"{own}/tiny-random-RobertaForSequenceClassification": lambda: tf.RobertaForSequenceClassification(
            tf.RobertaConfig(**encoder)
        ),
        f"{trl}/tiny-LlamaForSequenceClassification-3.2": lambda: tf.LlamaForSequenceClassification(
            tf.LlamaConfig(**decoder, num_labels=1)
        ),
    }


def build_hub(hub: Path) -> None:
    """Write the tiny models, their tokenizer, and the LoRA config that one test loads."""
    import torch
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    for name, make in tiny_models().items():
        torch.manual_seed(0)
        model = make()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # zero in a fresh model, but not in the hub's
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(hub / name)
        if "CausalLM" in name or "LMHead" in name or "gpt2" in name or "qwen2" in name or "opt" in name:
            tokenizer.save_pretrained(hub / name)
    base = "peft-internal-testing/tiny-random-OPTForCausalLM"
    lora = LoraConfig(base_model_name_or_path=base, task_type="CAUSAL_LM")
    lora.save_pretrained(hub / "peft-internal-testing/tiny-opt-lora-revision")


# ---------------------------------------------------------------------------------------------------- pytest plugin


class Injection:
    """Puts SmolConfig into the matrices and deselects what has none."""

    def __init__(self, kwargs: dict[str, Any], left_out: str) -> None:
        from amoeba_plugin.smol import SmolConfig

        self.config_class, self.kwargs, self.left_out = SmolConfig, kwargs, Path(left_out)
        self.seen: set[int] = set()
        self.injected: set[Any] = set()

    def values(self, file: str, test: str, names: tuple[str, ...], rows: list[Any]) -> list[Any] | None:
        """Return the values that replace a matrix; None: the test is not about PEFT's methods in general."""
        cls, kwargs = self.config_class, self.kwargs
        if file not in MATRICES:
            return None
        rows = [row.values if hasattr(row, "marks") else row for row in rows]  # pytest.param(...) is one with marks
        cells = [cell for row in rows for cell in (row if isinstance(row, tuple) else (row,))]
        methods = {x for x in cells if inspect.isclass(x) and x.__name__.endswith("Config")}
        general = len(methods) >= 4 and "rejects" not in test
        match names:
            case ("test_name", "model_id", "config_cls", "config_kwargs") if general:
                mlp = [
                    {"target_modules": "lin0"},
                    {"target_modules": ["lin0"]},
                    {"target_modules": ["lin1"]},
                    {"target_modules": ["lin0", "lin1"]},
                    {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
                    {"target_modules": ["lin0"], "lora_alpha": 4, "lora_dropout": 0.1},
                ]
                cases = [(f"Vanilla MLP {n}", "MLP", cls, {**kwargs, **case}) for n, case in enumerate(mlp, 1)]
                return [*cases, ("Conv1D", "EmbConv1D", cls, {**kwargs, "target_modules": ["conv1d"]})]
            case ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"):
                first = {**kwargs, "target_modules": ["lin0"], "init_weights": False}
                second = {**first, "target_modules": ["lin1"]}
                return [("Same", "smol", cls, first, first), ("Different", "smol", cls, first, second)]
            case ("config_class", "mandatory_kwargs") if general:
                return [(cls, kwargs)]
            case ("config_cls", "config_kwargs") if file == "test_quantization.py":
                return [(cls, {**kwargs, "target_modules": ["q_proj", "v_proj"]})]
            case ("config_cls", "config_kwargs") if file == "test_other.py":
                return [(cls, {**kwargs, "target_modules": target}) for target in ("l1.*", "(l1|.*gate).*")]
            case ("config_cls", "config_kwargs") if general:
                return [(cls, {**kwargs, "task_type": MATRICES[file], "target_modules": None})]
            case ("config",) if test.startswith("test_inject_from_state_dict_and_from"):
                return [cls(**kwargs)]
            case ("config_cls",) | ("config_class",) if general or test.startswith("test_default_target_modules"):
                return [cls]
        return None

    def rewrite(self, file: str, function: Any) -> None:
        """Replace the matrix of one test function."""
        if id(function) in self.seen or not hasattr(function, "pytestmark"):
            return
        self.seen.add(id(function))
        for position, mark in enumerate(function.pytestmark):
            if mark.name != "parametrize":
                continue
            names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
            names = tuple(name.strip() for name in names)
            values = self.values(file, function.__name__, names, mark.args[1])
            if values is not None:
                kwargs = {k: v for k, v in mark.kwargs.items() if k != "ids" or (callable(v) and names != ("config",))}
                new = pytest.mark.parametrize(mark.args[0], values, *mark.args[2:], **kwargs).mark
                function.pytestmark = [new if i == position else other for i, other in enumerate(function.pytestmark)]
                self.injected.add(function)
                return

    def pytest_pycollect_makeitem(self, collector: Any, name: str, obj: Any) -> None:
        """Rewrite tests before pytest reads their marks."""
        file = collector.path.name
        if inspect.isclass(obj) and name.startswith("Test"):
            for key in filter(lambda key: key.startswith("test"), dir(obj)):
                self.rewrite(file, getattr(obj, key))
        elif name.startswith("test") and callable(obj):
            self.rewrite(file, obj)

    def is_neutral(self, item: Any) -> bool:
        """Tell whether the test is to run with LoraConfig bound to SmolConfig."""
        pattern = NEUTRAL.get(item.path.name)
        function = getattr(item.function, "__func__", item.function)
        return pattern is not None and function not in self.injected and bool(re.search(pattern, item.nodeid))

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        """Keep what was injected or is neutral, without the skips that do not hold for SMOL."""
        for module in {item.module for item in items} | {sys.modules["tests.testing_common"]}:
            for name in filter(vars(module).__contains__, UNFOUNDED_SKIPS):
                setattr(module, name, lambda *args, **kwargs: None)

        def is_ours(item: Any) -> bool:
            params = getattr(getattr(item, "callspec", None), "params", {}).values()
            ours = any(value is self.config_class or isinstance(value, self.config_class) for value in params)
            function = getattr(item.function, "__func__", item.function)
            return (ours and function in self.injected) or self.is_neutral(item)

        kept = [item for item in items if is_ours(item)]
        noisy = [i for i in kept if self.kwargs.get("router_noise", True) and re.search(NOISE_DIFFERS, i.nodeid)]
        self.left_out.write_text("\n".join(item.nodeid for item in noisy))
        kept = [item for item in kept if item not in noisy]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """Bind LoraConfig while a neutral test runs."""
        if not (self.is_neutral(item) and hasattr(item.module, "LoraConfig")):
            return (yield)
        original, item.module.LoraConfig = item.module.LoraConfig, self.make_config
        try:
            return (yield)
        finally:
            item.module.LoraConfig = original

    def make_config(self, **fields: Any) -> Any:
        """Build a SmolConfig from LoRA's fields; skip the test if it wants one that only LoRA has."""
        if "init_lora_weights" in fields:
            fields["init_weights"] = bool(fields.pop("init_lora_weights"))
        foreign = fields.keys() - self.config_class.__dataclass_fields__.keys()
        if foreign:
            pytest.skip(f"SmolConfig has no field {sorted(foreign)}")
        return self.config_class(**{**self.kwargs, **fields})


def pytest_configure(config: pytest.Config) -> None:
    """Start the injection, when the command line below started pytest."""
    if SETTINGS not in os.environ:
        return
    for marker in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: PEFT's")
    import datasets

    quotes = datasets.DatasetDict(train=datasets.Dataset.from_dict({"quote": TEXTS}))
    datasets.load_dataset = lambda *args, **kwargs: quotes  # the only data set these tests load is english_quotes
    config.pluginmanager.register(Injection(**json.loads(os.environ[SETTINGS])), "smol-injection")


# ---------------------------------------------------------------------------------------------------- command line

STUBS = {
    "diffusers": "__version__ = '0.0.0'\ndef __getattr__(name):\n    if name.startswith('__'):\n"
    "        raise AttributeError(name)\n    return type(name, (), {})\n",
    "parameterized": "class parameterized:\n    expand = staticmethod(lambda *a, **k: lambda function: function)\n",
    "attr": "from dataclasses import dataclass\n",
}


def prepare(checkout: Path, work: Path) -> list[str]:
    """Copy the tests, write stubs and the hub; return the test files."""
    if not (checkout / "tests" / "testing_common.py").exists():
        sys.exit(f"{checkout}/tests has no testing_common.py; give the unpacked source distribution of PEFT")
    shutil.rmtree(work / "tests", ignore_errors=True)
    shutil.copytree(checkout / "tests", work / "tests", ignore=shutil.ignore_patterns("conftest.py", "__pycache__"))
    (work / "tests" / "__init__.py").touch()
    if importlib.util.find_spec("scipy") is None:  # no stub: transformers would take it for the real one
        scipy_user = work / "tests" / "test_initialization.py"
        scipy_user.write_text(re.sub(r"^from scipy import stats$", "stats = None", scipy_user.read_text(), flags=re.M))
    (work / "pytest.ini").write_text("[pytest]\n")
    for name, source in STUBS.items():
        if importlib.util.find_spec(name) is None:
            (work / "stubs" / name).mkdir(parents=True, exist_ok=True)
            (work / "stubs" / name / "__init__.py").write_text(source)
    if not (work / "hub").exists():
        build_hub(work / "hub")
    return [str(work / "tests" / file) for file in sorted(MATRICES.keys() | NEUTRAL.keys())]


def summarize(junit: Path) -> int:
    """Print passed, failed and skipped tests by file, reasons of skips, and failures; return how many are not right."""
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    failures, skips, unexpected = [], Counter[str](), 0
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        outcomes = {child.tag: (child.get("message") or "").split("\n")[0][:150] for child in case}
        bad = outcomes.get("failure", outcomes.get("error"))
        outcome = "failed" if bad is not None else "skipped" if "skipped" in outcomes else "passed"
        file = next((part for part in str(case.get("classname")).split(".") if part.startswith("test_")), "collection")
        by_file[file][outcome] += 1
        if bad is not None:
            failures.append(f"FAILED {case.get('classname')}::{case.get('name')}\n       {bad}")
        elif outcome == "skipped":
            test = f"{case.get('name')}: {outcomes['skipped']}"
            reason = next((why for why, pattern in SKIPS.items() if re.search(pattern, test)), f"UNEXPECTED: {test}")
            skips[reason] += 1
            unexpected += reason not in SKIPS
    by_file["total"] = sum(list(by_file.values()), Counter())
    for file, counts in by_file.items():
        print(f"{file:34} passed {counts['passed']:4}  failed {counts['failed']:3}  skipped {counts['skipped']:3}")
    for reason, count in skips.most_common():
        print(f"  skipped {count:3}: {reason}")
    print(*failures, sep="\n")
    return by_file["total"]["failed"] + unexpected or (0 if by_file["total"]["passed"] else 1)


def main() -> None:
    """Run the suite and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="unpacked source distribution of PEFT")
    parser.add_argument("--kwargs", type=json.loads, default={}, help="fields of every config, as JSON")
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()) / "smol_peft_suite")
    parser.add_argument("pytest_args", nargs="*", help="passed on to pytest, after --")
    arguments = parser.parse_args()

    work = arguments.workdir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    files = prepare(arguments.checkout, work)
    here = Path(__file__).resolve()
    peft = str((arguments.checkout / "src").resolve())
    paths = [peft, str(here.parent), str(here.parents[2]), str(work), *filter(None, [os.environ.get("PYTHONPATH")])]
    left_out = work / "left_out.txt"
    environment = os.environ | {
        SETTINGS: json.dumps({"kwargs": arguments.kwargs, "left_out": str(left_out)}),
        "PYTHONPATH": os.pathsep.join([*paths, str(work / "stubs")]),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    junit = work / "junit.xml"
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", here.stem, "-c", str(work / "pytest.ini"), "--tb=short"]
    command += ["--rootdir", str(work), "-p", "no:cacheprovider", f"--junitxml={junit}", "-W", "ignore", *files]
    with (work / "pytest.log").open("w") as log:
        subprocess.run([*command, *arguments.pytest_args], cwd=work / "hub", env=environment, stdout=log, stderr=log)
    if not junit.exists():
        sys.exit((work / "pytest.log").read_text()[-3000:])
    status = summarize(junit)
    if left_out.read_text():
        print("left out, because noise makes two forwards in training differ:", left_out.read_text(), sep="\n")
    print(f"log: {work / 'pytest.log'}")
    sys.exit(min(status, 1))


if __name__ == "__main__":
    main()
