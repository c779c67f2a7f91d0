"""Serving with vLLM: everything that does not need vLLM. tests_vllm tests the engine's outputs."""

import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from families import SHAPE, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import visible
from plans import random_plan
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

import headsink.serving.vllm.settings
from headsink import HeadsinkError, Pattern, Plan
from headsink.models.distributed import rank_heads
from headsink.serving.vllm import blocks, groups, launch
from headsink.serving.vllm import settings as vllm_settings
from headsink.serving.vllm.skeleton import check_folder
from headsink.utils import versions

patterns = st.one_of(
    st.just(Pattern()), st.builds(Pattern, sink=st.integers(0, 70), window=st.integers(0, 150), top_k=st.just(0))
)


def windowed(rng: random.Random) -> Pattern:
    return Pattern() if rng.random() < 0.2 else Pattern(rng.choice([0, 4]), 0, rng.choice([16, 100, 128, 500]))


@pytest.fixture
def vllm_of(tmp_path, monkeypatch):
    """Return a function that puts a fake vllm package of a given version on the path."""

    def install(version):
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('vLLM is not to be imported')")
        (tmp_path / "vllm" / "_version.py").write_text(f"__version__ = version = '{version}'\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.mark.slow
@given(patterns, st.sampled_from([1, 16, 32, 128]), st.integers(0, 300), st.integers(1, 200))
@settings(max_examples=200)
def test_blocks_are_the_fewest_that_contain_the_pattern(pattern, block, start, length):
    queries, keys = torch.arange(start, start + length), torch.arange(start + length)
    exact = visible(pattern, queries, keys, torch.zeros(len(keys)))
    kept = blocks.widen(pattern, block)
    assert not (exact & ~blocks.visible(kept, block, queries, keys)).any()
    if kept.back:
        far = torch.arange(block * (kept.sink + kept.back + 2))
        less = blocks.visible(blocks.Blocks(kept.sink, kept.back - 1), block, far, far)
        assert (visible(pattern, far, far, torch.zeros(len(far))) & ~less).any()


def test_peak_blocks_equal_the_visible_blocks():
    for kept in (blocks.Blocks(0, 0), blocks.Blocks(2, 1), blocks.Blocks(1, 3), blocks.ALL):
        for tokens in (1, 15, 16, 17, 100):
            positions = torch.arange(tokens)
            seen = blocks.visible(kept, 16, positions, positions)
            most = max(len({int(key) // 16 for key in row.nonzero()}) for row in seen)
            assert kept.cached_tokens(tokens, 16) == most


@pytest.mark.parametrize("ranks", [1, 2])
def test_groups_cover_every_head_and_their_bytes_are_correct(ranks):
    model = tiny("llama-mha")
    for seed in range(20):
        plan = random_plan(model, seed, windowed)
        found = groups.choose(plan, [None] * 3, 16, 4096, 256, ranks)
        for heads, units in zip(plan.layers, found.units, strict=True):
            for mine in rank_heads(4, ranks):
                order = groups.widest_first([head.pattern for head in heads], mine)
                for unit, n in zip(units, order, strict=True):
                    needed = blocks.widen(heads[mine[n]].pattern, 16)
                    assert blocks.union([unit, needed]) == unit
        kinds = Counter(unit for units in found.units for unit in units)
        size = groups.group_size(list(kinds.values()))
        slots = {kind: -(-count // size) * size for kind, count in kinds.items()}
        assert found.groups == sum(slots.values()) // size <= groups.MOST_GROUPS
        assert found.used == sum(slots[kind] * kind.cached_tokens(4096, 16) for kind in kinds) * 16 * 256
        assert found.planned <= found.used


def test_merging_is_never_worse_than_groups_of_equal_patterns():
    model = tiny("llama-mha")
    for seed in range(20):
        plan = random_plan(model, seed, windowed)
        kinds = Counter(blocks.widen(head.pattern, 16) for layer in plan.layers for head in layer)
        size = groups.group_size(list(kinds.values()))
        number = sum(-(-count // size) for count in kinds.values())
        alone = sum(-(-count // size) * size * kind.cached_tokens(4096, 16) for kind, count in kinds.items()) * 16 * 256
        if number <= groups.MOST_GROUPS:
            assert groups.choose(plan, [None] * 3, 16, 4096, 256, 1).used <= alone


def test_a_plan_balanced_for_ranks_has_no_overhead():
    """For a plan with equal budgets on two ranks, each rank takes half of the bytes of one; for others more."""
    model = tiny("llama-mha")
    for seed in range(20):
        plan = random_plan(model, seed, windowed)
        alike = plan.model_copy(update={"layers": tuple((*row[:2], *row[1::-1]) for row in plan.layers)})
        one, two = (groups.choose(alike, [None] * 3, 16, 4096, 256, ranks) for ranks in (1, 2))
        assert two.planned == one.planned / 2
        uneven = groups.choose(plan, [None] * 3, 16, 4096, 256, 2)
        assert uneven.planned >= groups.choose(plan, [None] * 3, 16, 4096, 256, 1).planned / 2


def test_heads_are_split_over_ranks_or_repeated():
    assert rank_heads(4, 2) == [[0, 1], [2, 3]]
    assert rank_heads(2, 4) == [[0], [0], [1], [1]]


def test_a_folder_is_checked_by_its_shape_and_its_weights(tmp_path):
    model = tiny("llama")
    plan = Plan.uniform(model, Pattern(4, 0, 64))
    model.save_pretrained(tmp_path / "same")
    check_folder(plan, tmp_path / "same")
    tiny("llama", seed=1).save_pretrained(tmp_path / "weights")
    with pytest.raises(
        HeadsinkError, match=r"other weights: the hash of weights is \w{12} here and \w{12} in the plan"
    ):
        check_folder(plan, tmp_path / "weights")
    tiny("llama-mha").save_pretrained(tmp_path / "shape")
    with pytest.raises(HeadsinkError, match="kv_heads is 4 here and 2 in the plan"):
        check_folder(plan, tmp_path / "shape")


def test_tied_weights_are_left_out_of_a_checkpoints_hash(tmp_path):
    model = tiny("gemma3")
    model.save_pretrained(tmp_path)
    check_folder(Plan.uniform(model, Pattern(4, 0, 64)), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SHAPE, num_local_experts=3, num_experts_per_tok=2),
        OlmoeConfig(**SHAPE, num_experts=3, num_experts_per_tok=2),
        Qwen3MoeConfig(**SHAPE, moe_intermediate_size=32, num_experts=3, num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)
def test_experts_are_hashed_one_by_one(tmp_path, config):
    model = AutoModelForCausalLM.from_config(config)
    plan = Plan.uniform(model, Pattern(4, 0, 64))
    model.save_pretrained(tmp_path)
    check_folder(plan, tmp_path)
    name = next(name for name, _ in model.named_parameters() if name.endswith("experts.gate_up_proj"))
    changed = model.get_parameter(name).data
    changed[1] = changed[1].roll(1, 0)
    model.save_pretrained(tmp_path)
    with pytest.raises(HeadsinkError, match="other weights"):
        check_folder(plan, tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {key: weight for key, weight in load_file(file).items() if ".experts.2." not in key}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(HeadsinkError, match=r"the checkpoint has no .*experts\.down_proj"):
        check_folder(plan, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: (Plan.uniform(model, Pattern(4, 0, 64), positions="cache-relative"),), "--positions absolute"),
        (
            lambda model: (Plan.uniform(model, Pattern(4, 0, 64)), "dense", ["x.kv"]),
            "only under a plan with top-k keys",
        ),
        (
            lambda _: (random_plan(tiny("gemma3"), 0, lambda _: Pattern(4, 2, 64)), "dense", ["x.kv"]),
            "models with sliding-window layers",
        ),
    ],
)
def test_unservable_plans_and_prefixes_are_refused(vllm_of, make, message):
    vllm_of("0.32.1")
    with pytest.raises(HeadsinkError, match=message):
        headsink.serving.vllm.settings.engine_args(*make(tiny("llama")))


def test_families_that_are_not_served_are_refused(vllm_of):
    vllm_of("0.32.1")
    with pytest.raises(HeadsinkError, match=r"Phi3ForCausalLM cannot be served.*Llama, Mistral"):
        headsink.serving.vllm.settings.engine_args(Plan.uniform(tiny("phi3"), Pattern(4, 0, 64)))


def test_a_plan_with_top_k_keys_is_served_without_prefix_caching(vllm_of):
    vllm_of("0.32.0")
    model = tiny("llama")
    plan = random_plan(model, 0, lambda _: Pattern(4, 2, 64))
    assert headsink.serving.vllm.settings.engine_args(plan)["enable_prefix_caching"] is False
    assert "enable_prefix_caching" not in headsink.serving.vllm.settings.engine_args(Plan.full(model))


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.320.0", "0.3.0"])
def test_another_version_of_vllm_is_refused(vllm_of, version):
    vllm_of(version)
    with pytest.raises(HeadsinkError, match=rf"vLLM {version} is installed; headsink serves with vLLM 0\.32 or 0\.33:"):
        versions.check_vllm()


@pytest.mark.parametrize("version", ["0.32.1", "0.33.0", "0.33.0+cpu"])
def test_versions_that_the_plugin_is_written_for_are_accepted(vllm_of, version):
    vllm_of(version)
    assert versions.check_vllm() == version


def test_the_plan_is_passed_in_vllms_configuration(vllm_of):
    vllm_of("0.32.0")
    plan = Plan.uniform(tiny("llama"), Pattern(4, 0, 64))
    given = headsink.serving.vllm.settings.engine_args(plan)
    assert given["hf_overrides"] == {"architectures": ["HeadsinkLlamaForCausalLM"]}
    assert given["additional_config"]["headsink_prefill"] == "dense"
    assert vllm_settings.given_plan(given["additional_config"]).layers == plan.layers
    with pytest.raises(HeadsinkError, match="has no headsink_plan"):
        vllm_settings.given_plan({})
    with pytest.raises(HeadsinkError, match="not a valid plan"):
        vllm_settings.given_plan({"headsink_plan": {}})


def test_the_server_is_started_with_the_plan_and_vllm_options(vllm_of, tmp_path):
    vllm_of("0.32.0")
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    plan = Plan.uniform(model, Pattern(4, 0, 64)).save(tmp_path / "plan.json")
    folder = str(tmp_path / "model")
    found = launch.command(folder, plan, ["--port", "80", "--max-model-len=128"])
    assert found[:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    assert f"--served-model-name={folder}" in found
    assert ("--block-size=32" in found) != torch.cuda.is_available()
    assert ("--max-num-batched-tokens=512" in found) != torch.cuda.is_available()  # a plan without top-k keys
    assert "--block-size=32" not in launch.command(folder, plan, ["--block_size", "64"])
    other = launch.command(folder, plan, ["--headless", "--node-rank=1"])  # a machine without the server
    assert other[1:4] == ["vllm.entrypoints.cli.main", "serve", str(folder)]
    assert other[4:] == [*found[4:-3], "--headless", "--node-rank=1"]
    assert found[-3:] == ["--port", "80", "--max-model-len=128"]
    with pytest.raises(HeadsinkError, match="prefill: 'dence' is neither 'dense' nor 'sparse'"):
        launch.command(folder, plan, [], "dence")
    with pytest.raises(HeadsinkError, match="--hf-overrides: headsink serve sets it itself"):
        launch.command(folder, plan, ["--hf_overrides={}"])
    assert "--enable-prefix-caching" in launch.command(folder, plan, ["--enable-prefix-caching"])
    assert "--no-enable-lora" in launch.command(folder, plan, ["--no-enable-lora", "-pp", "1"])
    top_k = random_plan(model, 1).save(tmp_path / "top_k.json")
    for options, feature in (
        (["--enable-lora"], "a LoRA adapter"),
        (["--speculative_config={}"], "speculative decoding"),
        (["--port", "80", "--pipeline_parallel_size=2"], "pipeline parallelism"),
        (["-pp", "2"], "pipeline parallelism"),
        (["--enable-prefix-caching"], "prefix caching"),
    ):
        with pytest.raises(HeadsinkError, match=f"{feature} cannot be used together with a plan"):
            launch.command(folder, top_k, options)


def test_serve_without_vllm_ends_with_one_line_and_status_2(tmp_path, capsys, monkeypatch):
    (tmp_path / "plan.json").write_text("{}")
    from headsink.cli.main import main

    monkeypatch.setattr(
        sys, "argv", ["headsink", "serve", "smollm2", "--plan", str(tmp_path / "plan.json"), "--port", "1"]
    )
    monkeypatch.setattr(
        sys, "path", [p for p in sys.path if not Path(p, "vllm").is_dir() or Path(p, "headsink").is_dir()]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "headsink: vLLM is not installed; headsink serves with vLLM 0.32 or 0.33: pip install 'vllm>=0.32,<0.34'\n"
    )
