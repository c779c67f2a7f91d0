"""The mask of a pattern where every token is a segment, as in decoding and sparse prefill."""

import math

import torch

from headsink.attention.reference import segment_mask


def visible(pattern, queries, keys, scores):
    """Return which keys some queries see: bool [..., queries, keys].

    queries: int [..., queries], positions. keys: int [..., keys], consecutive positions, negative for padding. scores: float
    [..., keys].
    """
    shape = torch.broadcast_shapes(keys.shape[:-1], scores.shape[:-1])
    rows = math.prod(shape)
    positions, scores = (t.expand(*shape, -1).reshape(rows, -1 if t.numel() else 0) for t in (keys, scores))
    mask = segment_mask(pattern, positions, scores, scores, range(positions.shape[1] + 1))
    own = (queries - keys[..., :1]).expand(*shape, -1).reshape(rows, -1 if queries.numel() else 0)
    found = mask.gather(1, own[..., None].expand(-1, -1, mask.shape[2]))
    return found.view(*shape, *found.shape[1:])
