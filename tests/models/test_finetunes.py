"""Fine-tunes, wrappers and float16: which models a plan is for, and how one is used for other weights of the same shape."""

import copy
import json
import sys

import pytest
import torch
import torch.distributed as dist
from families import tiny
from peft import (
    LoraConfig,
    PeftMixedModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from plans import QUALITY, random_plan
from reference import reference_logits
from torch import nn
from transformers import LlamaForCausalLM

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.cli import main
from headsink.decoding.step import refusal
from headsink.models.distributed import output_weight
from headsink.models.fingerprint import weights_hash
from headsink.models.rope import inverse_frequencies
from headsink.models.spec import attention_modules, decoder, describe, unwrap

TARGETS = ["q_proj", "v_proj", "o_proj"]


def lora(model, **options):
    """The model with an adapter that changes its outputs."""
    options = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    wrapped = get_peft_model(model, LoraConfig(**options)).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# wrappers


def wrappers_of(model):
    """Wrappers that do not change a model's outputs, also nested."""
    frozen = get_peft_model(model, LoraConfig(target_modules=TARGETS))
    frozen.disable_adapter_layers()
    return {
        "compiled": torch.compile(model, backend="eager"),
        "parallel": nn.DataParallel(model),
        "peft": frozen,
        "peft's base": frozen.base_model,
        "compiled peft": torch.compile(frozen, backend="eager"),
    }


@pytest.mark.parametrize("kind", ["compiled", "parallel", "peft", "peft's base", "compiled peft"])
def test_a_wrapper_counts_as_the_wrapped_model(kind):
    model = tiny("llama")
    plan, shape = random_plan(model, 1), describe(model)
    wrapper = wrappers_of(model)[kind]
    assert unwrap(wrapper) is model
    assert plan.check(wrapper) == describe(wrapper) == shape
    assert decoder(wrapper) is model.model
    assert attention_modules(wrapper) == attention_modules(model)
    assert torch.equal(inverse_frequencies(wrapper), inverse_frequencies(model))
    assert weights_hash(wrapper) == weights_hash(tiny("llama"))
    assert plan.for_model(wrapper) is plan
    with pytest.raises(HeadsinkError, match="other weights"):
        random_plan(tiny("llama", seed=1), 1).check(wrapper)


def test_distributed_data_parallel_counts_as_the_model(process_group):
    model = tiny("llama")
    wrapper = nn.parallel.DistributedDataParallel(model)
    assert random_plan(model, 1).check(wrapper) == describe(model)


def test_compiled_layers_are_found():
    model = tiny("llama")
    plan = random_plan(model, 1)
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    assert plan.check(model).layers == 3
    model.model = torch.compile(model.model, backend="eager")
    assert plan.check(model).layers == 3


def test_a_subclass_is_named_by_its_transformers_class():
    class Own(LlamaForCausalLM):
        """A user's subclass of a model."""

    model = tiny("llama")
    plan = random_plan(model, 1)
    model.__class__ = Own
    assert plan.check(model).name == "LlamaForCausalLM"


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2))])
def test_other_objects_are_refused_as_models(model):
    with pytest.raises(HeadsinkError, match=rf"^{type(model).__name__} is not a transformers model$"):
        describe(model)
    with pytest.raises(HeadsinkError, match="is not a transformers model"):
        weights_hash(model)


# adapters


def test_an_active_adapter_changes_the_fingerprint():
    model = tiny("llama")
    plan = random_plan(model, 1)
    wrapped = lora(model)
    for tuned in (wrapped, wrapped.base_model, model):  # PEFT changes the model in place
        with pytest.raises(HeadsinkError, match="without its adapter, which makes it a fine-tune: use plan") as error:
            plan.check(tuned)
        assert "\n" not in str(error.value)
        assert "--other-weights" in str(error.value)
    assert len({weights_hash(wrapped), weights_hash(wrapped.base_model), weights_hash(model)}) == 1
    assert weights_hash(wrapped) != weights_hash(tiny("llama"))
    assert weights_hash(lora(tiny("llama"), r=2)) != weights_hash(wrapped)
    with pytest.raises(HeadsinkError, match="if this is a fine-tune of that model"):
        random_plan(tiny("llama", seed=1), 1).check(wrapped)


def test_a_disabled_adapter_does_not_change_the_fingerprint():
    model = tiny("llama")
    plan, wrapped = random_plan(model, 1), lora(tiny("llama"))
    with wrapped.disable_adapter():
        assert plan.check(wrapped)
    with pytest.raises(HeadsinkError, match="without its adapter"):
        plan.check(wrapped)


def test_only_the_active_adapter_counts():
    wrapped = lora(tiny("llama"))
    wrapped.add_adapter("second", LoraConfig(r=2, target_modules=["k_proj"]))
    first = weights_hash(wrapped)
    wrapped.set_adapter("second")
    assert weights_hash(wrapped) != first
    wrapped.set_adapter("default")
    assert weights_hash(wrapped) == first


def test_a_merged_adapter_is_part_of_the_weights():
    plan, wrapped = random_plan(tiny("llama"), 1), lora(tiny("llama"))
    wrapped.merge_adapter()
    merged = weights_hash(wrapped)
    with pytest.raises(
        HeadsinkError, match=r"the plan is for other weights: .* if this is a fine-tune of that model, use"
    ):
        plan.check(wrapped)
    plain = wrapped.merge_and_unload()
    assert type(plain) is LlamaForCausalLM
    assert weights_hash(plain) == merged
    with pytest.raises(HeadsinkError, match="if this is a fine-tune of that model"):
        plan.check(plain)


def test_trained_modules_and_tokens_count():
    plan = random_plan(tiny("llama"), 1)
    for options in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}):
        wrapped = lora(tiny("llama"), target_modules=["q_proj"], **options)
        with pytest.raises(HeadsinkError, match="without its adapter"):
            plan.check(wrapped)
        with wrapped.disable_adapter():
            assert plan.check(wrapped)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_tuning_is_an_adapter(config):
    model = tiny("llama")
    plan = random_plan(model, 1)
    wrapped = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(HeadsinkError, match="without its adapter"):
        plan.check(wrapped)
    assert plan.check(wrapped.get_base_model())  # the base model is unaffected by the prompt


def test_injected_and_mixed_adapters_are_detected():
    plan = random_plan(tiny("llama"), 1)
    model = inject_adapter_in_model(LoraConfig(target_modules=TARGETS), tiny("llama"))  # as model.add_adapter does
    mixed = PeftMixedModel(tiny("llama"), LoraConfig(target_modules=TARGETS))
    for tuned in (model, mixed):
        with pytest.raises(HeadsinkError, match="without its adapter"):
            plan.check(tuned)


def test_the_output_projection_includes_its_adapter():
    tuned = lora(tiny("llama"), lora_alpha=16, use_dora=True)
    found = [output_weight(module, 2)[0] for module in attention_modules(tuned)]
    plain = attention_modules(tuned.merge_and_unload())
    for weight, module in zip(found, plain, strict=True):
        torch.testing.assert_close(weight, module.o_proj.weight, rtol=1e-5, atol=1e-5)


def test_the_decode_step_refuses_an_adapter():
    assert refusal(tiny("llama")) is None
    for dtype in (torch.float32, torch.bfloat16):  # PEFT's own weights stay in float32
        assert "merge_and_unload" in refusal(lora(tiny("llama", dtype=dtype)))


# other weights, on request


def fine_tuned(model):
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1 + 0.01 * torch.randn_like(parameter))
    return tuned


def test_a_plan_is_used_for_a_fine_tune_on_request(tmp_path):
    model = tiny("llama")
    plan = Plan.model_validate({**random_plan(model, 1).model_dump(), "quality": [QUALITY], "calibration": {"seed": 3}})
    tuned = fine_tuned(model)
    with pytest.raises(
        HeadsinkError, match=r"a fine-tune of that model, use plan\.for_model\(model\), or --other-weights"
    ):
        plan.check(tuned)
    other = plan.for_model(tuned)
    assert other.layers == plan.layers
    assert other.quality == ()
    assert other.calibration == {"seed": 3, "weights_of": weights_hash(model)}
    assert other.check(tuned) == describe(tuned)
    assert Plan.load(other.save(tmp_path / "plan.json")) == other
    with pytest.raises(HeadsinkError, match="other weights"):
        other.check(model)
    again = other.for_model(fine_tuned(tuned))
    assert again.calibration["weights_of"] == weights_hash(model)
    assert plan.for_model(model) is plan
    assert plan.quality
    ids = torch.randint(3, 211, (1, 40))
    with headsink.apply(tuned, other), torch.no_grad():
        found = tuned(ids).logits
    torch.testing.assert_close(found, reference_logits(tuned, plan, ids), rtol=1e-4, atol=1e-4)


def test_a_plan_runs_with_an_adapter_and_with_it_merged():
    model = tiny("llama")
    plan, ids = random_plan(model, 1), torch.randint(3, 211, (1, 40))
    wrapped = lora(tiny("llama"))
    with headsink.apply(wrapped, plan.for_model(wrapped)), torch.no_grad():
        unmerged = wrapped(input_ids=ids).logits
        text = wrapped.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    with headsink.apply(wrapped.get_base_model(), plan.for_model(wrapped.get_base_model())), torch.no_grad():
        torch.testing.assert_close(wrapped(input_ids=ids).logits, unmerged)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(unmerged, reference_logits(merged, plan, ids), rtol=1e-4, atol=1e-4)
    with headsink.apply(merged, plan.for_model(merged)):
        assert torch.equal(merged.generate(ids, max_new_tokens=5, do_sample=False), text)


def test_another_class_of_the_same_shape_is_named_and_allowed():
    plan, other = random_plan(tiny("llama"), 1), tiny("qwen2")
    with pytest.raises(HeadsinkError, match=r"architecture is Qwen2ForCausalLM here and LlamaForCausalLM .*for_model"):
        plan.check(other)
    assert plan.for_model(other).check(other).name == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama-mha", "the plan is for another model: kv_heads is 4 here and 2 in the plan"),
        ("qwen3", "the plan is for another model: head_dim is 16 here and 12 in the plan"),
        ("mistral-sliding", "layers.0: this layer of the model is of kind sliding_attention"),
        ("gemma3", "head_dim is 16"),
    ],
)
def test_a_model_of_another_shape_is_still_refused(family, reason):
    plan = random_plan(tiny("llama"), 1)
    with pytest.raises(HeadsinkError, match=reason) as error:
        plan.for_model(tiny(family))
    assert "fine-tune" not in str(error.value)


def test_a_plans_requirements_are_checked():
    plan = Plan.uniform(tiny("llama"), Pattern(), reconstruction_prompt=(5, 211))
    for use in (plan.check, plan.for_model):
        with pytest.raises(
            HeadsinkError, match="reconstruction_prompt: 211 is no token of this model, which has 0 to 210"
        ):
            use(tiny("llama"))
    assert Plan.uniform(tiny("llama"), Pattern(), reconstruction_prompt=(5, 210)).check(tiny("llama"))
    assert (
        Plan.uniform(tiny("llama"), Pattern(1, 0, 4), positions="cache-relative").for_model(tiny("mistral")).positions
        == "cache-relative"
    )


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["headsink", *map(str, words), "--device", "cpu"])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main.main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def base_plan(tiny_folder, tmp_path):
    """The plan of a model of which the one in the folder could be a fine-tune."""
    plan = Plan.uniform(fine_tuned(headsink.load(tiny_folder, device="cpu")[0]), Pattern(4, 0, 64))
    return plan.save(tmp_path / "base.json")


BENCH_QUALITY = ("--tasks", "perplexity", "--items", 1, "--context", 500)
COMMANDS = {
    "generate": ("generate", ("--prompt", "Hello", "--max-new-tokens", 2)),
    "prefill": ("prefill", ("--file", "text")),
    "bench quality": ("bench quality", BENCH_QUALITY),
    "bench speed": ("bench speed", ("--contexts", 24, "--tokens", 3, "--rounds", 1)),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_accept_the_plan_of_other_weights_on_request(run, tiny_folder, base_plan, tmp_path, command):
    (tmp_path / "text").write_text("A text that is read.")
    name, options = COMMANDS[command]
    words = (*name.split(), tiny_folder, "--plan", base_plan, *options, "--json")
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert "or --other-weights on the command line" in err.splitlines()[-1]
    status, out, err = run(*words, "--other-weights")
    assert status == 0, err
    assert json.loads(out)


@pytest.mark.parametrize("command", ["generate", "chat", "bench quality"])
def test_other_weights_needs_a_plan(run, tiny_folder, command):
    words = COMMANDS.get(command, ("chat", ()))
    status, out, err = run(*words[0].split(), tiny_folder, *words[1], "--other-weights")
    assert (status, out) == (2, "")
    assert err == "headsink: other-weights: it needs a plan that was made for other weights: --plan FILE\n"


# float16


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_float16_of_the_same_weights_is_the_same_model(family, kind):
    for seed in range(2):
        model = tiny(family, seed, dtype=kind)
        with torch.no_grad():  # some are subnormal or zero in float16
            for parameter in model.parameters():
                parameter.flatten()[::7] *= 10.0 ** -torch.randint(0, 12, parameter.flatten()[::7].shape)
        half = copy.deepcopy(model).half()
        assert weights_hash(half) != weights_hash(model)
        assert Plan.full(model).check(half)
        assert Plan.full(half).check(model)
        assert Plan.full(half).check(copy.deepcopy(model).bfloat16())
        assert Plan.full(half).check(copy.deepcopy(half).float())


def test_other_weights_in_float16_are_refused():
    model = tiny("llama")
    plan, half = Plan.full(model), tiny("llama").half()
    one_layer, one_adapter = tiny("llama"), lora(tiny("llama"), r=1, target_modules=["v_proj"]).merge_and_unload()
    one_layer.model.layers[2] = fine_tuned(one_layer.model.layers[2])
    for other in (fine_tuned(model), tiny("llama", seed=1), one_layer, one_adapter):
        for planned, found in ((plan, other.half()), (Plan.full(half), other.float()), (Plan.full(half), other.half())):
            with pytest.raises(HeadsinkError, match="the plan is for other weights"):
                planned.check(found)


def test_a_plan_without_a_float16_hash_is_refused_for_float16():
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.flatten()[::7] *= 1e-6
    fields = Plan.full(model).model_dump(mode="json")
    del fields["model"]["values"], fields["model"]["float16"]
    old = Plan.model_validate(fields)
    assert old.check(model)
    with pytest.raises(
        HeadsinkError, match=r"before they were rounded to float16.* cannot tell: make it again, or use plan"
    ):
        old.check(model.half())
    assert old.for_model(model).check(model)


# other quantisations


def test_linear_layers_of_codes_are_a_quantised_copy():
    """As in bitsandbytes and FP8: a matrix of 8-bit codes, and scales."""
    model = tiny("llama")
    plan, other = random_plan(model, 1), tiny("llama", seed=1)
    for found in (model, other):
        for layer in found.model.layers:
            codes = (layer.mlp.up_proj.weight * 100).to(torch.int8)
            layer.mlp.up_proj.weight = nn.Parameter(codes, requires_grad=False)
            layer.mlp.up_proj.scale = nn.Parameter(torch.ones(1))
    assert plan.check(model)
    with pytest.raises(HeadsinkError, match="the hash of unquantised is"):
        plan.check(other)
    with pytest.raises(HeadsinkError, match="without its adapter"):
        plan.check(lora(model))
