"""Where weights come from: a built-in model, a folder, a .gguf file, or a Hugging Face id.

Only safetensors and GGUF weights are read and no code that comes with a model is run. The network is used only for a
Hugging Face id (`owner/name`). GGUF files are converted once, into the user's cache folder; the converted files are
checked by their SHA-256 every time.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gguf import GGUFReader
from huggingface_hub import HfApi
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from headsink.architecture import attention_modules, check_class, check_config
from headsink.built_in import BUILT_IN, cache_folder, check_dtype, check_name, check_tokenizer, processes
from headsink.errors import HeadsinkError
from headsink.files import new_folder, sha256
from headsink.terminal import note

MANIFEST = "headsink.json"  # in a converted folder: the source's and the files' hashes
HUB_TIMEOUT = 5.0  # seconds
ACCELERATE = logging.getLogger("accelerate")


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    tensor_parallel: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name : "smollm2" or "gemma3-270m" (built in), a folder, a .gguf file, or a Hugging Face id `owner/name`, which may
        use the network.
    dtype : "float32", "bfloat16", "float16" or a torch dtype; the checkpoint's own if not given.
    device : where the model goes; a GPU if there is one.
    device_map : instead of `device`, as accelerate has it: "auto" fills the GPUs, then memory, and leaves the rest on
        disk; a dictionary says where each module goes.
    max_memory : for "auto", the most weights a device holds: {0: "20GB", "cpu": "30GB"}.
    offload_folder : where weights on disk go if they must be converted; others are read from where they are. A folder
        in headsink's cache that goes away with the model if not given.
    tensor_parallel : split every layer over the processes that torchrun started, by transformers' own plan.

    Raises
    ------
    HeadsinkError : the model is not there, cannot be read, or is of a kind that headsink cannot work on.
    """
    dtype = parse_dtype(dtype)
    if max_memory is not None and device_map is None:
        device_map = "auto"
    if (device is not None) + (device_map is not None) + tensor_parallel > 1:
        raise HeadsinkError("give one of device, device_map (with max_memory) and tensor_parallel")
    if device_map is None and not tensor_parallel:
        device = parse_device(device)
    ranks = processes() if tensor_parallel else 1
    name = check_name(str(name))
    source, local = find(name)
    fetched = not local and _on_hub(name)
    missing, local = not local and not fetched, not fetched
    with _quiet(), _one_line(name, missing):
        config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        check_config(config, name)
        mapping = AutoModelForCausalLM._model_mapping
        if type(config) not in mapping:
            raise HeadsinkError(
                f"{name}: {config.model_type} is not a causal language model; headsink works on those only"
            )
        check_class(mapping[type(config)], name)
        if tensor_parallel:
            _check_splittable(config.get_text_config(decoder=True), ranks, name)
        check_tokenizer(name)
        with _one_line(f"{name}: its tokenizer", missing):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        own_folder = None if device_map is None or offload_folder else _offload_folder()
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype or "auto",
            device_map=device_map,
            max_memory=max_memory and dict(max_memory),
            offload_folder=own_folder.name if own_folder else offload_folder,
            distributed_config=DistributedConfig(tp_size=ranks) if ranks > 1 else None,
            attn_implementation=_attention(config, mapping[type(config)]),
            use_safetensors=True,
            local_files_only=local,
            trust_remote_code=False,
        )
        if device_map is None and not tensor_parallel:
            model = model.to(device)
    if own_folder is not None:
        weakref.finalize(model, own_folder.cleanup)
    attention_modules(model)
    model.config.name_or_path = name
    return model.eval(), tokenizer


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        found: torch.dtype = getattr(torch, check_dtype(dtype))
        return found
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" and the like, as `parse_dtype` reads it."""
    return str(dtype).removeprefix("torch.")


def parse_device(device: str | torch.device | None) -> torch.device:
    """A device that is here; the best one if none is named."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise HeadsinkError(f"device: {str(device)!r} is not available here: {_first_line(error)}") from error
    return device


def _check_splittable(config: Any, processes: int, name: str) -> None:
    """Raise if the layers of a model cannot be split over so many processes."""
    if not getattr(config, "base_model_tp_plan", None):
        raise HeadsinkError(f"{name}: transformers has no tensor-parallel plan for {config.model_type}; use device_map")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % processes:
        raise HeadsinkError(f"{name}: its {heads} KV heads cannot be split over {processes} processes; start a divisor")


def _attention(config: Any, kind: Any) -> str:
    """The attention of transformers that computes what the model is: its `sdpa` silently does not cap logits (Gemma 2)."""
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    return "sdpa" if kind._supports_sdpa and not capped else "eager"


def _offload_folder() -> TemporaryDirectory[str]:
    """A new folder for weights that have to be written again; not in the temporary folder, which may be memory."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    return TemporaryDirectory(prefix="offload-", dir=cache_folder())


def find(name: str) -> tuple[str, bool]:
    """What to hand to transformers for `name`, and whether it is on this machine."""
    name = check_name(name)
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
        paths = built_in.paths() or []
        if sha256(*paths) != built_in.sha256:
            raise HeadsinkError(
                f"{name}: {paths[0]} is not the known file (SHA-256 differs); run: {built_in.install} --force-reinstall"
            )
        return str(_converted(paths, built_in.sha256)), True
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), True
    if path.is_file():
        return str(_converted([path], sha256(path))), True
    return name, False


def _on_hub(name: str) -> bool:
    """Ask the hub for a model, and say so first, as a hub that cannot be reached answers late. False: only the cache is left."""
    if hub_constants.HF_HUB_OFFLINE:
        return False
    note(f"looking for {name} on the Hugging Face hub ...")
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        return True
    except RepositoryNotFoundError as error:
        raise HeadsinkError(
            f"{name}: no such model on the Hugging Face hub, and no such folder here; a private one needs `hf auth login`"
        ) from error
    except Exception as error:  # its class depends on the network library that huggingface_hub uses
        note(f"the hub cannot be reached ({_first_line(error)}); looking for files that were fetched before")
        return False
    return True


def _converted(parts: list[Path], digest: str) -> Path:
    """The folder with the converted weights of a GGUF file (in parts), made now if it is not there or not whole."""
    stem, ending, _ = parts[0].name.partition(".gguf")
    folder = cache_folder() / f"{stem}-{digest[:12]}"
    if _is_whole(folder, digest):
        return folder
    with (
        new_folder(folder, MANIFEST) as made,
        TemporaryDirectory(prefix=f".{stem}.", dir=cache_folder()) as place,
        _quiet(),
        _one_line(str(parts[0]), False),
    ):
        gguf = parts[0] if len(parts) == 1 else _join(parts, Path(place) / (stem + ending))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        if _begins_with_bos(gguf):
            tokenizer.add_bos_token = True  # transformers forgets it for Gemma, which is lost without
        tokenizer.save_pretrained(made)
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = copy.deepcopy(quantized.config)
        del config.quantization_config  # transformers refuses to save weights that are marked as quantised
        model = type(quantized)(config)
        model.load_state_dict(quantized.state_dict())
        model.generation_config = quantized.generation_config
        model.save_pretrained(made)
        files = {path.name: sha256(path) for path in sorted(made.iterdir())}
        (made / MANIFEST).write_text(json.dumps({"source": digest, "files": files}, indent=1))
    return folder


def _join(parts: list[Path], path: Path) -> Path:
    with path.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)
    return path


def _begins_with_bos(gguf: Path) -> bool:
    """Whether a GGUF file says that every text begins with the token for that."""
    field = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        whole = manifest["source"] == digest
        return whole and all(sha256(folder / name) == expected for name, expected in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # not there, or damaged: it is made again


@contextmanager
def _one_line(name: str, offline: bool) -> Iterator[None]:
    """Turn what transformers says of a model that it cannot load into one line with what to do.

    offline: only what was fetched from the hub before was searched.
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
            reason = _first_line(error)
        raise HeadsinkError(f"{name}: cannot be loaded: {reason}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' and accelerate's own bars and notes off the screen."""
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
