"""Results in the terminal: a table for each metric, and what the documents cannot tell, in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from amoeba_lm_eval.results import Estimate, Results

MANY = 10_000


def tables_of(results: Results) -> Iterator[Table]:
    """Yield what every shape scores, with intervals; of several, how far each is from the first."""
    for task in dict.fromkeys(each.task for each in results.estimates):
        scores = results.of_task(task)
        for name, metric in scores[0].metrics.items():
            better = "higher" if metric.higher_is_better else "lower"
            title = f"{task}: {name}, of {len(metric.values)} documents ({better} is better)"
            rows = [each for each in results.estimates if (each.task, each.metric) == (task, name)]
            table = Table("shape", "score", "95 %", title=title, title_justify="left")
            if len(rows) > 1:
                table.add_column(f"minus {rows[0].shape}")
                table.add_column("95 %, paired")
            for row in rows:
                table.add_row(*_cells(row, len(rows) > 1), style="bold" if row is rows[0] else None)
            yield table


def notes_on(results: Results) -> Iterator[str]:
    """Yield which shapes cannot be ranked, what was cut, and what is not in the tables."""
    for each in results.unranked:
        yield (
            f"{each.task}, {each.metric}: {' and '.join([', '.join(each.shapes[:-1]), each.shapes[-1]])} cannot be "
            f"ranked on these {each.documents} documents: the intervals of their differences hold 0"
        )
    for task in dict.fromkeys(each.task for each in results.estimates):
        scores = results.of_task(task)
        if any(len(metric.values) < 2 for metric in scores[0].metrics.values()):
            yield f"{task} has one document: nothing to resample, no interval"
        if any(score.cut for score in scores):
            yield (
                f"{task}: of {max(score.cut for score in scores)} requests the model did not see the beginning, as "
                "they are longer than --max-length"
            )
        if scores[0].left_out:
            yield f"{task}: no interval can be had of {', '.join(scores[0].left_out)}, which are left out"


def _cells(row: Estimate, several: bool) -> list[str]:
    cells = [row.shape, _number(row.value), _ends(row.interval, signed=False)]
    if not several:
        return cells
    if row.difference is None:
        return [*cells, "", ""]
    return [*cells, _number(row.difference, signed=True), _ends(row.difference_interval, signed=True)]


def _number(value: float, signed: bool = False) -> str:
    """Write a number by its size.

    >>> _number(0.4583333), _number(27.6123), _number(123456.7), _number(-0.012, signed=True)
    ('0.458', '27.61', '1.2e+05', '-0.012')
    """
    digits = ".3f" if abs(value) < 10 else ".2f" if abs(value) < MANY else ".1e"
    return f"{value:{'+' if signed else ''}{digits}}"


def _ends(ends: tuple[float, float] | None, signed: bool) -> str:
    return "" if ends is None else f"{_number(ends[0], signed)} to {_number(ends[1], signed)}"
