"""Whether the Hugging Face hub can be asked for a model that is not here, found out by one question.

The hub's library asks again and again, half a minute long, for what it has no copy of where there is no network; most
such names are misspelt paths.
"""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"
TOO_BUSY = 429  # of HTTP; so are the server's own errors, from 500 on


def require_answering(model: str) -> None:
    """Refuse a model that is neither a directory nor in the cache where the hub does not answer.

    What the hub says of a model is left to whoever loads it; in its offline mode nothing is asked.

    Args:
        model: Path or hub id.

    Raises:
        OSError: If it does not answer.
    """
    if Path(model).exists() or Path(model).is_absolute():
        return
    import httpx
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if is_offline_mode() or try_to_load_from_cache(model, CONFIG) is not None:
            return
        get_hf_file_metadata(hf_hub_url(model, CONFIG))
    except HFValidationError:  # is said by whoever loads it
        return
    except HfHubHTTPError as error:
        if error.response.status_code < 500 and error.response.status_code != TOO_BUSY:
            return
        reason: Exception = error
    except httpx.TransportError as error:
        reason = error
    else:
        return
    said = " ".join(str(reason).split()) or type(reason).__name__
    raise OSError(f"{constants.ENDPOINT} does not answer ({said}), and nothing of it is in the cache.") from reason
