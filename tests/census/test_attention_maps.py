"""Attention maps equal the softmax of eager attention, pooled in the same way."""

import pytest
import torch
from families import tiny

from headsink.attention import chunked
from headsink.census.attention_maps import Request, all_heads, pooled_attention, tile_size
from headsink.errors import HeadsinkError
from headsink.models.spec import describe

FAMILIES = ("llama", "llama-mha", "mistral-sliding", "gemma3", "gemma2", "gpt-oss")


def matrices(family, ids):
    """The attention matrix of every head: [layers, heads, queries, keys]."""
    with torch.no_grad():
        found = tiny(family, attention="eager")(torch.tensor([ids]), output_attentions=True, use_cache=False)
    return torch.cat(found.attentions)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("length", "rows"), [(61, 64), (61, 7)])
def test_tiles_are_the_pooled_matrix(family, length, rows, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 2**10)  # several blocks, some smaller than a tile
    model, ids = tiny(family), torch.randint(3, 211, (length,)).tolist()
    heads = all_heads(describe(model))
    (found,) = pooled_attention(model, ids, Request(heads, rows, 5))
    exact, tile = matrices(family, ids).flatten(0, 1), tile_size(length, rows)
    assert found.heads == tuple(heads)
    assert (found.tile, found.tiles.shape[1:]) == (tile, (-(-length // tile),) * 2)
    for n, matrix in enumerate(exact):
        for i, queries in enumerate(matrix.split(tile)):
            pooled = torch.stack([part.sum(1).mean() for part in queries.split(tile, 1)])
            torch.testing.assert_close(found.tiles[n, i], pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.mean, exact[:, length // 4 :].mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_top_keys_of_every_query_are_those_of_the_matrix(family):
    model, ids, top = tiny(family), torch.randint(3, 211, (61,)).tolist(), 7
    heads = [(2, 3), (0, 1), (0, 2)]
    (found,) = pooled_attention(model, ids, Request(heads, 8, top))
    exact = matrices(family, ids)
    for n, (layer, head) in enumerate(heads):
        best = exact[layer, head].topk(top).values
        torch.testing.assert_close(found.weights[n], best, rtol=1e-4, atol=1e-5)
        there = found.keys[n].long()
        assert (there <= torch.arange(61)[:, None]).all()
        assert torch.equal(there >= 0, found.weights[n] > 0)
        read = exact[layer, head].gather(1, there.clamp(min=0)) * (there >= 0)
        torch.testing.assert_close(read, best, rtol=1e-4, atol=1e-5)


def test_a_text_of_8192_tokens_is_never_a_square_matrix(monkeypatch):
    model = tiny("llama", layers=1)
    model.config.max_position_embeddings = 8192
    largest, block = [0], chunked.block

    def measured(*given):
        part = block(*given)
        largest[0] = max(largest[0], part.weights.numel())
        return part

    monkeypatch.setattr(chunked, "block", measured)
    (found,) = pooled_attention(model, torch.randint(3, 211, (8192,)).tolist(), Request([(0, 0), (0, 3)], 128, 4))
    assert found.tiles.shape == (2, 128, 128)
    assert found.tile == 64
    torch.testing.assert_close(found.tiles.sum(-1), torch.ones(2, 128), rtol=1e-4, atol=1e-4)
    assert 0 < largest[0] <= chunked.BLOCK_ELEMENTS


def test_requests_are_read_in_one_pass():
    model, ids = tiny("qwen3"), torch.randint(3, 211, (40,)).tolist()
    passes = []
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    coarse, fine = pooled_attention(model, ids, Request(all_heads(describe(model)), 4, 0), Request([(1, 2)], 64, 3))
    assert len(passes) == 1
    assert (coarse.tiles.shape, coarse.keys.shape) == ((12, 3, 3), (12, 40, 0))
    assert fine.tiles.shape == (1, 40, 40)
    torch.testing.assert_close(fine.mean[0], coarse.mean[6])


def test_wrong_heads_and_texts_are_one_line():
    model = tiny("llama")
    for heads, ids, message in (
        (
            [(3, 0)],
            [5, 6],
            r"heads: 3\.0 is not a head of .*, which has attention in layers 0 to 2, with query heads 0 to 3",
        ),
        ([(0, -1)], [5, 6], r"heads: 0\.-1 is not a head"),
        ([(0, 0)], [5], "text: it has 1 tokens; give 2 to 512"),
        ([(0, 0)], [5] * 513, "text: it has 513 tokens"),
    ):
        with pytest.raises(HeadsinkError, match=message):
            pooled_attention(model, ids, Request(heads, 8, 1))
