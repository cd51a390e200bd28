"""``amoeba serve``: parses what it is given; what is heavy is imported when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def serve(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="ELASTIC | DEPLOYED...",
            help="Elastic checkpoint: what elastic_dir in a recipe named; or directories that `amoeba deploy` "
            "wrote for one engine, a shape each.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="To listen on; another than this machine's own needs AMOEBA_SERVE_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    profile: Annotated[Path, typer.Option(help="What shapes take here; made where it is not there.")] = Path(
        "amoeba_profile.json"
    ),
    decisions: Annotated[
        Path | None, typer.Option(help="What `amoeba tune-decisions` made: decides, and shortens prompts.")
    ] = None,
    decider: Annotated[
        str | None,
        typer.Option(
            help="largest_feasible, fixed, random_feasible, dual_head, or a plugin's. Default: dual_head with "
            "--decisions, else largest_feasible."
        ),
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Of --decider fixed. Default: the largest.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="That compute. Default: the profile's, of a new one 1.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request, at most.")] = 2**20,
    max_prompt: Annotated[int | None, typer.Option(min=1, help="Tokens. Default: the model's positions.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 1024,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that are taken and not done, at most.")] = 64,
    base: Annotated[str | None, typer.Option(help="Where ELASTIC's base model is now, if it moved.")] = None,
    drafts: Annotated[
        bool | None,
        typer.Option(
            "--drafts/--no-drafts",
            help="Let small shapes draft where `amoeba profile --drafting` found that it is faster. Default: of an "
            "elastic checkpoint they do.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=32,
            help="Of deployed files: tokens that a prompt and its answer may have together, for which every engine "
            "keeps room. Default: the model's positions, 2048 at most.",
        ),
    ] = None,
) -> None:
    """Serve an elastic model, or deployed shapes of one, OpenAI-compatible: every request names its own time, and gets
    the shape that keeps it."""
    from amoeba_http_service.resident import How
    from amoeba_http_service.run import run_server
    from amoeba_http_service.settings import TOKEN, Door, Limits

    run_server(
        models,
        How(profile, decider, shape, decisions, threads, base, drafts, context),
        Limits(max_body, max_prompt, max_tokens, max_waiting),
        Door(host, port, os.environ.get(TOKEN, "")),
    )
