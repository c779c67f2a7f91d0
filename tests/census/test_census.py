"""The blockwise census equals the same statistics computed from the whole attention matrix, key by key."""

import math

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from headsink.attention import chunked
from headsink.attention.interface import observe_attention
from headsink.census import head_statistics as statistics
from headsink.census.first_layer import _permute_heads, conditional, sentence, transfer
from headsink.census.head_statistics import Thresholds, distances, first_row, head_statistics, sample_queries, windows
from headsink.census.roles import ROLES, law, required_window, roles
from headsink.data import corpus
from headsink.models.spec import attention_modules, decoder, describe
from headsink.utils.statistics import difference, interval, rank_correlation

LIMITS = Thresholds(first=2, secondary=3, tau=0.8, window=9)
LENGTHS = (2, 3, 7, 30, 61)


def run(model, ids):
    """Return the attention inputs of every layer."""
    found = []
    with torch.no_grad(), observe_attention(model, found.append):
        decoder(model)(ids, use_cache=False)
    return found


def learned_share(seen):
    """Return the mass of a learned logit, [heads, N], in double precision: eager's matrix has it only as the rest to 1."""
    query, key = (
        seen.query[0].double(),
        seen.key[0].double().repeat_interleave(seen.query.shape[1] // seen.key.shape[1], 0),
    )
    if seen.sink_logits is None:
        return torch.zeros(query.shape[:2]).double()
    ages = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
    hidden = (ages < 0) | (ages >= (seen.sliding or query.shape[1]))
    logits = (query @ key.transpose(1, 2) * seen.scaling).masked_fill(hidden, float("-inf"))
    with_learned = torch.cat([logits, seen.sink_logits.double()[:, None, None].expand(*logits.shape[:2], 1)], -1)
    return with_learned.softmax(-1)[:, :, -1]


def whole_matrix(weights, seen, n):
    """The statistics of one layer at length n from its attention matrix [heads, N, N], one query at a time."""
    limits = LIMITS.at(n)
    value, output = seen.value[0, :, :n].double(), seen.output[0, :, :n].double()
    weights, n_heads, group = weights[:, :n, :n].double(), weights.shape[0], weights.shape[0] // value.shape[0]
    sink_logits = learned_share(seen)
    norms, positions, d = value.norm(dim=-1), torch.arange(n), value.shape[2]
    short = norms.float() < limits.tau * norms.float().median(-1, keepdim=True).values
    short &= positions >= limits.first
    secondary = short & (short.cumsum(-1) <= limits.secondary)  # the first ones
    w_o = seen.module.o_proj.weight.double()
    rows = range(first_row(n), n)
    scores = {name: torch.zeros(n_heads).double() for name in statistics.SCORES}
    errors = {kept: torch.zeros(n_heads, len(windows(n))).double() for kept in statistics.KEPT}
    group_errors = {kept: torch.zeros(value.shape[0], len(windows(n))).double() for kept in statistics.KEPT}
    profile = torch.zeros(n_heads, len(distances(n))).double()
    for i in rows:
        of_layer = (w_o @ output[:, i].flatten()).square().sum()
        for h in range(n_heads):
            g, p = h // group, weights[h, i]
            sink = (positions <= i) & ((positions < limits.first) | secondary[g])
            near = (i - positions < limits.window) & (positions <= i) & ~sink
            far = (positions <= i) & ~sink & ~near
            entropy = -sum(x * math.log(x) for x in (p / p.sum()).tolist() if x > 0)
            mine = {
                "first": p[0],
                "sink": p[sink].sum(),
                "local": p[near].sum(),
                "far": p[far].sum(),
                "far_peak": p[far].max() if far.any() else 0.0,
                "learned": sink_logits[h, i],
                "entropy": entropy,
                "effective": math.exp(entropy),
                "output": ((w_o[:, h * d : (h + 1) * d] @ output[h, i]).square().sum() / of_layer).sqrt(),
            }
            for name, x in mine.items():
                scores[name][h] += x / len(rows)
            within = torch.stack([p[max(0, i + 1 - s) : i + 1].sum() for s in distances(n)])
            profile[h] += within / len(rows)
        for kept in statistics.KEPT:
            for k, w in enumerate(windows(n)):
                wrong = torch.zeros(n_heads, d).double()
                for h in range(n_heads):
                    sink = (positions < limits.first) | (secondary[h // group] & (kept == "secondary"))
                    mask = (positions <= i) & (sink | (i - positions < w))
                    p = weights[h, i] * mask
                    wrong[h] = output[h, i] - (p / (p.sum() + sink_logits[h, i]).clamp(min=1e-30)) @ value[h // group]
                    lost = w_o[:, h * d : (h + 1) * d] @ wrong[h]
                    errors[kept][h, k] += lost.square().sum() / of_layer / len(rows)
                for g in range(value.shape[0]):
                    part = slice(g * group * d, (g + 1) * group * d)
                    lost = w_o[:, part] @ wrong[g * group : (g + 1) * group].flatten()
                    group_errors[kept][g, k] += lost.square().sum() / of_layer / len(rows)
    scores["legacy"] = weights[:, :, 0].sum(1) / weights.sum((1, 2))
    return scores, errors, group_errors, weights[:, list(rows)].mean(1), profile


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_the_eager_matrix(family, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", 2**11)
    eager, ids = tiny(family, attention="eager"), torch.randint(3, 211, (1, 61))
    model = tiny(family)
    with torch.no_grad():
        matrices = eager(ids, output_attentions=True, use_cache=False).attentions
    found = run(model, ids)
    assert [seen.layer for seen in found] == list(range(3))
    assert {seen.sliding for seen in found} == set(describe(model).windows)
    for seen, matrix in zip(found, matrices, strict=True):
        for length in LENGTHS:
            result = head_statistics(seen, length, LIMITS)
            scores, errors, group_errors, attention, profile = whole_matrix(matrix[0], seen, length)
            for name, expected in scores.items():
                close(result.scores[name], expected, f"{name} at {length}")
            for kept in statistics.KEPT:
                close(result.errors[kept], errors[kept], f"errors {kept} at {length}")
                close(result.group_errors[kept], group_errors[kept], f"group errors {kept} at {length}")
            close(result.attention.double(), attention, f"attention at {length}")
            close(result.profile, profile, f"profile at {length}")
            parts = sum(result.scores[name] for name in ("sink", "local", "far", "learned"))
            close(parts, torch.ones_like(parts), "masses")


def close(actual, expected, name):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_a_model_does_not_change_its_outputs(family):
    """Layers that are computed in blocks (sliding, capped, learned sinks) give the outputs of eager attention."""
    ids = torch.randint(3, 211, (1, 61))
    with torch.no_grad():
        expected = decoder(tiny(family, attention="eager"))(ids, use_cache=False).last_hidden_state
        model = tiny(family)
        with observe_attention(model, lambda _: None):
            found = decoder(model)(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 50), st.integers(1, 400), st.integers(1, 60))
def test_sampled_queries_represent_all(first, count, most):
    rows, weights = sample_queries(first, first + count, most)
    assert first <= rows[0]
    assert rows[-1] == first + count - 1
    assert len(rows) == -(-count // -(-count // most)) <= most
    assert torch.equal((weights.cumsum(0) * count).round().long(), rows - first + 1)


@pytest.mark.slow
def test_scores_of_some_queries_are_close_to_scores_of_all(smollm2):
    model, tokenizer = smollm2
    (seen, *_) = run(model, torch.tensor([corpus.tokens("prose", tokenizer, 1000, split="heldout")]))[8:9]
    some, all_of_them = (head_statistics(seen, 1000, Thresholds(), queries) for queries in (200, 1000))
    for name in ("sink", "local", "far", "legacy"):
        off = (some.scores[name] - all_of_them.scores[name]).abs()
        assert float(off.mean()) < 0.02
        assert float(off.max()) < 0.08


def test_uniform_scores_are_those_of_flat_attention():
    """A model whose queries are zero has uniform attention: each score equals its uniform value."""
    model = tiny("mistral-sliding")
    for module in attention_modules(model):
        torch.nn.init.zeros_(module.q_proj.weight)
    for seen in run(model, torch.randint(3, 211, (1, 61))):
        for length in LENGTHS:
            result = head_statistics(seen, length, LIMITS)
            for name, flat in result.uniform.items():
                close(result.scores[name], flat, name)


def test_the_legacy_score_calls_flat_attention_a_sink_on_short_text():
    """The numbers of the design: 0.75 at 2 tokens, 0.61 at 3."""
    none = torch.zeros(1, 3, dtype=torch.bool)
    flat = [float(statistics._uniform(none, n, LIMITS, None)["legacy"]) for n in (2, 3)]
    assert flat == pytest.approx([0.75, 11 / 18])


# roles and windows


def masses(sink=0.0, local=0.0, far=0.0, far_peak=0.0, learned=0.0):
    return {name: torch.tensor([x]) for name, x in locals().items()}


def role(uniform=None, **mass):
    return ROLES[int(roles(masses(**mass), uniform or masses(sink=0.01, local=0.04, far=0.95, far_peak=0.001)))]


def test_roles_match_their_definitions():
    assert role(sink=0.9, local=0.1) == "sink"
    assert role(sink=0.1, local=0.9) == "local"
    assert role(sink=0.5, local=0.5) == "mixed"
    assert role(sink=0.2, local=0.2, far=0.6, far_peak=0.01) == "diffuse"
    assert role(sink=0.2, local=0.2, far=0.6, far_peak=0.5) == "retrieval"
    assert role(sink=0.1, learned=0.85, local=0.05) == "sink"


@pytest.mark.parametrize("length", [2, 3, 5, 8, 20, 60, 500, 5000])
def test_flat_attention_has_no_role_but_diffuse_at_any_length(length):
    none = torch.zeros(1, length, dtype=torch.bool)
    none[:, : Thresholds().at(length).first] = True
    flat = statistics._uniform(none, length, Thresholds().at(length), None)
    assert ROLES[int(roles(flat, flat))] == "diffuse"


@given(*[st.floats(0, 1)] * 4)
def test_every_head_has_a_role(sink, local, far, peak):
    total = (sink + local + far) or 1.0
    assert role(sink=sink / total, local=local / total, far=far / total, far_peak=peak * far / total) in ROLES


def test_the_window_needed_is_the_smallest_from_which_on_the_error_is_small():
    errors = torch.tensor([[0.5, 0.2, 0.005, 0.002], [0.5, 0.005, 0.2, 0.2], [0.001, 0.001, 0.001, 0.001]])
    needed = required_window(errors, [0, 16, 32, 64], 100, epsilon=0.01)
    assert 16 < float(needed[0]) < 32
    assert float(needed[1]) == 100  # at 16 it is small, but not from there on
    assert float(needed[2]) == 0


@pytest.mark.parametrize(("scale", "exponent"), [(128, 0.0), (3, 0.5), (0.25, 1.0)])
def test_the_power_law_is_recovered(scale, exponent):
    lengths = [64, 256, 1024, 8192]
    needed = torch.tensor([[scale * n**exponent] for n in lengths])
    found = law(needed, lengths)
    assert float(found[0]) == pytest.approx(scale)
    assert float(found[1]) == pytest.approx(exponent)


# intervals


def test_the_interval_has_its_nominal_coverage():
    generator = torch.Generator().manual_seed(0)
    found = interval(3 + torch.randn(4, 20_000, generator=generator))
    assert float(((found.mean - 3).abs() <= found.half).double().mean()) == pytest.approx(0.95, abs=0.01)
    assert interval(torch.ones(1, 5)).half.isnan().all()


def test_pairing_removes_the_variance_between_texts():
    generator = torch.Generator().manual_seed(0)
    texts = 10 * torch.randn(6, 1, generator=generator)
    before, after = texts, texts + 0.5 + 0.01 * torch.randn(6, 1, generator=generator)
    paired, unpaired = (difference(before, after, p) for p in (True, False))
    assert float(paired.mean) == pytest.approx(float(unpaired.mean))
    assert float(paired.half) < 0.1 < 5 < float(unpaired.half)


# the first question


def test_head_indices_that_carry_over_are_found():
    sinks = torch.zeros(12, 9, dtype=torch.bool)
    sinks[:, :3] = True
    result = transfer(sinks, "made")
    assert result.pair_rate == result.first_rate == 1
    assert result.pair_chance == pytest.approx(1 / 3)
    assert result.pair_p < 0.001
    assert result.significant_pairs == result.testable_pairs == 66


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_chance_is_the_mean_of_the_shuffles(seed):
    generator = torch.Generator().manual_seed(seed)
    sinks = torch.rand(4, 7, generator=generator) < 0.5
    sinks[0, 0] = True
    result = transfer(sinks, "made", seed=seed)
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    trials = sum(int(sinks[a].sum()) for a, _ in pairs)
    assert result.pair_rate == pytest.approx(sum(int((sinks[a] & sinks[b]).sum()) for a, b in pairs) / trials)
    assert result.pair_chance == pytest.approx(
        sum(float(sinks[a].sum() * sinks[b].sum()) / 7 for a, b in pairs) / trials
    )
    assert 0 < result.pair_p <= 1


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 3])
def test_p_values_are_uniform_when_nothing_carries_over(group):
    """Also where the query heads of a KV head are alike: shuffling single heads would find too many."""
    generator = torch.Generator().manual_seed(0)

    def drawn():
        return (torch.rand(6, 9 // group, generator=generator) < 0.4).repeat_interleave(group, 1)

    values = [transfer(drawn(), "made", group=group, seed=n).pair_p for n in range(60)]
    assert 0.25 < sum(p < 0.5 for p in values) / 60 < 0.75
    assert sum(p < 0.05 for p in values) < 10


def test_renumbering_keeps_the_heads_of_a_kv_head_together():
    sinks = torch.arange(12).repeat(4, 1)  # numbers instead of flags, so that the order is visible
    order = _permute_heads(sinks, 3, 50, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort(-1).values, sinks.expand(50, -1, -1))
    together = order.view(50, 4, 4, 3) // 3
    assert torch.equal(together, together[..., :1].expand_as(together))
    assert len(order.view(-1, 12).unique(dim=0)) > 150


def test_the_test_of_one_pair_is_exact():
    """The same two of four heads are sinks in both layers: one of six arrangements."""
    sinks = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    assert transfer(sinks, "made").pair_p == pytest.approx(1 / 6, abs=0.02)
    assert transfer(torch.stack([sinks[0], ~sinks[0]]), "made").pair_p == 1
    assert transfer(torch.stack([sinks[0], torch.ones(4).bool()]), "made").testable_pairs == 0


def test_no_sinks_in_the_first_layer_predict_nothing():
    sinks = torch.rand(5, 6) < 0.5
    sinks[0] = False
    result = transfer(sinks, "made")
    assert result.first_rate is None
    assert "predicts nothing" in sentence(result)
    assert conditional(sinks)[0].isnan().all()


def test_rank_correlation_is_spearmans():
    a = torch.tensor([1.0, 2.0, 2.0, 4.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a, torch.ones(4)) is None
