"""Commands of ``amoeba`` about engines: what they load, what shapes cost there, which is best, how one gets there.

Nothing heavy is imported before a command runs, so that help comes at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from amoeba_plugin.runtime.messages import done, say, warn

if TYPE_CHECKING:
    from amoeba_plugin.deployment.search.frontier import Frontier

OutputOption = Annotated[Path, typer.Option("--output-dir", "-o", help="Where the export goes: new or empty.")]
PlotOption = Annotated[Path | None, typer.Option(help="A picture of it, .svg or .png.")]
BaseOption = Annotated[str | None, typer.Option(help="Where ELASTIC's base model is now, if it moved.")]


def loads(
    shape: Annotated[str, typer.Argument(help="DEPTHxWIDTH, for example 24x7/8.")],
    model: Annotated[str, typer.Option(help="Path or hub id of the whole model; only its configuration is read.")],
    flow: Annotated[
        str,
        typer.Option(help="torch, vllm, llama-cpp, onnxruntime or openvino, or one at a scheme: llama-cpp:Q4_K_M."),
    ],
    strategy: Annotated[
        Path | None, typer.Option(help="Elastic checkpoint, or directory with strategy.json: go by its sizes.")
    ] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="With --strategy: as extracted with --portable.")
    ] = False,
    round_to: Annotated[int, typer.Option(min=1, help="Without --strategy: channels that sizes are multiples of.")] = 1,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that the engine splits it over.")] = 1,
) -> None:
    """Tell whether an engine loads a subnet of a shape, by rules read in its sources, without loading weights."""
    from amoeba_plugin.deployment.loads import require_loads

    loading = require_loads(
        shape, model, flow, strategy=strategy, portable=portable, round_to=round_to, devices=tensor_parallel
    )
    for warning in loading.warnings:
        warn(warning)
    done(f"{flow} can load it, as {loading.saved_as}, by the rules of {loading.read}")


def profile(
    model: Annotated[str, typer.Argument(help="Path or hub id of a model, whose weights are not read; or ELASTIC.")],
    flow: Annotated[list[str], typer.Option(help="Engine and scheme: torch:fp32, llama-cpp:Q4_0; repeatable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile, a JSON file; one there is extended.")],
    strategy: Annotated[
        Path | None, typer.Option(help="Elastic checkpoint, or directory with strategy.json: go by its sizes.")
    ] = None,
    depths: Annotated[str, typer.Option(help="Of the space: 12,10,8. Default: down to half the layers.")] = "",
    widths: Annotated[str, typer.Option(help="Of the space: 1,3/4,1/2. Default: by eighths down to a half.")] = "",
    prompts: Annotated[str, typer.Option(help="Lengths of prompts, tokens: 32,128,256.")] = "",
    decoded: Annotated[int, typer.Option(min=1, help="Tokens behind the longest prompt.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Processes that visit every shape.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads; with one, CPU time counts.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    shapes: Annotated[int | None, typer.Option(min=2, help="How many are measured. Default: a quarter.")] = None,
    drafting: Annotated[
        str | None, typer.Option(help="Text on which small shapes of ELASTIC draft for larger ones; with its weights.")
    ] = None,
    plot: PlotOption = None,
    base: BaseOption = None,
) -> None:
    """Measure what shapes cost in engines on this machine: time, memory, bytes. Weights are random."""
    from amoeba_plugin.deployment.profiling import asked, measure
    from amoeba_plugin.reports.picture import require_picture, save_figure
    from amoeba_plugin.reports.profile_plot import drawn
    from amoeba_plugin.reports.profile_table import notes_on, tables_of
    from amoeba_plugin.serving.drafted_pairs import measure_drafting, require_elastic

    require_picture(plot)
    if drafting is not None:
        require_elastic(Path(model), flow)
    subject = asked.subject_of(model, strategy, _listed(depths), _listed(widths), base)
    lengths = asked.prompts_of(_listed(prompts), subject, decoded)
    how = measure.Measuring(lengths, decoded, rounds, threads, batch, shapes)
    found = measure.profile_model(subject, asked.flows_of(flow), output, how, model)
    if drafting is not None:
        found = measure_drafting(Path(model), output, drafting, base)
    save_figure(lambda: drawn(found), plot, "profile")
    for each in tables_of(found):
        Console().print(each)
    for note in notes_on(found):
        say(note)
    done(f"profile of {len(found.sizes)} shapes written to {output}")


def search(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint: what elastic_dir in a recipe named.")],
    profile: Annotated[Path, typer.Option(help="What its shapes cost here; `amoeba profile ELASTIC` makes it.")],
    budget: Annotated[str, typer.Option(help="'llama-cpp:Q8_0,Q4_0 decode<=12ms prefill[256]<=200ms memory<=300MB'.")],
    dataset: Annotated[str, typer.Option(help="Text or questions to judge shapes on, not those they were chosen on.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="What was found, a JSON file.")],
    plot: PlotOption = None,
    searcher: Annotated[str, typer.Option(help="hierarchical, exhaustive, nsga2, or a plugin's.")] = "hierarchical",
    trials: Annotated[int, typer.Option(min=1, help="Of nsga2: choices that are tried, again and again.")] = 100,
    storage: Annotated[
        Path | None, typer.Option(help="Of nsga2: file of its trials, to go on with and to share by processes.")
    ] = None,
    evaluator: Annotated[
        str, typer.Option(help="loss, on text; accuracy, on multiple-choice questions; or a plugin's.")
    ] = "loss",
    finalists: Annotated[
        int, typer.Option(min=0, help="How many of the best are judged in their engine, quantized; 0: none.")
    ] = 6,
    letters: Annotated[
        bool, typer.Option("--letters/--no-letters", help="Ask for a choice's letter, or for its text.")
    ] = True,
    num_samples: Annotated[int, typer.Option(min=1, help="Rows of text, or questions.")] = 32,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens of a row, at most.")] = 256,
    split: Annotated[str, typer.Option(help="Split of the data set; a file is one split.")] = "train",
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Run shapes whose predicted costs straddle the budget.")
    ] = True,
    foreign: Annotated[bool, typer.Option("--foreign", help="The profile may be of another machine.")] = False,
    base: BaseOption = None,
) -> None:
    """Find the best shape, and scheme, within a budget: costs by a profile, quality by running it."""
    from amoeba_plugin.deployment.search.run import Asked, search_shapes
    from amoeba_plugin.reports.frontier_plot import drawn
    from amoeba_plugin.reports.picture import require_picture, save_figure

    asked = Asked(
        searcher, dataset, split, num_samples, max_seq_length, measure, foreign, evaluator, finalists, letters, trials,
        storage,
    )  # fmt: skip
    require_picture(plot)
    found = search_shapes(elastic, profile, budget, asked, base)
    found.save(output)
    save_figure(lambda: drawn(found), plot, "frontier")
    _tell(found)
    say(
        f"{found.evaluated} of {found.shapes} shapes evaluated, costs of {found.measured} and quality of "
        f"{found.finalists} measured in the engine; all of it in {output}"
    )
    done(f"best within {budget}: {found.chosen} at {found.flow}\n{found.command(elastic)}")


def _tell(found: Frontier) -> None:
    from amoeba_plugin.reports.frontier_table import notes_on, table_of

    Console().print(table_of(found))
    for note in notes_on(found):
        say(note)


def deploy(
    elastic: Annotated[Path, typer.Argument(help="Elastic checkpoint: what elastic_dir in a recipe named.")],
    output_dir: OutputOption,
    shape: Annotated[str, typer.Option(help="DEPTHxWIDTH, for example 24x7/8.")] = "",
    flow: Annotated[str, typer.Option(help="Engine and scheme: torch:fp32, llama-cpp:Q4_0.")] = "",
    budget: Annotated[
        str, typer.Option(help="Instead of both, for the best shape within 'llama-cpp:Q4_0 decode<=12ms'.")
    ] = "",
    dataset: Annotated[str, typer.Option(help="With a budget: text that shapes are judged on.")] = "",
    profile: Annotated[Path, typer.Option(help="With a budget: what shapes cost; made where it is not there.")] = Path(
        "amoeba_profile.json"
    ),
    base: BaseOption = None,
) -> None:
    """Cut a shape out, write it in an engine's format, and let the engine prove that it computes the same."""
    from amoeba_plugin.deployment.deploy import deploy_shape
    from amoeba_plugin.deployment.search.asked import Asked
    from amoeba_plugin.deployment.within import deploy_within
    from amoeba_plugin.errors import RecipeError

    if [*map(bool, (shape, flow, budget, dataset))] not in ([True, True, False, False], [False, False, True, True]):
        raise RecipeError(
            "name what shall be deployed: --shape 24x7/8 --flow llama-cpp:Q4_0, or the best within a budget: --budget "
            "'llama-cpp:Q4_0 decode<=12ms' --dataset TEXT"
        )
    if budget:
        found, best = deploy_within(elastic, budget, Asked("hierarchical", dataset), profile, output_dir, base)
        shape, flow, deployed = best.choice.shape, best.choice.flow, best.deployed
        _tell(found)
        for each in best.skipped:
            warn(f"not {each.shape} at {each.flow}: {each.why}")
    else:
        deployed = deploy_shape(elastic, shape, flow, output_dir, base)
    for told in deployed.parity.mended:
        warn(f"mended: {told}")
    say(deployed.parity.in_words)
    if deployed.generated:
        say(f"it says: {deployed.generated!r}")
    done(f"{flow} at {shape} written to {output_dir} ({deployed.export.in_words}); README.md there says how to run it")


def fit(
    model: Annotated[str, typer.Argument(help="Path or hub id of a causal LM of a supported architecture.")],
    dataset: Annotated[
        str, typer.Option(help="Text to select, train, judge and report on, in parts: a file or hub id.")
    ],
    budget: Annotated[str, typer.Option(help="'llama-cpp:Q4_0 decode<=12ms prefill[256]<=200ms memory<=300MB'.")],
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="New, or an earlier fit's, which goes on.")],
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Without: repair alone makes up for what is cut; minutes.")
    ] = True,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training. Default: the shipped recipe's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop behind the recipe, with what it will cost.")] = False,
    num_calibration_samples: Annotated[int, typer.Option(min=1, help="Rows that selection sees.")] = 64,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 256,
    text_column: Annotated[
        str | None, typer.Option(help="Column with the text; default: text, or the only one.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set; a file is one split.")] = "train",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = 42,
) -> None:
    """From a model to the best subnet within a budget of this machine, deployed: one command for the whole way."""
    from amoeba_plugin.errors import RecipeError
    from amoeba_plugin.fit.result import FitOptions
    from amoeba_plugin.fit.run import fit_model, plan_fit
    from amoeba_plugin.fit.summary import summary_of

    if not training and steps:
        raise RecipeError("--no-training takes no steps; leave out one of --no-training and --steps")
    options = FitOptions(steps if training else 0, num_calibration_samples, max_seq_length, split, text_column, seed)
    if dry_run:
        planned = plan_fit(model, dataset, budget, output_dir, options)
        for line in planned.told:
            say(line)
        done(f"{planned.recipe} is what would run; without --dry-run the same command runs it")
        return
    found = fit_model(model, dataset, budget, output_dir, options)
    for part in summary_of(found, output_dir):
        Console().print(part)
    done(f"{found.deployed.shape} keeps {found.budget}; it is in {output_dir / 'deployed'}, with how to run it")


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


COMMANDS = (fit, loads, profile, search, deploy)
