"""Plan files: saved plans load equal; errors name the wrong field."""

import json

import pytest
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import QUALITY, RETRIEVAL, random_plan

from headsink import HeadsinkError, Pattern, Plan
from headsink.eviction.scorers import LINEAR

MODEL = tiny("llama")
FEATURES = LINEAR.n_features(12)


@given(st.integers(0, 10_000))
@settings(max_examples=40)
def test_saved_plans_load_equal(tmp_path_factory, seed):
    plan = random_plan(MODEL, seed)
    path = plan.save(tmp_path_factory.mktemp("plan") / "plan.json")
    assert Plan.load(path) == plan
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_a_person_can_read_it():
    text = Plan.uniform(MODEL, Pattern(4, 0, 128)).to_json()
    assert '{"sink": 4, "top_k": 0, "window": 128, "scorer_weights": null}' in text


def edit(tmp_path, change):
    fields = json.loads(random_plan(MODEL, 1).to_json())
    change(fields)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(fields))
    return path


def head(fields):
    return fields["layers"][1][0]


def with_quality(fields, **changes):
    fields["quality"] = [{**QUALITY, **changes}]


def with_retrieval(fields, **changes):
    with_quality(fields, retrieval=[{**RETRIEVAL, **changes}])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda f: head(f).update(window=-5), "layers.1.0.window"),
        (lambda f: head(f).update(window=1.5), "layers.1.0.window"),
        (lambda f: head(f).update(window="64"), "layers.1.0.window"),
        (lambda f: head(f).pop("window"), "layers.1.0.window"),
        (lambda f: head(f).update(sinks=4), "layers.1.0.sinks"),
        (
            lambda f: head(f).update(window=8, top_k=4, scorer_weights=None),
            "layers.1.0: top-k keys need scorer_weights",
        ),
        (
            lambda f: head(f).update(window=8, top_k=4, scorer_weights=[0.0] * FEATURES),
            "layers.1.0: top-k keys need scorer_weights",
        ),
        (
            lambda f: head(f).update(scorer_weights=[1.0] * (FEATURES - 1)),
            f"layers.1.0.scorer_weights: {FEATURES - 1} weights given",
        ),
        (
            lambda f: head(f).update(scorer_weights=[1.0] * (FEATURES - 1) + [float("nan")]),
            f"layers.1.0.scorer_weights.{FEATURES - 1}:",
        ),
        (lambda f: head(f).update(scorer_weights=["some"] + [1.0] * (FEATURES - 1)), "layers.1.0.scorer_weights.0:"),
        (lambda f: head(f).update(window=None, sink=4, top_k=0), "layers.1.0.*window null"),
        (lambda f: f["layers"].pop(), "layers: 2 given"),
        (lambda f: f["layers"][2].pop(), "layers.2: 1 heads given"),
        (lambda f: f.update(schema_version=99), "schema_version"),
        (lambda f: f.update(schema_version=0), "schema_version"),
        (lambda f: f.update(tau=0.4), "tau"),
        (lambda f: f.update(prefill_compression=True), "prefill_compression"),
        (lambda f: f.update(refit_values=True), "refit_values"),
        (lambda f: f.update(reconstruction_prompt=[5, -1]), "reconstruction_prompt.1"),
        (lambda f: f.update(positions="cache-relative"), "positions"),
        (lambda f: f["model"].pop("weights"), "model.weights"),
        (lambda f: f.pop("layers"), "layers"),
        (lambda f: with_quality(f, kl=float("nan")), "quality.0.kl:"),
        (lambda f: with_quality(f, kl=-0.1), "quality.0.kl:"),
        (lambda f: with_quality(f, documents=0), "quality.0.documents"),
        (lambda f: with_quality(f, top1=1.2), "quality.0.top1:"),
        (lambda f: with_quality(f, kl_interval=[0.3, 0.1]), "quality.0.kl_interval: 0.3 is above 0.1"),
        (lambda f: with_quality(f, top1_interval=[0.9]), "quality.0.top1_interval"),
        (lambda f: with_quality(f, nll_change_interval=[0.0, float("inf")]), "quality.0.nll_change_interval"),
        (
            lambda f: with_retrieval(f, right_plan=5),
            "quality.0.retrieval.0.right_plan: 5 correct answers to 4 questions",
        ),
        (lambda f: with_retrieval(f, right_full=-1), "quality.0.retrieval.0.right_full"),
        (lambda f: with_retrieval(f, asked=0), "quality.0.retrieval.0.asked"),
    ],
)
def test_invalid_fields_are_refused_by_name(tmp_path, change, field):
    path = edit(tmp_path, change)
    with pytest.raises(HeadsinkError, match=field) as error:
        Plan.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"layers": NaN}'])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(HeadsinkError, match="plan"):
        Plan.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(HeadsinkError, match="No such file"):
        Plan.load(tmp_path / "none.json")


def test_a_folder_at_the_path_is_refused(tmp_path):
    with pytest.raises(HeadsinkError, match="it is a folder"):
        Plan.full(MODEL).save(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(HeadsinkError, match="cannot write"):
        Plan.full(MODEL).save(tmp_path / "file" / "plan.json")


def test_kept_equals_the_caches_share():
    plan = Plan.of(MODEL, [[Pattern(), Pattern(4, 0, 60)]] * 3)
    assert plan.kv_budget(640) == pytest.approx((640 + 64) / 1280)
    assert plan.kv_budget(30) == 1
    assert Plan.full(MODEL).kv_budget(100) == 1
    assert plan.counts() == {"full": 3, "4+0k+60": 3}


def test_quality_is_loaded_and_states_its_longest_context(tmp_path):
    assert Plan.full(MODEL).verified is None
    path = edit(tmp_path, lambda f: f.update(quality=[QUALITY, {**QUALITY, "context": 1024}, QUALITY]))
    plan = Plan.load(path)
    assert plan.verified == 1024
    assert plan.quality[0].nll_change == pytest.approx(-0.1)
    assert (plan.quality[0].asked, plan.quality[0].right_full, plan.quality[0].right_plan) == (4, 4, 3)
    assert Plan.load(plan.save(path)) == plan


def test_top_k_keys_need_scores():
    with pytest.raises(HeadsinkError, match="top_k"):
        Plan.uniform(MODEL, Pattern(4, 4, 16))


def test_scores_are_those_given_for_heads_with_top_k_keys():
    given = torch.randn(3, 2, FEATURES)
    plan = Plan.of(MODEL, [[Pattern(2, 4, 8), Pattern(2, 0, 8)], [Pattern()] * 2, [Pattern(0, 1, 0)] * 2], given)
    assert torch.allclose(plan.scores(0)[0], given[0, 0], rtol=1e-5)
    assert torch.allclose(plan.scores(2), given[2], rtol=1e-5)
    assert not plan.scores(0)[1].any()
    assert not plan.scores(1).any()
    assert plan.layers[0][1].scorer_weights is None


def test_a_plan_for_a_sliding_layer_is_refused():
    sliding = tiny("gemma3")
    plan = Plan.full(sliding)
    assert plan.layers[0] is None
    with pytest.raises(HeadsinkError, match=r"layers\.0: this layer of the model is of kind sliding_attention"):
        plan.model_copy(update={"layers": (plan.layers[1], *plan.layers[1:])}).check(sliding)


# foreign files


def refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(HeadsinkError, match="not a valid plan") as error:
        Plan.load(path)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    ("once", "twice", "field"),
    [
        ('"window": ', '"window": 8, "window": ', "window is there twice"),
        (
            '"positions": ',
            '"positions": "absolute", "positions": ',
            "positions is there twice",
        ),
        ('"calibration": {', '"calibration": {"a\\u001b": 1, "a\\u001b": 1', r"'a\\x1b' is there twice"),
    ],
)
def test_duplicate_names_are_refused(tmp_path, once, twice, field):
    text = random_plan(MODEL, 1).to_json()
    assert once in text
    assert field.replace("\\\\", "\\") in refused(tmp_path, text.replace(once, twice, 1))


@pytest.mark.parametrize("schema", [1, 2, 3, 4])
def test_a_plan_of_an_older_schema_is_refused_with_the_command_that_makes_a_new_one(tmp_path, schema):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"schema_version": schema, "model": {}, "layers": []}), encoding="utf-8")
    again = f"make it again: headsink plan MODEL --budget BUDGET --context CONTEXT --out {path}"
    with pytest.raises(HeadsinkError, match=f"a plan of schema {schema}, and this headsink reads 5") as error:
        Plan.load(path)
    assert str(error.value).endswith(again)


def test_a_byte_order_mark_is_read(tmp_path):
    plan = random_plan(MODEL, 1)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert Plan.load(path) == plan


@pytest.mark.parametrize("score", ["1e308", "-3.5e38", "1e400"])
def test_scores_that_float32_cannot_hold_are_refused(tmp_path, score):
    fields = json.loads(random_plan(MODEL, 1).to_json())
    head(fields).update(window=8, top_k=4, scorer_weights=[1.0] * FEATURES)
    text = json.dumps(fields).replace("[1.0, 1.0", f"[1.0, {score}", 1)
    assert f"layers.1.0.scorer_weights.1: Input should be {'a finite' if score == '1e400' else ''}" in refused(
        tmp_path, text
    )
    plan = Plan.model_validate_json(text.replace(score, "3.4e38"))
    assert plan.scores(1).isfinite().all()


DEEP = ("[" * 100_000, '{"calibration": ' * 5000, '{"calibration": {"a": ' + "[" * 900 + "]" * 900 + "}}")


@pytest.mark.parametrize("deep", DEEP)
def test_deep_nesting_is_one_line(tmp_path, deep):
    refused(tmp_path, deep)


def test_names_from_a_file_are_escaped(tmp_path):
    fields = json.loads(random_plan(MODEL, 1).to_json())
    evil = "\x1b]0;pwn\x07Llama\nsecond line"
    assert r"'\x1b]0;pwn\x07Llama\nsecond line': Extra" in refused(tmp_path, json.dumps({**fields, evil: 1}))
    assert len(refused(tmp_path, json.dumps({**fields, "x" * 10**6: 1}))) < 300
    for field in ("architecture", "weights"):
        plan = Plan.model_validate({**fields, "model": {**fields["model"], field: evil}, "headsink": evil})
        with pytest.raises(HeadsinkError) as error:
            plan.check(MODEL)
        assert str(error.value).isprintable()
        assert r"\x1b" in str(error.value)
        assert "\x1b" not in repr(plan) + str(plan) + plan._repr_html_()
        assert repr(plan).count("\n") == 5


@pytest.mark.parametrize("values", ["0", "123", "12g4", "ABCD", "é123"])
def test_values_of_a_model_are_hexadecimal(tmp_path, values):
    path = edit(tmp_path, lambda f: f["model"].update(values=values))
    with pytest.raises(HeadsinkError, match=r"model\.values"):
        Plan.load(path)


def test_values_of_another_length_belong_to_other_weights(tmp_path):
    for values in ("", "0000", "7fc0" * 10**5):
        plan = Plan.load(edit(tmp_path, lambda f, given=values: f["model"].update(values=given, weights="x")))
        with pytest.raises(HeadsinkError, match="the plan is for other weights"):
            plan.check(tiny("llama").half())


# printed form


def test_a_plan_is_described_in_five_lines():
    plan = random_plan(MODEL, 1)
    calibration = {"context": [512, 2048]}
    plan = Plan.model_validate({**plan.model_dump(), "quality": [QUALITY], "calibration": calibration})
    lines = repr(plan).split("\n")
    assert [line.split()[0] for line in lines] == ["Plan", "model", "positions", "patterns", "keeps", "quality"]
    assert str(plan) == repr(plan) == f"{plan}"
    assert f"LlamaForCausalLM, 3 layers, 2 KV heads of size 12, weights {plan.model.weights[:12]}" in lines[1]
    assert lines[2].split(maxsplit=1)[1] == "absolute"
    for pattern, count in list(plan.counts().items())[:4]:
        assert f"{count} x {pattern}" in lines[3]
    for context in (512, 2048):
        assert f"{plan.kv_budget(context):.1%} of the KV entries at {context} tokens" in lines[4]
    assert "of 0.6 MB" in lines[4].split(";")[1]  # 2 x 6 heads x 2,048 tokens x 12 numbers of 2 bytes
    assert "KL 0.0200 nats, same top token 97.0%, 3 of 4 answers correct (full cache 4) at 512 tokens" in lines[5]
    html = plan._repr_html_()
    assert all(f"<th>{line.split()[0]}</th>" in html for line in lines[1:])
    assert "not measured" in repr(Plan.full(MODEL))


@pytest.mark.parametrize("context", [None, "x", 512, [], [0, -5], ["512"], [True], {"a": 1}])
def test_any_calibration_can_be_described(context):
    plan = Plan.full(MODEL).model_copy(update={"calibration": {"context": context}})
    assert "100.0% of the KV entries at 1024 tokens" in repr(plan)


def test_html_of_a_plan_is_escaped():
    plan = Plan.full(MODEL)
    evil = plan.model_copy(update={"model": plan.model.model_copy(update={"architecture": "<script>"})})
    assert "<script>" in repr(evil)
    assert "<script>" not in evil._repr_html_()


def test_plans_can_be_compared_and_copied():
    plan = random_plan(MODEL, 1)
    assert plan.model_copy() == plan
    assert plan.model_copy(update={"reconstruction_prompt": (5,)}) != plan
    assert Plan.model_validate(plan.model_dump()) == plan


@pytest.mark.parametrize("context", [400, 1000, 1700, 8000])
@pytest.mark.parametrize("top_k", [300, 0])
def test_a_scaled_plan_keeps_its_budget(top_k, context):
    patterns = [[Pattern(4, top_k, 32 if top_k else 400), Pattern()]] * 2 + [
        [Pattern(4, 2 * top_k, 32), Pattern(4, 0, 32)]
    ]
    plan = Plan.of(MODEL, patterns, torch.ones(3, 2, FEATURES)).model_copy(
        update={"calibration": {"context": [1000, 1000]}}
    )
    scaled = plan.scale(context)
    assert plan.kv_budget(1000) - 0.002 <= scaled.kv_budget(context) <= plan.kv_budget(1000) + (0 if top_k else 0.002)
    assert scaled.layers[0][1].pattern.full
    if top_k:
        assert scaled.layers[2][0].top_k == pytest.approx(2 * scaled.layers[0][0].top_k, abs=1)
        assert scaled.layers[2][1] == plan.layers[2][1]
    assert scaled.calibration["context"] == [context, context]
    assert plan.scale(1000).layers == plan.layers


def test_a_plan_scaled_to_a_short_text_keeps_sinks_and_window():
    weights = torch.ones(3, 2, FEATURES)
    plan = Plan.of(MODEL, [[Pattern(4, 300, 32)] * 2] * 3, weights).model_copy(
        update={"calibration": {"context": [1000, 1000]}}
    )
    assert {head.pattern for layer in plan.scale(50).layers for head in layer} == {Pattern(4, 0, 32)}
