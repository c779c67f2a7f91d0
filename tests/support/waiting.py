"""A mode in which every synchronisation of the host with a GPU is an error; it works without a GPU."""

from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar", "nonzero", "masked_select", "unique")


class Waiting(TorchDispatchMode):
    """Fail on operations that synchronise with the host, which CUDA graphs do not allow either."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(part in name for part in WAITS), name
        return func(*args, **(kwargs or {}))
