"""A file of multiple-choice questions."""

from __future__ import annotations

import json
from pathlib import Path


def write_questions(path: Path, count: int, context: str = "") -> str:
    """Write so many questions, each behind a context where one is given; return the path."""
    rows = [
        {"question": f"What is {number}?", "choices": ["one", "two", "many"], "answer": number % 3}
        | ({"context": f"{context} {number}"} if context else {})
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
