"""The padding of a batch from call to call: a later mask shows the left padding of the first one, and may hide more columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headsink.attention.params import Padding
from headsink.cache.buffers import Buffers
from headsink.errors import HeadsinkError


def continue_padding(groups: Sequence[Buffers], seen: int, padding: Padding | None) -> bool:
    """Give the groups of a layer the padding of a later call. Return whether it hides columns that were visible.

    seen: tokens in the cache. padding: None leaves the padding as it is. Raises HeadsinkError if it does not agree with that of
    earlier calls, except in rows of padding only, and for a cache that begins with a batch padded on the right.
    """
    before = groups[0].padding
    if before is not None and before.right:
        raise HeadsinkError(
            "this cache begins with a batch that is padded on the right: pad on the left (tokenizer.padding_side = 'left') to "
            "continue it"
        )
    if padding is None:
        return False
    if padding.tokens.shape[0] != groups[0].keys.shape[0]:
        raise HeadsinkError(f"attention_mask: it has {len(padding.tokens)} rows and this cache {len(groups[0].keys)}")
    same = padding.tokens == (before.tokens if before is not None else 0)
    if before is not None:
        same |= (before.tokens >= seen) & (padding.tokens >= seen)
    if not same.all():
        raise HeadsinkError("attention_mask: the left padding is not the one that this cache was started with")
    hidden = _hide(groups, seen, padding.hidden, None if before is None else before.hidden)
    for group in groups:
        group.padding = padding
    return hidden


def _hide(groups: Sequence[Buffers], seen: int, hidden: Tensor | None, before: Tensor | None) -> bool:
    """Hide the columns of a mask, bool [batch, columns], except those that were already hidden (`before`).

    Return whether there are any.
    """
    new = torch.zeros(groups[0].keys.shape[0], seen, dtype=torch.bool, device=groups[0].keys.device)
    old = torch.zeros_like(new)
    for target, given in ((new, hidden), (old, before)):
        if given is not None:
            target[:, : given.shape[1]] = given[:, :seen]
    if (old & ~new).any():
        raise HeadsinkError("attention_mask: it shows tokens that it hid before; they may have been evicted")
    new &= ~old
    if not new.any():
        return False
    for group in groups:
        group.check_hide(new)
    for group in groups:
        group.hide(new)
    return True
