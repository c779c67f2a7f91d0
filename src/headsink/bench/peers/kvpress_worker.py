"""The kvpress worker process (process.py): reads a document under a press, then answers questions about it.

The Python of an environment with kvpress runs this file as a script, so it imports nothing from headsink. Arguments: the model
(a folder or a Hugging Face id), dtype, device. Requests, one line of JSON each:

    {"forget": true}                                         -> {"allocated_bytes"}, of the GPU's memory; null on a CPU
    {"press": "SnapKV", "budget": 0.25, "document": [ids]}   -> {"read_s", "kv_bytes", "kv_bytes_full"} or {"refused": reason}
    {"question": [ids], "tokens": 128, "stops": ["\\n"]}      -> {"ids", "first_s", "steps_s"}

Answers have "peak_bytes" of the GPU's memory since the document before was forgotten. `read_s` is the prefill with the press.
Bytes are those of keys and values that count: some presses (KVzip, and AdaKV for KVzap) mark keys per head instead of removing
them, and kvpress keeps their memory. A question does not change the compressed document.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import time
from importlib.metadata import version
from itertools import pairwise
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # other output goes to standard error

import kvpress  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache  # noqa: E402

KVZAP = ("Qwen3-8B", "Qwen3-32B", "Llama-3.1-8B-Instruct")  # models with published KVzap weights
PRESSES = {
    "KVzip": kvpress.KVzipPress,
    "KVzap-linear": lambda: kvpress.AdaKVPress(kvpress.KVzapPress(model_type="linear")),
    "ExpectedAttention": kvpress.ExpectedAttentionPress,
    "SnapKV": kvpress.SnapKVPress,
}


class Worker:
    """A model, and the compressed cache of the last document."""

    def __init__(self, source: str, dtype: str, device: str):
        options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
        self.model = AutoModelForCausalLM.from_pretrained(source, **options).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.device = torch.device(device)
        end = self.model.generation_config.eos_token_id
        self.forget()
        self.ends = set(end if isinstance(end, list) else [end])
        for layer in self.model.model.layers:
            layer.self_attn.rotary_emb = self.model.model.rotary_emb  # where presses expect it

    def forget(self) -> dict[str, Any]:
        self.cache = DynamicCache(config=self.model.config)
        if self.device.type != "cuda":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # freed memory goes back to the system (glibc only)
            if trim is not None:
                trim(0)
            return {"allocated_bytes": None}
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"allocated_bytes": torch.cuda.memory_allocated(self.device)}

    def read(self, press: str, budget: float, document: list[int]) -> dict[str, Any]:
        name = self.model.config.name_or_path.rstrip("/").split("/")[-1]
        if press == "KVzap-linear" and name not in KVZAP:
            return {"refused": f"there are no published weights for this model; there are for {', '.join(KVZAP)}"}
        chosen = PRESSES[press]()
        for module in self._attention():
            module.masked_key_indices = None  # type: ignore[assignment]
        ids = torch.tensor([document], device=self.device)
        self.document = len(document)
        start = time.perf_counter()
        try:
            chosen.compression_ratio = 1 - budget
            with chosen(self.model):
                self.model.model(input_ids=ids, past_key_values=self.cache)
        except (ValueError, AssertionError) as error:
            return {"refused": str(error).strip() or type(error).__name__}
        self._wait()
        seconds, kept, full = time.perf_counter() - start, 0, 0
        for module, layer in zip(self._attention(), self.cache.layers, strict=True):
            marked = getattr(module, "masked_key_indices", None)  # (batch, head, key)
            entry = 2 * layer.keys.shape[-1] * layer.keys.element_size()  # bytes of a head's key and value
            kept += entry * (layer.keys.shape[1] * layer.keys.shape[2] - (0 if marked is None else len(marked[0])))
            full += entry * layer.keys.shape[1] * self.document
        return {"read_s": seconds, "kv_bytes": kept, "kv_bytes_full": full}

    def answer(self, question: list[int], tokens: int, stops: list[str]) -> dict[str, Any]:
        lengths = [layer.keys.shape[2] for layer in self.cache.layers]
        ids, times, start = list[int](), list[float](), time.perf_counter()
        given, position = torch.tensor([question], device=self.device), self.document
        while len(ids) < tokens:
            positions = torch.arange(position, position + given.shape[1], device=self.device)[None]
            output = self.model(given, past_key_values=self.cache, position_ids=positions, logits_to_keep=1)
            ids.append(int(output.logits[0, -1].argmax()))
            times.append(time.perf_counter() - start)
            position += given.shape[1]
            given = torch.tensor([[ids[-1]]], device=self.device)
            if ids[-1] in self.ends or any(stop in self.tokenizer.decode(ids) for stop in stops):
                break
        for layer, length in zip(self.cache.layers, lengths, strict=True):  # as kvpress's pipeline does
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        steps = [later - earlier for earlier, later in pairwise(times)]
        return {"ids": ids, "first_s": times[0], "steps_s": steps}

    def _attention(self) -> list[torch.nn.Module]:
        return [layer.self_attn for layer in self.model.model.layers]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def main() -> None:
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # presses warn at every start
    worker = Worker(*sys.argv[1:])
    answers.write(json.dumps({"ready": True, "version": version("kvpress")}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if "forget" in request:
            found = worker.forget()
        else:
            found = worker.read(**request) if "document" in request else worker.answer(**request)
            found["peak_bytes"] = (
                torch.cuda.max_memory_allocated(worker.device) if worker.device.type == "cuda" else None
            )
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
