"""Tensor parallelism: two processes, each with its share of the heads, give the results of one process.

This file is also the program that torchrun starts: `test_tensor_parallel.py FOLDER` measures every model in a folder.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

import headsink
from headsink import HeadsinkError, Pattern
from headsink.attention.interface import observe_attention
from headsink.data.documents import Document
from headsink.evaluation.limited import Limit, LimitedDocument
from headsink.models.distributed import input_device, is_main
from headsink.models.spec import decoder

pytestmark = pytest.mark.slow

SPLIT = ("llama", "llama-mha", "qwen2", "qwen3", "gemma3")  # each process has some heads
SEEN_BY_ALL = ("phi3", "olmo2")  # each process has all heads, only the projections are split
ALONE = "gemma3-one-kv-head"
REFUSED = "not with tensor parallelism, where a process has some of the heads"


def measure(folder: Path, tensor_parallel: bool) -> dict[str, Tensor]:
    """A census, the KV heads that this process saw, and the fingerprint's bytes."""
    where = {"tensor_parallel": True} if tensor_parallel else {"device": "cpu"}
    model, tokenizer = headsink.load(folder, **where)
    census = headsink.analyze(model, tokenizer, lengths=(16, 60), domains=("prose",), checkpoint=None, progress=False)
    found = {
        name: array for name, array in census.arrays.items() if not name.endswith(".top")
    }  # equal values may be in any order
    found["fingerprint"] = torch.tensor(list(bytes.fromhex(census.settings["model"]["weights"])))
    with torch.no_grad(), observe_attention(model, lambda seen: found.update(kv=torch.tensor(seen.key.shape[1]))):
        decoder(model)(torch.arange(3, 60, device=input_device(model))[None], use_cache=False)
    return found


def refusals(folder: Path) -> str:
    """What the functions say that need all heads of a layer in one process."""
    model, tokenizer = headsink.load(folder, tensor_parallel=True)
    text = LimitedDocument(model, Document(list(range(3, 40)), list(range(5, 15)), []))
    calls = (
        lambda: headsink.attention_weights(model, tokenizer, "yield a value"),
        lambda: headsink.attention_maps(model, tokenizer, "yield a value", [(0, 0)]),
        lambda: text.log_probs(Limit({0: [0]}, Pattern(4, 0, 8))),
    )
    said = []
    for call in calls:
        with pytest.raises(HeadsinkError) as raised:
            call()
        said.append(str(raised.value))
    return "\n".join(said)


def main(folder: Path) -> None:
    for place in sorted(folder.iterdir()):
        try:
            found = measure(place, tensor_parallel=True)
            if place.name in SPLIT:
                found["refusals"] = torch.tensor(list(refusals(place).encode()))
        except HeadsinkError as error:
            assert place.name == ALONE, error  # noqa: PT017
            found = {"refused": torch.tensor(list(str(error).encode()))}
        if is_main():
            save_file({name: value.contiguous() for name, value in found.items()}, folder / f"{place.name}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A folder of models, and the results of two processes."""
    folder = tmp_path_factory.mktemp("split")
    for family in (*SPLIT, *SEEN_BY_ALL, ALONE):
        model = tiny("gemma3" if family == ALONE else family)
        if family == ALONE:
            model.config.num_key_value_heads = 1
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("family", [*SPLIT, *SEEN_BY_ALL])
def test_two_processes_equal_one(folder, family):
    expected, found = measure(folder / family, tensor_parallel=False), load_file(folder / f"{family}.safetensors")
    said = bytes(found.pop("refusals").tolist()).decode() if family in SPLIT else ""
    names = ("attention_weights", "attention maps", "ablate") if family in SPLIT else ()
    assert said.splitlines() == [f"{name}: {REFUSED}" for name in names]
    assert found.keys() == expected.keys()
    everyone = expected.pop("kv")
    assert found["kv"] == (everyone if family in SEEN_BY_ALL else everyone / 2)
    for name, value in expected.items():
        half = value.dtype == torch.float16  # its last bit may be rounded differently
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-3 if half else 2e-5, equal_nan=True, msg=name)


def test_heads_that_cannot_be_split_are_refused(folder):
    reason = bytes(load_file(folder / f"{ALONE}.safetensors")["refused"].tolist()).decode()
    assert "1 KV heads cannot be split over 2 processes" in reason
    assert "\n" not in reason


if __name__ == "__main__":
    main(Path(sys.argv[1]))
