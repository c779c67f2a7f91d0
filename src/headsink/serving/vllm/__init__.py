"""Serve a plan with unmodified vLLM: each KV head keeps sink tokens and a window, and the memory of all other keys is freed.

    from vllm import LLM
    from headsink.serving.vllm.settings import engine_args
    LLM(folder, **engine_args(headsink.Plan.load("plan.json")))

`headsink serve` starts the OpenAI-compatible server. `blocks` defines which keys a query attends to; `groups` chooses which heads
share a block table; `kv_cache`, `attention` and `models` run in vLLM and import it; `fingerprint` checks a plan against weights.
"""
