"""Silence transformers and the Hugging Face hub while a model is loaded, and turn their errors into one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from headsink.errors import HeadsinkError

ACCELERATE = logging.getLogger("accelerate")


@contextmanager
def one_line(name: str, offline: bool) -> Iterator[None]:
    """Turn an error of transformers while it loads a model into a HeadsinkError of one line that says what to do.

    offline: only previously downloaded files were searched.
    """
    try:
        yield
    except HeadsinkError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, MemoryError) as error:
        text = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            reason = "it does not fit in memory; give max_memory, to leave some of it on disk"
        elif "trust_remote_code" in text:
            reason = "it needs code of its own; headsink runs no code that comes with a model"
        elif "safetensors" in text and ("no file named" in text or "does not appear to have" in text):
            reason = "it has no safetensors weights; only safetensors and GGUF are read"
        elif "gated" in text:
            reason = "it is gated: accept its terms on the hub and log in with `hf auth login`"
        elif offline and not isinstance(error, ValueError):
            reason = "it is not on this machine, and the Hugging Face hub cannot be reached or HF_HUB_OFFLINE is set"
        else:
            reason = first_line(error)
        raise HeadsinkError(f"{name}: cannot be loaded: {reason}") from error


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and log messages of transformers and accelerate."""
    level, hub_level = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    accelerate_level = ACCELERATE.level
    ACCELERATE.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        ACCELERATE.setLevel(accelerate_level)
        if bars:
            transformers_logging.enable_progress_bar()
