"""Serving under a plan by vLLM as it is: per KV head the first tokens and a window, the memory of the rest really freed.

    from vllm import LLM
    from headsink.serving.vllm.settings import engine_args
    LLM(folder, **engine_args(headsink.Plan.load("plan.json")))

or `headsink serve` for the OpenAI server. `blocks` says exactly what a query sees; `groups` which heads share a block table;
`kv_cache`, `attention` and `models` are what vLLM runs, and import it; `fingerprint` checks the plan against the weights.
"""
