"""ONNX Runtime as an engine: onnxruntime and numpy, and to read text tokenizers and jinja2. An engine file; no torch.

Keys and values have one buffer for the whole context, which the graph reads and writes in place, as onnxruntime-genai
has it: so many tokens in front of new ones are known, and to go back is to know fewer.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray


class Engine:
    """Runs one directory at a time, on the CPU."""

    def __init__(self) -> None:
        self._session: Any = None
        self._cache: Cache | None = None
        self._text: Text | None = None
        self._path, self._context = Path(), 0
        self._model: dict[str, Any] = {}
        self._prompt: list[int] = []

    def about(self) -> dict[str, str]:
        """Return what computes."""
        return {"engine": "ONNX Runtime", "version": f"onnxruntime {onnxruntime.__version__}"}

    def load(self, path: str, threads: int, context: int, batch: int) -> None:
        """Load a directory.

        Args:
            path: Of the directory, with ``model.onnx`` and ``genai_config.json``.
            threads: That compute.
            context: Tokens that one prompt and what follows it may have.
            batch: Prompts at a time; 1.
        """
        if batch != 1:
            raise ValueError("ONNX Runtime is measured with one prompt at a time")
        self._session = self._cache = self._text = None  # first: two models at once would be one too many
        self._path, self._context = Path(path), context
        self._model = json.loads((self._path / "genai_config.json").read_text(encoding="utf-8"))["model"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        file = str(self._path / self._model["decoder"]["filename"])
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute a prompt; its cache has room for the whole context."""
        self._prompt = list(prompts[0])
        self._begin(self._context).append(self._prompt)

    def decode(self, count: int) -> None:
        """Decode behind the prompt: the first of so many tokens is at its end, however often this is asked."""
        assert self._cache is not None
        self._cache.known = len(self._prompt)
        for _ in range(count):
            self._cache.append(self._prompt[-1:])

    def log_probabilities(self, tokens: Sequence[int], behind: Sequence[int]) -> list[str]:
        """Return the log-probabilities of the next token behind so many tokens."""
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in self._behind(tokens, sorted(behind))]

    def token_log_probabilities(self, tokens: Sequence[int], behind: Sequence[int]) -> list[float]:
        """Return the log-probability of the token that follows."""
        rows = self._behind(tokens, behind)
        return [float(row[tokens[count]]) for row, count in zip(rows, behind, strict=True)]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids."""
        return [self._texts.ids(text, special=False) for text in texts]

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return messages as the template writes them."""
        return self._texts.render(messages)

    def generate(self, prompt: str, count: int) -> str:
        """Return what follows a prompt, greedily."""
        given = self._texts.ids(prompt, special=True)
        ends = self._model["eos_token_id"]
        ends = ends if isinstance(ends, list) else [ends]
        cache, tokens = self._begin(len(given) + count), given
        found: list[int] = []
        while len(found) < count:
            tokens = [int(cache.append(tokens).argmax())]
            if tokens[0] in ends:
                break
            found += tokens
        return self._texts.of(found)

    @property
    def _texts(self) -> Text:
        self._text = self._text or Text(self._path)
        return self._text

    def _behind(self, tokens: Sequence[int], counts: Sequence[int]) -> Iterator[NDArray[np.float64]]:
        """Yield log-probabilities; the graph has those of the last position alone, so tokens come piece by piece."""
        cache = self._begin(self._context)
        for done, count in itertools.pairwise([0, *counts]):
            logits = cache.append(tokens[done:count]).astype(np.float64)
            logits -= logits.max()
            yield logits - np.log(np.exp(logits).sum())

    def _begin(self, room: int) -> Cache:
        """Return the cache, empty, with room for so many tokens."""
        if self._cache is None or self._cache.room < room:
            self._cache = None  # first: it may be large
            decoder = self._model["decoder"]
            self._cache = Cache(self._session, (1, decoder["num_key_value_heads"], room, decoder["head_size"]))
        self._cache.known = 0
        return self._cache


class Cache:
    """Keys and values of the tokens so far.

    Attributes:
        room: Tokens that there is place for.
        known: Tokens whose keys and values count; what is behind them is overwritten.
    """

    def __init__(self, session: Any, shape: tuple[int, int, int, int]) -> None:
        self._session, self._binding = session, session.io_binding()
        self.room, self.known = shape[2], 0
        self._binding.bind_output("logits")  # the first of the outputs
        for each in session.get_inputs():
            if each.name.startswith("past_key_values."):
                room = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                self._binding.bind_ortvalue_input(each.name, room)
                self._binding.bind_ortvalue_output(each.name.replace("past_key_values.", "present."), room)

    def append(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Compute tokens behind those that are known; return the logits of the last one, (vocabulary,)."""
        whole = self.known + len(tokens)
        self._binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        self._binding.bind_cpu_input("attention_mask", np.ones((1, whole), np.int64))
        self._session.run_with_iobinding(self._binding)
        self.known = whole
        logits: NDArray[np.float32] = self._binding.get_outputs()[0].numpy()
        return logits.reshape(-1)


class Text:
    """Text to ids and back, by the files of the directory."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer  # which models without a tokenizer do without

        self._directory = directory
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_truncation()  # as transformers, which asks for neither
        self._tokenizer.no_padding()

    def ids(self, text: str, special: bool) -> list[int]:
        """Return ids, with those around every text or without."""
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return found

    def of(self, ids: Sequence[int]) -> str:
        """Return text."""
        return str(self._tokenizer.decode(list(ids)))

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return messages as the template writes them."""
        return str(self._template.render(messages=list(messages), add_generation_prompt=True, **self._special))

    @cached_property
    def _template(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise ValueError(message)

        kind = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        kind.globals["raise_exception"] = refuse
        return kind.from_string((self._directory / "chat_template.jinja").read_text(encoding="utf-8"))

    @cached_property
    def _special(self) -> dict[str, str]:
        """Special tokens by their names, which templates write."""
        told = json.loads((self._directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        named = {name: token for name, token in told.items() if name.endswith("_token")}
        return {name: token["content"] if isinstance(token, dict) else token for name, token in named.items() if token}
