"""Tiny random models of the architectures in docs/families.md, and what headsink does with each.

python tests/support/architectures.py    # writes docs/families.md

A capability is "yes" if the outputs were right, else the reason of a `HeadsinkError`. Wrong outputs and other errors raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers as hf
from cached_documents import BRANCH, random_document
from reference import reference_logits
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.attention.rotary import layer_rotations
from headsink.calibration import calibrate
from headsink.calibration.cached_document import CachedDocument
from headsink.compression import continuations
from headsink.decoding.step import refusal
from headsink.eviction.scorers import LINEAR
from headsink.models.spec import describe
from headsink.models.transformers_names import cache_argument

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
TOKENS, PADS, NEW = 48, 13, 10
SPREAD = 1e-4  # of a model's own logits, read in one call and in several; above it chunks are not compared
BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZED = BASE | {"head_dim": 16}
KINDS = ["sliding_attention", "full_attention"] * 2
SLIDING = SIZED | {"sliding_window": 11, "layer_types": KINDS}
MOE = {"num_experts_per_tok": 2}
EXPERTS = MOE | {"num_experts": 4, "moe_intermediate_size": 32}
LOCAL = MOE | {"num_local_experts": 4}
ROUTED = MOE | {
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
DELTA_NET = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
OLD = {"vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = VISION | {"image_size": 16, "patch_size": 4}


def without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


# Name in docs/families.md: configuration, and the implementation of attention where it is not `sdpa`.
CONFIGS: dict[str, Callable[[], Any]] = {
    "AFMoE": lambda: hf.AfmoeConfig(**SLIDING, **EXPERTS, num_dense_layers=2),
    "Apertus": lambda: hf.ApertusConfig(**SIZED),
    "Arcee": lambda: hf.ArceeConfig(**SIZED),
    "BioGPT": lambda: hf.BioGptConfig(**without(BASE, "num_key_value_heads")),
    "BitNet": lambda: hf.BitNetConfig(**SIZED),
    "CodeGen": lambda: hf.CodeGenConfig(**OLD, rotary_dim=8),
    "Cohere": lambda: hf.CohereConfig(**BASE),
    "Cohere 2": lambda: hf.Cohere2Config(**SLIDING),
    "CWM": lambda: hf.CwmConfig(**SLIDING),
    "dots.1": lambda: hf.Dots1Config(**SIZED, **ROUTED, n_shared_experts=1),
    "ERNIE 4.5": lambda: hf.Ernie4_5Config(**SIZED),
    "ERNIE 4.5 MoE": lambda: hf.Ernie4_5_MoeConfig(**SIZED, moe_num_experts=4, moe_k=2, moe_intermediate_size=32),
    "EXAONE 4": lambda: hf.Exaone4Config(**SLIDING, sliding_window_pattern=2),
    "EXAONE MoE": lambda: hf.ExaoneMoeConfig(**SLIDING, **EXPERTS),
    "FlexOlmo": lambda: hf.FlexOlmoConfig(**BASE, **MOE, num_experts=4),
    "Gemma": lambda: hf.GemmaConfig(**SIZED),
    "Gemma 2": lambda: hf.Gemma2Config(**SLIDING, query_pre_attn_scalar=16),
    "Gemma 3": lambda: hf.Gemma3TextConfig(**SLIDING, query_pre_attn_scalar=16),
    "Gemma 3 (images)": lambda: hf.Gemma3Config(
        text_config=SLIDING | {"query_pre_attn_scalar": 16},
        vision_config=PIXELS,
        mm_tokens_per_image=4,
        image_token_index=255,
        boi_token_index=253,
        eoi_token_index=254,
    ),
    "Gemma 3n": lambda: hf.Gemma3nTextConfig(
        **SLIDING,
        vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=2,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "Gemma 4": lambda: hf.Gemma4TextConfig(
        **SLIDING,
        global_head_dim=32,
        num_global_key_value_heads=1,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        attention_k_eq_v=True,
    ),
    "Gemma 4 E": lambda: hf.Gemma4TextConfig(
        **SLIDING,
        global_head_dim=32,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=256,
        num_kv_shared_layers=2,
    ),
    "GLM": lambda: hf.GlmConfig(**SIZED, partial_rotary_factor=0.5),
    "GLM-4": lambda: hf.Glm4Config(**SIZED, partial_rotary_factor=0.5),
    "GLM-4 MoE": lambda: hf.Glm4MoeConfig(**SIZED, **ROUTED),
    "GPT-2": lambda: hf.GPT2Config(**OLD, bos_token_id=1, eos_token_id=2),
    "GPT-BigCode": lambda: hf.GPTBigCodeConfig(**OLD),
    "GPT-J": lambda: hf.GPTJConfig(**OLD, rotary_dim=8),
    "GPT-NeoX": lambda: hf.GPTNeoXConfig(**without(BASE, "num_key_value_heads")),
    "gpt-oss": lambda: hf.GptOssConfig(**SLIDING, **LOCAL),
    "Granite": lambda: hf.GraniteConfig(**BASE, attention_multiplier=0.2),
    "Granite MoE": lambda: hf.GraniteMoeConfig(**BASE, **LOCAL),
    "Granite 4 (attention only)": lambda: hf.GraniteMoeHybridConfig(
        **BASE, **LOCAL, layer_types=["attention"] * 4, shared_intermediate_size=32, position_embedding_type="rope"
    ),
    "Helium": lambda: hf.HeliumConfig(**SIZED),
    "Hunyuan": lambda: hf.HunYuanDenseV1Config(**SIZED),
    "Hunyuan MoE": lambda: hf.HunYuanMoEV1Config(**SIZED, num_experts=4, moe_topk=2),
    "Llama": lambda: hf.LlamaConfig(**SIZED),
    "LLaVA": lambda: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**SIZED),
        vision_config=hf.CLIPVisionConfig(**PIXELS),
        image_token_index=255,
        image_seq_length=16,
    ),
    "MiniMax-M2": lambda: hf.MiniMaxM2Config(**SIZED, **LOCAL),
    "Ministral 3": lambda: hf.Ministral3Config(**SIZED),
    "Mistral": lambda: hf.MistralConfig(**BASE, sliding_window=None),
    "Mixtral": lambda: hf.MixtralConfig(**BASE, **LOCAL, sliding_window=None),
    "ModernBERT decoder": lambda: hf.ModernBertDecoderConfig(
        **without(BASE, "num_key_value_heads"), cls_token_id=1, sep_token_id=2
    ),
    "NanoChat": lambda: hf.NanoChatConfig(**SIZED),
    "Nemotron": lambda: hf.NemotronConfig(**SIZED),
    "OLMo": lambda: hf.OlmoConfig(**BASE),
    "OLMo 2": lambda: hf.Olmo2Config(**BASE),
    "OLMo 3": lambda: hf.Olmo3Config(**BASE, sliding_window=11, layer_types=KINDS),
    "OLMo 3 (full attention)": lambda: hf.Olmo3Config(**BASE, layer_types=["full_attention"] * 4),
    "OLMoE": lambda: hf.OlmoeConfig(**BASE, **MOE, num_experts=4),
    "OPT": lambda: hf.OPTConfig(**without(BASE, "num_key_value_heads"), ffn_dim=96, word_embed_proj_dim=64),
    "Persimmon": lambda: hf.PersimmonConfig(**without(BASE, "num_key_value_heads")),
    "Phi": lambda: hf.PhiConfig(**BASE, partial_rotary_factor=0.5),
    "Phi-3": lambda: hf.Phi3Config(**BASE),
    "Phi-3.5 MoE": lambda: hf.PhimoeConfig(**BASE, **LOCAL, sliding_window=None),
    "Qwen2": lambda: hf.Qwen2Config(**BASE),
    "Qwen2 MoE": lambda: hf.Qwen2MoeConfig(**BASE, **EXPERTS, shared_expert_intermediate_size=32),
    "Qwen2.5-VL": lambda: hf.Qwen2_5_VLConfig(
        text_config=BASE
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 64,
            "patch_size": 4,
            "fullatt_block_indexes": [1],
            "window_size": 16,
        },
    ),
    "Qwen3": lambda: hf.Qwen3Config(**SIZED),
    "Qwen3 MoE": lambda: hf.Qwen3MoeConfig(**SIZED, **EXPERTS),
    "Seed-OSS": lambda: hf.SeedOssConfig(**SIZED),
    "SmolLM3": lambda: hf.SmolLM3Config(**BASE, no_rope_layer_interval=2),
    "StableLM": lambda: hf.StableLmConfig(**BASE, partial_rotary_factor=0.25),
    "Starcoder2": lambda: hf.Starcoder2Config(**BASE, sliding_window=None),
    "VaultGemma": lambda: hf.VaultGemmaConfig(**SLIDING, query_pre_attn_scalar=16),
    # with layers that are not attention, and refused
    "Bamba": lambda: hf.BambaConfig(**BASE, **MAMBA, attn_layer_indices=[1, 3], mamba_n_groups=1),
    "BERT": lambda: hf.BertConfig(**without(BASE, "num_key_value_heads"), is_decoder=True),
    "BLOOM": lambda: hf.BloomConfig(vocab_size=256, hidden_size=64, n_layer=3, n_head=4),
    "DeepSeek V2": lambda: hf.DeepseekV2Config(**BASE | {"num_key_value_heads": 4}, **LATENT, **ROUTED),
    "DeepSeek V3": lambda: hf.DeepseekV3Config(**BASE | {"num_key_value_heads": 4}, **LATENT, **ROUTED),
    "DiffLlama": lambda: hf.DiffLlamaConfig(**BASE),
    "Doge": lambda: hf.DogeConfig(**BASE),
    "Falcon": lambda: hf.FalconConfig(vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4),
    "GPT-Neo": lambda: hf.GPTNeoConfig(
        vocab_size=256, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "Granite 4": lambda: hf.GraniteMoeHybridConfig(
        **BASE, **LOCAL, **MAMBA, layer_types=["mamba", "attention"] * 2, shared_intermediate_size=32
    ),
    "Jamba": lambda: hf.JambaConfig(
        **BASE, attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False, mamba_d_state=8
    ),
    "JetMoe": lambda: hf.JetMoeConfig(**without(BASE, "num_attention_heads"), **LOCAL, kv_channels=16),
    "LFM2": lambda: hf.Lfm2Config(**BASE, layer_types=["conv", "full_attention"] * 2, conv_L_cache=3),
    "Llama 4": lambda: hf.Llama4TextConfig(
        **SIZED, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=16, no_rope_layers=[1, 1, 1, 0]
    ),
    "Mamba": lambda: hf.MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=3, state_size=8),
    "Mamba 2": lambda: hf.Mamba2Config(
        vocab_size=256, hidden_size=64, num_hidden_layers=3, state_size=8, num_heads=8, head_dim=16, n_groups=1
    ),
    "MiMo-V2-Flash": lambda: hf.MiMoV2FlashConfig(**SIZED),
    "MiniMax": lambda: hf.MiniMaxConfig(**SIZED, **LOCAL, block_size=16),
    "MPT": lambda: hf.MptConfig(vocab_size=256, d_model=64, n_layers=3, n_heads=4, max_seq_len=512),
    "Nemotron-H": lambda: hf.NemotronHConfig(**SIZED),
    "Qwen3-Next": lambda: hf.Qwen3NextConfig(**SIZED, **EXPERTS, **DELTA_NET, shared_expert_intermediate_size=32),
    "Qwen3.5": lambda: hf.Qwen3_5TextConfig(**SIZED, **DELTA_NET),
    "RecurrentGemma": lambda: hf.RecurrentGemmaConfig(**BASE, lru_width=64),
    "T5": lambda: hf.T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
    "Whisper": lambda: hf.WhisperConfig(
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        vocab_size=256,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
EAGER = ("Gemma 2", "gpt-oss")  # `sdpa` cannot express their attention
CLASSES = {
    "Gemma 3 (images)": "Gemma3ForConditionalGeneration",
    "LLaVA": "LlavaForConditionalGeneration",
    "Qwen2.5-VL": "Qwen2_5_VLForConditionalGeneration",
    "T5": "T5ForConditionalGeneration",
    "Whisper": "WhisperForConditionalGeneration",
}


def make(name: str) -> PreTrainedModel:
    """A random model whose attention is far from uniform, so that a wrong mask changes its outputs."""
    torch.manual_seed(0)
    config, attention = CONFIGS[name](), {"attn_implementation": "eager"} if name in EAGER else {}
    owner = getattr(hf, CLASSES[name])._from_config if name in CLASSES else AutoModelForCausalLM.from_config
    model = owner(config, **attention).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 2 and not any(part in parameter_name for part in ("embed", "lm_head", "wte", "wpe")):
            torch.nn.init.normal_(parameter, std=0.25)
        if parameter.dim() == 3:
            torch.nn.init.normal_(parameter, std=0.1)
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, mean=1.0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def tokens(number: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 250, (1, number), generator=torch.Generator().manual_seed(seed))


@contextmanager
def outcome(found: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
        found[name] = "yes"
    except HeadsinkError as error:
        found[name] = str(error)


def close(output: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-4 * float(expected.abs().max().clamp(min=1)))


def generated(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)[:, ids.shape[1] :]


COLUMNS = ("plan", "chunks", "prompt scores", "compress", "calibrate", "lossless", "analyze", "compiled step")


@torch.no_grad()
def capabilities(name: str, tokenizer: Any) -> dict[str, str]:
    """What headsink does with a model: "yes" or a reason for every one of `COLUMNS`."""
    model, found = make(name), dict[str, str]()
    with outcome(found, "plan"):
        check_plans(model, found)
    if found["plan"] == "yes":
        plan, ids = Plan.uniform(model, Pattern(2, 0, 8)), tokens(TOKENS)
        rotations = zip(layer_rotations(model), describe(model).planned, strict=True)
        known = all(rotation is not None for rotation, planned in rotations if planned)
        found["prompt scores"] = "yes" if known else "its queries are not rotated by position in the usual way"
        if found["chunks"] == "yes":
            check_top_k(model)
        with outcome(found, "compress"):
            check_compress(model, plan)
        with outcome(found, "calibrate"):
            check_calibrate(model, tokenizer)
        with outcome(found, "lossless"):
            assert torch.equal(
                headsink.generate_lossless(model, plan, ids, max_new_tokens=NEW)[:, TOKENS:], generated(model, ids)
            )
        found["compiled step"] = refusal(model) or "yes"
        if found["compiled step"] == "yes":
            texts = []
            for compiled in (True, False):
                with headsink.apply(model, plan, compiled=compiled):
                    texts.append(generated(model, ids))
            assert torch.equal(*texts)
            # compares the logits of the step with those of the model
            assert refusal(make(name).to(torch.bfloat16)) is None
    with outcome(found, "analyze"):
        headsink.analyze(model, tokenizer, lengths=(64,), texts=["The quick brown fox. " * 20], progress=False)
    return found


def check_plans(model: PreTrainedModel, found: dict[str, str]) -> None:
    """Check plans against the full cache and the reference; padded batches against their rows; and that memory is freed."""
    ids, full = tokens(TOKENS), Plan.full(model)
    own = model(ids).logits
    if not any(describe(model).planned):
        raise HeadsinkError("no layer has full attention, so a plan changes nothing")
    with headsink.apply(model, full):
        close(model(ids).logits, own)
        assert torch.equal(generated(model, ids), generated_without_plan(model, ids))
    plan = Plan.uniform(model, Pattern(2, 0, 8))
    expected = reference_logits(model, plan, ids, segments=[1] * TOKENS)
    assert float((expected - own).abs().max()) > 1e-3
    found["chunks"] = "yes"
    for calls in ([TOKENS], [17, 1, 1, 1, 11, 17]):
        if (
            float(
                (in_calls(model, DynamicCache(config=model.config.get_text_config(decoder=True)), calls) - own)
                .abs()
                .max()
            )
            > SPREAD
        ):
            found["chunks"] = "the model itself gives other logits in several calls"
            continue
        with headsink.apply(model, plan):
            close(in_calls(model, headsink.new_cache(model, plan, prefill="sparse"), calls), expected)
    with headsink.apply(model, plan):  # dense prefill: the prompt is the full cache's
        close(model(ids).logits, own)
    batch = torch.cat([ids, torch.cat([torch.zeros(1, PADS, dtype=torch.long), tokens(TOKENS - PADS, 2)], 1)])
    mask = torch.ones_like(batch)
    mask[1, :PADS] = 0
    with headsink.apply(model, plan):
        both = generated(model, batch, mask)
        for row, alone in enumerate((batch[:1], batch[1:, PADS:])):
            assert torch.equal(both[row : row + 1], generated(model, alone))


def check_top_k(model: PreTrainedModel) -> None:
    """Check top-k keys against the reference: dense prefill of a prompt, with prompt scores where there are any, then tokens."""
    shape, generator = describe(model), torch.Generator().manual_seed(1)
    size = shape.layers, shape.kv_heads, LINEAR.n_features(shape.head_dim)
    patterns = [[Pattern(2, 6, 8)] * shape.kv_heads if own else None for own in shape.planned]
    plan = Plan.of(model, patterns, torch.randn(size, generator=generator), decode_window=12)
    prompt, calls = TOKENS - 9, [TOKENS - 9] + [1] * 9
    expected = reference_logits(model, plan, tokens(TOKENS), segments=calls)[:, prompt:]
    with headsink.apply(model, plan):
        found = in_calls(model, headsink.new_cache(model, plan), calls)[:, prompt:]
    close(found, expected)


def in_calls(model: PreTrainedModel, cache: Any, calls: list[int]) -> torch.Tensor:
    """Logits of the tokens, read in calls of so many tokens."""
    parts = tokens(TOKENS).split(calls, 1)
    return torch.cat([model(part, **cache_argument(cache), use_cache=True).logits for part in parts], 1)


def generated_without_plan(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    from headsink.runtime.apply import full_cache

    with full_cache(model):
        return generated(model, ids)


def check_compress(model: PreTrainedModel, plan: Plan) -> None:
    long = tokens(300)
    with headsink.apply(model, Plan.full(model)):
        full = headsink.new_cache(model, Plan.full(model))
        model(long, **cache_argument(full), use_cache=True)
    cache = headsink.compress(model, plan, long)
    shape = describe(model)
    layer_bytes = 2 * 4 * shape.kv_heads * long.shape[1] * shape.head_dim
    assert cache.nbytes() < full.nbytes() - 0.8 * sum(shape.planned) * layer_bytes


def check_calibrate(model: PreTrainedModel, tokenizer: Any) -> None:
    """Calibrate a plan and use it for context reconstruction; continuations of a document have the model's log-probabilities."""
    with patch.object(calibrate, "FEW", 0):  # without coordinate descent, which is slow and the same for all families
        options = {"context": 416, "budget": 0.5, "quality_contexts": (), "progress": False}
        plan = headsink.calibrate(model, tokenizer, **options)
    headsink.compress(model, plan, tokens(100), reconstruct=True)
    document = random_document()
    whole, expected = [(document.continuation, BRANCH - 1)], []
    for ids, scored in whole + [(question.ids, question.answer_tokens) for question in document.questions]:
        logits = model(torch.tensor([document.ids + ids]), use_cache=False).logits[0, -scored - 1 : -1]
        expected.append(logits.log_softmax(-1))
    with patch.object(continuations, "STORED", {}):  # without rounding keys to bfloat16
        close(CachedDocument(model, document).full.log_probs, torch.cat(expected))


def rows(found: dict[str, dict[str, str]]) -> dict[str, str]:
    """A line of the page for each architecture."""
    lines = {}
    for name, own in found.items():
        if own["plan"] == "yes":
            cells = ["yes" if own[column] == "yes" else "no" for column in COLUMNS]
        else:
            cells = ["yes" if own["analyze"] == "yes" else "no", own["plan"]]
        lines[name] = " | ".join([f"| {name}", *cells]) + " |"
    return lines


def page(tokenizer: Any) -> str:
    """The page docs/families.md."""
    found = {name: capabilities(name, tokenizer) for name in sorted(CONFIGS, key=str.casefold)}
    lines, works = rows(found), {name: own["plan"] == "yes" for name, own in found.items()}
    head = [HEAD, "| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    refused = [REFUSED, "| family | analyze | reason |", "|---|---|---|"]
    parts = [*head, *(lines[n] for n in lines if works[n]), *refused, *(lines[n] for n in lines if not works[n])]
    return "\n".join(parts) + "\n"


HEAD = """# Model families

After this page you know whether headsink works with your model. The tables are made by the tests
(`tests/support/architectures.py`), on tiny random models of every family in float32 on a CPU.

- **plan**: a plan of full attention gives the model's own logits and generated tokens; a plan of windows equals the
  reference; rows of a left-padded batch equal the rows alone.
- **chunks**: a plan equals the reference in chunks and token by token too. "no" where the model itself, without a
  plan, gives other logits in several calls than in one.
- **prompt scores**: the prompt's own queries score its keys, top-k keys are refitted, and cache-relative positions
  work. Two passes over one token find out how a layer rotates its queries. Otherwise the plan's scorer ranks the keys
  of prompts too.
- **compress**: `headsink.compress` works, and the memory of evicted keys is freed.
- **calibrate**: `headsink.calibrate` makes a plan, and context reconstruction works.
- **lossless**: `headsink.generate_lossless` generates what the model generates.
- **analyze**: the census runs.
- **compiled step**: all layers of a token run in one compiled call on a CPU, in float32 and
  bfloat16. Without it the model's own forward pass decodes. A model that is not listed has the step if it is made of
  the usual parts: before its first use the step is compared with the model.

A plan governs the layers with full attention. A layer with a sliding window keeps its window, in the same cache. Linear
attention and convolutions run as they are. A layer that attends to the keys of another layer (Gemma 3n, Gemma 4 E; with
transformers 5.24) sees what that layer keeps. Where a model cannot be calibrated, make a plan of windows with
`Plan.uniform`.

A family that is not listed works if its attention goes through transformers' `AttentionInterface`, and if it passes
keys and values to its attention as the cache returns them. Otherwise the first call is refused with the reason.
"""
REFUSED = """
## Refused

Nothing runs under a plan with these models.
"""

if __name__ == "__main__":
    from small_tokenizer import Small

    hf.logging.set_verbosity_error()
    PAGE.write_text(page(Small(headsink.load("smollm2")[1])), encoding="utf-8")
