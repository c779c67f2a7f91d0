"""Convert a .gguf file to a folder that transformers can load."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from headsink.models.builtin import cache_folder
from headsink.models.hf_logging import one_line, quiet
from headsink.utils.files import new_folder, sha256

MANIFEST = "headsink.json"  # in a converted folder: hashes of the source and of the files


def convert(parts: list[Path], digest: str) -> Path:
    """Return the folder with the converted weights of a GGUF file (in parts). Converts unless the folder exists and is intact."""
    stem, ending, _ = parts[0].name.partition(".gguf")
    folder = cache_folder() / f"{stem}-{digest[:12]}"
    if _is_whole(folder, digest):
        return folder
    with (
        new_folder(folder, MANIFEST) as made,
        TemporaryDirectory(prefix=f".{stem}.", dir=cache_folder()) as temporary,
        quiet(),
        one_line(str(parts[0]), False),
    ):
        gguf = parts[0] if len(parts) == 1 else _join(parts, Path(temporary) / (stem + ending))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        if _begins_with_bos(gguf):
            tokenizer.add_bos_token = True  # transformers omits it for Gemma, whose output is wrong without it
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
    """Whether a GGUF file says that the tokenizer adds a BOS token."""
    field = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
    return field is not None and bool(field.contents())


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        whole = manifest["source"] == digest
        return whole and all(sha256(folder / name) == expected for name, expected in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # missing or damaged: convert again
