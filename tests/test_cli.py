"""The command line: what it answers at once, what it refuses, and that a recipe runs from end to end."""

from __future__ import annotations

import errno
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import amoeba_plugin
from amoeba_plugin.cli import app
from amoeba_plugin.deployment.profiling.measure import Measuring
from amoeba_plugin.deployment.search import preflight
from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.recipes import files as recipe_files
from amoeba_plugin.recipes.files import shipped_recipes
from amoeba_plugin.recipes.inputs import RunOptions, calibration_batches
from amoeba_plugin.recipes.read import plan_recipe
from amoeba_plugin.runtime.files import whole_or_nothing
from amoeba_plugin.testing.random_models import random_strategy
from support.ordinary_user import read_only

RECIPE = {
    "select_stage": {
        "a_modifiers": {
            "DepthShrinkingModifier": {"min_depth": 2},
            "WidthShrinkingModifier": {"widths": ["1", "3/4"], "allocation": "uniform"},
        }
    },
    "finetune_stage": {
        "b_modifiers": {
            "OneForAllDistillationModifier": {
                "adapter": {"r": 2, "num_experts": 2},
                "max_steps": 1,
                "gradient_accumulation_steps": 1,
                "elastic_dir": "ELASTIC",
            }
        }
    },
    "extract_stage": {"c_modifiers": {"SubnetExtractionModifier": {"shape": "3x3/4"}}},
    "quantize_stage": {
        "d_modifiers": {"QuantizationModifier": {"targets": ["Linear"], "scheme": "W8A8", "ignore": ["lm_head"]}}
    },
}

TinyModel = Callable[..., PreTrainedModel]
Files = dict[str, Path]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    last = result.stderr.splitlines()[-1]  # progress bars of loading data may come before
    assert last.startswith("error: ")
    return last


@pytest.fixture
def files(tiny_model: TinyModel, tmp_path: Path) -> Files:
    """A tiny model with a tokenizer, a text and a recipe, on disk; ``out`` and ``elastic`` do not exist yet."""
    model, text, recipe = tmp_path / "model", tmp_path / "text.jsonl", tmp_path / "recipe.yaml"
    tiny_model("llama").save_pretrained(model)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w1", model_max_length=64
    ).save_pretrained(model)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 97, (12, 24), generator=generator).tolist()
    text.write_text("".join(json.dumps({"text": " ".join(f"w{number}" for number in row)}) + "\n" for row in rows))
    elastic = tmp_path / "elastic"
    recipe.write_text(yaml.safe_dump(RECIPE, sort_keys=False).replace("ELASTIC", str(elastic)))
    return {"model": model, "text": text, "recipe": recipe, "elastic": elastic, "out": tmp_path / "out"}


def run_arguments(files: Files, **changed: str | Path) -> list[str | Path]:
    chosen = {**files, **changed}
    return [
        "run", chosen["recipe"], "--model", chosen["model"], "--dataset", chosen["text"], "--output-dir", chosen["out"],
        "--num-calibration-samples", "8", "--max-seq-length", "16", "--batch-size", "2",
    ]  # fmt: skip


def logits(directory: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        return model(torch.arange(3, 19)[None], use_cache=False).logits.float()


def test_help_names_the_commands():
    text = invoke("--help").output
    for command in ("run", "extract", "check", "loads", "demo", "recipes"):
        assert command in text


def test_the_version_is_the_packages():
    assert invoke("--version").output.strip() == f"amoeba_plugin {amoeba_plugin.__version__}"


def test_the_command_line_itself_imports_nothing_heavy():
    """Whatever the package does when it is imported, help and version need none of it."""
    program = (
        "import sys, types; package = types.ModuleType('amoeba_plugin'); "
        f"package.__path__ = [{str(Path(amoeba_plugin.__file__).parent)!r}]; sys.modules['amoeba_plugin'] = package; "
        "import amoeba_plugin.cli; "
        "print([n for n in ('torch', 'transformers', 'peft', 'llmcompressor', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_the_text_of_a_recipe_tells_is_refused_before_the_hosts_are_imported(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("select:\n  a_modifiers:\n    DepthShrinkingModifier: {min_depth: 2}\n")
    program = (
        "import sys; from amoeba_plugin.errors import RecipeError\n"
        "from amoeba_plugin.recipes.check import check_recipe\n"
        f"try: check_recipe({str(tmp_path / 'recipe.yaml')!r})\n"
        "except RecipeError as error: print(error, [n for n in ('torch', 'llmcompressor') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "name it 'select_stage' []" in done.stdout


def test_shipped_recipes_are_listed_shown_and_copied(tmp_path: Path):
    shipped = shipped_recipes()
    assert all(name in invoke("recipes", "list").output for name in shipped)
    for name, path in shipped.items():
        assert invoke("recipes", "show", name).output == path.read_text()
    assert invoke("recipes", "copy", "demo", tmp_path).exit_code == 0
    assert (tmp_path / "demo.yaml").read_text() == shipped["demo"].read_text()
    assert "nothing is overwritten" in refused("recipes", "copy", "qwen3", tmp_path / "demo.yaml")
    assert (tmp_path / "demo.yaml").read_text() == shipped["demo"].read_text()


def test_an_unknown_recipe_names_the_known_ones():
    assert "Did you mean 'demo'" in refused("recipes", "show", "demos")


def test_check_shows_the_modifiers(files: Files):
    result = invoke("check", files["recipe"], "--model", files["model"])
    assert result.exit_code == 0, result.output
    assert "SubnetExtractionModifier" in result.stdout
    assert "can run on" in result.stderr


def uneven(files: Files) -> Path:
    """Write a strategy of the tiny model, four layers, whose narrow layers differ in size."""
    model = AutoModelForCausalLM.from_pretrained(files["model"])
    strategy = random_strategy(model)
    for key in strategy.width.units[Fraction(1, 2)]:
        if key.endswith("mlp"):
            strategy.width.units[Fraction(1, 2)][key] += 16 * int(key[0])
    strategy.save(files["elastic"])
    return files["elastic"]


def test_loads_goes_by_the_sizes_that_a_strategy_found(files: Files):
    strategy = uneven(files)
    asked = ["loads", "4x1/2", "--model", files["model"], "--flow"]
    plain = invoke(*asked, "vllm")
    assert plain.exit_code == 0, plain.output
    assert "taken to keep the same sizes" in plain.stderr
    assert "one size for all layers" in refused(*asked, "vllm", "--strategy", strategy)
    assert invoke(*asked, "vllm", "--strategy", strategy, "--portable").exit_code == 0
    known = invoke(*asked, "torch", "--strategy", strategy)
    assert known.exit_code == 0, known.output
    assert "as PerLayer" in known.stderr
    assert "taken to keep" not in known.stderr
    # 64, 80, 96 and 112 of 128 neurons: no layer is asked about in the name of another
    message = refused(*asked, "torch:W4A16", "--strategy", strategy)
    assert "down_proj of layer 1 (80 inputs)" in message
    assert "down_proj of layer 0 (64 inputs)" in message


@pytest.mark.usefixtures("no_model_loads")
def test_loads_refuses_a_strategy_of_a_model_of_other_sizes(files: Files, tiny_model: TinyModel, tmp_path: Path):
    random_strategy(tiny_model("llama", intermediate_size=64)).save(tmp_path / "other")
    asked = ["loads", "4x1/2", "--model", files["model"], "--flow", "torch"]
    assert "belongs to another model" in refused(*asked, "--strategy", tmp_path / "other")
    assert "does not exist" in refused(*asked, "--strategy", tmp_path / "nowhere")


@pytest.mark.usefixtures("no_model_loads")
def test_loads_refuses_options_that_would_do_nothing(files: Files, tiny_model: TinyModel, tmp_path: Path):
    random_strategy(tiny_model("llama")).save(tmp_path / "strategy")
    asked = ["loads", "4x1/2", "--model", files["model"], "--flow", "torch"]
    assert "--round-to is for sizes" in refused(*asked, "--strategy", tmp_path / "strategy", "--round-to", 8)
    assert "add --strategy DIR" in refused(*asked, "--portable")


def test_what_is_missing_is_named(files: Files):
    for missing, given in (("--model", ["--flow", "vllm"]), ("--flow", ["--model", files["model"]])):
        result = invoke("loads", "4x1/2", *given)
        assert result.exit_code == 2
        assert f"Missing option '{missing}'" in result.output
    assert "no recipe '7b.yaml'" in refused("check", "7b.yaml")  # a file's name, not a shape
    assert "loads a shape, such as 24x7/8, tells 'amoeba loads SHAPE" in refused("check", "4x1/2")


def test_ctrl_c_is_told_and_has_an_exit_code_of_its_own(monkeypatch: pytest.MonkeyPatch):
    def stop(name: str) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe_files, "require_shipped", stop)
    result = invoke("recipes", "show", "demo")
    assert result.exit_code == 130
    assert result.stderr.strip() == "error: stopped by Ctrl-C; no half-written checkpoint was left"


def test_debug_shows_where_an_error_came_from():
    result = CliRunner().invoke(app, ["--debug", "recipes", "show", "demos"])
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "RecipeError"


@pytest.fixture
def no_model_loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test that loads weights; on the meta device, only their names and sizes are looked at."""
    load = AutoModelForCausalLM.from_pretrained

    def fail(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device_map") == "meta":
            return load(*args, **kwargs)
        pytest.fail("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    return


@pytest.mark.usefixtures("no_model_loads")
class TestBeforeAnythingLoads:
    def test_a_bad_recipe_is_refused(self, files: Files):
        files["recipe"].write_text(files["recipe"].read_text().replace("min_depth", "mindepth"))
        assert "Did you mean 'min_depth'" in refused(*run_arguments(files))
        assert not files["out"].exists()

    @pytest.mark.parametrize("what", ["directory", "file"])
    def test_an_output_that_holds_something_else_is_refused_and_kept(self, files: Files, what: str):
        kept = files["out"] / "thesis.txt" if what == "directory" else files["out"]
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("years of work")
        message = refused(*run_arguments(files))
        assert "nothing is overwritten" in message
        assert ("is no directory" in message) == (what == "file")
        assert "nothing is overwritten" in refused("demo", "--output-dir", files["out"])
        assert kept.read_text() == "years of work"

    def test_an_elastic_dir_that_holds_something_else_is_refused(self, files: Files):
        files["elastic"].mkdir()
        (files["elastic"] / "thesis.txt").write_text("years of work")
        assert "no elastic checkpoint" in refused(*run_arguments(files))

    def test_linears_that_the_model_has_not_are_refused(self, files: Files):
        known = 'target_modules: ["q_proj", "mlp.up_proj", "lm_head"]'
        text = files["recipe"].read_text()
        files["recipe"].write_text(text.replace("r: 2", f"r: 2\n        {known}"))
        assert invoke("check", files["recipe"], "--model", files["model"]).exit_code == 0
        files["recipe"].write_text(files["recipe"].read_text().replace('"mlp.up_proj"', '"mlp.up", "proj"'))
        message = refused(*run_arguments(files))
        assert "target_modules names mlp.up, proj, and the model has no such linear" in message
        assert "possible are q_proj, k_proj" in message

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ("dataset: nobody/nothing", "data set nobody/nothing, split train, cannot be read: it is no path here"),
            ("dataset: TEXT\n      text_column: body", "no column 'body' of strings; its columns are text"),
        ],
    )
    def test_training_text_is_opened_before_selection(self, files: Files, fields: str, message: str):
        training = f"max_steps: 1\n      {fields}".replace("TEXT", str(files["text"]))
        files["recipe"].write_text(files["recipe"].read_text().replace("max_steps: 1", training))
        assert message in refused(*run_arguments(files))
        assert not files["out"].exists()

    def test_one_directory_for_two_things_is_refused(self, files: Files):
        assert "name two directories" in refused(*run_arguments(files, out=files["elastic"]))
        assert "elastic_dir" in refused(*run_arguments(files, out=files["elastic"] / "out"))

    @pytest.mark.parametrize("field", ["elastic_dir", "checkpoint_dir"])
    def test_a_directory_in_the_output_directory_is_refused(self, files: Files, field: str):
        inside = files["out"] / "inside"
        text = files["recipe"].read_text().replace(f"elastic_dir: {files['elastic']}", f"{field}: {inside}")
        assert str(inside) in text
        files["recipe"].write_text(text)
        assert f"{field} {inside} and the output directory" in refused(*run_arguments(files))
        assert not files["out"].exists()

    @pytest.mark.parametrize("where", ["inside", "behind a file"])
    def test_a_directory_for_steps_that_cannot_be_is_refused(self, files: Files, where: str):
        steps = (files["out"] if where == "inside" else files["text"]) / "steps"
        fields = f"allocation: uniform\n      resume_dir: {steps}"
        files["recipe"].write_text(files["recipe"].read_text().replace("allocation: uniform", fields))
        told = f"resume_dir {steps} and the output directory" if where == "inside" else f"{steps} cannot be written"
        assert told in refused(*run_arguments(files))
        assert not files["out"].exists()

    def test_a_model_that_is_not_there_is_refused(self, files: Files):
        assert "cannot be loaded: there is no such directory" in refused(*run_arguments(files, model=files["out"]))

    @pytest.mark.parametrize(
        ("name", "words"), [("adapter_config.json", "is a PEFT adapter"), ("elastic.json", "is an elastic checkpoint")]
    )
    def test_what_is_no_model_is_called_by_its_name(self, files: Files, name: str, words: str):
        directory = files["out"].with_name("mistaken")
        directory.mkdir()
        (directory / name).write_text("{}")
        assert f"{words}; give its base model" in refused(*run_arguments(files, model=directory))
        assert "is a file" in refused(*run_arguments(files, model=directory / name))

    @pytest.mark.parametrize("damage", ["missing", "truncated", "missing shard"])
    def test_weights_that_are_not_whole_are_refused(self, files: Files, damage: str):
        weights = files["model"] / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        if damage == "truncated":
            weights.write_bytes(content[: len(content) // 2])
        if damage == "missing shard":
            index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
            (files["model"] / "model.safetensors.index.json").write_text(json.dumps(index))
        words = {"missing": "has no weights", "truncated": "truncated or damaged", "missing shard": "lacks model-00001"}
        assert words[damage] in refused(*run_arguments(files))

    def test_a_missing_tokenizer_is_told_in_one_line(self, files: Files):
        for path in files["model"].glob("token*"):
            path.unlink()
        assert "put the tokenizer's files beside its weights" in refused(*run_arguments(files))

    @pytest.mark.parametrize("field", ["out", "elastic_dir", "checkpoint_dir"])
    def test_where_nothing_can_be_written_is_refused(self, files: Files, field: str):
        inside = files["text"] / "inside"  # a file is in the way
        if field == "out":
            assert f"{inside} cannot be written" in refused(*run_arguments(files, out=inside))
            assert f"{inside} cannot be written" in refused("demo", "--output-dir", inside)
            return
        text = files["recipe"].read_text()
        files["recipe"].write_text(text.replace(f"elastic_dir: {files['elastic']}", f"{field}: {inside}"))
        assert f"{inside} cannot be written" in refused(*run_arguments(files))

    @pytest.mark.parametrize("field", ["out", "elastic_dir", "checkpoint_dir"])
    def test_where_this_user_may_not_write_is_refused_before_anything_is_spent(
        self, files: Files, field: str, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("llmcompressor.oneshot", None)  # not reached
        locked = files["text"].parent / "locked"
        empty, new = locked / "empty", locked / "new" / "deep"
        empty.mkdir(parents=True)
        text = files["recipe"].read_text()
        with read_only(empty), read_only(locked):
            for directory in (empty, new):
                if field == "out":
                    commands = [run_arguments(files, out=directory), ["demo", "--output-dir", directory]]
                else:
                    there = text.replace(f"elastic_dir: {files['elastic']}", f"{field}: {directory}")
                    files["recipe"].write_text(there)
                    commands = [run_arguments(files)]
                for command in commands:
                    message = refused(*command)
                    assert f"{directory} cannot be written" in message
                    assert "Permission denied); name another directory" in message
            if field == "out":
                assert f"{empty} cannot be written" in refused("recipes", "copy", "demo", empty)
            assert [list(locked.iterdir()), list(empty.iterdir())] == [[empty], []]

    def test_training_text_that_is_not_there_is_refused(self, files: Files):
        text = files["recipe"].read_text().replace("max_steps: 1", "max_steps: 1\n      dataset: nowhere.jsonl")
        files["recipe"].write_text(text)
        assert "data set nowhere.jsonl: no such file" in refused(*run_arguments(files))

    def test_an_unsupported_architecture_is_refused(self, files: Files):
        AutoConfig.for_model("gpt2").save_pretrained(files["model"])
        assert "supported are gemma2" in refused(*run_arguments(files))

    def test_a_quantized_model_is_refused(self, files: Files):
        path = files["model"] / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        path.write_text(json.dumps(config))
        assert "already quantized" in refused(*run_arguments(files))

    def test_no_data_is_refused(self, files: Files):
        assert "give --dataset" in refused("run", files["recipe"], "--model", files["model"], "-o", files["out"])

    @pytest.mark.parametrize("content", ["", '{"text": ""}\n', '{"text": "w5"}\n'])
    def test_an_empty_or_too_short_data_set_is_refused(self, files: Files, content: str):
        files["text"].write_text(content)
        refused(*run_arguments(files))
        assert not files["out"].exists()

    def test_an_objective_the_data_cannot_serve_is_refused(self, files: Files):
        files["recipe"].write_text(
            files["recipe"].read_text().replace("min_depth: 2", "min_depth: 2\n      objective: accuracy")
        )
        assert "question" in refused(*run_arguments(files))

    def test_a_shape_outside_an_elastic_checkpoint_is_refused(self, files: Files):
        assert "elastic" in refused("extract", files["model"], "--shape", "2x1", "-o", files["out"])


def test_run_then_extract(files: Files):
    """A recipe runs; `oneshot` gives the same checkpoint; any other shape comes from the elastic checkpoint."""
    result = invoke(*run_arguments(files))
    assert result.exit_code == 0, result.output
    for told in (
        "depth 3 is without ",
        "width 3/4 keeps ",
        "one-for-all training ended at step 1: loss 4x1 ",
        "subnet 3x3/4 has ",
        f"checkpoint written to {files['out']}: ",
        f"amoeba extract {files['elastic']} ",
    ):
        assert told in result.stderr  # fmt: skip
    assert "accelerator" not in result.output
    assert (files["out"] / "recipe.yaml").is_file()
    plan_recipe(files["out"] / "recipe.yaml")
    config = AutoConfig.from_pretrained(files["out"])
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (3, 6, 96)

    again = files["out"].with_name("oneshot")
    options = RunOptions(num_samples=8, max_seq_length=16, batch_size=2)
    batches = calibration_batches(plan_recipe(files["recipe"]), str(files["model"]), 97, str(files["text"]), options)
    from llmcompressor import oneshot

    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    oneshot(model=str(files["model"]), recipe=str(files["recipe"]), dataset=loader, output_dir=str(again))
    assert torch.equal(logits(files["out"]), logits(again))

    other = files["out"].with_name("other")
    result = invoke("extract", files["elastic"], "--shape", "2x1", "-o", other)
    assert result.exit_code == 0, result.output
    assert AutoConfig.from_pretrained(other).num_hidden_layers == 2
    assert "outside the space" in refused("extract", files["elastic"], "--shape", "1x1", "-o", files["out"] / "x")


def test_a_run_given_again_says_that_its_result_is_there(files: Files, monkeypatch: pytest.MonkeyPatch):
    result = invoke(*run_arguments(files), "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-1].startswith(f"checkpoint written to {files['out']}")
    assert "keeps" not in result.stderr
    before = {path: path.stat().st_mtime_ns for path in files["out"].parent.rglob("*")}
    monkeypatch.setattr("amoeba_plugin.recipes.run.execute", None)
    again = invoke(*run_arguments(files))
    assert again.exit_code == 0, again.output
    assert "already; nothing was computed" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in files["out"].parent.rglob("*")} == before
    assert "another options" in refused(*run_arguments(files), "--seed", "3")
    files["recipe"].write_text(files["recipe"].read_text().replace("min_depth: 2", "min_depth: 1"))
    assert "another recipe" in refused(*run_arguments(files))


# As many layers and KV groups as the model that each shipped recipe names, everything else tiny.
SHIPPED_MODELS = {
    "demo": ("llama", {"layers": 12, "hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 8}),
    "llama2-7b": ("llama", {"layers": 32, "hidden_size": 128, "head_dim": 128, "num_key_value_heads": 8}),
    "qwen3": ("qwen3", {"layers": 28, "head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 8}),
    "small-llama": (
        "llama",
        {"layers": 30, "hidden_size": 72, "head_dim": 64, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "smollm2": (
        "llama",
        {
            "layers": 30,
            "hidden_size": 72,
            "head_dim": 64,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 300,
        },
    ),
    "select_only": ("llama", {"layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}),
    "mixed_bits": (
        "llama",
        {"layers": 6, "hidden_size": 64, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
}


@pytest.mark.parametrize(
    "name", sorted(shipped_recipes().keys() - {"fit", "edge_llm"})
)  # which have tests of their own
def test_a_shipped_recipe_runs_on_a_tiny_model(
    files: Files, tiny_model: TinyModel, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Only the steps, the training text and the place of the elastic checkpoint differ from what is shipped."""
    model_type, sizes = SHIPPED_MODELS[name]
    tiny_model(model_type, intermediate_size=512, **sizes).save_pretrained(files["model"])
    recipe = yaml.safe_load(shipped_recipes()[name].read_text())
    if "finetune_stage" in recipe:
        training = recipe["finetune_stage"]["amoeba_finetune_modifiers"]["OneForAllDistillationModifier"]
        training |= {"max_steps": 1, "elastic_dir": str(files["elastic"])}
        if "dataset" in training:
            training |= {"dataset": str(files["text"]), "text_column": "text", "num_samples": 4, "max_seq_length": 16}
    asked = recipe["extract_stage"]["amoeba_extract_modifiers"]["SubnetExtractionModifier"]
    if "budget" in asked:
        monkeypatch.setattr(preflight, "Measuring", functools.partial(Measuring, shapes=6))
        asked["budget"]["file"] = "18MB"  # of 24
        asked["search"]["profile"] = str(files["recipe"].with_name("profile.json"))
    files["recipe"].write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = invoke(*run_arguments(files), "--num-calibration-samples", "4" if "total" in asked else "2")
    assert result.exit_code == 0, result.output
    config = AutoConfig.from_pretrained(files["out"])
    queries = config.num_attention_heads // config.num_key_value_heads
    kept, whole = (  # rows of a KV group's queries, key and value, columns of its output; a neuron's of three matrices
        groups * config.head_dim * (2 * queries + 2) + 3 * neurons
        for groups, neurons in (
            (config.num_key_value_heads, config.intermediate_size),
            (sizes["num_key_value_heads"], 512),
        )
    )
    if "budget" in asked:
        assert 20 <= config.num_hidden_layers <= 30
        assert 4 * (2 * 300 * 72 + config.num_hidden_layers * kept * 72) < 18e6
    else:
        depth, width = str(config.num_hidden_layers), ""
        if "total" in asked:
            width = str(Fraction(asked["total"]) * sizes["layers"] / int(depth))
            assert 2 / 3 <= int(depth) / sizes["layers"] <= 1
        else:
            depth, width = asked["shape"].split("x")
        assert config.num_hidden_layers == int(depth)
        assert abs(kept - Fraction(width) * whole) <= 3 * 128 / 2  # half a step of round_to
    if "quantize_stage" in recipe:
        assert config.quantization_config["quant_method"] == "compressed-tensors"
    assert torch.isfinite(logits(files["out"])).all()


def test_an_error_half_way_leaves_nothing(files: Files, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, output_dir: str, **kwargs: object) -> None:
        (Path(output_dir) / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("llmcompressor.oneshot", full)
    assert "is full" in refused(*run_arguments(files))
    assert not list(files["out"].parent.glob("*out*"))


def test_whole_or_nothing(tmp_path: Path):
    with whole_or_nothing(tmp_path / "new") as partial:
        (partial / "file").write_text("content")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "file").read_text() == "content"
    with pytest.raises(KeyError), whole_or_nothing(tmp_path / "other") as partial:
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(OSError, match="permission"), whole_or_nothing(tmp_path / "other"):
        raise PermissionError(errno.EACCES, "permission denied")
    with pytest.raises(ArtifactError, match="full"), whole_or_nothing(tmp_path / "other"):
        raise OSError(errno.ENOSPC, "No space left on device")
