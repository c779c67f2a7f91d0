"""Contexts that are kept in files: what comes after them is as if they had just been read."""

import json
import struct

import pytest
import torch
from families import FAMILIES, tiny
from plans import random_plan
from transformers import DynamicCache

import headsink
from headsink import HeadsinkError, Plan
from headsink.cache import nbytes
from headsink.prefix import prefix_text

LENGTH = 61


def text(seed=0, tokens=LENGTH, rows=1):
    return torch.randint(3, 211, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, plan, ids, mask=None):
    """Under the plan, or in full and compressed once."""
    options = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if plan.once:
        full = DynamicCache(config=model.config)
        model(ids, past_key_values=full, **options)
        return headsink.compress(model, plan, full, mask, ids)
    cache = headsink.new_cache(model, plan)
    with headsink.apply(model, plan):
        model(ids, past_key_values=cache, **options)
    return cache


@pytest.mark.parametrize("exact", [True, False])
def test_whether_bits_are_the_models_own_is_kept(exact, tmp_path):
    model, ids = tiny("llama"), torch.randint(3, 211, (1, 40))
    plan = Plan.full(model)
    cache = headsink.new_cache(model, plan, exact)
    with headsink.apply(model, plan), torch.no_grad():
        model(ids, past_key_values=cache)
    loaded, _ = headsink.load_prefix(headsink.save_prefix(tmp_path / "text.kv", cache, ids), model)
    assert loaded.exact is exact
    assert loaded.layers[0].groups[0].exact is exact


@torch.no_grad()
def goes_on(model, cache, tokens, mask=None):
    """Logits of what comes after: some tokens at once, then one by one."""
    found = []
    with headsink.apply(model, cache.plan):
        for part in (tokens[:, :9], *tokens[:, 9:].split(1, 1)):
            options = {}
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(part)], 1)
                options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -part.shape[1] :]}
            found.append(model(part, past_key_values=cache, **options).logits)
    return torch.cat(found, 1)


def header(file):
    """The JSON at the start of a safetensors file, and where the tensors begin."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def edit(file, change):
    """Change the saved description, leaving the tensors as they are."""
    found, tensors = header(file)
    own = json.loads(found["__metadata__"]["headsink"])
    change(own)
    found["__metadata__"]["headsink"] = json.dumps(own)
    packed = json.dumps(found).encode()
    file.write_bytes(struct.pack("<Q", len(packed)) + packed + tensors)


@pytest.mark.parametrize("way", ["running", "once", "retold"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_context_goes_on_as_if_it_had_just_been_read(family, way, tmp_path):
    model, ids, file = tiny(family), text(), tmp_path / "prefix.safetensors"
    ways = {"running": {}, "once": {"once": True}, "retold": {"once": True, "retell": (7, 8, 9)}}
    for seed in (1, 2):
        plan = random_plan(model, seed).model_copy(update=ways[way])
        cache = read(model, plan, ids)
        headsink.save_prefix(file, cache, ids, text="once upon")
        loaded, tokens = headsink.load_prefix(file, model)
        assert loaded.plan == plan
        assert torch.equal(tokens, ids)
        assert prefix_text(file) == "once upon"
        assert loaded.get_seq_length() == LENGTH
        slides = any(row is None for row in plan.layers)  # then transformers still holds the whole text, behind a view
        assert nbytes(loaded) < nbytes(cache) if slides else nbytes(loaded) == nbytes(cache)
        after = text(9, 30)
        assert torch.equal(goes_on(model, loaded, after), goes_on(model, cache, after))


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_padded_batch_in_bfloat16(family, once, tmp_path):
    model, file = tiny(family, dtype=torch.bfloat16), tmp_path / "prefix.safetensors"
    plan = random_plan(model, 3).model_copy(update={"once": once})
    ids, mask = text(rows=3), torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :7] = mask[2, :40] = 0
    cache = read(model, plan, ids, mask)
    headsink.save_prefix(file, cache, ids)
    loaded, tokens = headsink.load_prefix(file, model)
    assert torch.equal(tokens, ids)
    after = text(9, 30, rows=3)
    assert torch.equal(goes_on(model, loaded, after, mask), goes_on(model, cache, after, mask))


def test_generate_goes_on_from_a_file(tmp_path):
    model, ids, file = tiny("llama"), text(), tmp_path / "prefix.safetensors"
    plan = random_plan(model, 4).model_copy(update={"once": True})
    headsink.save_prefix(file, read(model, plan, ids), ids)
    longer, answers = torch.cat([ids, text(5, 12)], 1), []
    for cache in (read(model, plan, ids), headsink.load_prefix(file, model)[0]):
        with headsink.apply(model, plan):
            answers.append(model.generate(longer, past_key_values=cache, max_new_tokens=20, do_sample=False))
    assert torch.equal(*answers)


def test_a_loaded_context_may_be_taken_back_to(tmp_path):
    """So that many questions can be asked of one that was loaded once."""
    model, ids, file = tiny("llama"), text(), tmp_path / "prefix.safetensors"
    headsink.save_prefix(file, read(model, random_plan(model, 4), ids), ids)
    cache, _ = headsink.load_prefix(file, model)
    cache.activate_past_recording()
    question = text(6, 15)
    with headsink.apply(model, cache.plan), torch.no_grad():
        first = model(question, past_key_values=cache).logits
        cache.crop(-15)
        assert torch.equal(model(question, past_key_values=cache).logits, first)


# what is refused


def test_a_cache_that_is_not_ready_is_refused(tmp_path):
    model, ids, file = tiny("llama"), text(), tmp_path / "prefix.safetensors"
    plan = random_plan(model, 1)
    for other in (model, tiny("gemma3")):  # whose first layer is transformers' own
        with pytest.raises(HeadsinkError, match="input_ids: 1 x 61 tokens given, the cache has seen 0 x 0"):
            headsink.save_prefix(file, headsink.new_cache(other, random_plan(other, 1)), ids)
    cache = read(model, plan, ids)
    with pytest.raises(HeadsinkError, match="input_ids: 1 x 60 tokens given, the cache has seen 1 x 61"):
        headsink.save_prefix(file, cache, ids[:, :-1])
    cache.activate_past_recording()
    with headsink.apply(model, plan), torch.no_grad():
        model(text(2, 5), past_key_values=cache)
    with pytest.raises(HeadsinkError, match="waits for tokens to be taken back"):
        headsink.save_prefix(file, cache, text(0, LENGTH + 5))
    assert list(tmp_path.iterdir()) == []


def test_a_context_of_another_model_or_dtype_is_refused(tmp_path):
    model, ids, file = tiny("llama"), text(), tmp_path / "prefix.safetensors"
    headsink.save_prefix(file, read(model, Plan.full(model), ids), ids)
    with pytest.raises(HeadsinkError, match="the plan is for other weights"):
        headsink.load_prefix(file, tiny("llama", seed=1))
    with pytest.raises(HeadsinkError, match="its keys and values are float32, the model is bfloat16"):
        headsink.load_prefix(file, tiny("llama").to(torch.bfloat16))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x10\0\0\0\0\0\0\0{}              "])
def test_another_file_is_refused(content, tmp_path):
    file = tmp_path / "prefix.safetensors"
    file.write_bytes(content)
    with pytest.raises(HeadsinkError, match=r"prefix\.safetensors: not a prefix that headsink has saved"):
        headsink.load_prefix(file, tiny("llama"))
    with pytest.raises(HeadsinkError, match=r"cannot read .*: "):
        headsink.load_prefix(tmp_path / "none", tiny("llama"))


@pytest.mark.parametrize(
    "change",
    [
        lambda own: own["layers"].pop(),
        lambda own: own["layers"][0].update(seen=5),
        lambda own: own["layers"][1]["groups"].pop(),
        lambda own: own["layers"][1]["groups"][0].update(heads=[0, 0]),
        lambda own: own["layers"][1]["groups"][0].update(heads=[0, 1, 2, 3]),
        lambda own: own["layers"][1]["groups"][0].update(length=10**6, window=None),
        lambda own: own["layers"][1]["groups"][0].update(anchors=10**6),
        lambda own: own["layers"][1]["groups"][0].update(young=True, anchors=0),
        lambda own: own["layers"][1]["groups"][0].update(young=True, anchors=0, window=None),
        lambda own: own["layers"][1]["groups"][0].update(start=10**6, window=None),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_file_edited_into_nonsense_is_refused(family, change, tmp_path):
    model, ids, file = tiny(family), text(), tmp_path / "prefix.safetensors"
    headsink.save_prefix(file, read(model, random_plan(model, 1), ids), ids)
    headsink.load_prefix(file, model)
    layers = json.loads(header(file)[0]["__metadata__"]["headsink"])["layers"]
    assert len(layers) > 1

    def changed(own):
        planned = [layer for layer in own["layers"] if layer["groups"]]
        view = {"layers": [own["layers"][0], planned[0]]}
        change(view)
        if len(view["layers"]) < 2:
            own["layers"].pop()

    edit(file, changed)
    with pytest.raises(HeadsinkError, match=r"prefix\.safetensors: its parts do not fit together"):
        headsink.load_prefix(file, model)


@pytest.mark.parametrize("field", ["seen", "length", "anchors"])
def test_a_field_of_a_wrong_kind_is_refused(field, tmp_path):
    model, ids, file = tiny("llama"), text(), tmp_path / "prefix.safetensors"
    headsink.save_prefix(file, read(model, random_plan(model, 1), ids), ids)
    edit(file, lambda own: (own["layers"][0] if field == "seen" else own["layers"][0]["groups"][0]).update({field: -1}))
    with pytest.raises(HeadsinkError, match="not a prefix that headsink has saved"):
        headsink.load_prefix(file, model)
