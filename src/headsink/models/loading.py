"""Load a model: a built-in one, a folder, a .gguf file, or a Hugging Face id.

Only safetensors and GGUF weights are read, and code that comes with a model is never run. The network is used only for a
Hugging Face id (`owner/name`). A GGUF file is converted once, into the user's cache folder. The SHA-256 of the converted files is
checked at every load.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig

from headsink.errors import HeadsinkError
from headsink.models.builtin import BUILT_IN, cache_folder, check_name, check_tokenizer, processes
from headsink.models.devices import parse_device, parse_dtype
from headsink.models.gguf import convert
from headsink.models.hf_logging import first_line, one_line, quiet
from headsink.models.spec import check_class, check_config, describe, heads_of
from headsink.utils.files import sha256
from headsink.utils.terminal import note

HUB_TIMEOUT = 5.0  # seconds


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
    dtype : "float32", "bfloat16", "float16" or a torch dtype. Default: the checkpoint's dtype.
    device : the device of the model. Default: a GPU if there is one, else the CPU.
    device_map : accelerate's device map, instead of `device`: "auto" fills the GPUs, then memory, and leaves the rest on
        disk; a dictionary assigns each module to a device.
    max_memory : the largest size of the weights on each device for "auto": {0: "20GB", "cpu": "30GB"}.
    offload_folder : the folder of offloaded weights that must be converted; others are read from the checkpoint. Default: a
        folder in headsink's cache that is deleted with the model.
    tensor_parallel : split every layer over the processes that torchrun started, by transformers' tensor-parallel plan.

    Raises
    ------
    HeadsinkError : the model does not exist, cannot be read, or is of an unsupported kind.
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
    with quiet(), one_line(name, missing):
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
        with one_line(f"{name}: its tokenizer", missing):
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
    describe(model)  # raises for a model that is not supported
    model.config.name_or_path = name
    return model.eval(), tokenizer


def _check_splittable(config: Any, processes: int, name: str) -> None:
    """Raise if the layers of a model cannot be split over `processes` processes."""
    if not getattr(config, "base_model_tp_plan", None):
        raise HeadsinkError(f"{name}: transformers has no tensor-parallel plan for {config.model_type}; use device_map")
    for layer in config.get_text_config(decoder=True).per_layer_config:
        if (heads := heads_of(layer)[1]) % processes:
            raise HeadsinkError(
                f"{name}: its {heads} KV heads cannot be split over {processes} processes; start a divisor"
            )


def _attention(config: Any, kind: Any) -> str:
    """Return `sdpa`, or `eager` where logits are capped (Gemma 2): transformers' `sdpa` silently ignores the cap."""
    capped = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    return "sdpa" if kind._supports_sdpa and not capped else "eager"


def _offload_folder() -> TemporaryDirectory[str]:
    """Create a folder for offloaded weights. It is not in the temporary folder, which may be in memory."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    return TemporaryDirectory(prefix="offload-", dir=cache_folder())


def find(name: str) -> tuple[str, bool]:
    """Return what transformers should load for `name`, and whether it is on this machine."""
    name = check_name(name)
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
        paths = built_in.paths() or []
        if sha256(*paths) != built_in.sha256:
            raise HeadsinkError(
                f"{name}: {paths[0]} is not the known file (SHA-256 differs); run: {built_in.install} --force-reinstall"
            )
        return str(convert(paths, built_in.sha256)), True
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), True
    if path.is_file():
        return str(convert([path], sha256(path))), True
    return name, False


def _on_hub(name: str) -> bool:
    """Whether the hub has a model and can be reached. Prints a note first, since the request may time out.

    Raises HeadsinkError if the hub has no such model.
    """
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
        note(f"the hub cannot be reached ({first_line(error)}); looking for files that were downloaded before")
        return False
    return True
