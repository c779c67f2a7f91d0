"""Random documents, and cached documents of them on tiny models."""

import torch

from headsink.calibration.cached_document import CachedDocument
from headsink.data.documents import Document, Question
from headsink.eviction.pattern import FULL
from headsink.eviction.scorers import LINEAR

LENGTH, BRANCH = 150, 40


SOME = ("llama", "llama-mha", "gemma3")


def random_document(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(3, 211, (count,), generator=generator).tolist()

    return Document(tokens(LENGTH), tokens(BRANCH), [Question("one", tokens(19), 4), Question("two", tokens(5), 1)])


def everything(shape):
    return [None if window else [FULL] * shape.kv_heads for window in shape.windows]


def random_weights(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.layers, shape.kv_heads, LINEAR.n_features(shape.head_dim), generator=generator)


def make_cached_document(model, seed=0):
    """Return a cached document with random importance of its keys."""
    cached = CachedDocument(model, random_document(seed))
    generator = torch.Generator().manual_seed(seed)
    cached.importance = torch.randn(cached.importance.shape, generator=generator)
    return cached
