"""llama.cpp as an engine: xllamacpp, bindings to its server. An engine file; it imports nothing else.

The server answers requests in this process; what goes beyond them, text to ids and the chat template, is asked of it by
HTTP on the loopback device, where it listens.
"""

from __future__ import annotations

import base64
import json
import struct
import urllib.request
from collections.abc import Sequence
from typing import Any

import xllamacpp


class Engine:
    """Runs one GGUF file at a time."""

    def __init__(self) -> None:
        self._server: Any = None
        self._prompts: list[list[int]] = []
        self._requests: dict[int, list[int]] = {}

    def about(self) -> dict[str, str]:
        """Return what computes."""
        return {"engine": "llama.cpp", "version": f"xllamacpp {xllamacpp.__version__}"}

    def load(
        self, path: str, threads: int, context: int, batch: int, exact_cache: bool = False, requests: int = 1
    ) -> None:
        """Load a file.

        Args:
            path: Of the GGUF.
            threads: That compute.
            context: Tokens that one prompt and what follows it may have.
            batch: Prompts at a time; 1.
            exact_cache: Keep keys and values in fp32, to compare logits.
            requests: Whose keys and values :meth:`follow` keeps, each of ``context`` tokens.
        """
        if batch != 1:
            raise ValueError("llama.cpp is measured with one prompt at a time")
        self._server = None  # first: two models at once would be one too many
        parameters = xllamacpp.CommonParams()
        parameters.model.path = path
        parameters.n_ctx = context * requests
        parameters.n_parallel = requests
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        parameters.warmup = False
        parameters.use_jinja = True
        if exact_cache:
            parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(parameters)
        self._letter = self.tokenize(["a"])[0][-1]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Compute a prompt, and one token."""
        self._prompts = [list(prompt) for prompt in prompts]
        self._complete(self._prompts[0], cache_prompt=False)

    def decode(self, count: int) -> None:
        """Decode behind the prompt, whose last token is computed once more: as many steps as tokens."""
        self._complete(self._prompts[0], n_predict=count)

    def log_probabilities(self, tokens: Sequence[int], behind: Sequence[int]) -> list[str]:
        """Return the log-probabilities of the next token behind so many tokens; the prompt's beginning is kept."""
        return [self._whole_vocabulary(list(tokens[:count])) for count in sorted(behind)]

    def token_log_probabilities(self, tokens: Sequence[int], behind: Sequence[int]) -> list[float]:
        """Return the log-probability of the token that follows, in a tenth of the time of the whole vocabulary."""
        return [self._of_token(list(tokens[:count]), tokens[count]) for count in behind]

    def follow(self, request: int, tokens: Sequence[int], most: int) -> tuple[list[int], list[float]]:
        """Return the likeliest tokens behind some more of a request, with their log-probabilities.

        The server finds the keys and values that it has of the longest beginning of a prompt; with more requests than
        it was loaded for, it computes some of them anew.
        """
        known = self._requests.setdefault(request, [])
        known.extend(tokens)
        # What is sampled must be a letter, see below; its bias does not reach the probabilities that are told.
        answer = self._complete(known, n_probs=most, logit_bias=[[self._letter, 1e4]])
        told = answer["logprobs"]["content"][0]["top_logprobs"]
        return [each["id"] for each in told], [each["logprob"] for each in told]

    def forget(self, request: int) -> None:
        """Forget the tokens of a request; the server writes over its keys and values when it needs room."""
        self._requests.pop(request, None)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids."""
        return [self._post("/tokenize", {"content": text, "add_special": False})["tokens"] for text in texts]

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Return messages as the file's template writes them."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def generate(self, prompt: str, count: int) -> str:
        """Return what follows a prompt, greedily."""
        return str(self._complete(prompt, n_predict=count, ignore_eos=False)["text"])

    def _whole_vocabulary(self, tokens: list[int]) -> str:
        # What is sampled must be a letter: of half a character the server keeps the probabilities to itself. They are
        # those before sampling, which a bias does not reach.
        answer = self._complete(tokens, n_probs=2**20, logit_bias=[[self._letter, 1e4]])
        answer = answer["logprobs"]["content"][0]["top_logprobs"]
        found = [0.0] * len(answer)
        for each in answer:
            found[each["id"]] = each["logprob"]
        return base64.b64encode(struct.pack(f"<{len(found)}f", *found)).decode()

    def _of_token(self, tokens: list[int], following: int) -> float:
        # Sampled by a bias, told as it was before; of half a character, which is not told, by the whole vocabulary.
        told = self._complete(tokens, n_probs=1, logit_bias=[[following, 1e4]])["logprobs"]
        if told and told["content"] and told["content"][0]["id"] == following:
            return float(told["content"][0]["logprob"])
        found: float = struct.unpack_from("<f", base64.b64decode(self._whole_vocabulary(tokens)), 4 * following)[0]
        return found

    def _complete(self, prompt: Any, **options: Any) -> dict[str, Any]:
        request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "cache_prompt": True, "ignore_eos": True}
        answer = self._server.handle_completions({**request, **options})
        if "choices" not in answer:
            raise RuntimeError(str(answer)[:500])
        found: dict[str, Any] = answer["choices"][0]
        return found

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._server.listening_address}{path}",
            json.dumps(body).encode(), {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as response:  # of this process
            found: dict[str, Any] = json.load(response)
        return found
