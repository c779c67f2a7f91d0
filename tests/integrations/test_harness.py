"""The lm-evaluation-harness under a plan: equal to HFLM where everything is kept, and to the definition of patterns elsewhere."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from plans import QUALITY, random_plan
from reference import reference_logits

from headsink import HeadsinkError, Plan

pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-harness")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from headsink.integrations.lm_eval import HeadsinkLM, main
from headsink.models.transformers_names import NAMES

STORY = (
    "The keeper of the old lighthouse wrote the weather into a book, and on Sundays he counted the ships that passed. "
)
PAIRS = [
    (STORY * 2 + "How many ships were there?", " Nine of them."),
    (STORY * 2 + "How many ships were there?", " Nobody knows how many there were, for the book was lost."),
    (STORY + "The weather was", " fine"),
    (STORY + "The weather was", " bad"),
    ("", "No context, only this."),
    (STORY + "A space at the end ", "belongs to what follows"),
]
TEXTS = [STORY * 2, "A short one."]
PROMPTS = [STORY + "Then", "One day", "And when he came down he said:"]


def requests(kind, arguments):
    return [
        Instance(kind, {}, one if isinstance(one, tuple) else (one,), number) for number, one in enumerate(arguments)
    ]


def answers(lm, pairs=PAIRS, texts=TEXTS, prompts=PROMPTS):
    """Return a model's results for requests of all three types."""
    likelihoods = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    rolling = lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    asked = [(prompt, {"until": [], "max_gen_toks": 3}) for prompt in prompts]
    return likelihoods, rolling, lm.generate_until(requests("generate_until", asked), disable_tqdm=True)


def same(found, own):
    """Check that results are equal, log-likelihoods to rounding: under a plan a context is read once for its continuations."""
    (likelihoods, *rest), (expected, *others) = found, own
    assert [greedy for _, greedy in likelihoods] == [greedy for _, greedy in expected]
    assert [one for one, _ in likelihoods] == pytest.approx([one for one, _ in expected], rel=1e-5)
    assert rest[0] == pytest.approx(others[0], rel=1e-5)
    assert rest[1] == others[1]


def encoded(lm, context, continuation):
    if not context:
        return [lm.prefix_token_id], lm.tok_encode(continuation)
    return lm._encode_pair(context, continuation)


def by_definition(lm, context, continuation):
    """Return a continuation's log-likelihood and whether it is greedy, with every head masked by its pattern."""
    prompt = (
        len(context) - 1
    )  # is read at once; the last token of the context predicts the continuation, as in decoding
    segments = [prompt] * (prompt > 0) + [1] * (1 + len(continuation))
    logits = reference_logits(lm.model, lm.plan, torch.tensor([context + continuation]), None, segments)
    log_probs = logits[0, len(context) - 1 : -1].float().log_softmax(-1)
    targets = torch.tensor(continuation)
    return float(log_probs.gather(1, targets[:, None]).sum()), bool((log_probs.argmax(-1) == targets).all())


def greedy_by_definition(lm, prompt, tokens):
    ids = lm.tok_encode(prompt)
    found = []
    for _ in range(tokens):
        logits = reference_logits(lm.model, lm.plan, torch.tensor([ids + found]), None, len(ids))
        found.append(int(logits[0, -1].argmax()))
        if found[-1] == lm.eot_token_id:
            break
    return lm.tok_decode(found)


@pytest.fixture(scope="module")
def plans(tiny_folder, tmp_path_factory):
    """Plan files for the tiny model: full heads, and random patterns."""
    model, folder = HFLM(str(tiny_folder), device="cpu").model, tmp_path_factory.mktemp("plans")
    made = {"full": Plan.full(model), "drawn": random_plan(model, 3)}
    return {name: str(plan.save(folder / f"{name}.json")) for name, plan in made.items()}


@pytest.mark.parametrize("batch", [1, 3])
def test_without_a_plan_or_with_full_heads_it_equals_hflm(batch, tiny_folder, plans):
    own = answers(HFLM(str(tiny_folder), device="cpu", batch_size=batch))
    assert answers(HeadsinkLM(str(tiny_folder), None, device="cpu", batch_size=batch)) == own
    same(answers(HeadsinkLM(str(tiny_folder), plans["full"], device="cpu", batch_size=batch)), own)


@pytest.mark.parametrize("batch", [1, 3])
def test_continuations_are_scored_by_the_definition(batch, tiny_folder, plans):
    lm = HeadsinkLM(str(tiny_folder), plans["drawn"], device="cpu", batch_size=batch)
    own = HFLM(str(tiny_folder), device="cpu")
    found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for pair, (likelihood, is_greedy) in zip(PAIRS, found, strict=True):
        expected, greedy = by_definition(lm, *encoded(lm, *pair))
        assert likelihood == pytest.approx(expected, rel=1e-5)
        assert is_greedy == greedy
    without = own.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, without, strict=True)) > 1e-2  # the plan matters


def test_logits_of_a_batch_padded_on_the_right_are_those_of_each_text(tiny_folder, plans):
    """Padded as in lm-eval, without a mask."""
    lm = HeadsinkLM(str(tiny_folder), plans["drawn"], device="cpu")
    ids = torch.randint(3, 200, (3, 50))
    for row, length in enumerate((50, 31, 8)):
        ids[row, length:] = lm.tokenizer.pad_token_id or 0
    logits = lm._model_call(ids)
    for row, length in enumerate((50, 31, 8)):
        expected = reference_logits(lm.model, lm.plan, ids[row : row + 1, :length], None, 1)[0]
        torch.testing.assert_close(logits[row, :length], expected, rtol=2e-4, atol=2e-4)


def test_scores_without_the_plan_are_never_given(tiny_folder, plans):
    """Another program has wrapped the decoder and drops the cache."""
    lm = HeadsinkLM(str(tiny_folder), plans["drawn"], device="cpu")
    inner = lm.model.model.forward
    lm.model.model.forward = lambda *args, **given: inner(
        *args, **{name: value for name, value in given.items() if name not in NAMES}
    )
    with pytest.raises(HeadsinkError, match="the plan was not applied"):
        lm.loglikelihood(requests("loglikelihood", PAIRS[:1]), disable_tqdm=True)


def test_the_full_caches_greedy_continuation_is_greedy(tiny_folder, plans):
    lm = HeadsinkLM(str(tiny_folder), plans["drawn"], device="cpu")
    context = lm.tok_encode(PROMPTS[0])
    segments = [len(context) - 1, 1]
    said = int(reference_logits(lm.model, lm.plan, torch.tensor([context]), None, segments)[0, -1].argmax())
    likely, unlikely = lm._loglikelihood_tokens([(None, context, [said]), (None, context, [said ^ 1])])
    assert (likely[1], unlikely[1]) == (True, False)


def test_whole_texts_are_scored_by_the_definition_in_windows(tiny_folder, plans):
    lm = HeadsinkLM(str(tiny_folder), plans["drawn"], device="cpu", batch_size=2, max_length=40)
    for text, found in zip(TEXTS, lm.loglikelihood_rolling(requests("loglikelihood_rolling", TEXTS)), strict=True):
        ids, start, expected = [lm.prefix_token_id, *lm.tok_encode(text)], 0, 0.0
        while (
            start < len(ids) - 1
        ):  # disjoint: each window starts where the previous one ended; the last is filled with earlier tokens
            end = min(start + 40, len(ids) - 1)
            begin = max(0, end - 40) if start else 0
            expected += by_definition(lm, ids[begin : start + 1], ids[start + 1 : end + 1])[0]
            start = end
        assert found == pytest.approx(expected, rel=1e-5)


def test_contexts_that_are_too_long_lose_their_beginning(tiny_folder, plans):
    lm = HeadsinkLM(str(tiny_folder), plans["drawn"], device="cpu", max_length=32)
    lm.model.config.max_position_embeddings = 32  # so that one more token is an error
    context, continuation = encoded(lm, *PAIRS[0])
    found = lm.loglikelihood(requests("loglikelihood", PAIRS[:1]), disable_tqdm=True)[0][0]
    rest = (context + continuation)[-33 : -len(continuation)]
    assert found == pytest.approx(by_definition(lm, rest, continuation)[0], rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_it_generates_by_the_definition_up_to_a_stop(batch, tiny_folder, plans):
    lm = HeadsinkLM(str(tiny_folder), plans["drawn"], device="cpu", batch_size=batch)
    asked = [(prompt, {"until": [], "max_gen_toks": 4}) for prompt in PROMPTS]
    found = lm.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert found == [greedy_by_definition(lm, prompt, 4) for prompt in PROMPTS]
    stop = found[0][len(found[0]) // 2 :][:3]
    cut = lm.generate_until(
        requests("generate_until", [(PROMPTS[0], {"until": [stop], "max_gen_toks": 4})]), disable_tqdm=True
    )
    assert cut == [found[0].split(stop)[0]]


def test_a_real_model_with_full_heads_and_under_a_plan(smollm2, tmp_path):
    model, tokenizer = smollm2
    own = HFLM(model, tokenizer=tokenizer, batch_size=3)
    Plan.full(model).save(tmp_path / "full.json")
    asked = PAIRS[2:4], TEXTS[1:], PROMPTS[1:2]
    lm = HeadsinkLM("smollm2", str(tmp_path / "full.json"), device="cpu", batch_size=3)
    same(answers(lm, *asked), answers(own, *asked))
    lm.plan = random_plan(model, 1)
    found = lm.loglikelihood(requests("loglikelihood", PAIRS[2:3]), disable_tqdm=True)
    expected = [by_definition(lm, *encoded(lm, *pair))[0] for pair in PAIRS[2:3]]
    assert [likelihood for likelihood, _ in found] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("plan", [None, "drawn"])
def test_caches_in_8_bits(tiny_folder, plans, plan):
    plan = plan and plans[plan]
    found, exact = (HeadsinkLM(str(tiny_folder), plan, device="cpu", kv_dtype=kind) for kind in ("int8", "auto"))
    one, other = (
        [likelihood for likelihood, _ in lm.loglikelihood(requests("loglikelihood", PAIRS[:4]), disable_tqdm=True)]
        for lm in (found, exact)
    )
    assert one != other
    assert one == pytest.approx(other, rel=1e-2)
    assert found._prefill(list(range(3, 60))).kv_dtype == "int8"
    with pytest.raises(HeadsinkError, match="kv_dtype: 'int3'"):
        HeadsinkLM(str(tiny_folder), plan, device="cpu", kv_dtype="int3")


def test_errors_are_one_line_that_names_the_option(tiny_folder, plans):
    with pytest.raises(HeadsinkError, match="the plan is for another model: layers is 30 here and 3 in the plan"):
        HeadsinkLM("smollm2", plans["drawn"], device="cpu")
    with pytest.raises(
        HeadsinkError, match=r"model_args: peft is not an option of the model headsink, which has pretr"
    ):
        HeadsinkLM(str(tiny_folder), plans["drawn"], peft="adapter")
    with pytest.raises(HeadsinkError, match=r"cannot read plan nosuch\.json"):
        HeadsinkLM(str(tiny_folder), "nosuch.json")


def test_a_sequence_beyond_the_measured_lengths_warns_once(tiny_folder, plans, tmp_path):
    plan = Plan.load(plans["drawn"]).model_dump() | {"quality": [QUALITY | {"context": 20}]}
    Plan.model_validate(plan).save(tmp_path / "measured.json")
    lm = HeadsinkLM(str(tiny_folder), str(tmp_path / "measured.json"), device="cpu")
    asked = [(PROMPTS[0], {"until": [], "max_gen_toks": 2})]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        lm.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert len([w for w in seen if "the plan's quality was measured up to 20" in str(w.message)]) == 1


TASKS = {
    "choice": (
        [{"text": STORY * 2 + "The ships were", "choices": [" counted", " sunk", " sold off"], "answer": 0}] * 2,
        """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
""",
    ),
    "whole": (
        [{"text": text} for text in TEXTS],
        """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
""",
    ),
    "answer": (
        [{"text": prompt, "answer": "none"} for prompt in PROMPTS],
        """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
metric_list:
  - metric: exact_match
""",
    ),
}


def test_the_harness_s_command_runs_tasks_under_a_plan(tiny_folder, plans, tmp_path):
    for name, (rows, settings) in TASKS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = f"{{data_files: {{test: {tmp_path / name}.jsonl}}}}"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test"
        (tmp_path / f"{name}.yaml").write_text(head + settings)
    words = [
        "--model",
        "headsink",
        "--model_args",
        f"pretrained={tiny_folder},plan={plans['drawn']}",
        "--device",
        "cpu",
    ]
    words += ["--tasks", ",".join(f"{tmp_path / name}.yaml" for name in TASKS), "--batch_size", "2", "--log_samples"]
    words += ["--output_path", str(tmp_path / "out"), "--apply_chat_template"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "headsink.integrations.lm_eval"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["config"]["plan"]["patterns"] == Plan.load(plans["drawn"]).counts()
    lm = HeadsinkLM(str(tiny_folder), plans["drawn"], device="cpu")
    (samples,) = (tmp_path / "out").rglob("samples_choice_*.jsonl")
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for arguments, ((likelihood, _),) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            context, continuation = arguments["arg_0"], arguments["arg_1"]
            assert context.startswith("<|im_start|>")  # the model's chat format
            assert float(likelihood) == pytest.approx(
                by_definition(lm, *encoded(lm, context, continuation))[0], rel=1e-5
            )
    bits = found["results"]["whole"]["bits_per_byte,none"]
    scored = [by_definition(lm, [lm.prefix_token_id], lm.tok_encode(text))[0] for text in TEXTS]
    nats = -sum(scored) / sum(len(text.encode()) for text in TEXTS)
    assert bits == pytest.approx(nats / torch.tensor(2.0).log().item(), rel=1e-4)


def test_an_error_of_the_user_s_ends_the_command_with_one_line(tiny_folder, monkeypatch):
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: HeadsinkLM(str(tiny_folder), "nosuch.json"))
    with pytest.raises(SystemExit, match=r"^headsink: cannot read plan nosuch\.json: No such file or directory$"):
        main()
