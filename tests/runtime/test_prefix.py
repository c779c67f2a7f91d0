"""Saved prefixes: continuations are the same as after reading the context."""

import json
import resource
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from families import FAMILIES, tiny
from plans import random_plan
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.cache.cache import nbytes
from headsink.eviction.scorers import LINEAR, NONE
from headsink.models.spec import describe
from headsink.runtime.prefix import prefix_heads, prefix_text, prefix_tokens

LENGTH = 61


def text(seed=0, tokens=LENGTH, rows=1):
    return torch.randint(3, 211, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, plan, ids, mask=None, prefill="dense"):
    """Prefill a text under the plan."""
    options = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    cache = headsink.new_cache(model, plan, prefill=prefill)
    with headsink.apply(model, plan):
        model(ids, past_key_values=cache, **options)
    return cache


@pytest.mark.parametrize("exact", [True, False])
def test_the_exact_flag_is_saved(exact, tmp_path):
    model, ids = tiny("llama"), torch.randint(3, 211, (1, 40))
    plan = Plan.full(model)
    cache = headsink.new_cache(model, plan, exact)
    with headsink.apply(model, plan), torch.no_grad():
        model(ids, past_key_values=cache)
    loaded, _ = headsink.load_prefix(headsink.save_prefix(tmp_path / "text.kv", cache, ids), model)
    assert loaded.exact is exact
    assert loaded.layers[0].groups[0].exact is exact


@torch.no_grad()
def continue_from(model, cache, tokens, mask=None, first=9):
    """Return the logits of a continuation: `first` tokens in one pass, then one by one."""
    found = []
    with headsink.apply(model, cache.plan):
        for part in (tokens[:, :first], *tokens[:, first:].split(1, 1)):
            options = {}
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(part)], 1)
                options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -part.shape[1] :]}
            found.append(model(part, past_key_values=cache, **options).logits)
    return torch.cat(found, 1)


def edit(file, change):
    """Save the file again with another header and other tensors: `change(header, tensors)` changes both in place."""
    with safe_open(file, "pt") as old:
        header, tensors = json.loads(old.metadata()["headsink"]), {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"headsink": json.dumps(header)})


@pytest.mark.parametrize("way", ["dense", "sparse", "compress", "reconstruct"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_prefix_continues_like_the_original(family, way, tmp_path):
    model, ids, file = tiny(family), text(), tmp_path / "prefix.safetensors"
    for seed in (1, 2):
        plan = random_plan(model, seed).model_copy(update={"reconstruction_prompt": (7, 8, 9)})
        if way in ("dense", "sparse"):
            cache = read(model, plan, ids, prefill=way)
        else:
            cache = headsink.compress(model, plan, ids, reconstruct=way == "reconstruct")
        headsink.save_prefix(file, cache, ids, text="once upon")
        loaded, tokens = headsink.load_prefix(file, model)
        assert loaded.plan == plan
        assert torch.equal(tokens, ids)
        assert prefix_text(file) == "once upon"
        assert loaded.get_seq_length() == LENGTH
        assert nbytes(loaded) <= nbytes(cache)  # empty slots are not stored
        spare = any(
            head.pattern.full for layer in plan.layers for head in layer or ()
        )  # slots by which such heads grow
        assert not spare or nbytes(loaded) < nbytes(cache)
        after, first = text(9, 30), 1 if way == "sparse" else 9
        found, expected = (continue_from(model, one, after, first=first) for one in (loaded, cache))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("way", ["dense", "sparse", "reconstruct", "generated"])
@pytest.mark.parametrize("family", ["llama", "llama-mha", "gemma3"])
def test_the_heads_of_a_prefix_are_those_of_its_cache(family, way, tmp_path):
    """Sink tokens and the window are the model's own keys; a query attends to all of them as in the cache."""
    model, ids, file = tiny(family), text(), tmp_path / "prefix.safetensors"
    full = DynamicCache()  # without windows of the model
    with torch.no_grad():
        model(ids, past_key_values=full)
    for seed in range(4):
        plan = random_plan(model, seed).model_copy(update={"reconstruction_prompt": (7, 8, 9)})
        if way == "reconstruct":
            cache = headsink.compress(model, plan, ids, reconstruct=True)
        elif way == "generated":
            cache = read(model, plan, ids[:, :40])
            with headsink.apply(model, plan), torch.no_grad():
                for token in ids[:, 40:].split(1, 1):
                    model(token, past_key_values=cache)
        else:
            cache = read(model, plan, ids, prefill=way)
        headsink.save_prefix(file, cache, ids)
        assert prefix_tokens(file) == ids[0].tolist()
        tokens, layers = prefix_heads(file, plan, describe(model))
        assert tokens == ids[0].tolist()
        for layer, row in zip(cache.layers, layers, strict=True):
            for group in layer.groups:
                for at, head in enumerate(group.heads):
                    found, seen, window = row[head], group.visible[0, at], layer.patterns[head].window
                    query = torch.randn(5, found.keys.shape[1])
                    expected = (query @ group.keys[0, at, : len(seen)][seen].T).softmax(-1)
                    expected = expected @ group.values[0, at, : len(seen)][seen]
                    torch.testing.assert_close((query @ found.keys.T).softmax(-1) @ found.values, expected)
                    assert not window or found.positions[-1] == LENGTH - 1
                    assert (found.positions.diff() >= 0).all()
                    assert ((found.scores > NONE) | (found.positions.diff(prepend=torch.tensor([-1])) > 0)).all()
        own = full.layers[0].keys[0]
        for head, found in enumerate(layers[0]):
            certain = found.scores == NONE
            same = found.keys[certain] - own[head, found.positions[certain] - LENGTH]
            assert not certain.any() or same.abs().max() < 1e-5


def test_prefix_heads_refuses_other_plans_and_padded_rows(tmp_path):
    model, ids, file = tiny("llama"), text(rows=2), tmp_path / "prefix.safetensors"
    plan = random_plan(model, 1)
    headsink.save_prefix(file, read(model, plan, ids[:1]), ids[:1])
    with pytest.raises(HeadsinkError, match=r"prefix\.safetensors: it was made under another plan"):
        prefix_heads(file, random_plan(model, 2), describe(model))
    headsink.save_prefix(file, read(model, plan, ids), ids, force=True)
    for call in (lambda: prefix_heads(file, plan, describe(model)), lambda: prefix_tokens(file)):
        with pytest.raises(HeadsinkError, match=r"prefix\.safetensors: it must hold one text"):
            call()


@pytest.mark.parametrize("way", ["dense", "compress"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_padded_batch_in_bfloat16(family, way, tmp_path):
    model, file = tiny(family, dtype=torch.bfloat16), tmp_path / "prefix.safetensors"
    plan = random_plan(model, 3)
    ids, mask = text(rows=3), torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :7] = mask[2, :40] = 0
    dense = way == "dense"
    cache = read(model, plan, ids, mask) if dense else headsink.compress(model, plan, ids, attention_mask=mask)
    headsink.save_prefix(file, cache, ids)
    loaded, tokens = headsink.load_prefix(file, model)
    assert torch.equal(tokens, ids)
    after = text(9, 30, rows=3)
    assert torch.equal(continue_from(model, loaded, after, mask), continue_from(model, cache, after, mask))


def test_generate_continues_from_a_file(tmp_path):
    model, ids, file = tiny("llama"), text(), tmp_path / "prefix.safetensors"
    plan = random_plan(model, 4)
    headsink.save_prefix(file, headsink.compress(model, plan, ids), ids)
    longer, answers = torch.cat([ids, text(5, 12)], 1), []
    for cache in (headsink.compress(model, plan, ids), headsink.load_prefix(file, model)[0]):
        with headsink.apply(model, plan):
            answers.append(model.generate(longer, past_key_values=cache, max_new_tokens=20, do_sample=False))
    assert torch.equal(*answers)


def test_a_loaded_prefix_can_be_cropped_to(tmp_path):
    """So that many questions can be answered from one loaded prefix."""
    model, ids, file = tiny("llama"), text(), tmp_path / "prefix.safetensors"
    headsink.save_prefix(file, read(model, random_plan(model, 4), ids), ids)
    cache, _ = headsink.load_prefix(file, model)
    cache.activate_past_recording()
    question = text(6, 15)
    with headsink.apply(model, cache.plan), torch.no_grad():
        first = model(question, past_key_values=cache).logits
        cache.crop(-15)
        assert torch.equal(model(question, past_key_values=cache).logits, first)


# refusals


def test_a_cache_that_is_not_ready_is_refused(tmp_path):
    model, ids, file = tiny("llama"), text(), tmp_path / "prefix.safetensors"
    plan = random_plan(model, 1)
    for other in (model, tiny("gemma3")):  # whose first layer's cache is transformers'
        with pytest.raises(HeadsinkError, match="input_ids: 1 x 61 tokens given, the cache has seen 0 x 0"):
            headsink.save_prefix(file, headsink.new_cache(other, random_plan(other, 1)), ids)
    cache = read(model, plan, ids)
    with pytest.raises(HeadsinkError, match="input_ids: 1 x 60 tokens given, the cache has seen 1 x 61"):
        headsink.save_prefix(file, cache, ids[:, :-1])
    cache.activate_past_recording()
    with headsink.apply(model, plan), torch.no_grad():
        model(text(2, 5), past_key_values=cache)
    with pytest.raises(HeadsinkError, match="records tokens so that they can be cropped"):
        headsink.save_prefix(file, cache, text(0, LENGTH + 5))
    assert list(tmp_path.iterdir()) == []


def test_a_context_of_another_model_or_dtype_is_refused(tmp_path):
    model, ids, file = tiny("llama"), text(), tmp_path / "prefix.safetensors"
    headsink.save_prefix(file, read(model, Plan.full(model), ids), ids)
    with pytest.raises(HeadsinkError, match="the plan is for other weights"):
        headsink.load_prefix(file, tiny("llama", seed=1))
    with pytest.raises(HeadsinkError, match="it was made in float32, the model is bfloat16"):
        headsink.load_prefix(file, tiny("llama").to(torch.bfloat16))


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x10\0\0\0\0\0\0\0{}              "])
def test_another_file_is_refused(content, tmp_path):
    file = tmp_path / "prefix.safetensors"
    file.write_bytes(content)
    with pytest.raises(HeadsinkError, match=r"prefix\.safetensors: not a prefix that headsink has saved"):
        headsink.load_prefix(file, tiny("llama"))
    with pytest.raises(HeadsinkError, match=r"cannot read .*: "):
        headsink.load_prefix(tmp_path / "none", tiny("llama"))


# llama, 2 rows of 61 tokens of which the second begins with 7 of padding. In layer 1, group 0 has top-k keys and group 1 has full
# attention.
PATTERNS = [
    [Pattern(2, 4, 8), Pattern(2, 4, 8)],
    [Pattern(2, 4, 8), Pattern()],
    [Pattern(1, 0, 5), Pattern(0, 3, 200)],
]
DAMAGE = {
    "a row too many": (
        lambda h, t: t.update(input_ids=t["input_ids"].repeat(2, 1)),
        r"keys is float32 \[2, 2, 14, 12\]",
    ),
    "no row": (
        lambda h, t: t.update(input_ids=t["input_ids"][:0]),
        r"input_ids is \[0, 61\] and must be rows of 61 tokens",
    ),
    "token ids in one dimension": (
        lambda h, t: t.update(input_ids=t["input_ids"][0]),
        r"input_ids is \[61\] and must be rows of 61 tokens",
    ),
    "token ids that are floats": (lambda h, t: t.update(input_ids=t["input_ids"].float()), "input_ids is float32"),
    "a token id outside the vocabulary": (
        lambda h, t: t["input_ids"].__setitem__((0, 3), 211),
        "input_ids: numbers from 3 to 211, outside 0 to 210",
    ),
    "a negative token id": (lambda h, t: t["input_ids"].__setitem__((0, 3), -1), "input_ids: numbers from -1"),
    "other lengths": (lambda h, t: h.update(seen=161), r"input_ids is \[2, 61\] and must be rows of 161 tokens"),
    "a length of 2**62": (lambda h, t: h.update(seen=2**62), "must be rows of 4611686018427387904 tokens"),
    "a length of 2**70": (lambda h, t: h.update(seen=2**70), "must be rows of 1180591620717411303424"),
    "fewer layers": (lambda h, t: h["prefix_slots"].pop(), "prefix_slots: of 2 layers, the model has 3"),
    "fewer groups": (lambda h, t: h["prefix_slots"][1].pop(), "prefix_slots.1: .6,., of a layer with 2 patterns"),
    "a layer without groups": (
        lambda h, t: h["prefix_slots"].__setitem__(1, []),
        r"prefix_slots.1: \(\), of a layer with 2 patterns",
    ),
    "no prefix slots": (
        lambda h, t: h["prefix_slots"][0].__setitem__(0, 0),
        "prefix_slots.0.0: 0 slots after 61 tokens under 2.4k.8",
    ),
    "too many prefix slots": (
        lambda h, t: h["prefix_slots"][0].__setitem__(0, 2**62),
        "prefix_slots.0.0: 4611686018427387904 slots",
    ),
    "prefix slots of full attention": (
        lambda h, t: h["prefix_slots"][1].__setitem__(1, 4),
        "prefix_slots.1.1: 4 slots .* under full",
    ),
    "fewer starts": (lambda h, t: h["starts"].pop(), "starts: of 2 layers, the model has 3"),
    "a ring that begins in its window": (
        lambda h, t: h["starts"][0].__setitem__(0, 54),
        "starts.0.0: 54 after 61 tokens under 2.4k.8",
    ),
    "a ring of full attention that begins late": (
        lambda h, t: h["starts"][1].__setitem__(1, 1),
        "starts.1.1: 1 after 61 tokens under full",
    ),
    "more prefix slots than slots": (
        lambda h, t: h["prefix_slots"][2].__setitem__(1, 3),
        "tensor 'layers.2.1.scores' is missing",
    ),
    "another pattern in the plan": (
        lambda h, t: h["plan"]["layers"][0][0].update(window=9),
        "prefix_slots.0: .6,., of a layer with 2 patterns",
    ),
    "a window of 0 in the plan": (
        lambda h, t: [head.update(window=0) for head in h["plan"]["layers"][0]],
        r"layers.0.0.keys is float32 \[2, 2, 14, 12\] and must be float32 \[2, 2, 6, 12\]",
    ),
    "smaller heads": (
        lambda h, t: [t.update({n: x[..., :6]}) for n, x in t.items() if n.endswith(("keys", "values"))],
        r"layers.0.0.keys is float32 \[2, 2, 14, 6\] and must be float32 \[2, 2, 14, 12\]",
    ),
    "smaller heads in one layer": (
        lambda h, t: t.update({f"layers.1.0.{n}": t[f"layers.1.0.{n}"][..., :6] for n in ("keys", "values")}),
        r"layers.1.0.keys is float32 \[2, 1, 14, 6\]",
    ),
    "fewer slots": (
        lambda h, t: t.update({"layers.1.1.keys": t["layers.1.1.keys"][:, :, 1:]}),
        r"keys is float32 \[2, 1, 60",
    ),
    "fewer heads": (
        lambda h, t: t.update({"layers.0.0.values": t["layers.0.0.values"][:, :1]}),
        "layers.0.0.values is",
    ),
    "keys of another dtype": (
        lambda h, t: t.update({"layers.0.0.keys": t["layers.0.0.keys"].bfloat16()}),
        "layers.0.0.keys is bfloat16",
    ),
    "scores in float16": (
        lambda h, t: t.update({"layers.0.0.scores": t["layers.0.0.scores"].half()}),
        r"layers.0.0.scores is float16 \[2, 2, 4\] and must be float32 \[2, 2, 4\]",
    ),
    "scores in bytes": (
        lambda h, t: t.update({"layers.0.0.scores": t["layers.0.0.scores"].byte()}),
        "layers.0.0.scores is uint8",
    ),
    "more scores than top-k keys": (
        lambda h, t: t.update({"layers.0.0.scores": torch.zeros(2, 2, 5)}),
        r"layers.0.0.scores is float32 \[2, 2, 5\]",
    ),
    "scores of a group without top-k keys": (
        lambda h, t: t.update({"layers.2.0.scores": torch.zeros(2, 1, 3)}),
        "tensor 'layers.2.0.scores' does not belong there",
    ),
    "a score that is NaN": (lambda h, t: t["layers.0.0.scores"].fill_(float("nan")), "layers.0.0.scores: it holds NaN"),
    "several keys that are never evicted": (
        lambda h, t: t["layers.0.0.scores"].fill_(float("inf")),
        "layers.0.0.scores: several keys of a head are never evicted",
    ),
    "a key that is NaN": (
        lambda h, t: t["layers.2.0.keys"].view(-1)[:1].fill_(float("nan")),
        "layers.2.0.keys: it holds",
    ),
    "a value that is infinite": (
        lambda h, t: t["layers.2.0.values"].fill_(float("inf")),
        "layers.2.0.values: it holds",
    ),
    "padding that is negative": (
        lambda h, t: t["padding"].fill_(-5),
        "padding: numbers from -5 to -5, outside 0 to 61",
    ),
    "padding of 2**40": (lambda h, t: t["padding"].fill_(2**40), "padding: numbers from 1099511627776 to"),
    "padding that is a float": (lambda h, t: t.update(padding=t["padding"].float()), "padding is float32"),
    "padding of no row": (
        lambda h, t: t.update(padding=t["padding"][:0]),
        r"padding is int64 \[0\] and must be int64 \[2\]",
    ),
    "padding of nearly everything": (
        lambda h, t: t["padding"].fill_(60),
        "layers.0.0.scores: of more top-k keys than have left the window",
    ),
    "a tensor too many": (lambda h, t: t.update(other=torch.zeros(1)), "tensor 'other' does not belong there"),
    "a tensor with line breaks in its name": (
        lambda h, t: t.update({"\x1b]0;title\x07\n": torch.zeros(1)}),
        r"tensor '\\x1b\]0;title\\x07\\n' does not belong there",
    ),
    "a tensor too few": (lambda h, t: t.pop("layers.2.1.keys"), "tensor 'layers.2.1.keys' is missing"),
}


@pytest.fixture(scope="module")
def damaged():
    """A model, and a file of a padded batch."""
    model, mask = tiny("llama"), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    weights = torch.randn(3, 2, LINEAR.n_features(12), generator=torch.Generator().manual_seed(0))
    ids = text(rows=2)
    cache = read(model, Plan.of(model, PATTERNS, weights), ids, mask)
    with TemporaryDirectory() as folder:
        yield model, headsink.save_prefix(Path(folder) / "prefix.safetensors", cache, ids)


@pytest.mark.parametrize("case", DAMAGE)
def test_a_file_whose_parts_disagree_is_refused(case, damaged, tmp_path):
    (model, original), (change, reason) = damaged, DAMAGE[case]
    file = shutil.copy(original, tmp_path)
    edit(file, lambda header, tensors: None)
    headsink.load_prefix(file, model)
    edit(file, change)
    with pytest.raises(
        HeadsinkError, match=rf"^.*prefix\.safetensors: its parts do not fit together: .*({reason})"
    ) as refused:
        headsink.load_prefix(file, model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seen": 0}, "'seen'"),
        ({"seen": 61.0}, "'seen'"),
        ({"exact": 1}, "'exact'"),
        ({"prefill": "thin"}, "'prefill'"),
        ({"chunk_size": 0}, "'chunk_size'"),
        ({"prefix_slots": [[-1], [6, 0], [1, 0]]}, "'prefix_slots.0.0'"),
        ({"dtype": "int8"}, "'dtype'"),
        ({"window": 8}, "'window'"),
        ({"\x1b[2J\n": 8}, r"'\\x1b\[2J\\n'"),
        ({"plan": {}}, "'plan.model'"),
        ({"format": "headsink prefix 7"}, "'format'"),
    ],
)
def test_a_field_of_a_wrong_kind_is_refused(change, field, damaged, tmp_path):
    model, original = damaged
    file = shutil.copy(original, tmp_path)
    edit(file, lambda header, tensors: header.update(change))
    with pytest.raises(HeadsinkError, match=f"not a prefix that headsink has saved: {field}: ") as refused:
        headsink.load_prefix(file, model)
    assert "\n" not in str(refused.value)


def test_a_file_of_an_older_headsink_is_refused_with_the_command_that_makes_a_new_one(damaged, tmp_path):
    model, original = damaged
    file = shutil.copy(original, tmp_path)
    edit(file, lambda header, tensors: header.update(format="headsink prefix 3"))
    for use in (prefix_text, lambda file: headsink.load_prefix(file, model)):
        with pytest.raises(
            HeadsinkError, match=r"older headsink; .*: headsink prefill MODEL --plan PLAN .* --out .*prefix"
        ):
            use(file)


def test_a_sliding_layer_of_other_tokens_is_refused(tmp_path):
    model, ids, file = tiny("gemma3"), text(), tmp_path / "prefix.safetensors"
    headsink.save_prefix(file, read(model, random_plan(model, 1), ids), ids)
    edit(file, lambda header, tensors: tensors.update({"layers.0.0.keys": tensors["layers.0.0.keys"][:, :, 1:]}))
    with pytest.raises(
        HeadsinkError, match=r"layers.0.0.keys is float32 \[1, 2, 10, 16\] and must be float32 \[1, 2, 11, 16\]"
    ):
        headsink.load_prefix(file, model)


# unsaved states


def test_a_cache_with_nan_is_not_saved(tmp_path):
    model, ids = tiny("llama"), text()
    cache = read(model, Plan.full(model), ids)
    cache.layers[1].groups[0].values[0, 0, 3] = float("nan")
    with pytest.raises(HeadsinkError, match=r"this cache cannot be saved: layers\.1\.0\.values: it holds NaN"):
        headsink.save_prefix(tmp_path / "prefix.safetensors", cache, ids)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ids: ids.float(), "input_ids: float32 given, token ids are whole numbers"),
        (lambda ids: ids - 211, "this cache cannot be saved: input_ids: numbers from .*, outside 0"),
    ],
)
def test_invalid_token_ids_are_not_saved(change, reason, tmp_path):
    model, ids = tiny("llama"), text()
    with pytest.raises(HeadsinkError, match=reason):
        headsink.save_prefix(tmp_path / "prefix.safetensors", read(model, Plan.full(model), ids), change(ids))
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_the_system_refuses_is_one_line_and_leaves_nothing(tmp_path):
    model, ids = tiny("llama"), text()
    cache = read(model, Plan.full(model), ids)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(
            HeadsinkError, match=r"^cannot write .*prefix\.safetensors: the file would be larger than is allowed here$"
        ):
            headsink.save_prefix(tmp_path / "prefix.safetensors", cache, ids)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# saved states


@pytest.mark.parametrize("how", [{}, {"prefill": "sparse"}, {"chunk_size": 16}])
def test_a_loaded_prefix_reads_later_turns_as_the_cache_does(how, tmp_path):
    model, ids, file = tiny("llama"), text(), tmp_path / "prefix.safetensors"
    plan = random_plan(model, 4)
    cache = headsink.new_cache(model, plan, **how)
    with headsink.apply(model, plan), torch.no_grad():
        model(ids, past_key_values=cache)
    headsink.save_prefix(file, cache, ids)
    loaded, _ = headsink.load_prefix(file, model)
    after = text(9, 60)
    found = continue_from(model, loaded, after, first=50)
    assert torch.equal(found, continue_from(model, cache, after, first=50))
    others = [headsink.compress(model, plan, ids)] if how else []
    assert not any(torch.equal(found, continue_from(model, other, after, first=50)) for other in others)


def test_a_frozen_cache_and_one_that_hides_tokens_are_not_saved(tmp_path):
    model, ids, file = tiny("llama"), text(), tmp_path / "prefix.safetensors"
    cache = read(model, Plan.full(model), ids)
    cache.hide(torch.tensor([[False, True, True, False]]))
    with pytest.raises(HeadsinkError, match="hides tokens between visible ones"):
        headsink.save_prefix(file, cache, ids)
    cache = read(model, random_plan(model, 4), ids)
    cache.freeze()
    with pytest.raises(HeadsinkError, match="this cache is frozen"):
        headsink.save_prefix(file, cache, ids)
    assert list(tmp_path.iterdir()) == []


def test_a_row_of_padding_only(tmp_path):
    """After cropping, the padding may be longer than the remaining tokens."""
    model, ids, file, mask = tiny("llama"), text(rows=2), tmp_path / "prefix.safetensors", torch.ones(2, LENGTH)
    mask[1, :50] = 0
    cache = read(model, random_plan(model, 4, lambda rng: Pattern(2, 3, 200)), ids, mask.long())
    cache.crop(-20)
    headsink.save_prefix(file, cache, ids[:, :-20])
    loaded, _ = headsink.load_prefix(file, model)
    after, mask = text(9, 20, rows=2), mask[:, :-20].long()
    assert torch.equal(continue_from(model, loaded, after, mask), continue_from(model, cache, after, mask))
