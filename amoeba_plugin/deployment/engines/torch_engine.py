"""The engine of the flow ``torch``: transformers, in eager mode, as it computes a checkpoint or an elastic model.

An engine file (``child.py`` runs it); ``flow.py`` says what each method is for.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from amoeba_plugin.elastic.checkpoint import load_elastic
from amoeba_plugin.elastic.subnet_config import PER_LAYER_FILE
from amoeba_plugin.models import modeling_per_layer
from amoeba_plugin.runtime.compat import cache_name

Prompts = Sequence[Sequence[int]]


class Engine:
    """Computes on the CPU."""

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None
        self._path = Path()
        self._elastic: tuple[Path, Any] | None = None  # that is resident, whatever shape is asked for next
        self._output: Any = None
        self._caches: dict[int, Any] = {}  # of requests
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)

    def about(self) -> dict[str, str]:
        """Return what computes."""
        return {"engine": "torch", "version": version("torch"), "transformers": version("transformers")}

    def load(
        self, path: str, threads: int, context: int, batch: int, dtype: str = "float32", shape: str | None = None,
        requests: int = 1,
    ) -> None:  # fmt: skip
        """Load a checkpoint in a dtype; or, with a shape, an elastic checkpoint, once for all shapes."""
        self._caches.clear()
        torch.set_num_threads(threads)
        self._output, self._path = None, Path(path)
        if shape is None:
            self._model = self._elastic = None
            self._model = load_checkpoint(self._path, getattr(torch, dtype))
            return
        if self._elastic is None or self._elastic[0] != self._path:
            self._model = self._elastic = None
            self._elastic = (self._path, load_elastic(self._path)[0])
        self._elastic[1].set_shape(shape)
        self._model = self._elastic[1].model

    def prefill(self, prompts: Prompts) -> None:
        """Compute prompts of one length."""
        self._step(torch.tensor(prompts), None)

    def decode(self, count: int) -> None:
        """Decode greedily."""
        for _ in range(count):
            self._step(self._output.logits[:, -1:].argmax(-1), getattr(self._output, cache_name(self._loaded)))

    @torch.inference_mode()
    def log_probabilities(self, tokens: Sequence[int], behind: Sequence[int]) -> list[str]:
        """Return the log-probabilities of the next token behind so many tokens."""
        logits = self._loaded(torch.tensor([tokens]), use_cache=False).logits[0].float().log_softmax(-1)
        return [base64.b64encode(logits[count - 1].numpy().astype("<f4").tobytes()).decode() for count in behind]

    @torch.inference_mode()
    def follow(self, request: int, tokens: Sequence[int], most: int) -> tuple[list[int], list[float]]:
        """Return the likeliest tokens behind some more of a request, with their log-probabilities."""
        name = cache_name(self._loaded)
        given = {name: self._caches[request]} if request in self._caches else {}
        output = self._loaded(torch.tensor([tokens]), use_cache=True, logits_to_keep=1, **given)
        self._caches[request] = getattr(output, name)
        row = output.logits[0, -1].float().log_softmax(-1)
        found = row.topk(min(most, len(row)))
        return found.indices.tolist(), found.values.tolist()

    def forget(self, request: int) -> None:
        """Drop the keys and values of a request."""
        self._caches.pop(request, None)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids."""
        tokenizer = AutoTokenizer.from_pretrained(self._path)
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return messages as the template writes them."""
        tokenizer = AutoTokenizer.from_pretrained(self._path)
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    @torch.inference_mode()
    def generate(self, prompt: str, count: int) -> str:
        """Return what follows a prompt."""
        tokenizer = AutoTokenizer.from_pretrained(self._path)
        given = tokenizer(prompt, return_tensors="pt")
        found = self._loaded.generate(**given, max_new_tokens=count, do_sample=False)  # type: ignore[operator]
        return str(tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True))

    @property
    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            raise RuntimeError("nothing is loaded")
        return self._model

    @torch.inference_mode()
    def _step(self, tokens: torch.Tensor, cache: Any) -> None:
        given = {} if cache is None else {cache_name(self._loaded): cache}
        # as engines do: of a prompt only the last position's logits
        self._output = self._loaded(tokens, use_cache=True, logits_to_keep=1, **given)


def load_checkpoint(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a checkpoint; code that lies in it runs only where it is this package's own, to the byte."""
    code = path / PER_LAYER_FILE
    own = code.is_file() and code.read_bytes() == Path(modeling_per_layer.__file__).read_bytes()
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=own)
    model.eval()
    return model
