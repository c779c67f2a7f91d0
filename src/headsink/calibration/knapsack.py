"""The knapsack that spends a KV budget: one option for every row, with the least total cost within the total size."""

from __future__ import annotations

import torch
from torch import Tensor

from headsink.errors import HeadsinkError

HALVINGS = 80  # of the interval of prices


def choose(cost: Tensor, sizes: Tensor, allowed: float) -> Tensor:
    """Choose an option for every row to minimise the total cost within the total size `allowed`: int64 [rows].

    cost: float64 [rows, options]; sizes: float64 [options]. A Lagrangian knapsack: every row takes the option with the least
    cost + price x size, at the lowest price at which all fit. The remaining size goes to the best single improvements. Raises
    HeadsinkError if nothing fits.
    """
    if sizes.min() * len(cost) > allowed:
        raise HeadsinkError(
            f"budget: {allowed:.0f} keys are less than the smallest plan, {sizes.min() * len(cost):.0f}"
        )
    low, high = 0.0, 1e-9
    while sizes[_cheapest(cost, sizes, high)].sum() > allowed:
        high *= 4
    for _ in range(HALVINGS):
        price = (low + high) / 2
        low, high = (price, high) if sizes[_cheapest(cost, sizes, price)].sum() > allowed else (low, price)
    pick = _cheapest(cost, sizes, high)
    while True:
        left = allowed - sizes[pick].sum()
        gain = cost.gather(1, pick[:, None]) - cost
        growth = sizes - sizes[pick][:, None]
        worth = torch.where((gain > 0) & (growth <= left), gain / growth.clamp(min=1e-9), 0.0)
        if not worth.max() > 0:
            return pick
        row, option = divmod(int(worth.argmax()), cost.shape[1])
        pick[row] = option


def _cheapest(cost: Tensor, sizes: Tensor, price: float) -> Tensor:
    return (cost + price * sizes).argmin(1)
