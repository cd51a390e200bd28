"""The command ``amoeba``: run a recipe, cut a shape, look at recipes, show the demo.

Nothing heavy is imported before a command runs, so that help comes at once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from amoeba_plugin._version import __version__
from amoeba_plugin.errors import AmoebaError, ArtifactError, RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from amoeba_plugin.recipes.check import CheckedRecipe

EXIT_REFUSED = 2  # what was asked cannot be done; the message says why
EXIT_STOPPED = 130  # what shells report of a command that Ctrl-C stopped


class AmoebaGroup(TyperGroup):
    """Turns what a user can put right into one red message and exit code 2; ``--debug`` shows the traceback."""

    def invoke(self, ctx: Any) -> object:  # typer's own copy of click's Context, which has no public name
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (AmoebaError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            _refuse(str(error))
            raise typer.Exit(EXIT_REFUSED) from None
        except KeyboardInterrupt:
            _refuse("stopped by Ctrl-C; no half-written checkpoint was left")
            raise typer.Exit(EXIT_STOPPED) from None


app = typer.Typer(
    name="amoeba",
    cls=AmoebaGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From one pretrained LM and one recipe to quantized subnets of any shape.",
)
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that come with the package.")
app.add_typer(recipes_app, name="recipes")

QUIET = {
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
RecipeArgument = Annotated[str, typer.Argument(help="Path of a recipe, or the name of a shipped one.")]


def main() -> None:
    """Run the command line."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"amoeba_plugin {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """From one pretrained LM and one recipe to quantized subnets of any shape."""


@app.command()
def run(
    recipe: RecipeArgument,
    model: Annotated[str, typer.Option(help="Path or hub id of a causal LM of a supported architecture.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the checkpoint goes: new or empty.")],
    dataset: Annotated[
        str | None,
        typer.Option(help="Text: a .jsonl, .json, .txt, .csv or .parquet file, a save_to_disk directory, or a hub id."),
    ] = None,
    num_calibration_samples: Annotated[
        int, typer.Option(min=1, help="Sequences of calibration data that selection sees.")
    ] = 512,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per batch.")] = 1,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 42,
    text_column: Annotated[
        str | None, typer.Option(help="Column with the text; default: text, or the only column of strings.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set; a file is one split.")] = "train",
    dtype: Annotated[
        Dtype, typer.Option(help="To load the model in; float32 where a CPU is slow in bfloat16.")
    ] = "auto",
) -> None:
    """Run a recipe on a model and write the checkpoint."""
    from amoeba_plugin.recipes.run import RunOptions, run_recipe

    options = RunOptions(split, text_column, num_calibration_samples, max_seq_length, batch_size, seed, dtype)
    written = run_recipe(recipe, model, dataset, output_dir, options)
    _done(f"checkpoint written to {written}")


@app.command()
def extract(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint: what elastic_dir in a recipe named.")],
    shape: Annotated[str, typer.Option(help="DEPTHxWIDTH, for example 24x7/8.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where the checkpoint goes: new or empty.")],
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
    adapter: Annotated[
        Literal["fold", "separate"],
        typer.Option(help="Into the weights, or cut without it and its LoRA written to OUT/adapter."),
    ] = "fold",
    portable: Annotated[
        bool, typer.Option("--portable", help="Layers that differ: pad with zeros to a stock class; no speed.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "5GB",
) -> None:
    """Cut one shape out of an elastic checkpoint: no training, no data."""
    _be_quiet()
    from amoeba_plugin.elastic.subnet_config import PER_LAYER_FILE
    from amoeba_plugin.extraction.checkpoint import extract_checkpoint

    parity = extract_checkpoint(elastic, shape, output_dir, base, adapter, portable, max_shard_size)
    _done(f"shape {parity.shape} written to {output_dir}; {parity.in_words}")
    if (output_dir / PER_LAYER_FILE).is_file():
        _done("its layers differ: load it with trust_remote_code=True, or repeat with --portable for any loader")
    elif portable:
        _done("where its layers differed they are padded with zeros: it loads anywhere, but gains no speed there")


@app.command()
def check(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|SHAPE", help="A recipe's path or shipped name, or DEPTHxWIDTH.")
    ],
    model: Annotated[str | None, typer.Option(help="Path or hub id; only its configuration is read.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Can it load the subnet: transformers, vllm, llama.cpp or openvino.")
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(help="Quantized so, by the target's name for it: W4A16, Q4_K_M.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that the target splits it over.")] = 1,
    round_to: Annotated[int, typer.Option(min=1, help="Of a SHAPE: channels that sizes are multiples of.")] = 1,
    strategy: Annotated[
        Path | None, typer.Option(help="Of a SHAPE: elastic checkpoint, or directory with strategy.json: its sizes.")
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="With --strategy: as extracted with --portable.")
    ] = False,
) -> None:
    """Check a recipe or a shape, how it fits a model, and whether a target can load it, without loading weights."""
    _be_quiet()
    from amoeba_plugin.recipes.check import check_recipe
    from amoeba_plugin.recipes.files import find_recipe
    from amoeba_plugin.recipes.model_plan import planned_config, shape_config, sizes_unknown, subnet_config
    from amoeba_plugin.recipes.preflight import check_against_model
    from amoeba_plugin.runtime.model_files import load_config
    from amoeba_plugin.shape import SubnetShape

    is_shape = re.fullmatch(r"[0-9][0-9.]*(x.*)?", recipe.lower()) is not None and not Path(recipe).exists()
    if (is_shape or target or scheme or tensor_parallel > 1) and (model is None or target is None):
        raise RecipeError(
            "whether a subnet can be loaded depends on the model and on what loads it; give --model, --target"
        )
    if (strategy is not None and not is_shape) or (portable and strategy is None):
        raise RecipeError(
            "--strategy goes with a SHAPE, and --portable with --strategy; leave them out, or name a shape"
        )
    if round_to > 1 and (not is_shape or strategy is not None):
        raise RecipeError(
            "--round-to goes with a SHAPE alone: a recipe has WidthShrinkingModifier.round_to, a strategy its own "
            "sizes; leave it out"
        )
    if target is not None:
        from amoeba_plugin.deployment.targets import require_target

        require_target(target)
    if not is_shape:
        checked = check_recipe(find_recipe(recipe))
        if model is not None:
            check_against_model(checked, load_config(model))
        Console().print(_modifier_table(checked))
        on = f" on {model}" if model else "; add --model to check it against a model's sizes"
        _done(f"{checked.source} can run{on}")
    if model is not None and target is not None:
        whole = load_config(model)
        if not is_shape:
            subnet = subnet_config(checked, whole, even_split=True)
            if sizes_unknown(checked):
                _warn("its widths have sizes after selection only; check the shape again with --strategy then")
        elif strategy is not None:
            subnet = planned_config(whole, SubnetShape.parse(recipe), strategy, portable)
        else:
            subnet = shape_config(whole, SubnetShape.parse(recipe), round_to)
            _warn(
                "every layer is taken to keep the same sizes (allocation: uniform); --strategy DIR: those of a strategy"
            )
        _check_target(whole.model_type, subnet, target, scheme, tensor_parallel)


def _check_target(model_type: str, subnet: PretrainedConfig, target: str, scheme: str | None, devices: int) -> None:
    from amoeba_plugin.deployment.targets import candidate, require_loadable, targets
    from amoeba_plugin.models.registry import architecture_for

    subject = candidate(subnet, architecture_for(model_type), target, scheme, devices)
    for warning in require_loadable(subject, target):
        _warn(f"{warning.where}: {warning.rule.says} [{warning.rule.source}]")
    quantized = f" in {scheme}" if scheme else ""
    _done(f"{target} can load it, as {subject.saved_as}{quantized}, by the rules of {targets()[target].read}")


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where report and checkpoints go.")] = Path(
        "amoeba_demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A shortened schedule: shows that it works, not how well.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 42,
) -> None:
    """Compress the model that comes with the package and report what was gained and lost."""
    _be_quiet()
    from amoeba_plugin.recipes.preflight import require_new_directory
    from amoeba_plugin.reports.report import REPORT_JSON

    require_new_directory(output_dir, replaceable=REPORT_JSON)
    from amoeba_plugin.demo.run import run_demo

    run_demo(output_dir, quick=quick, seed=seed)
    _done(f"report written to {output_dir / 'report.html'}")


@recipes_app.command("list")
def list_recipes() -> None:
    """Name the shipped recipes."""
    from amoeba_plugin.recipes.files import shipped_recipes

    table = Table("name", "what it is for", box=None)
    for name, path in shipped_recipes().items():
        table.add_row(name, _first_sentence(path))
    Console().print(table)


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")]) -> None:
    """Print a shipped recipe."""
    typer.echo(_shipped(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    path: Annotated[Path, typer.Argument(help="File or directory to copy it to.")],
) -> None:
    """Copy a shipped recipe, to edit it."""
    source = _shipped(name)
    target = path / source.name if path.is_dir() else path
    if target.exists():
        raise ArtifactError(f"{target} exists; nothing is overwritten: name another path")
    if not target.parent.is_dir():
        raise ArtifactError(f"there is no directory {target.parent} to copy the recipe into; make it first")
    target.write_bytes(source.read_bytes())
    _done(f"recipe {name} written to {target}")


def _shipped(name: str) -> Path:
    from amoeba_plugin.recipes.files import require_shipped

    return require_shipped(name)


def _first_sentence(path: Path) -> str:
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).partition(". ")[0].partition(": ")[0].rstrip(".:")


def _modifier_table(checked: CheckedRecipe) -> Table:
    table = Table("#", "modifier", "group", "fields", title=checked.source, title_justify="left")
    for number, modifier in enumerate(checked.modifiers, start=1):
        given = modifier.model_dump(exclude_unset=True, exclude={"group"})
        fields = ", ".join(f"{name}={value}" for name, value in given.items())
        table.add_row(str(number), type(modifier).__name__, modifier.group, fields)
    return table


def _be_quiet() -> None:
    """Silence the hosts' logs and bars, so that a command's own can be read; set the variables to hear them again."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def _done(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="green", markup=False)


def _warn(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"warning: {message}", style="yellow", markup=False)


def _refuse(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", style="bold red", markup=False)
