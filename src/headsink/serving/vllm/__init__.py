"""Serve a plan with unmodified vLLM: each KV head keeps what its pattern says, and the memory of all other keys is freed.

    from vllm import LLM
    from headsink.serving.vllm.settings import engine_args
    LLM(folder, **engine_args(headsink.Plan.load("plan.json")))

`headsink serve` starts the OpenAI-compatible server. Plans with top-k keys: `slab` says where the keys of a sequence are,
`slab_cache` and `slab_attention` run in vLLM. Plans of windows: `blocks` defines which keys a query attends to, `groups` chooses
which heads share a block table, `kv_cache` and `attention` run in vLLM. `models` has the model classes of both; `fingerprint`
checks a plan against weights.
"""
