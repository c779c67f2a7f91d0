"""`headsink bench serving`, without vLLM. tests_vllm/test_serve.py measures a server."""

import sys

import pytest
from families import tiny

from headsink import Pattern, Plan
from headsink.bench import serving
from headsink.cli.main import main
from headsink.models import loading


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clients", "0"], "clients: 0 clients send nothing"),
        (["--clients", "many"], "clients: 'many' is not a list of whole numbers"),
        (["--ways", "stock,dence"], "ways: 'dence' is not one of stock, dense, sparse"),
    ],
)
def test_bad_options_end_with_one_line_and_status_2(tmp_path, capsys, monkeypatch, options, message):
    plan = Plan.uniform(tiny("llama"), Pattern(4, 0, 64)).save(tmp_path / "plan.json")
    monkeypatch.setattr(sys, "argv", ["headsink", "bench", "serving", "smollm2", "--plan", str(plan), *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().startswith(f"headsink: {message}")


def test_prompts_are_held_out_documents_with_a_question():
    folder = loading.find("smollm2")[0]
    found = serving.questions(folder, 3, 600)
    assert found == serving.questions(folder, 3, 600)
    for prompt, answer in found:
        assert len(prompt) > 1000
        assert answer.strip()
        assert answer.strip() in prompt  # in the needle
    assert len({prompt for prompt, _ in found}) == 3


def test_ratios_are_those_of_the_same_round():
    load = serving.Load("smollm2", None, (1, 4), 1, 400, 8, 2, ("stock", "dense"), 1)
    speed = {"stock": (10.0, 20.0), "dense": (15.0, 50.0)}
    rows = [
        {"way": way, "clients": clients, "round": turn, "tokens_per_s": clients * speed[way][turn], "mean_running": 1.0}
        for way in speed
        for clients in (1, 4)
        for turn in (0, 1)
    ]
    found = serving.ratios(load, rows)
    assert [one["clients"] for one in found] == [1, 4]
    assert all(one["tokens_per_s"]["all"] == [1.5, 2.5] for one in found)
