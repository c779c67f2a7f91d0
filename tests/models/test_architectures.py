"""What headsink does with every architecture of docs/families.md: right outputs, or a refusal with its reason."""

import pytest
import torch
from architectures import CONFIGS, PAGE, capabilities, rows
from small_tokenizer import Small
from transformers import LlamaConfig, LlamaForCausalLM

import headsink
from headsink import HeadsinkError, Pattern, Plan


@pytest.fixture(scope="module")
def small(smollm2):
    return Small(smollm2[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_page_says_what_a_model_can_do(name, small):
    (expected,) = (line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |"))
    assert rows({name: capabilities(name, small)})[name] == expected


def test_the_page_lists_every_architecture():
    listed = [line.split("|")[1].strip() for line in PAGE.read_text(encoding="utf-8").splitlines() if "| " in line]
    assert sorted(set(listed) - {"family"}) == sorted(CONFIGS)
    assert len(listed) == len(set(listed)) + 1  # two tables with a heading each


def test_an_unknown_kind_of_layer_is_refused_in_one_line():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2))
    model.config.layer_types = ["full_attention", "telepathy"]
    for call in (
        lambda: Plan.full(model),
        lambda: headsink.analyze(model, None),
        lambda: Plan.uniform(model, Pattern()),
    ):
        with pytest.raises(
            HeadsinkError, match=r"^LlamaForCausalLM: llama has layers of kind telepathy; not supported$"
        ):
            call()


def test_a_model_on_the_meta_device_is_refused_in_one_line():
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with pytest.raises(HeadsinkError) as refused:
        Plan.full(model)
    assert "\n" not in str(refused.value)
