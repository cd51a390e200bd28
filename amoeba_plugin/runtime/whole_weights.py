"""Whether a model's weights are whole, before they are loaded: files, names, sizes, ties; by the host's rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from amoeba_plugin.errors import ArtifactError
from amoeba_plugin.runtime.hub import require_answering
from amoeba_plugin.runtime.model_files import why_not
from amoeba_plugin.runtime.stored_tensors import CheckpointTensors, NativeTensors, read_index

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def require_weights(model: str, config: PretrainedConfig | None = None) -> None:
    """Look at the weights in a directory, without memory for them; what is on the hub is not looked at.

    transformers fills a parameter that no file holds with random numbers, and goes on with a warning.

    Args:
        model: Path or hub id.
        config: The model's, where it has been read already.

    Raises:
        ArtifactError: If the directory has no weights or no configuration, a file is missing that the index names, one
            is truncated, a parameter of the model is in none or of another size, or two that the configuration ties
            differ.
    """
    directory = Path(model)
    if not directory.is_dir():
        return
    files = weight_files(directory)
    if not files and not any(directory.glob("*.bin")):
        raise ArtifactError(f"the model '{model}' has no weights: no model.safetensors; copy the whole model")
    for path in files:
        if not path.is_file():
            raise ArtifactError(f"the model '{model}' lacks {path.name}, which its index names; copy the whole model")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ArtifactError(f"{path} is truncated or damaged ({error}); copy or download it anew") from error
    _require_parameters(model, config)


def has_weights(model: str) -> bool:
    """Tell whether a directory holds weights, whole or not."""
    return any(path.suffix in {".safetensors", ".bin"} for path in Path(model).glob("*"))


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that transformers reads of a directory; what an index names need not exist."""
    single, index = directory / SAFE_WEIGHTS_NAME, directory / SAFE_WEIGHTS_INDEX_NAME
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    return [directory / name for name in sorted(set(read_index(index).values()))]


def _require_parameters(model: str, config: PretrainedConfig | None) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if config is None:
            require_answering(model)
            config = AutoConfig.from_pretrained(model)
        if getattr(config, "quantization_config", None) is not None:  # files have other names and sizes
            return
        with _quiet():
            # on the meta device transformers goes by names and sizes alone, and says what it would make up
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                model, config=config, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise ArtifactError(f"the model '{model}' cannot be loaded: {why_not(model, error)}") from error
    skeleton, report = loaded
    if report["missing_keys"]:
        raise ArtifactError(
            f"the weights of '{model}' lack {_some(report['missing_keys'])}, which transformers would fill with random "
            "numbers; copy the whole model, or save it anew"
        )
    if report["mismatched_keys"]:
        sizes = (f"{key} is {tuple(stored)}, not {tuple(own)}" for key, stored, own in report["mismatched_keys"])
        raise ArtifactError(
            f"the weights of '{model}' are not of the sizes that its config.json has: {_some(sizes)}; put the "
            "config.json back that they were saved with"
        )
    _require_ties(model, skeleton)


def _require_ties(model: str, skeleton: PreTrainedModel) -> None:
    """Refuse what transformers unties although the configuration ties it: saved as a subnet, it would be tied."""
    tensors = CheckpointTensors.find(model)
    ties = skeleton.get_expanded_tied_weights_keys(all_submodels=True)
    if tensors is None or not ties:
        return
    stored = NativeTensors.of(skeleton, tensors)
    for target, source in ties.items():
        if target in stored and source in stored:
            one, other = (stored.read([name], skeleton.dtype)[name] for name in (target, source))
            if not one.equal(other):
                raise ArtifactError(
                    f"the config.json of '{model}' ties {target} to {source}, but its weights hold two different ones; "
                    "say tie_word_embeddings: false there"
                )


def _some(names: Iterable[str], most: int = 3) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return f"{', '.join(ordered[:most])}{more}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers prints of a loading to itself: the refusal says it."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
