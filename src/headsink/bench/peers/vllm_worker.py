"""The vLLM worker process (process.py): one line of JSON per request, {"ids": [[...], ...], "tokens"}, and per answer.

The Python of an environment with vLLM runs this file as a script, so it imports nothing from headsink. Arguments: model folder,
dtype, maximum sequence length in tokens, maximum number of sequences. The engine runs in the same process, so that nothing polls
while it waits. Prefix caching is off, because every round sends the same prompts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # vLLM's own output goes to standard error


def answer(found: dict[str, Any]) -> None:
    answers.write(json.dumps(found) + "\n")
    answers.flush()


def times(engine: Any, ids: list[list[int]], tokens: int) -> tuple[list[list[float]], int]:
    """Generate and return the arrival times of each sequence's tokens, in seconds, and the peak number of cache blocks in use."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    unused, most = pool.get_num_free_blocks(), 0
    found: list[list[float]] = [[] for _ in ids]
    start = time.perf_counter()
    for number, prompt in enumerate(ids):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - start
        most = max(most, unused - pool.get_num_free_blocks())
        for output in outputs:
            count = len(output.outputs[0].token_ids)
            found[int(output.request_id)] += [now] * (count - len(found[int(output.request_id)]))
    return found, most


def main() -> None:
    folder, dtype, longest, sequences = sys.argv[1:]
    import vllm

    engine = vllm.LLM(
        folder,
        dtype=dtype,
        max_model_len=int(longest),
        max_num_seqs=int(sequences),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    ).llm_engine
    config = engine.engine_core.engine_core.scheduler.kv_cache_config
    # Every entry has the size of the whole allocation: groups of layers (full, sliding) share it, one group per block.
    block = max(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
    answer({"ready": True, "version": vllm.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        found, blocks = times(engine, request["ids"], request["tokens"])
        answer({"times": found, "kv_bytes": blocks * block})


if __name__ == "__main__":
    main()
