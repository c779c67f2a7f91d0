"""Models larger than memory: measurements do not depend on where the weights are."""

import pytest
import torch
from accelerate import cpu_offload
from families import tiny
from small_tokenizer import Small

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.decoding.step import refusal
from headsink.models.distributed import input_device
from headsink.models.fingerprint import weights_hash

FAMILIES = ("llama", "qwen3", "gemma3")


def saved(folder, family, tokenizer):
    """A tiny model in a folder, and its device map if only the first layer fits in memory."""
    model = tiny(family)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    return places | {"model.layers.1": "disk", "model.layers.2": "disk", "model.norm": "disk", "lm_head": "disk"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_census_is_the_same_with_layers_on_disk(tmp_path, family, tokenizer):
    places = saved(tmp_path, family, tokenizer)
    whole, _ = headsink.load(tmp_path, device="cpu")
    offloaded, _ = headsink.load(tmp_path, device_map=places)
    assert offloaded.get_submodule("model.layers.2.self_attn.o_proj").weight.is_meta
    options = {"lengths": (64, 200), "domains": ("prose",), "progress": False}
    expected = headsink.analyze(whole, tokenizer, **options)
    found = headsink.analyze(offloaded, tokenizer, **options)
    for name in ("sink", "far", "entropy", "output"):
        assert torch.equal(found.score(name, 200), expected.score(name, 200)), name
    assert found.settings["model"] == expected.settings["model"]
    assert offloaded.get_submodule("model.layers.2.self_attn.o_proj").weight.is_meta


def test_a_fingerprint_is_the_same_on_disk_and_in_another_type(tmp_path, tokenizer):
    places = saved(tmp_path, "llama", tokenizer)
    whole, _ = headsink.load(tmp_path, device="cpu")
    offloaded, _ = headsink.load(tmp_path, device_map=places, dtype="bfloat16")
    assert weights_hash(offloaded) == weights_hash(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("share", "places"), [(0.997, {"cpu", "disk"}), (1e-6, {"disk"})])
def test_auto_offloads_layers_that_do_not_fit(tmp_path, tokenizer, share, places):
    saved(tmp_path, "llama", tokenizer)
    whole, _ = headsink.load(tmp_path, device="cpu")
    room = share * sum(p.numel() * p.element_size() for p in whole.parameters())
    offloaded, _ = headsink.load(tmp_path, max_memory={"cpu": int(room)}, offload_folder=tmp_path / "offload")
    assert set(offloaded.hf_device_map.values()) == places
    assert input_device(offloaded) == torch.device("cpu")
    assert weights_hash(offloaded) == weights_hash(whole)
    assert list((tmp_path / "offload").iterdir()) == []  # safetensors files are read in place
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(offloaded(ids.to(input_device(offloaded))).logits, whole(ids).logits)


def test_missing_weights_give_one_line():
    with torch.device("meta"):
        model = tiny("llama")
    with pytest.raises(HeadsinkError, match="neither in memory nor offloaded"):
        weights_hash(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "cpu", "device_map": "auto"}, "one of device, device_map"),
        ({"device": "cpu", "max_memory": {"cpu": "1GB"}}, "one of device, device_map"),
        ({"device_map": "auto", "tensor_parallel": True}, "one of device, device_map"),
        ({"max_memory": {"cpu": "some"}}, "cannot be loaded"),
        ({"tensor_parallel": True}, "torchrun"),
    ],
)
def test_impossible_options_give_one_line(tiny_folder, options, reason):
    with pytest.raises(HeadsinkError, match=reason) as error:
        headsink.load(tiny_folder, **options)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_every_call_works_with_offloaded_weights(tied, smollm2):
    def make():
        model = tiny("llama")
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model

    ids = torch.randint(3, 211, (1, 60), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = make().generate(ids, **options)
    model = cpu_offload(make(), execution_device=torch.device("cpu"))
    assert model.device == torch.device("meta")
    plan = Plan.uniform(model, Pattern(2, 0, 8))
    with headsink.apply(model, Plan.full(model)):
        assert torch.equal(model.generate(ids, **options), expected)
    assert refusal(model) == "its weights are offloaded"
    assert torch.equal(headsink.generate_lossless(model, plan, ids, **options), expected)
    made = headsink.calibrate(model, Small(smollm2[1]), context=416, budget=0.5, quality_contexts=(), progress=False)
    cache = headsink.compress(model, made, ids, reconstruct=True)
    assert cache.get_seq_length() == 60
