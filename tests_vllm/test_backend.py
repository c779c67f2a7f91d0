"""The block tables given to the kernels match the visibility rule of blocks.py."""

import random
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from headsink import HeadsinkError
from headsink.serving.vllm.attention import check_planned, compact
from headsink.serving.vllm.blocks import Blocks, visible
from headsink.serving.vllm.kv_cache import SinkWindowSpec

TABLE = 64  # blocks in a row of the block table


def batch(requests, block):
    """requests: (tokens read before, tokens now); block n of request r is number 1000 r + n."""
    starts = torch.tensor([0, *(now for _, now in requests)]).cumsum(0).int()
    ends = torch.tensor([before + now if now else 0 for before, now in requests]).int()
    table = torch.arange(len(requests))[:, None] * 1000 + torch.arange(TABLE)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=ends,
        seq_lens_cpu_upper_bound=ends,
        num_reqs=len(requests),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(now for _, now in requests),
        max_seq_len=int(ends.max()),
        block_table_tensor=table.int(),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.long),
        is_prefilling=torch.tensor([before == 0 for before, _ in requests]),
    )


@pytest.mark.parametrize("split", [1, 2], ids=["blocks", "kernel blocks of half the size"])
@pytest.mark.parametrize("seed", range(10))
def test_pieces_contain_the_keys_that_their_queries_see(seed, split):
    rng = random.Random(seed)
    whole, block = 4 * split, 4
    kept = Blocks(rng.randrange(3), rng.randrange(4))
    requests = [(rng.randrange(60), rng.choice([0, 1, 1, 2, 5, 37])) for _ in range(5)]
    if not any(now for _, now in requests):
        requests.append((3, 1))
    found = compact(batch(requests, block), kept, whole, block)
    assert found.query_start_loc[-1] == sum(now for _, now in requests)
    assert len(found.is_prefilling) == found.num_reqs == len(found.seq_lens)

    seen = []  # for every query in order: (request, position) of its keys
    for n in range(found.num_reqs):
        first, after = found.query_start_loc[n : n + 2].tolist()
        length = int(found.seq_lens[n])
        numbers = found.block_table_tensor[n].tolist()
        keys = [(numbers[c // block] // 1000, numbers[c // block] % 1000 * block + c % block) for c in range(length)]
        seen += [keys[: length - (after - first) + 1 + query] for query in range(after - first)]
    expected = []
    for r, (before, now) in enumerate(requests):
        mask = visible(kept, whole, torch.arange(before, before + now), torch.arange(before + now))
        expected += [[(r, key) for key in row.nonzero().flatten().tolist()] for row in mask]
    assert seen == expected


def test_vllm_leaves_all_blocks_of_a_window_with_sinks_in_the_block_table():
    """From 0.33 on, the model runner of GPUs replaces blocks below `num_retained_tokens` by null blocks, unless it is 0."""
    spec = SinkWindowSpec.of(Blocks(1, 2), 16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    assert isinstance(spec, SlidingWindowSpec)  # the specs to which the runner does so
    assert spec.num_retained_tokens == 0


def test_a_layer_with_another_cache_spec_than_the_plans_raises():
    """vLLM does this where it unifies the caches of all layers; then nothing would be evicted."""
    fields = {"num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    planned = SinkWindowSpec.of(Blocks(1, 2), 16, **fields)
    layers = {"a": SimpleNamespace(planned=planned), "full": SimpleNamespace(planned=None)}
    check_planned(planned, ["a"], layers)
    check_planned(FullAttentionSpec(block_size=16, **fields), ["full"], layers)
    for other in (FullAttentionSpec(block_size=16, **fields), SinkWindowSpec.of(Blocks(0, 2), 16, **fields)):
        with pytest.raises(HeadsinkError, match=r"a: vLLM uses .* so the plan would not be applied"):
            check_planned(other, ["a"], layers)
