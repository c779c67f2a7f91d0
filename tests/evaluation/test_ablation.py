"""Limited heads see what the definition says, and a set of heads costs what a model without them loses."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from architectures import make
from families import FAMILIES, tiny
from reference import reference_logits

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.attention.params import Inputs
from headsink.data.documents import Document, Question
from headsink.evaluation.ablation import _costs, measure
from headsink.evaluation.head_sets import Heads
from headsink.evaluation.limited import Limit, LimitedDocument, LimitedText, mean_outputs
from headsink.models.spec import attention_modules, describe, output_projection

CLOSE = {"rtol": 0, "atol": 1e-5}


def random_document(seed=0, length=90, vocabulary=211):
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    return Document(tokens(length), tokens(190), [Question("first", tokens(19), 4), Question("second", tokens(5), 1)])


def each_alone(document, logits_of):
    """Log-probabilities of every continuation from a pass over the document and this continuation alone."""
    with torch.no_grad():
        for _, ids, scored in document.continuations:
            logits = logits_of(torch.tensor([document.ids + ids]))
            yield logits[0, -scored - 1 : -1].log_softmax(-1).float()


def assert_same(found, expected):
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_limited_heads_the_model_is_itself(family):
    model, document = tiny(family, dtype=torch.float64), random_document()
    assert_same(
        LimitedDocument(model, document).log_probs(Limit()), each_alone(document, lambda ids: model(ids).logits)
    )


@pytest.mark.parametrize("name", ["LFM2", "Qwen3.5", "Gemma 4 E", "dynamic"])
def test_continuations_run_alone_where_positions_or_states_need_it(name):
    model, document = dynamic() if name == "dynamic" else make(name), random_document()
    text = LimitedDocument(model, document)
    assert len(text.texts) == (1 if name == "Gemma 4 E" else 3)
    expected = each_alone(document, lambda ids: model(ids, use_cache=False).logits)
    for own, other in zip(text.log_probs(Limit()), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-3)


def dynamic():
    """A model whose rotation depends on the length of the text."""
    model = tiny("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return type(model)(model.config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pattern", [Pattern(3, 0, 17), Pattern(0, 0, 1), Pattern(5, 0, 0)], ids=str)
def test_all_heads_limited_are_the_reference_mask(family, pattern):
    model, document = tiny(family, dtype=torch.float64), random_document()
    shape, plan = describe(model), Plan.uniform(model, pattern)
    heads = {layer: range(shape.query_heads) for layer, own in enumerate(shape.planned) if own}
    expected = each_alone(document, lambda ids: reference_logits(model, plan, ids, segments=[1] * ids.shape[1]))
    assert_same(LimitedDocument(model, document).log_probs(Limit(heads, pattern)), expected)


@pytest.mark.parametrize("sliding", [None, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("pattern", [Pattern(2, 3, 4), Pattern(0, 5, 0), Pattern(2, 0, 4), Pattern(0, 0, 0)], ids=str)
def test_a_limited_head_sees_what_the_definition_says(pattern, softcap, sliding):
    document, continuations = [0] * 21, [("text", [0] * 9, 8), ("first", [0] * 5, 2)]
    text = LimitedText(document, continuations, torch.device("cpu"))
    n = len(text.ids)
    query, key, value = (torch.randn(1, heads, n, 8, dtype=torch.float64) for heads in (4, 2, 2))
    sink_logits = torch.randn(4, dtype=torch.float64) if softcap else None
    inputs = Inputs(torch.nn.Module(), 7, query, key, value, 0.3, sliding, softcap, sink_logits)
    limited = [0, 3]
    found = text.attend(inputs, Limit({7: limited, 8: [1]}, pattern))
    places = [*((0, i) for i in range(21)), *((1, 21 + i) for i in range(9)), *((2, 21 + i) for i in range(5))]
    for head in range(4):
        for i, (branch, position) in enumerate(places):
            logits = query[0, head, i] @ key[0, head // 2].T * 0.3
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            ages = {j: position - places[j][1] for j in range(i + 1) if places[j][0] in (0, branch)}
            seen = {j for j, age in ages.items() if sliding is None or age < sliding}
            if head in limited:
                near = {j for j in seen if places[j][1] < pattern.sink or ages[j] < pattern.window}
                near |= set(sorted(seen - near, key=lambda j: -logits[j])[: pattern.top_k])
                seen = near
            weights = torch.zeros(n, dtype=torch.float64)
            index = torch.tensor(sorted(seen), dtype=torch.long)
            below = logits[index].exp().sum() + (sink_logits[head].exp() if softcap else 0)
            if len(index):
                weights[index] = logits[index].exp() / below
            torch.testing.assert_close(found[0, head, i], weights @ value[0, head // 2], rtol=0, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_a_removed_head_writes_nothing(family):
    model, document = tiny(family), random_document()
    found = LimitedDocument(model, document).log_probs(Limit({1: [2]}, Pattern(0, 0, 0)))
    silence(model, 1, 2)
    assert_same(found, each_alone(document, lambda ids: model(ids).logits))


def silence(model, layer, head):
    """Let a head write nothing to the residual stream."""
    dim = describe(model).head_dim
    output_projection(attention_modules(model)[layer]).weight.data[:, head * dim : (head + 1) * dim] = 0


def test_a_head_is_replaced_by_its_mean_output():
    model, texts = tiny("llama"), [random_document(seed).ids[: 50 + seed] for seed in range(2)]
    shape, seen = describe(model), []
    hook = output_projection(attention_modules(model)[1]).register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    with torch.no_grad():
        for ids in texts:
            model(torch.tensor([ids]))
    hook.remove()
    means = mean_outputs(model, texts)
    expected = torch.cat(seen, 1)[0].unflatten(-1, (shape.query_heads, shape.head_dim)).mean(0)
    torch.testing.assert_close(means[1], expected)
    document = random_document(3)
    found = LimitedDocument(model, document).log_probs(Limit({1: [0, 2]}, output=means))

    def replace_output(_, given):
        grouped = given[0].unflatten(-1, (shape.query_heads, shape.head_dim)).clone()
        grouped[:, :, [0, 2]] = expected[[0, 2]]
        return (grouped.flatten(-2), *given[1:])

    output_projection(attention_modules(model)[1]).register_forward_pre_hook(replace_output)
    assert_same(found, each_alone(document, lambda ids: model(ids).logits))


def test_a_head_that_matters_costs_more_than_one_that_does_not():
    """The text is the model's own most likely one, so a head that writes something loses NLL and one that is silent none."""
    model = tiny("llama")
    silence(model, 1, 3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 211, (1, 60), generator=generator)
    written = model.generate(ids, max_new_tokens=120, do_sample=False)[0].tolist()
    question = Question("first", written[60:70], 5)
    document = Document(written[:60], written[60:], [question])
    sets = {name: (name,) for name in ((1, 3), (1, 0))}
    heads = Heads(describe(model), kv_heads=False)
    limits = {one: Limit(heads.query_heads(one), Pattern(0, 0, 0)) for one in sets.values()}
    silent, loud = sets.values()
    costs, (excess, (low, high)) = _costs(measure(model, [document, document], limits), loud, [silent])
    assert costs[silent].delta_nll == pytest.approx(0, abs=1e-6)
    assert costs[silent].kl == pytest.approx(0, abs=1e-6)
    assert costs[silent].right == 2
    assert costs[loud].delta_nll > 0.01
    assert costs[loud].right == 0
    assert costs[loud].answer_delta_nll > 0
    assert low <= excess <= high
    assert excess == pytest.approx(costs[loud].delta_nll - costs[silent].delta_nll)
    assert low > 0


@pytest.fixture(scope="module")
def heads():
    return Heads(describe(tiny("llama")), kv_heads=False)


def test_heads_are_read_from_names_and_pairs(heads):
    assert heads.read("2.3, 0.*,0.1") == ((0, 0), (0, 1), (0, 2), (0, 3), (2, 3))
    assert heads.read([(2, 1), (0, 3)]) == ((0, 3), (2, 1))
    assert heads.query_heads(((0, 1), (0, 3))) == {0: [1, 3]}
    groups = Heads(heads.shape, kv_heads=True)
    assert groups.query_heads(groups.read("1.1,2.*")) == {1: [2, 3], 2: [0, 1, 2, 3]}


def test_random_heads_follow_the_seed(heads):
    chosen = heads.read("0.0,0.1,2.3")
    for null in ("layers", "all"):
        drawn = heads.draw(chosen, null, 30, seed=0)
        assert drawn == heads.draw(chosen, null, 30, seed=0)
        assert drawn != heads.draw(chosen, null, 30, seed=1)
        assert {len(set(one)) for one in drawn} == {3}
        layers = {tuple(layer for layer, _ in one) for one in drawn}
        assert (layers == {(0, 0, 2)}) == (null == "layers")
    assert {head for one in heads.draw(chosen, "all", 100, seed=0) for head in one} == {
        (layer, head) for layer in range(3) for head in range(4)
    }


@pytest.mark.parametrize(
    ("given", "null", "reason"),
    [
        ("3.0", "all", "heads: layer 3 has no attention; the model has 3 layers, from 0"),
        ("1.4", "all", "heads: 1.4 is not there; layer 1 has 4 query heads, from 0"),
        ([(1, -1)], "all", "heads: 1.-1 is not there"),
        ("1", "all", "heads: '1' is not LAYER.HEAD; give heads such as 3.2,5.*"),
        ("", "all", "heads: '' is not LAYER.HEAD"),
        ([1, 2], "all", "heads: give pairs of layer and head"),
        ([(1, 0.5)], "all", "heads: give pairs of layer and head"),
        ([], "all", "heads: none are given"),
        ("1.*", "layers", "random heads of the same layers are the same heads; give 'all' as null"),
        ("0.*,1.*,2.*", "all", "the same heads; give 0 as draws"),
        ("1.1", "none", "null: 'none' is unknown; one of layers, all"),
    ],
)
def test_unusable_heads_are_refused(given, null, reason):
    with pytest.raises(HeadsinkError) as error:
        headsink.ablate(tiny("llama"), None, given, null=null)
    assert reason in str(error.value)


def test_what_is_not_a_pattern_is_refused():
    with pytest.raises(
        HeadsinkError, match=r"pattern: \(4, 0, 9\) is not a Pattern; give Pattern\(sink, top_k, window\) or 'mean'"
    ):
        headsink.ablate(tiny("llama"), None, "1.1", (4, 0, 9))


@pytest.mark.parametrize("text", ["4", "4+", "4+k+9", "x+9", "4+3+9", "-1+9", "4+99999999999"])
def test_a_pattern_that_cannot_be_read_is_refused(text):
    with pytest.raises(HeadsinkError, match=r"pattern: .* is not SINK\+WINDOW"):
        Pattern.parse(text)


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(4, 0, 256), Pattern(0, 9, 0)], ids=str)
def test_a_pattern_is_read_as_it_is_written(pattern):
    assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse("4+256") == Pattern(4, 0, 256)


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return headsink.load(str(tiny_folder), device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [Pattern(2, 4, 8), "mean"], ids=str)
def test_a_set_of_heads_is_measured_beside_random_sets(loaded, pattern):
    model, tokenizer = loaded
    options = {"draws": 3, "context": 512, "progress": False}
    found = headsink.ablate(model, tokenizer, "0.1,2.0", pattern, **options)
    assert found == headsink.ablate(model, tokenizer, [(2, 0), (0, 1)], pattern, **options)
    assert (found.documents, found.tokens, found.pattern) == (4, 4 * 255, str(pattern))
    assert found.asked >= 4
    assert [[layer for layer, _ in one.heads] for one in found.random_sets] == [[0, 2]] * 3
    for one in (found.cost, *found.random_sets):
        assert one.delta_nll_interval[0] <= one.delta_nll <= one.delta_nll_interval[1]
        assert 0 < one.kl_interval[0] <= one.kl <= one.kl_interval[1]
    mean = sum(one.delta_nll for one in found.random_sets) / 3
    assert found.excess == pytest.approx(found.cost.delta_nll - mean, abs=1e-9)
    assert found.excess_interval[0] <= found.excess <= found.excess_interval[1]
    assert found.below == sum(one.delta_nll < found.cost.delta_nll for one in found.random_sets)
    assert found.p == pytest.approx((4 - found.below) / 4)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["cost"]["heads"] == "0.1,2.0"
    assert f"delta NLL {found.cost.delta_nll:+.4f}" in str(found)
    assert "\n" not in str(found)
    assert ("replaced by their mean output" if pattern == "mean" else "limited to 2+4k+8") in found._repr_html_()
    assert "<script>" not in replace(found, model="<script>")._repr_html_()
    with pytest.raises(FrozenInstanceError):
        found.seed = 1


@pytest.mark.slow
def test_kv_heads_are_limited_with_their_groups(loaded):
    model, tokenizer = loaded
    options = {"draws": 0, "context": 512, "progress": False}
    whole = headsink.ablate(model, tokenizer, "1.1", Pattern(0, 0, 8), kv_heads=True, **options)
    group = headsink.ablate(model, tokenizer, "1.2,1.3", Pattern(0, 0, 8), **options)
    assert whole.cost == replace(group.cost, heads=((1, 1),))
    assert (whole.random_sets, whole.excess, whole.p) == ((), None, 1)
    json.dumps(whole.to_dict(), allow_nan=False)
    with pytest.raises(HeadsinkError, match="context: 300 tokens are too few"):
        headsink.ablate(model, tokenizer, "1.1", **{**options, "context": 300})
