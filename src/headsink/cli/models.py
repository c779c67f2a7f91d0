"""`headsink models`: the built-in models, whether they are installed, and what else can be loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headsink.cli.options import Json
from headsink.models.builtin import BUILT_IN
from headsink.utils.terminal import MEGABYTE, emit, new_table, out


@dataclass(frozen=True)
class ModelsOptions:
    """Options of `headsink models`."""

    as_json: Json = False


def models(options: ModelsOptions) -> None:
    """List the built-in models, and say what else can be loaded."""
    found = list_models()
    if options.as_json:
        emit(found)
    else:
        print_models(found)


def list_models() -> dict[str, Any]:
    """The built-in models: installed or not, and how to install them."""
    listed = []
    for model in BUILT_IN.values():
        paths = model.paths()
        listed.append(
            {
                "name": model.name,
                "title": model.title,
                "licence": model.licence,
                "installed": paths is not None,
                "install": model.install,
                "bytes": sum(path.stat().st_size for path in paths) if paths else None,
            }
        )
    return {
        "built_in": listed,
        "others": "a folder as transformers saves it, a .gguf file, or a Hugging Face id owner/name",
        "tested_families": [
            "Llama",
            "Qwen2",
            "Qwen3",
            "Mistral",
            "Gemma 2",
            "Gemma 3",
            "Phi-3",
            "OLMo-2",
            "Granite",
            "gpt-oss",
        ],
    }


def print_models(found: dict[str, Any]) -> None:
    table = new_table("Built-in models", "name", "model", "licence", "installed")
    for model in found["built_in"]:
        state = f"yes, {model['bytes'] / MEGABYTE:.0f} MB" if model["installed"] else "no"
        table.add_row(model["name"], model["title"], model["licence"], state)
    out.print(table)
    for model in found["built_in"]:
        if not model["installed"]:  # below the table, where no column cuts the command
            out.print(f"To install {model['name']}: {model['install']}", highlight=False)
    out.print(f"Also: {found['others']}.", highlight=False)
    out.print(f"Tested families: {', '.join(found['tested_families'])} and others (docs/families.md).", highlight=False)
