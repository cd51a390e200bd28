"""The demo: one recipe on the model that comes with the package, and a report of what was gained and lost."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from llmcompressor import oneshot
from peft import PeftModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from amoeba_plugin.data.bars import MANY, without_bars
from amoeba_plugin.data.batch import Batch
from amoeba_plugin.demo.budgets import within_budgets
from amoeba_plugin.demo.data import BLOCK_SIZE, FULL, MODEL, QUICK, DemoData, Schedule, demo_data
from amoeba_plugin.demo.depth_comparison import compare_depth_selectors
from amoeba_plugin.demo.figures import DENSE, Figures, checkpoint_bytes, quality, quality_by_shape
from amoeba_plugin.demo.requests import answered_requests
from amoeba_plugin.deployment.latency import DECODE_TOKENS, PROMPT_TOKENS, measure_latency
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.models.registry import architecture_of
from amoeba_plugin.recipes.files import find_recipe
from amoeba_plugin.recipes.places import require_new_directory
from amoeba_plugin.recipes.policy import PolicyTools, recipe_of
from amoeba_plugin.reports.html import write_report
from amoeba_plugin.reports.report import REPORT_JSON, Provenance, Report
from amoeba_plugin.reports.terminal import print_report
from amoeba_plugin.runtime.ownership import owning
from amoeba_plugin.runtime.peak_memory import peak_memory
from amoeba_plugin.runtime.stages import Stages
from amoeba_plugin.selection.layerwise.policy import LayerwisePolicy
from amoeba_plugin.selection.layerwise.search import PolicyBudget, find_policy
from amoeba_plugin.selection.registry import sensitivity_named
from amoeba_plugin.shape import SubnetShape

AVERAGE_BITS, POLICY_BATCHES = 5.0, 1  # of the dense model's weights, chosen on so much of the calibration data
VERSIONED = ("torch", "transformers", "peft", "llmcompressor", "compressed-tensors", "torch-pruning")


def run_demo(output_dir: Path, quick: bool = False, seed: int = 42) -> Report:
    """Run the shipped recipe ``demo`` end to end and write report and checkpoints.

    Args:
        output_dir: New, or an older demo's, which is replaced. Holds in the end ``report.html``, ``report.json``, the
            ``recipe.yaml`` that ran, ``elastic/``, ``quantized/``, ``profile.json``, and what was deployed for the
            budget of each engine.
        quick: Shortened: shows that everything works, not how well.
        seed: Of data, sampling and initialisation.

    Raises:
        ArtifactError: If the directory holds anything else, or cannot be written.
    """
    with owning(output_dir, alone=True):
        require_new_directory(output_dir, replaceable=REPORT_JSON)
        shutil.rmtree(output_dir, ignore_errors=True)
        return _run(output_dir, QUICK if quick else FULL, seed)


def _run(output_dir: Path, schedule: Schedule, seed: int) -> Report:
    stages = Stages()
    output_dir.mkdir(parents=True)
    with stages.timed("data"):
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        data = demo_data(tokenizer, schedule, seed)
    with stages.timed("recipe"):
        recipe = _write_recipe(output_dir, data, schedule, seed)
        _run_recipe(recipe, tokenizer, data, output_dir, seed)
    elastic, peft_model = load_elastic(output_dir / "elastic")
    figures = _figures(elastic, peft_model, schedule, data, stages)
    with stages.timed("depth selectors"):
        depths = compare_depth_selectors(
            figures.models[DENSE], elastic.strategy.depth, data.calibration, data.held_out, schedule.compared_depths,
            schedule.random_selections, seed,
        )  # fmt: skip
    with stages.timed("quantized subnet"):
        quantized = figures.quantized_row(output_dir / "quantized", _chosen_shape(recipe), data)
    with stages.timed("bits of every layer"):
        policy = _policy(figures.models[DENSE], data.calibration, output_dir)
    with stages.timed("budgets"):
        judged = output_dir / "judged_data"
        with without_bars():
            data.judged.save_to_disk(judged)
        budgets, profile = within_budgets(output_dir / "elastic", judged, output_dir, schedule)
    with stages.timed("requests"):
        requests = answered_requests(elastic, profile, tokenizer, data.judged[0]["input_ids"])
    report = Report(
        title="Demo: a 12-layer Llama trained on the Python standard library",
        dense=figures.row(DENSE),
        shapes=[figures.row(shape) for shape in schedule.shapes],
        depth_selectors=depths,
        quantized=quantized,
        policy=policy,
        budgets=budgets,
        profile=profile,
        requests=requests,
        provenance=_provenance(stages, seed, schedule, elastic, data),
    )
    write_report(report, output_dir)
    print_report(report)
    return report


def _figures(
    elastic: ElasticModel, peft_model: PeftModel | None, schedule: Schedule, data: DemoData, stages: Stages
) -> Figures:
    """Measure the dense model and every subnet, before and after training."""
    with stages.timed("extraction"):
        dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        subnets = {shape: extract(elastic, shape) for shape in schedule.shapes}
        models = {DENSE: dense, **subnets}
        sizes = {name: checkpoint_bytes(model) for name, model in models.items()}
    with stages.timed("quality of every shape"):
        after = {shape: quality(subnet, data) for shape, subnet in tqdm(subnets.items(), "quality after training")}
        with peft_model.disable_adapter() if peft_model is not None else nullcontext():
            before = quality_by_shape(elastic, schedule.shapes, data)
        before[DENSE] = quality(dense, data)
    with stages.timed("latency"):
        latency = measure_latency(models, rounds=schedule.latency_rounds)
    return Figures(models, sizes, before, after, latency)


def _policy(dense: PreTrainedModel, calibration: list[Batch], output_dir: Path) -> LayerwisePolicy:
    """Choose bits for the dense model, and write them, and the recipe of llm-compressor's own that carries them out."""
    adapter, scored = architecture_of(dense.config), sensitivity_named("output_error")
    found = find_policy(dense, adapter, calibration[:POLICY_BATCHES], scored, PolicyBudget(AVERAGE_BITS))
    found.save(output_dir / "policy.json")
    (output_dir / "policy.yaml").write_text(recipe_of(found, dense, PolicyTools()), encoding="utf-8")
    return found


def _write_recipe(output_dir: Path, data: DemoData, schedule: Schedule, seed: int) -> Path:
    """Write the shipped recipe with this run's paths and seed filled in; it can be run again as it stands."""
    with without_bars(len(data.training) < MANY):
        data.training.save_to_disk(output_dir / "training_data")
    recipe = yaml.safe_load(find_recipe("demo").read_text(encoding="utf-8"))
    train = _modifier(recipe, "OneForAllDistillationModifier")
    train |= {
        "dataset": str(output_dir / "training_data"),
        "elastic_dir": str(output_dir / "elastic"),
        "num_samples": schedule.training_blocks,
        "max_seq_length": BLOCK_SIZE,
        "seed": seed,
    }
    if schedule.training_steps is not None:
        train["max_steps"] = schedule.training_steps
    path = output_dir / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def _modifier(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(group[name] for stage in recipe.values() for group in stage.values() if name in group)
    return found


def _chosen_shape(recipe: Path) -> str:
    shape = _modifier(yaml.safe_load(recipe.read_text(encoding="utf-8")), "SubnetExtractionModifier")["shape"]
    return str(SubnetShape.parse(shape))


def _run_recipe(recipe: Path, tokenizer: PreTrainedTokenizerBase, data: DemoData, output_dir: Path, seed: int) -> None:
    set_seed(seed)
    oneshot(
        model=str(MODEL),
        tokenizer=tokenizer,
        precision="float32",  # this runs on CPUs, of which many compute bf16 slowly or not at all
        recipe=str(recipe),
        dataset=DataLoader(data.calibration, batch_size=None),  # type: ignore[arg-type]  # a list is a data set
        output_dir=str(output_dir / "quantized"),
    )


def _provenance(stages: Stages, seed: int, schedule: Schedule, elastic: ElasticModel, data: DemoData) -> Provenance:
    seconds = {**stages.seconds}
    inside = elastic.strategy.provenance.get("seconds", {})
    if inside:
        whole = seconds.pop("recipe")
        seconds = {
            "data": seconds.pop("data"),
            **inside,
            "extraction and quantization": whole - sum(inside.values()),
            **seconds,
        }
    return Provenance(
        seed=seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads, fp32",
        versions={"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
        stage_seconds=seconds,
        peak_memory_bytes=peak_memory()["process"],
        data={
            "selection": f"{schedule.calibration_blocks} blocks of {BLOCK_SIZE} tokens of train modules",
            "training": f"{schedule.training_blocks} other blocks of train modules",
            "held-out loss": f"{schedule.held_out_blocks} blocks of held-out modules",
            "accuracy": f"{schedule.questions} questions with 4 choices from held-out modules",
            "choice within budgets": f"{len(data.judged)} other blocks of held-out modules",
            "latency": f"one prompt of {PROMPT_TOKENS} tokens, then {DECODE_TOKENS} tokens one by one; medians",
        },
    )
