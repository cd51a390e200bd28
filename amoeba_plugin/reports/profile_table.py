"""A profile in the terminal: a table for each flow, and what is to be known of it in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from amoeba_plugin.deployment.profiling.profile import Drafting, Profile
from amoeba_plugin.deployment.profiling.table import disagreements, rows


def tables_of(profile: Profile) -> Iterator[Table]:
    """Yield what every shape costs, flow by flow; of what is predicted, the interval."""
    for flow, of in profile.flows.items():
        found = rows(profile, flow)
        lengths = list(found[0].prefill)
        title = f"{flow} ({' '.join(of.engine.values())}, threads {of.threads}): ms and MB; ~ is predicted"
        columns = ["shape", *(f"prefill[{each}]" for each in lengths), "decode", "memory", "file"]
        table = Table(*columns, title=title, title_justify="left")
        for row in found:
            costs = [*(row.prefill[each] for each in lengths), row.decode, row.memory, row.file]
            table.add_row(row.shape, *map(str, costs))
        yield table


def notes_on(profile: Profile) -> Iterator[str]:
    """Yield which flows rank shapes otherwise, and which were measured on a machine that did something else."""
    for flow, of in profile.flows.items():
        if of.busy:
            yield f"{flow}: the machine was busy; times are those of the CPU, not of the clock"
    for one, first, other, second in disagreements(profile):
        yield f"{one} is faster at {first} than at {second}, {other} the other way round"
    if profile.drafting is not None:
        yield from _notes_on_drafting(profile.drafting)


def _notes_on_drafting(drafting: Drafting) -> Iterator[str]:
    drafters = drafting.drafters()
    for pair in drafting.pairs:
        if drafters.get(pair.target) == pair.drafter:
            yield (
                f"{pair.drafter} drafts for {pair.target}: {pair.drafted:.3g} tokens/s instead of {pair.alone:.3g}, "
                f"{pair.acceptance:.0%} of the drafts accepted"
            )
    if not drafters:
        yield f"drafting: none of {len(drafting.pairs)} pairs is faster than the larger shape alone"
