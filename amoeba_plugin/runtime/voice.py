"""What a command says while it works: the package's own lines, whole beside progress bars; the hosts' on demand."""

from __future__ import annotations

import logging
import os
import sys
import warnings

PACKAGE = "amoeba_plugin"
HOSTS = {
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def speak(debug: bool) -> None:
    """Show what the package logs, from INFO on, on stderr.

    To be called before the hosts are imported: they read their variables then. A variable that is set already stays.

    Args:
        debug: Show DEBUG and what the hosts log, too.
    """
    if not debug:
        for name, value in HOSTS.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
    logger = logging.getLogger(PACKAGE)
    for handler in [each for each in logger.handlers if isinstance(each, _Lines)]:  # of an earlier command
        logger.removeHandler(handler)
    logger.addHandler(_Lines())
    logger.setLevel(logging.DEBUG if debug else logging.INFO)


def hush() -> None:
    """Show warnings only."""
    logging.getLogger(PACKAGE).setLevel(logging.WARNING)


class _Lines(logging.Handler):
    """Writes a line above the bars that are on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich.console import Console
        from tqdm import tqdm

        warns = record.levelno >= logging.WARNING
        text = f"warning: {record.getMessage()}" if warns else record.getMessage()
        with tqdm.external_write_mode(file=sys.stderr):
            console = Console(stderr=True, highlight=False, soft_wrap=True)
            console.print(text, style="yellow" if warns else None, markup=False)
