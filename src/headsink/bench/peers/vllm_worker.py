"""vLLM as a process that answers (peers.py): a line of JSON in, {"ids": [[...], ...], "tokens"}, and one out for it.

Run as a file by the Python of an environment where vLLM is installed, so it imports nothing of headsink. Arguments: the model's
folder, dtype, the longest text in tokens, how many texts at once. The engine runs in this very process: nothing polls while it
waits. Prefixes are not kept from one text to the next, for the texts are the same in every round.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM prints goes where its errors go


def answer(found: dict[str, Any]) -> None:
    answers.write(json.dumps(found) + "\n")
    answers.flush()


def times(engine: Any, ids: list[list[int]], tokens: int) -> tuple[list[list[float]], int]:
    """When each token of each text came, in seconds from the start, and the most blocks of the cache that were in use."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    unused, most = pool.get_num_free_blocks(), 0
    found: list[list[float]] = [[] for _ in ids]
    start = time.perf_counter()
    for number, text in enumerate(ids):
        engine.add_request(str(number), {"prompt_token_ids": text}, wanted)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - start
        most = max(most, unused - pool.get_num_free_blocks())
        for output in outputs:
            count = len(output.outputs[0].token_ids)
            found[int(output.request_id)] += [now] * (count - len(found[int(output.request_id)]))
    return found, most


def main() -> None:
    folder, dtype, longest, texts = sys.argv[1:]
    import vllm

    engine = vllm.LLM(
        folder,
        dtype=dtype,
        max_model_len=int(longest),
        max_num_seqs=int(texts),
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    ).llm_engine
    config = engine.engine_core.engine_core.scheduler.kv_cache_config
    # Each entry names the whole allocation, which groups of layers (full, sliding) share: a block is one group's at a time.
    block = max(tensor.size for tensor in config.kv_cache_tensors) // config.num_blocks
    answer({"ready": True, "version": vllm.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        found, blocks = times(engine, request["ids"], request["tokens"])
        answer({"times": found, "kv_bytes": blocks * block})


if __name__ == "__main__":
    main()
