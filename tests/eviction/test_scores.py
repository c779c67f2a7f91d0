"""Importance scores of keys, and the top-k keys they select."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headsink.eviction import lifetimes as lifetimes_module
from headsink.eviction.lifetimes import lifetimes
from headsink.eviction.scorers import LINEAR


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [6, 64])
def test_a_score_does_not_depend_on_its_batch(dim, dtype):
    key, value = torch.randn(2, 2, 3, 70, dim).to(dtype)
    weights = torch.randn(3, LINEAR.n_features(dim))
    scores = LINEAR.scores(key, value, weights)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for n in range(70):
        alone = LINEAR.scores(key[:, :, n : n + 1], value[:, :, n : n + 1], weights)
        assert torch.equal(alone, scores[:, :, n : n + 1])


def test_feature_pairs_are_those_of_rotary_embedding():
    key, value = torch.tensor([3.0, 0.0, 4.0, 2.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])
    assert LINEAR.features(key, value).tolist() == [3, 0, 4, 2, 5, 2, 5, 6, 7, 8]


def top_k_keys(earlier, leaving, counts, top_k):
    """Return which keys are top-k keys once `counts` of the leaving keys have left: bool [..., counts, keys]."""
    ends = lifetimes(earlier[None], leaving[None], top_k)[0]
    found = counts[:, None] < ends[..., None, :]
    found[..., earlier.shape[-1] :] &= torch.arange(leaving.shape[-1]) < counts[:, None]
    return found


def slow_top_k_keys(earlier, leaving, counts, top_k):
    """Find the top-k keys query by query."""
    rows = []
    for left in counts.tolist():
        scores = torch.cat([earlier, leaving], -1)
        scores[..., earlier.shape[-1] + left :] = float("-inf")
        top = scores.topk(min(top_k, scores.shape[-1]), -1)
        rows.append(torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top.indices, top.values > float("-inf")))
    return torch.stack(rows, -2)


@pytest.mark.slow
@given(
    st.sampled_from([(), (2,), (2, 3)]),
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(0, 14),
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.integers(0, 10_000),
)
@settings(max_examples=400)
def test_top_k_keys_equal_a_query_by_query_search(shape, before, later, top_k, counts, seed):
    generator = torch.Generator().manual_seed(seed)
    earlier, leaving = (torch.randn(*shape, keys, generator=generator) for keys in (before, later))
    for scores, empty in ((earlier, 0.3), (leaving, 0.2)):
        scores[torch.rand(scores.shape, generator=generator) < empty] = float("-inf")
    counts = torch.tensor(sorted(min(n, later) for n in counts))
    assert torch.equal(top_k_keys(earlier, leaving, counts, top_k), slow_top_k_keys(earlier, leaving, counts, top_k))


def test_equal_scores_do_not_exceed_the_capacity():
    counts = torch.arange(6)
    found = top_k_keys(torch.zeros(3), torch.zeros(5), counts, 3)
    assert found.sum(-1).tolist() == [3] * 6
    assert not (found[:, 3:] & (torch.arange(5) >= counts[:, None])).any()


@pytest.mark.parametrize(
    ("before", "later", "top_k"),
    [(0, 1, 1), (3, 40, 2), (5, 0, 3), (7, 20, 0), (2, 300, 5), (0, 500, 130), (140, 260, 140), (4, 30, 90)],
)
def test_vectorised_lifetimes_equal_those_of_a_heap(device, before, later, top_k):
    """Also for equal scores: the choice must not depend on the machine."""
    earlier, leaving = (torch.randint(-9, 10, (2, 2, keys)).float() for keys in (before, later))
    for scores in (earlier, leaving):
        scores[scores == -9] = float("-inf")
    leaving[1] = torch.randn(2, later)
    found = lifetimes(earlier.to(device), leaving.to(device), top_k).cpu()
    expected = np.empty((4, before + later), np.int64)
    for row, (own, new) in enumerate(zip(earlier.flatten(0, 1), leaving.flatten(0, 1), strict=True)):
        lifetimes_module._lifetimes(own.double().numpy(), new.double().numpy(), top_k, expected[row])
    assert found.flatten(0, 1).tolist() == expected.tolist()
