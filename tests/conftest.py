import os
import zlib
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

settings.register_profile("headsink", deadline=None)  # examples may take longer on a busy machine
settings.load_profile("headsink")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    if find_spec("triton"):
        import interpreter

        interpreter.replace_once_a_launch()
        interpreter.make_types_once()


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="leave out tests marked slow, and all but one case of a matrix"
    )


def pytest_collection_modifyitems(config, items) -> None:
    if not config.getoption("--fast"):
        return
    by_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    # Which case it is depends on the test's name only, so that over all tests every family has its turn.
    kept = {id(cases[zlib.crc32(name.encode()) % len(cases)]) for name, cases in by_test.items()}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def case_seed(request) -> int:
    """A seed of its own for each case of a matrix, always the same."""
    return zlib.crc32(request.node.name.encode()) % 1000


@pytest.fixture
def device(monkeypatch) -> torch.device:
    """The device of the Triton kernels: a GPU, or the CPU with Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    from headsink.utils import device

    monkeypatch.setattr(device, "DEVICES", {"cpu"})
    return torch.device("cpu")


@pytest.fixture
def precise(monkeypatch):
    """Keep float64 where numbers are rounded to save memory, so that those of a float64 model can be compared closely."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)


@pytest.fixture(scope="session")
def smollm2():
    """The built-in model and its tokenizer."""
    import headsink

    return headsink.load("smollm2", device="cpu")


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return smollm2[1]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """A tiny random Llama saved by transformers, with a tokenizer like the built-in model's and a vocabulary of 2,048 tokens."""
    from pydoc_data.topics import topics

    from families import CONFIGS
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tokenizer.train_new_from_iterator(topics.values(), 2048)
    config = CONFIGS["llama"]()
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 2048
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
