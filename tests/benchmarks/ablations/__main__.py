"""The design of AmoebaLLM's Tables 1, 3, 4 and 5 (arXiv:2411.10606) on small trained models.

Prints tables in Markdown: held-out loss above the dense model's in nats per token, mean over seeds and, behind it,
their standard deviation. Every way to train gets the best of three learning rates, chosen on a text and by a seed that
are not reported. Every finished training is kept in ``--results``; a run that was stopped goes on::

    AMOEBA_TEST_ASSETS=ASSETS python tests/benchmarks/ablations --subject stories260K --tables 4 3 5 --seeds 3
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from after_training import table_training
from published_methods import table_1
from repairing import table_repair
from results import Results
from subjects import SUBJECTS
from untrained import table_depths, table_totals
from ways_to_train import table_4, table_beyond

from selection import table_3, table_5, table_widths

TABLES = {
    "1": table_1, "3": table_3, "4": table_4, "5": table_5, "beyond": table_beyond, "widths": table_widths,
    "repair": table_repair, "totals": table_totals, "depths": table_depths, "training": table_training,
}  # fmt: skip


def main() -> None:
    """Measure what is not known yet and print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=SUBJECTS, default="demo")
    parser.add_argument("--tables", choices=TABLES, nargs="+", default=list(TABLES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of one-for-all training; default: the subject's")
    parser.add_argument("--variants", nargs="+", help="parts of names: only these rows of Table 4, totals, or depths")
    parser.add_argument("--results", type=Path, default=Path("ablations.json"))
    asked = parser.parse_args()
    subject = SUBJECTS[asked.subject]()
    if asked.steps:
        subject = replace(subject, steps=asked.steps)
    results = Results(asked.results.with_stem(f"{asked.results.stem}-{asked.subject}-{subject.steps}"))
    for table in asked.tables:
        TABLES[table](subject, results, range(asked.seeds), asked.variants)


if __name__ == "__main__":
    main()
