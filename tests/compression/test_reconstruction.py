"""Context reconstruction at prefill: scores and refitted keys equal reference computations."""

import pytest
import torch
from families import FAMILIES, tiny
from feeding import padded
from masks import visible
from plans import random_plan
from transformers import DynamicCache

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.attention.interface import left_padding, observe_attention
from headsink.attention.reference import masked_attention, reference_synthetic_key
from headsink.compression import reconstruction
from headsink.compression.reconstruction import LEAD, RIDGE, kept_keys
from headsink.eviction.scorers import ALWAYS, SCORERS
from headsink.eviction.scorers.prompt import match_scale
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument

PROMPT = (17, 5, 90, 23)
LENGTH = 61


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    monkeypatch.setattr(reconstruction, "SPAN", 16)


def text(seed=0, tokens=LENGTH):
    return torch.randint(3, 211, (1, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, ids, mask=None):
    cache, options = DynamicCache(config=model.config), {}
    if mask is not None:
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    model(ids, **cache_argument(cache), **options)
    return cache


def plan_for(model, seed=1, **fields):
    return random_plan(model, seed).model_copy(update={"reconstruction_prompt": PROMPT} | fields)


@torch.no_grad()
def passes(model, ids):
    """Yield each span with the attention inputs of every layer, from one pass over everything."""
    for start in range(0, len(ids), reconstruction.SPAN):
        span = range(start, min(start + reconstruction.SPAN, len(ids)))
        seen = []
        with observe_attention(model, seen.append):
            model(torch.tensor([[*ids, *PROMPT, *ids[max(start - LEAD, 0) : span.stop]]]), use_cache=False)
        yield span, seen


def attention(inputs, head, group, hidden, keys=None):
    """Return the attention of a KV head's query heads, [group, tokens, tokens], zero on columns that are `hidden`."""
    rows, tokens = slice(head * group, (head + 1) * group), inputs.key.shape[2]
    seen = ~(hidden | torch.ones(tokens, tokens, dtype=torch.bool).triu(1))
    sink_logits = None if inputs.sink_logits is None else inputs.sink_logits[rows]
    keys = inputs.key[0, head] if keys is None else keys
    given = inputs.query[:, rows], keys[None, None], torch.eye(tokens, dtype=inputs.key.dtype)[None, None]
    return masked_attention(*given, seen, inputs.scaling, inputs.softcap, sink_logits)[0]


def synthetic_key(everything, head, group, evicted, stride):
    """Return the key and the value that stand for the evicted keys of a KV head."""
    queries, lost, target = [], [], []
    for _, seen, full in everything:
        rows = seen.query[0, head * group : (head + 1) * group, LENGTH:].flatten(0, 1)[::stride] * seen.scaling
        key, value = (t[0, head, :LENGTH][evicted] for t in (seen.key, seen.value))
        logits = rows @ key.T
        queries.append(rows)
        lost.append(full[:, LENGTH:, :LENGTH][..., evicted].flatten(0, 1)[::stride])
        target.append((logits if seen.softcap is None else seen.softcap * (logits / seen.softcap).tanh()).logsumexp(-1))
    return reference_synthetic_key(torch.cat(queries), torch.cat(lost), torch.cat(target), key, value)


@pytest.mark.parametrize(
    ("family", "rows"),
    [*((family, 8192) for family in FAMILIES), ("gemma3", 50), ("llama-mha", 30)],
)
def test_scores_keys_and_values_equal_masked_attention(family, rows, precise, monkeypatch):
    monkeypatch.setattr(reconstruction, "ROWS", rows)
    model, ids = tiny(family, dtype=torch.float64), text()
    plan, shape = plan_for(model), describe(model)
    cache = read(model, ids)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    scores = reconstruction.reconstruct(model, plan, cache, ids)
    reconstructions = list(passes(model, ids[0].tolist()))
    assert scores.keys() == {layer for layer, row in enumerate(plan.layers) if row}
    for layer, row in enumerate(plan.layers):
        after = cache.layers[layer].keys, cache.layers[layer].values
        if row is None:
            assert all(map(torch.equal, after, before[layer]))
            continue
        for head, pattern in enumerate(h.pattern for h in row):
            everything = [
                (span, seen[layer], attention(seen[layer], head, shape.group, False)) for span, seen in reconstructions
            ]
            largest = torch.cat([a[:, LENGTH:, span.start : span.stop].amax((0, 1)) for span, _, a in everything])
            found = scores[layer][0, head]
            (keys, values), (old_keys, old) = ([t[0, head] for t in part] for part in (after, before[layer]))
            synthetic = (found == ALWAYS).nonzero()[:, 0]
            assert len(synthetic) == (pattern.size(LENGTH) < LENGTH and pattern.top_k > 1)
            found[synthetic] = largest[synthetic].log().to(found)
            torch.testing.assert_close(found.exp().double(), largest, rtol=1e-5, atol=1e-7)
            if pattern.size(LENGTH) >= LENGTH:
                assert torch.equal(keys, old_keys)
                assert torch.equal(values, old)
                continue
            kept_indices = kept_keys(pattern, found)
            evicted = torch.ones(LENGTH, dtype=torch.bool).index_fill(0, kept_indices, False)
            assert torch.equal(values[evicted], old[evicted])
            queries = shape.group * sum(a.shape[1] - LENGTH for _, _, a in everything)
            stride = -(-queries // rows)
            new_keys, new_values = old_keys.clone(), old.clone()
            if len(synthetic):
                assert synthetic == kept_indices[pattern.sink + pattern.top_k - 1]
                gone = evicted.index_fill(0, synthetic, True)
                replaced = synthetic_key(everything, head, shape.group, gone, stride)
                new_keys[synthetic], new_values[synthetic] = (given[None] for given in replaced)
            torch.testing.assert_close(keys, new_keys, rtol=1e-4, atol=1e-6)
            known, missed = [], []
            for _, seen, a in everything:
                own_keys, own_values = (t[0, head].clone() for t in (seen.key, seen.value))
                own_keys[:LENGTH], own_values[:LENGTH] = new_keys, new_values
                hidden = torch.nn.functional.pad(evicted, (0, a.shape[1] - LENGTH))
                left = attention(seen, head, shape.group, hidden, own_keys)
                full = a[:, LENGTH:].flatten(0, 1) @ seen.value[0, head]
                known.append(left[:, LENGTH:, kept_indices].flatten(0, 1)[::stride])
                missed.append((full - left[:, LENGTH:].flatten(0, 1) @ own_values)[::stride])
            known, missed = torch.cat(known), torch.cat(missed)
            ridge = (RIDGE * known.square().sum(0).mean()).sqrt()
            known = torch.cat([known, ridge * torch.eye(len(kept_indices))])
            missed = torch.cat([missed, missed.new_zeros(len(kept_indices), missed.shape[1])])
            change = torch.linalg.lstsq(known, missed).solution
            torch.testing.assert_close(values[kept_indices] - new_values[kept_indices], change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_kept_keys_match_the_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    for length in (1, 3, 20, 57):
        scores = torch.randn(length, generator=generator)
        for pattern in (
            Pattern(),
            Pattern(0, 0, 0),
            Pattern(4, 3, 5),
            Pattern(0, 7, 1),
            Pattern(5, 60, 8),
            Pattern(2, 0, 300),
        ):
            positions = torch.arange(length)[None]
            seen = visible(pattern, positions[:, -1:], positions, scores[None])[0, 0]
            assert sorted(kept_keys(pattern, scores).tolist()) == seen.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
def test_the_cache_contains_the_refitted_keys_and_values(family):
    model, ids = tiny(family), text(2)
    plan = plan_for(model, 3)
    full_cache = read(model, ids)
    scores = reconstruction.reconstruct(model, plan, full_cache, ids)
    cache = headsink.compress(model, plan, ids, reconstruct=True)
    for index, row in enumerate(plan.layers):
        for group in cache.layers[index].groups if row else ():
            for n, head in enumerate(group.heads):
                kept_indices = kept_keys(group.segment_pattern, scores[index][0, head]).sort().values
                frozen = group.visible[0, n]
                layer = full_cache.layers[index]
                for kind, whole in ((group.keys, layer.keys), (group.values, layer.values)):
                    mine, expected = kind[0, n][frozen], whole[0, head, kept_indices]
                    assert torch.equal(mine[mine[:, 0].argsort()], expected[expected[:, 0].argsort()])


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-sliding"])
def test_rows_of_a_padded_batch_are_reconstructed_separately(family, precise):
    model = tiny(family, dtype=torch.float64)
    ids, mask = padded()
    plan = plan_for(model, 5)
    context, continuation = slice(0, 50), slice(50, 61)
    cache = headsink.compress(model, plan, ids[:, context], attention_mask=mask[:, context], reconstruct=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, continuation]
    with headsink.apply(model, plan), torch.no_grad():
        both = model(ids[:, continuation], **cache_argument(cache), attention_mask=mask, position_ids=positions).logits
    for row in range(len(ids)):
        alone = ids[row : row + 1, mask[row].bool()]
        before = alone[:, : -both.shape[1]]
        single = headsink.compress(model, plan, before, reconstruct=True)
        with headsink.apply(model, plan), torch.no_grad():
            logits = model(alone[:, before.shape[1] :], **cache_argument(single)).logits
        torch.testing.assert_close(both[row : row + 1], logits, rtol=1e-6, atol=1e-8)


def test_refitted_values_reduce_the_error_of_continuations():
    model = tiny("llama")
    patterns = [[Pattern(4, 8, 8)] * 2] * 3
    weights = torch.ones(3, 2, 30)
    nearer = 0
    for seed in range(6):
        ids = text(seed, 200)
        with torch.no_grad():
            full = model(torch.cat([ids, ids[:, :60]], 1)).logits[:, 200:]
        loss = []
        plan = Plan.of(model, patterns, weights, reconstruction_prompt=PROMPT)
        for reconstruct in (False, True):
            cache = headsink.compress(model, plan, ids, reconstruct=reconstruct)
            with headsink.apply(model, plan), torch.no_grad():
                logits = model(ids[:, :60], **cache_argument(cache)).logits
            loss.append(
                float((full.log_softmax(-1).exp() * (full.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean())
            )
        nearer += loss[1] < loss[0]
    assert nearer >= 5


def test_an_all_full_plan_equals_the_model():
    """Up to rounding: compress makes caches for the fastest kernels."""
    model, ids = tiny("llama"), text(4)
    plan = Plan.full(model).model_copy(update={"reconstruction_prompt": PROMPT})
    cache, plain = headsink.compress(model, plan, ids, reconstruct=True), read(model, ids)
    with torch.no_grad():
        expected = model(ids[:, :9], **cache_argument(plain)).logits
        with headsink.apply(model, plan):
            found = model(ids[:, :9], **cache_argument(cache)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_scores_in_16_bits_are_close():
    ids = text(6, 120)
    exact, rounded = (
        reconstruction.reconstruct(model, plan_for(model), read(model, ids), ids)
        for model in (tiny("llama"), tiny("llama").to(torch.bfloat16))
    )
    for layer, scores in exact.items():
        assert rounded[layer].dtype == torch.float32
        real = (scores != ALWAYS) & (rounded[layer] != ALWAYS)
        assert float((rounded[layer] - scores)[real].abs().mean()) < 0.1 * float(scores[real].std())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_the_cache_equals_one_filled_with_the_scores_at_the_scorers_scale(family, padding):
    """And the cache goes on evicting: reconstructed keys compete with later ones."""
    model = tiny(family)
    ids, mask = padded() if padding else (torch.randint(3, 211, (2, LENGTH)), None)
    plan, after = plan_for(model, 3), torch.randint(3, 211, (len(ids), 40))
    full, padding = read(model, ids, mask), left_padding(mask)
    scores = reconstruction.reconstruct(model, plan, full, ids, None if padding is None else padding.tokens)
    expected = headsink.new_cache(model, plan, exact=False)
    values = [layer.values.clone() for layer in full.layers]
    keys = [layer.keys.clone() for layer in full.layers]
    expected.fill(full, padding, scores)
    found = headsink.compress(model, plan, ids, attention_mask=mask, reconstruct=True)
    for index, row in enumerate(plan.layers):
        if row is None:
            continue
        linear = SCORERS[plan.scorer].scores(keys[index], values[index], plan.scores(index))
        for n in range(len(ids)):
            first = 0 if padding is None else int(padding.tokens[n])
            scaled = match_scale(scores[index][n, :, first:], linear[n, :, first:])
            assert (scaled.sort(1).values >= linear[n, :, first:].sort(1).values).all()  # the scorer's own scale
            for group in found.layers[index].groups:
                if not group.pattern.top_k:
                    continue
                largest = scaled[group.heads].masked_fill(scaled[group.heads] == ALWAYS, 0).amax()
                assert ((group.scores[n] <= largest + 1e-5) | (group.scores[n] == ALWAYS)).all()
                if group.pattern.top_k > 1 and group.pattern.size(LENGTH - first) < LENGTH - first:
                    assert (
                        (group.scores[n] == ALWAYS).sum(-1) == 1
                    ).all()  # the synthetic key of a head is never evicted
    parts = []
    for cache in (found, expected):
        with headsink.apply(model, plan), torch.no_grad():
            given, new = {}, []
            for start in range(40):
                if mask is not None:
                    whole = torch.cat([mask, torch.ones(len(ids), start + 1, dtype=mask.dtype)], 1)
                    given = {"attention_mask": whole, "position_ids": (whole.cumsum(1) - 1)[:, -1:]}
                new.append(model(after[:, start : start + 1], **cache_argument(cache), **given).logits)
        parts.append(torch.cat(new, 1))
    assert torch.equal(*parts)
    assert not found.frozen


def test_cache_relative_positions_are_refused():
    model = tiny("llama")
    plan = Plan.uniform(model, Pattern(4, 0, 16), positions="cache-relative")
    with pytest.raises(HeadsinkError, match=r"^reconstruct: it needs 'absolute' positions$"):
        headsink.compress(model, plan, text(), reconstruct=True)
