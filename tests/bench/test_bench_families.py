"""`headsink bench families`: times of families with random weights, and what memory allows."""

import json

import pytest
import torch
from click.testing import CliRunner
from typer.main import get_command

from headsink.bench import families, limit
from headsink.bench.architectures import FAMILIES
from headsink.bench.limit import token_bytes
from headsink.cli.main import app

TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 6,
}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(families, "SIZES", families.SIZES | TINY)
    monkeypatch.setattr(limit, "READ", 2**20)


def test_a_family_with_a_step_and_one_without(tiny, tmp_path, monkeypatch):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    monkeypatch.setitem(FAMILIES, "Phi-3.5 MoE", ("PhimoeConfig", experts))
    out = tmp_path / "families.json"
    done = CliRunner().invoke(
        get_command(app),
        ["bench", "families", "--families", "Qwen3,Phi-3.5 MoE", "--tokens", "3", "--rounds", "1", "--out", str(out)],
    )
    assert done.exit_code == 0, done.output
    one, other = json.loads(out.read_text())["results"]
    assert one["compiled_step"] == "used"
    assert one["decode_ratio"]["median"] == pytest.approx(
        one["decode_s"]["transformers"]["median"] / one["decode_s"]["headsink"]["median"]
    )
    assert one["limit_s"] == one["token_bytes"] / one["bandwidth"]
    assert other["decode_s"].keys() == {"transformers"}
    assert "Qwen3 " in done.output
    assert "no compiled step: its router PhimoeTopKRouter" in done.output


def test_bytes_of_a_token_leave_out_other_embeddings_and_experts(tiny):
    model = families.make("Qwen3", torch.float32)
    assert token_bytes(model) == 4 * (sum(p.numel() for p in model.parameters()) - 256 * 64)
    model = families.make("Qwen3 MoE", torch.float32)
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    rest = sum(p.numel() for p in model.parameters() if p.dim() != 3) - 256 * 64
    assert token_bytes(model) == 4 * (rest + experts * 4 // 16)
    tied = families.make("Gemma 3", torch.float32)  # the head reads all embeddings
    assert token_bytes(tied) == 4 * sum(p.numel() for p in tied.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_made(tiny, name):
    assert families.make(name, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--families", "Lama"], "families: 'Lama' is not one of Arcee,"),
        (["--families", ","], "families: none given"),
        (["--dtype", "float16"], "dtype: 'float16' is neither float32 nor bfloat16"),
    ],
)
def test_bad_options_are_refused(options, said):
    done = CliRunner().invoke(get_command(app), ["bench", "families", *options])
    assert said in str(done.exception or done.output)
