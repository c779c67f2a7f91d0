"""A mode in which everything that makes the host wait for a card is an error; it works without a card."""

from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar", "nonzero", "masked_select", "unique")


class Waiting(TorchDispatchMode):
    """Fails where the host would have to wait, which a CUDA graph cannot hold either."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(part in name for part in WAITS), name
        return func(*args, **(kwargs or {}))
