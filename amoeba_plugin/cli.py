"""The command ``amoeba``: every command parses what it is given, calls one function, and prints what came of it.

Nothing heavy is imported before a command runs, so that help comes at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from amoeba_plugin import cli_deployment, cli_serving, cli_training
from amoeba_plugin._version import __version__
from amoeba_plugin.errors import AmoebaError, shortened
from amoeba_plugin.runtime.messages import done, refuse, say, warn
from amoeba_plugin.runtime.voice import hush, speak

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
            refuse(shortened(str(error)))  # the system's errors repeat names of files of any length
            raise typer.Exit(EXIT_REFUSED) from None
        except KeyboardInterrupt:
            refuse("stopped by Ctrl-C; no half-written checkpoint was left")
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
for command in (*cli_deployment.COMMANDS, *cli_serving.COMMANDS, *cli_training.COMMANDS):
    app.command()(command)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
RecipeArgument = Annotated[str, typer.Argument(help="Path of a recipe, or the name of a shipped one.")]
SamplesOption = Annotated[int, typer.Option(min=1, help="Sequences of calibration data that selection sees.")]
LengthOption = Annotated[int, typer.Option(min=2, help="Tokens per sequence.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Say nothing but warnings and where the result is.")]
OutputOption = Annotated[Path, typer.Option("--output-dir", "-o", help="Where the checkpoint goes: new or empty.")]


def main() -> None:
    """Run the command line, with the commands of integrations."""
    from amoeba_plugin.plugins.commands import offered_commands

    try:
        for offered in offered_commands():
            app.command(offered.name, help=offered.help, context_settings=offered.settings)(offered.function)
    except AmoebaError as error:
        refuse(str(error))
        raise SystemExit(EXIT_REFUSED) from None
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"amoeba_plugin {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and all that is logged.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """From one pretrained LM and one recipe to quantized subnets of any shape."""
    speak(debug)


@app.command()
def run(
    recipe: RecipeArgument,
    model: Annotated[str, typer.Option(help="Path or hub id of a causal LM of a supported architecture.")],
    output_dir: OutputOption,
    dataset: Annotated[
        str | None,
        typer.Option(help="Text: a .jsonl, .json, .txt, .csv or .parquet file, a save_to_disk directory, or a hub id."),
    ] = None,
    num_calibration_samples: SamplesOption = 512,
    max_seq_length: LengthOption = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per batch.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = 42,
    text_column: Annotated[
        str | None, typer.Option(help="Column with the text; default: text, or the only column of strings.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set; a file is one split.")] = "train",
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="To compute in; auto: the model's own where the machine has instructions for it, else float32. The "
            "checkpoint is saved in the model's own."
        ),
    ] = "auto",
    quiet: QuietOption = False,
) -> None:
    """Run a recipe on a model and write the checkpoint."""
    _hush_if(quiet)
    from amoeba_plugin.recipes.inputs import RunOptions
    from amoeba_plugin.recipes.run import run_recipe

    options = RunOptions(split, text_column, num_calibration_samples, max_seq_length, batch_size, seed, dtype)
    result = run_recipe(recipe, model, dataset, output_dir, options)
    for line in result.in_words[: 1 if quiet else None]:
        done(line)


@app.command()
def check(
    recipe: RecipeArgument,
    model: Annotated[
        str | None, typer.Option(help="Path or hub id; of weights there, only names and sizes are read.")
    ] = None,
    num_calibration_samples: SamplesOption = 512,
    max_seq_length: LengthOption = 512,
) -> None:
    """Check a recipe, and how it fits a model, without loading weights."""
    from amoeba_plugin.recipes.check import check_recipe

    checked = check_recipe(recipe, model, num_calibration_samples, max_seq_length)
    table = Table("#", "modifier", "group", "fields", title=checked.source, title_justify="left")
    for row in checked.rows:
        table.add_row(*row)
    Console().print(table)
    for told in (*checked.costs, *checked.needs):
        say(told)
    for note in checked.notes:
        warn(note)
    done(f"{checked.source} can run{f' on {model}' if model else '; add --model to check it against its sizes'}")


@app.command()
def policy(
    model: Annotated[str, typer.Argument(help="Path or hub id of a causal LM of a supported architecture.")],
    dataset: Annotated[str, typer.Option(help="Text to measure on, as for `amoeba run`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe, a new .yaml file.")],
    average_bits: Annotated[
        float | None, typer.Option(help="The most bits per weight of the layers' linears, scales counted.")
    ] = None,
    average_sparsity: Annotated[float, typer.Option(help="The least share of zeros, 0 to 0.7; they save no time.")] = 0,
    bits: Annotated[str, typer.Option(help="That weights may have; 2 and 3 load in transformers only.")] = "4,8,16",
    sparsities: Annotated[str, typer.Option(help="That units may have.")] = "0,0.2,0.3,0.4,0.5,0.6,0.7",
    sensitivity: Annotated[str, typer.Option(help="kl, output_error, fisher, or a plugin's.")] = "kl",
    allocation: Annotated[
        Literal["knapsack", "mean"], typer.Option(help="What loses least within the averages, or Edge-LLM's rule.")
    ] = "knapsack",
    exchanges: Annotated[int, typer.Option(min=0, help="Tried by measuring, at every quarter of a bit.")] = 4,
    quantizer: Annotated[Literal["gptq", "rtn"], typer.Option(help="Of the recipe; rtn: round to nearest.")] = "gptq",
    pruner: Annotated[Literal["sparsegpt", "wanda"], typer.Option(help="Of the recipe.")] = "sparsegpt",
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale, -1: a row. Default: of 128, 64, 32 the first to fit.")
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="With zero points.")] = False,
    data: Annotated[Path | None, typer.Option(help="The policy itself with all scores, a new .json file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="The policy as a picture, .svg or .png.")] = None,
    num_calibration_samples: SamplesOption = 16,
    max_seq_length: LengthOption = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the draw of rows.")] = 42,
    dtype: Annotated[Dtype, typer.Option(help="To compute in.")] = "auto",
    quiet: QuietOption = False,
) -> None:
    """Choose bits and sparsity layer by layer, and write them as a recipe of llm-compressor's own modifiers."""
    _hush_if(quiet)
    from amoeba_plugin.recipes.inputs import RunOptions
    from amoeba_plugin.recipes.policy import PolicyTools, make_policy
    from amoeba_plugin.reports.picture import require_picture, save_figure
    from amoeba_plugin.reports.policy_plot import drawn
    from amoeba_plugin.selection.layerwise.options import listed
    from amoeba_plugin.selection.layerwise.search import PolicyBudget

    budget = PolicyBudget(
        average_bits, average_sparsity, listed(bits, int, "bits"), listed(sparsities, float, "sparsities"),
        allocation, exchanges, group_size, not asymmetric,
    )  # fmt: skip
    options = RunOptions(num_samples=num_calibration_samples, max_seq_length=max_seq_length, seed=seed, dtype=dtype)
    require_picture(plot)
    found = make_policy(model, dataset, output, budget, PolicyTools(sensitivity, quantizer, pruner), options, data)
    save_figure(lambda: drawn(found), plot, "policy")
    for note in found.notes:
        warn(note)
    done(f"recipe written to {output}: {found.in_words}")


@app.command()
def extract(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint: what elastic_dir in a recipe named.")],
    shape: Annotated[str, typer.Option(help="DEPTHxWIDTH, for example 24x7/8.")],
    output_dir: OutputOption,
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it moved.")] = None,
    adapter: Annotated[
        Literal["fold", "separate"],
        typer.Option(help="Into the weights, or cut without it and its LoRA written to OUT/adapter."),
    ] = "fold",
    portable: Annotated[
        bool, typer.Option("--portable", help="Layers that differ: pad with zeros to a stock class; no speed.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of weights.")] = "5GB",
    dtype: Annotated[Dtype, typer.Option(help="To save in; auto: the base model's own.")] = "auto",
    quiet: QuietOption = False,
) -> None:
    """Cut one shape out of an elastic checkpoint: no training, no data."""
    _hush_if(quiet)
    from amoeba_plugin.extraction.checkpoint import extract_checkpoint, how_to_load

    parity = extract_checkpoint(elastic, shape, output_dir, base, adapter, portable, max_shard_size, dtype=dtype)
    done(f"shape {parity.shape} written to {output_dir}; {parity.in_words}")
    for note in how_to_load(output_dir, portable):
        done(note)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Where report and checkpoints go.")] = Path(
        "amoeba_demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A shortened schedule: shows that it works, not how well.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = 42,
) -> None:
    """Compress the model that comes with the package and report what was gained and lost."""
    from amoeba_plugin.demo.run import run_demo

    run_demo(output_dir, quick=quick, seed=seed)
    done(f"report written to {output_dir / 'report.html'}")


@recipes_app.command("list")
def list_recipes() -> None:
    """Name the shipped recipes."""
    from amoeba_plugin.recipes.files import purposes

    table = Table("name", "what it is for", box=None)
    for name, purpose in purposes().items():
        table.add_row(name, purpose)
    Console().print(table)


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")]) -> None:
    """Print a shipped recipe."""
    from amoeba_plugin.recipes.files import require_shipped

    typer.echo(require_shipped(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    path: Annotated[Path, typer.Argument(help="File or directory to copy it to.")],
) -> None:
    """Copy a shipped recipe, to edit it."""
    from amoeba_plugin.recipes import files

    done(f"recipe {name} written to {files.copy_recipe(name, path)}")


def _hush_if(quiet: bool) -> None:
    if quiet:
        hush()
