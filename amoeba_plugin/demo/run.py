"""The demo: one recipe on the model that comes with the package, and a report of what was gained and lost."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from llmcompressor import oneshot
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from amoeba_plugin.data.batch import Batch
from amoeba_plugin.data.calibration import materialise, require_disjoint
from amoeba_plugin.demo.corpus import part_files, token_blocks
from amoeba_plugin.demo.depth_comparison import compare_depth_selectors
from amoeba_plugin.demo.multiple_choice import multiple_choice
from amoeba_plugin.deployment.latency import DECODE_TOKENS, PROMPT_TOKENS, Latency, measure_latency
from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.model import ElasticModel
from amoeba_plugin.extraction.cut import extract
from amoeba_plugin.recipes.files import find_recipe
from amoeba_plugin.recipes.places import require_new_directory
from amoeba_plugin.reports.html import write_report
from amoeba_plugin.reports.report import REPORT_JSON, Provenance, Quality, QuantizedRow, Report, ShapeRow
from amoeba_plugin.reports.terminal import print_report
from amoeba_plugin.runtime.peak_memory import peak_memory
from amoeba_plugin.selection.registry import objective_named
from amoeba_plugin.shape import SubnetShape

MODEL = Path(__file__).parent / "model"
BLOCK_SIZE = 256
BATCH_SIZE = 8
VERSIONED = ("torch", "transformers", "peft", "llmcompressor", "compressed-tensors", "torch-pruning")


@dataclass(frozen=True)
class Schedule:
    """How much of everything; sizes of data in blocks of ``BLOCK_SIZE`` tokens."""

    shapes: tuple[str, ...]
    calibration_blocks: int
    training_blocks: int
    held_out_blocks: int
    questions: int
    training_steps: int | None  # None: the recipe's
    compared_depths: tuple[int, ...]
    random_selections: int


FULL = Schedule(
    ("12x1", "12x3/4", "12x1/2", "10x1", "10x3/4", "10x1/2", "8x1", "8x3/4", "8x1/2"),
    20, 1600, 40, 40, None, (10, 8), 3,
)  # fmt: skip
QUICK = Schedule(("12x1", "10x3/4", "8x1/2"), 8, 64, 8, 16, 4, (10,), 1)


@dataclass
class Stages:
    """Seconds by stage, in the order in which they ran."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a block of code."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


@dataclass(frozen=True)
class DemoData:
    """Text by purpose; selection and training see the train part alone, every figure comes from held-out modules."""

    calibration: list[Batch]
    training: Dataset
    held_out: list[Batch]
    questions: list[Batch]


def run_demo(output_dir: Path, quick: bool = False, seed: int = 42) -> Report:
    """Run the shipped recipe ``demo`` end to end and write report and checkpoints.

    Args:
        output_dir: New, or an older demo's, which is replaced. Holds in the end ``report.html``, ``report.json``, the
            ``recipe.yaml`` that ran, ``elastic/`` and ``quantized/``.
        quick: Shortened: shows that everything works, not how well.
        seed: Of data, sampling and initialisation.
    """
    require_new_directory(output_dir, replaceable=REPORT_JSON)
    schedule, stages = QUICK if quick else FULL, Stages()
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    with stages.timed("data"):
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        data = demo_data(tokenizer, schedule, seed)
    with stages.timed("recipe"):
        recipe = _write_recipe(output_dir, data, schedule, seed)
        _run_recipe(recipe, tokenizer, data, output_dir, seed)
    elastic, peft_model = load_elastic(output_dir / "elastic")
    chosen = _chosen_shape(recipe)
    with stages.timed("extraction"):
        dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        subnets = {shape: extract(elastic, shape) for shape in schedule.shapes}
        sizes = {name: _checkpoint_bytes(model) for name, model in {"dense": dense, **subnets}.items()}
    with stages.timed("quality of every shape"):
        after = {shape: _quality(subnet, data) for shape, subnet in tqdm(subnets.items(), "quality after training")}
        with peft_model.disable_adapter() if peft_model is not None else nullcontext():
            before = _quality_before_training(elastic, schedule.shapes, data)
    with stages.timed("latency"):
        latency = measure_latency({"dense": dense, **subnets}, rounds=2 if quick else 4)
    with stages.timed("depth selectors"):
        depths = compare_depth_selectors(
            dense, elastic.strategy.depth, data.calibration, data.held_out, schedule.compared_depths,
            schedule.random_selections, seed,
        )  # fmt: skip
    with stages.timed("quantized subnet"):
        quantized = _quantized_row(output_dir / "quantized", chosen, subnets, sizes, after, data)
    whole = _block_parameters(dense)
    report = Report(
        title="Demo: a 12-layer Llama trained on the Python standard library",
        dense=_row("12x1", dense, 1.0, sizes["dense"], _quality(dense, data), None, latency["dense"]),
        shapes=[
            _row(
                shape,
                model,
                _block_parameters(model) / whole,
                sizes[shape],
                before[shape],
                after[shape],
                latency[shape],
            )
            for shape, model in subnets.items()
        ],
        depth_selectors=depths,
        quantized=quantized,
        provenance=_provenance(stages, seed, schedule, elastic),
    )
    write_report(report, output_dir)
    print_report(report)
    return report


def demo_data(tokenizer: PreTrainedTokenizerBase, schedule: Schedule, seed: int) -> DemoData:
    """Draw calibration and training blocks from the train part, evaluation blocks and questions from held-out
    modules."""
    train = token_blocks(part_files("train"), tokenizer, BLOCK_SIZE).shuffle(seed=seed)
    held_out_files = part_files("held_out")
    held_out = token_blocks(held_out_files, tokenizer, BLOCK_SIZE).shuffle(seed=seed)
    selected = schedule.calibration_blocks + schedule.training_blocks
    calibration = _batches(train.select(range(schedule.calibration_blocks)))
    reported = _batches(held_out.select(range(schedule.held_out_blocks)))
    require_disjoint(calibration, reported)
    return DemoData(
        calibration=calibration,
        training=train.select(range(schedule.calibration_blocks, min(selected, len(train)))),
        held_out=reported,
        questions=multiple_choice(held_out_files, tokenizer, schedule.questions, seed),
    )


def _batches(blocks: Dataset) -> list[Batch]:
    return materialise(DataLoader(blocks.with_format("torch"), batch_size=BATCH_SIZE))


def _write_recipe(output_dir: Path, data: DemoData, schedule: Schedule, seed: int) -> Path:
    """Write the shipped recipe with this run's paths and seed filled in; it can be run again as it stands."""
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


def _quality_before_training(elastic: ElasticModel, shapes: Sequence[str], data: DemoData) -> dict[str, Quality]:
    found = {}
    for shape in tqdm(shapes, desc="quality before training", unit="shape"):
        with elastic.active(shape) as model:
            found[shape] = _quality(model, data)
    return found


def _quality(model: PreTrainedModel, data: DemoData) -> Quality:
    perplexity = objective_named("perplexity").measure(model, data.held_out)
    accuracy = objective_named("accuracy").measure(model, data.questions)
    return Quality(loss=perplexity.loss, perplexity=perplexity.value, accuracy=accuracy.value)


def _row(
    shape: str,
    model: PreTrainedModel,
    share: float,
    size: int,
    before: Quality,
    after: Quality | None,
    latency: Latency,
) -> ShapeRow:
    return ShapeRow(
        shape=shape,
        parameters=model.num_parameters(),
        block_share=share,
        checkpoint_bytes=size,
        before=before,
        after=after,
        prefill_ms=latency.prefill_ms,
        decode_ms=latency.decode_ms,
    )


def _quantized_row(
    directory: Path,
    shape: str,
    subnets: Mapping[str, PreTrainedModel],
    sizes: Mapping[str, int],
    quality: Mapping[str, Quality],
    data: DemoData,
) -> QuantizedRow:
    quantized = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return QuantizedRow(
        shape=shape,
        scheme="GPTQ, 4-bit weights in groups of 32",
        checkpoint_bytes=_weight_bytes(directory),
        quality=_quality(quantized, data),
        unquantized_bytes=sizes[shape],
        unquantized=quality[shape],
        mean_kl_divergence=_mean_kl_divergence(subnets[shape], quantized, data.held_out[:2]),
    )


@torch.no_grad()
def _mean_kl_divergence(model: PreTrainedModel, other: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Return the mean over positions of KL(model || other), nats per token."""
    total, positions = 0.0, 0
    for batch in batches:
        p, q = (each(batch["input_ids"], use_cache=False).logits.log_softmax(-1) for each in (model, other))
        total += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
        positions += batch["input_ids"].numel()
    return total / positions


def _block_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


def _checkpoint_bytes(model: PreTrainedModel) -> int:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return _weight_bytes(Path(directory))


def _weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _provenance(stages: Stages, seed: int, schedule: Schedule, elastic: ElasticModel) -> Provenance:
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
            "latency": f"one prompt of {PROMPT_TOKENS} tokens, then {DECODE_TOKENS} tokens one by one; medians",
        },
    )
