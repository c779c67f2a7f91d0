"""Table of calls of a model under a plan: each equals the reference mask or is refused in one line.

`PYTHONPATH=tests/support python tests/runtime/test_table_of_calls.py` prints the list as the page docs/calls.md.
"""

import asyncio
import copy
import io
import pickle
import queue
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
import transformers
from families import SHAPE, SLIDING, tiny
from plans import random_plan
from reference import masked, reference_logits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache, pipeline
from transformers.generation.streamers import BaseStreamer

import headsink
from headsink import HeadsinkError
from headsink.models.transformers_names import cache_argument, returned_cache

PAGE = Path(__file__).parents[2] / "docs" / "calls.md"
NEW = 8  # tokens
IMAGE = 205  # the token that stands for a part of an image
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


class Setting:
    """A tiny model under a plan, and its input: two sequences of 40 tokens."""

    def __init__(self, model=None, prefill="dense"):
        self.prefill = prefill
        self.model = tiny("llama") if model is None else model
        self.model.generation_config.pad_token_id = 0
        plans = (random_plan(self.model, seed) for seed in (3, 9))
        self.plan, self.other_plan = (plan.model_copy(update={"decode_window": 3}) for plan in plans)
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, 200, (2, 40), generator=generator)
        self.more = torch.randint(3, 200, (2, 12), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :7] = 0
        self.repeated = self.ids[:1, :12].repeat(1, 3)
        self.pixels = {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}

    @cached_property
    def other(self):
        model = tiny("llama", seed=2)
        model.generation_config.pad_token_id = 0
        return model

    def generate(self, ids=None, model=None, **options):
        ids = self.ids if ids is None and not {"inputs_embeds", "input_ids"} & set(options) else ids
        model = self.model if model is None else model
        return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False} | options)

    def text(self, ids=None, padding=None, **options):
        """Return the output of `generate` under the reference mask, with a pass over the whole text for every token.

        The prompt is one segment, every later token is one, as in the cache."""
        decoder, prompt = self.model.get_decoder(), (self.ids if ids is None else ids).shape[1]
        with masked(decoder, self.plan, padding, prompt if self.prefill == "dense" else 1):
            return self.generate(ids, use_cache=False, **options)

    def text_of(self, segments, ids=None):
        """Return the greedy text under the reference mask of a prompt that was read in segments."""
        text = self.ids if ids is None else ids
        assert sum(segments) == text.shape[1]
        for new in range(NEW):
            logits = reference_logits(self.model, self.plan, text, None, [*segments, *[1] * new])
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        return text

    def reread_text(self):
        """Return the text where every call reads the whole text."""
        return self.own_text() if self.prefill == "dense" else self.text()

    def logits(self, ids=None, mask=None):
        ids = self.ids if ids is None else ids
        return reference_logits(self.model, self.plan, ids, mask, ids.shape[1] if self.prefill == "dense" else 1)

    def own_text(self, ids=None, **options):
        """Return the model's output with the full cache."""
        return self.generate(ids, **options)

    def loop(self, cache, ids=None):
        """A hand-written decoding loop."""
        ids = text = self.ids if ids is None else ids
        with torch.no_grad():
            for _ in range(NEW):
                ids = self.model(ids, **cache_argument(cache)).logits[:, -1:].argmax(-1)
                text = torch.cat([text, ids], 1)
        return text

    def loop_without_cache(self):
        text = self.ids
        with torch.no_grad():
            for _ in range(NEW):
                text = torch.cat([text, self.model(text).logits[:, -1:].argmax(-1)], 1)
        return text

    def read(self, ids=None, mask=None):
        """Return the cache of a text."""
        cache, options = headsink.new_cache(self.model, self.plan), {}
        if mask is not None:
            options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            self.model(self.ids if ids is None else ids, **cache_argument(cache), **options)
        return cache

    @torch.no_grad()
    def forward(self, ids=None, **options):
        return self.model(self.ids if ids is None else ids, **options).logits


# calls


class Streamed(BaseStreamer):
    def __init__(self):
        self.parts = queue.Queue()

    def put(self, value):
        self.parts.put(value.flatten().tolist())

    def end(self):
        self.parts.put(None)


def streamed(here, **options):
    """As in a web server: the model generates in a thread, and the tokens are read here."""
    stream, found = Streamed(), []
    arguments = {"max_new_tokens": NEW, "do_sample": False, "streamer": stream, **options}
    thread = threading.Thread(target=here.model.generate, args=(here.ids[:1],), kwargs=arguments)
    thread.start()
    while (part := stream.parts.get(timeout=60)) is not None:
        found += part
    thread.join()
    return torch.tensor([found])


def in_pool(here):
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda row: here.generate(row[None]), here.ids))
    return torch.cat(rows)


def in_executor(here):
    async def answer():
        return await asyncio.get_running_loop().run_in_executor(None, here.generate)

    return asyncio.run(answer())


def steps(here, plan):
    """A generator that enters its own block and yields one token at a time."""
    with headsink.apply(here.model, plan):
        new, cache = here.ids, headsink.new_cache(here.model, plan, prefill=here.prefill)
        for _ in range(NEW):
            new = here.forward(new, **cache_argument(cache))[:, -1:].argmax(-1)
            yield new


def resumed_elsewhere(here):
    stream = steps(here, here.plan)
    found = []
    for _ in range(NEW):
        with ThreadPoolExecutor(1) as pool:  # another thread every time
            found.append(pool.submit(next, stream).result())
    assert list(stream) == []
    return torch.cat([here.ids, *found], 1)


def interleaved(here):
    pairs = zip(steps(here, here.plan), steps(here, here.other_plan), strict=True)
    return torch.cat([here.ids, *(mine for mine, _ in pairs)], 1)


def async_steps(here):
    async def stream():
        for new in steps(here, here.plan):
            yield new
            await asyncio.sleep(0)

    async def collect():
        return [part async for part in stream()]

    return torch.cat([here.ids, *asyncio.run(collect())], 1)


def by_pipeline(here):
    words = Tokenizer(WordLevel({"pad": 0} | {str(n): n for n in range(1, 211)}, unk_token="pad"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad")
    pipe = pipeline("text-generation", model=here.model, tokenizer=tokenizer)
    texts = [" ".join(map(str, row)) for row in here.ids.tolist()]
    found = pipe(texts, batch_size=2, max_new_tokens=NEW, do_sample=False, return_tensors=True)
    return torch.tensor([row[0]["generated_token_ids"] for row in found])


def two_assistants(here):
    with headsink.apply(here.other, random_plan(here.other, 4)):
        return here.generate(here.repeated, assistant_model=here.other)


def padded_forward(here, mask):
    places = (mask.cumsum(1) - 1).clamp(min=0)
    return here.forward(attention_mask=mask, position_ids=places)[mask.bool()]


def right_padded(here):
    return here.mask.flip(1)


def shared_prefix(here):
    cache = here.read(here.ids[:1])
    return here.generate(torch.cat([here.ids[:1].repeat(2, 1), here.more], 1), **cache_argument(cache))


def shared_prefix_text(here):
    return here.text_of([40, 12], torch.cat([here.ids[:1].repeat(2, 1), here.more], 1))


def saved_prefix(here):
    with tempfile.TemporaryDirectory() as folder:
        path = headsink.save_prefix(Path(folder) / "text.kv", here.read(here.ids[:1]), here.ids[:1])
        cache, _ = headsink.load_prefix(path, here.model)
    return here.generate(torch.cat([here.ids[:1], here.more[:1]], 1), **cache_argument(cache))


def pickled_cache(here):
    cache = pickle.loads(pickle.dumps(here.read()))  # noqa: S301
    return here.generate(torch.cat([here.ids, here.more], 1), **cache_argument(cache))


def longer_text(here):
    return here.text_of([40, 12], torch.cat([here.ids, here.more], 1))


def filled_outside(here):
    """As in prefix tuning."""
    cache = DynamicCache(config=here.model.config)
    layers, rows, tokens = here.model.config.num_hidden_layers, len(here.ids), 5
    for layer in range(layers):
        cache.update(torch.randn(rows, 2, tokens, 12), torch.randn(rows, 2, tokens, 12), layer)
    return cache


def peft(here):
    module = pytest.importorskip("peft", reason="peft is not installed here")
    wrapped = module.get_peft_model(here.model, module.LoraConfig(target_modules=["q_proj", "v_proj"]))
    found = wrapped.generate(input_ids=here.ids, max_new_tokens=NEW, do_sample=False)
    wrapped.unload()
    return found


def checkpointed(here):
    assert torch.is_grad_enabled()
    here.model.gradient_checkpointing_enable()
    return here.model.train()(here.ids, labels=here.ids).loss


def loss(here):
    targets = here.ids[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(here.logits()[:, :-1].flatten(0, 1), targets)


def call_layer(here):
    hidden = here.model.get_input_embeddings()(here.ids)
    turns = here.model.model.rotary_emb(hidden, torch.arange(40)[None])
    return here.model.model.layers[0](hidden, position_embeddings=turns)


def attention_set(here):
    here.model.set_attn_implementation("sdpa")
    try:
        return here.forward()
    finally:
        here.model.set_attn_implementation("headsink")


def own_config(here):
    here.model.generation_config.use_cache = False
    return here.generate()


def padded_cache_without_mask(here):
    return here.generate(torch.cat([here.ids, here.more], 1), **cache_argument(here.read(mask=here.mask)))


def narrow(here):
    """The model is converted between two passes."""
    cache = here.read()
    here.model.bfloat16()
    return here.forward(here.more, **cache_argument(cache))


def another_model(here):
    with headsink.apply(here.other, random_plan(here.other, 4)), torch.no_grad():
        cache = returned_cache(here.other(here.ids))
    return here.forward(here.more, **cache_argument(cache))


def llava():
    text = transformers.LlamaConfig(**SHAPE)
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return seeing(transformers.LlavaForConditionalGeneration, config)


def gemma3():
    text = {**SHAPE, "head_dim": 16, "sliding_window": 11, "layer_types": SLIDING}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE
    )
    return seeing(transformers.Gemma3ForConditionalGeneration, config)


def qwen_vl():
    turning = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 3]}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 48}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**SHAPE, "rope_parameters": turning},
        vision_config={**vision, "patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16},
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )
    return seeing(transformers.Qwen2_5_VLForConditionalGeneration, config)


def grid(here):
    """A prompt with an image of 4 x 4 patches, whose positions have several axes."""
    ids = pictured(here, 4)
    ids[:, 9] = IMAGE + 2
    patches = torch.randn(16, 96, generator=torch.Generator().manual_seed(1))
    kinds = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).int()}
    return {"pixel_values": patches, "input_ids": ids, **kinds}


def seeing(kind, config):
    """A tiny random vision-language model."""
    torch.manual_seed(0)
    model = kind._from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
            torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = None
    return model


def pictured(here, tokens=16):
    """A prompt with an image."""
    return torch.cat([here.ids[:1, :10], torch.full((1, tokens), IMAGE), here.ids[:1, 10:]], 1)


def types(here):
    return {"token_type_ids": (pictured(here, 4) == IMAGE).long()}


SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20}
REREAD = "every call reads the whole text, in full attention"
SPARSE = ("forward passes", "threads")  # groups of calls that are also tested with sparse prefill


@dataclass(frozen=True)
class Call:
    """name: the call as code. run: the call, inside `with headsink.apply(model, plan)`. right: the reference's result, or words
    of the error that refuses it. model: a model other than a tiny Llama. close: relative tolerance."""

    name: str
    run: Callable[[Setting], torch.Tensor]
    right: Callable[[Setting], torch.Tensor] | str
    model: Callable[[], torch.nn.Module] | None = None
    close: float = 2e-4
    note: str = ""


CALLS = {
    "generate": [
        Call("`model.generate(ids)`, greedy", lambda h: h.generate(), Setting.text),
        Call("sampling", lambda h: h.generate(**SAMPLED), lambda h: h.text(**SAMPLED)),
        Call("beams", lambda h: h.generate(num_beams=3), lambda h: h.text(num_beams=3)),
        Call(
            "`num_return_sequences=2`",
            lambda h: h.generate(**SAMPLED, num_return_sequences=2),
            lambda h: h.text(**SAMPLED, num_return_sequences=2),
        ),
        Call("`use_cache=False`", lambda h: h.generate(use_cache=False), Setting.reread_text, note=REREAD),
        Call("`model.generation_config.use_cache = False`", own_config, Setting.reread_text, note=REREAD),
        Call(
            "`prefill_chunk_size=7`",
            lambda h: h.generate(prefill_chunk_size=7),
            lambda h: h.text_of([7, 7, 7, 7, 7, 5]),
            note="a chunk is a call, after which heads evict",
        ),
        Call(
            "`return_dict_in_generate=True`",
            lambda h: h.generate(return_dict_in_generate=True, output_scores=True).sequences,
            Setting.text,
        ),
        Call(
            "`inputs_embeds=`",
            lambda h: h.generate(inputs_embeds=h.model.get_input_embeddings()(h.ids)),
            lambda h: h.text()[:, 40:],
        ),
        Call(
            "a batch padded on the left",
            lambda h: h.generate(attention_mask=h.mask),
            lambda h: h.text(padding=torch.tensor([7, 0]), attention_mask=h.mask),
        ),
        Call("a batch padded on the right", lambda h: h.generate(attention_mask=right_padded(h)), "pad on the left"),
        Call('`pipeline("text-generation")`', by_pipeline, Setting.text),
        Call("a `PeftModel` made of the model in the block", peft, Setting.text),
        Call("`torch.inference_mode()`", torch.inference_mode()(lambda h: h.generate()), Setting.text),
        Call(
            "`headsink.generate_lossless`",
            lambda h: headsink.generate_lossless(h.model, h.plan, h.ids, max_new_tokens=NEW, do_sample=False),
            Setting.own_text,
            note="the text of the full cache, which is what it is for",
        ),
    ],
    "drafts": [
        Call(
            "`prompt_lookup_num_tokens=`",
            lambda h: h.generate(h.repeated, prompt_lookup_num_tokens=3),
            lambda h: h.text(h.repeated),
        ),
        Call(
            "`assistant_model=`, the model under a plan",
            lambda h: h.generate(h.repeated, assistant_model=h.other),
            lambda h: h.text(h.repeated),
        ),
        Call(
            "`assistant_model=`, the assistant under a plan",
            lambda h: h.generate(h.repeated, h.other, assistant_model=h.model),
            lambda h: h.generate(h.repeated, h.other),
        ),
        Call("`assistant_model=`, both under plans", two_assistants, lambda h: h.text(h.repeated)),
    ],
    "threads": [
        Call("`Thread(target=model.generate)` with a streamer", streamed, lambda h: h.text(h.ids[:1])),
        Call("`ThreadPoolExecutor`", in_pool, Setting.text),
        Call("`run_in_executor`", in_executor, Setting.text),
        Call("a generator that other threads resume", resumed_elsewhere, Setting.text),
        Call("two generators with two plans, by turns", interleaved, Setting.text),
        Call("an async generator", async_steps, Setting.text),
    ],
    "forward passes": [
        Call("`model(ids)`", Setting.forward, Setting.logits),
        Call("`model(ids, use_cache=False)`", lambda h: h.forward(use_cache=False), Setting.logits),
        Call(
            "`model(inputs_embeds=)`",
            lambda h: h.model(inputs_embeds=h.model.get_input_embeddings()(h.ids)).logits.detach(),
            Setting.logits,
        ),
        Call("`logits_to_keep=1`", lambda h: h.forward(logits_to_keep=1), lambda h: h.logits()[:, -1:]),
        Call("`labels=`: the loss", lambda h: h.model(h.ids, labels=h.ids).loss.detach(), loss),
        Call(
            "a batch padded on the left",
            lambda h: padded_forward(h, h.mask),
            lambda h: h.logits(mask=h.mask)[h.mask.bool()],
        ),
        Call(
            "a batch padded on the right",
            lambda h: padded_forward(h, right_padded(h)),
            lambda h: h.logits()[right_padded(h).bool()],
            note="logits of the tokens; those of the padding mean nothing",
        ),
        Call(
            "a 4-D mask",
            lambda h: h.forward(attention_mask=torch.ones(2, 1, 40, 40).bool().tril()),
            "a plan takes a 2-D",
        ),
        Call(
            "packed documents, `position_ids` that start again",
            lambda h: h.forward(position_ids=torch.arange(20).repeat(2)[None].expand(2, -1), use_cache=False),
            "position_ids start again",
        ),
        Call("`output_attentions=True`", lambda h: h.forward(output_attentions=True), "output_attentions: the weights"),
        Call(
            "`torch.compile(model)`",
            lambda h: torch.compile(h.model, backend="eager")(h.ids).logits.detach(),
            Setting.logits,
        ),
        Call(
            "`torch.autocast`",
            torch.autocast("cpu", torch.bfloat16)(Setting.forward),
            Setting.logits,
            close=0.1,
            note="to the precision of bfloat16",
        ),
        Call("gradient checkpointing in training", checkpointed, "gradient checkpointing drops the KV cache"),
        Call(
            "`model.model(ids)`, the decoder alone",
            lambda h: h.model.lm_head(h.model.model(h.ids).last_hidden_state).detach(),
            Setting.logits,
        ),
        Call("`model.forward(ids)`", lambda h: h.model.forward(h.ids).logits.detach(), Setting.logits),
        Call("`model.model.forward(ids)`", lambda h: h.model.model.forward(h.ids), "attended without the plan's cache"),
        Call("a layer called by itself", call_layer, "attended without the plan's cache"),
        Call("`model.set_attn_implementation` in the block", attention_set, "the model's attention was set to 'sdpa'"),
        Call(
            "`copy.deepcopy(model)` in the block",
            lambda h: copy.deepcopy(h.model),
            "a model cannot be copied or pickled",
        ),
        Call("a pickled model", lambda h: torch.save(h.model, io.BytesIO()), "a model cannot be copied or pickled"),
    ],
    "caches": [
        Call("a loop without a cache", Setting.loop_without_cache, Setting.reread_text, note=REREAD),
        Call(
            "a loop with an empty `DynamicCache()`", lambda h: h.loop(DynamicCache(config=h.model.config)), Setting.text
        ),
        Call("a loop with `headsink.new_cache`", lambda h: h.loop(headsink.new_cache(h.model, h.plan)), Setting.text),
        Call(
            "a text continued from its cache",
            lambda h: h.generate(torch.cat([h.ids, h.more], 1), **cache_argument(h.read())),
            longer_text,
        ),
        Call("one prefix for a batch", shared_prefix, shared_prefix_text),
        Call(
            "a cache of other texts than are given",
            lambda h: h.forward(h.more[:1], **cache_argument(h.read())),
            "this cache holds 2 sequences",
        ),
        Call(
            "a saved and loaded prefix",
            saved_prefix,
            lambda h: h.text_of([40, 12], torch.cat([h.ids[:1], h.more[:1]], 1)),
        ),
        Call("a pickled cache", pickled_cache, longer_text),
        Call(
            "a cache that holds the whole prompt", lambda h: h.generate(**cache_argument(h.read())), "the cache holds"
        ),
        Call("the cache of a padded batch without its mask", padded_cache_without_mask, "attention_mask: "),
        Call("a cache of another model", another_model, "this cache was made for another model"),
        Call("`model.bfloat16()` between two passes", narrow, "this cache does not fit the model"),
        Call(
            "a filled `DynamicCache` (prefix tuning)",
            lambda h: h.forward(**cache_argument(filled_outside(h))),
            "this cache was filled without the plan",
        ),
        Call(
            "`StaticCache`",
            lambda h: h.forward(**cache_argument(StaticCache(config=h.model.config, max_cache_len=64))),
            "StaticCache cannot hold a plan",
        ),
        Call(
            '`cache_implementation="static"`',
            lambda h: h.generate(cache_implementation="static"),
            "StaticCache cannot hold a plan",
        ),
    ],
    "images": [
        Call(
            "LLaVA: `generate(pixel_values=)`",
            lambda h: h.generate(pictured(h), **h.pixels),
            lambda h: h.text(pictured(h), **h.pixels),
            llava,
        ),
        Call(
            "LLaVA with `headsink.generate_lossless`",
            lambda h: headsink.generate_lossless(
                h.model, h.plan, pictured(h), **h.pixels, max_new_tokens=NEW, do_sample=False
            ),
            lambda h: h.own_text(pictured(h), **h.pixels),
            llava,
            note="the text of the full cache",
        ),
        Call(
            "Qwen2.5-VL with `headsink.generate_lossless`",
            lambda h: headsink.generate_lossless(h.model, h.plan, **grid(h), max_new_tokens=NEW, do_sample=False),
            lambda h: h.generate(**grid(h)),
            qwen_vl,
            note="the text of the full cache",
        ),
        Call(
            "Gemma 3: `generate(pixel_values=)`",
            lambda h: h.generate(pictured(h, 4), **h.pixels, **types(h)),
            "a plan works on causal attention only",
            gemma3,
        ),
        Call(
            "Gemma 3 with `headsink.generate_lossless`",
            lambda h: headsink.generate_lossless(h.model, h.plan, pictured(h, 4), **h.pixels, **types(h)),
            "a plan works on causal attention only",
            gemma3,
        ),
    ],
}
ALL = [(f"{group}: {call.name}", call, "dense") for group, calls in CALLS.items() for call in calls]
ALL += [
    (f"{group}: {call.name}, sparse prefill", call, "sparse")
    for group in SPARSE
    for call in CALLS[group]
    if not isinstance(call.right, str)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("call", "prefill"), [case[1:] for case in ALL], ids=[case[0] for case in ALL])
def test_a_call_is_correct_or_refused_in_one_line(call, prefill):
    here = Setting(call.model and call.model(), prefill)
    before = here.model.get_decoder().config._attn_implementation
    if isinstance(call.right, str):
        with pytest.raises(HeadsinkError) as caught, headsink.apply(here.model, here.plan):
            call.run(here)
        assert call.right in str(caught.value)
        assert "\n" not in str(caught.value)
    else:
        torch.manual_seed(0)
        # with sparse prefill the model runs every pass
        with headsink.apply(here.model, here.plan, prefill=prefill, compiled=None if prefill == "dense" else False):
            found = call.run(here)
        here.model.generation_config.use_cache = True
        torch.manual_seed(0)
        expected = call.right(here)
        if expected.is_floating_point():
            assert found.shape == expected.shape
            assert (found - expected).norm() < call.close * expected.norm()
        else:
            assert torch.equal(found, expected)
    assert here.model.get_decoder().config._attn_implementation == before  # the block is undone


def test_without_the_plan_texts_and_logits_differ():
    here = Setting()
    assert not torch.equal(here.own_text(), here.text())
    sparse = Setting(prefill="sparse")
    assert (sparse.forward() - sparse.logits()).norm() > 0.2 * sparse.logits().norm()
    assert not torch.equal(here.text(), sparse.text())
    assert not torch.equal(here.text_of([7, 7, 7, 7, 7, 5]), here.text())
    assert not torch.equal(longer_text(here), here.text(torch.cat([here.ids, here.more], 1)))
    here = Setting(llava())
    own, under = (each(pictured(here), **here.pixels) for each in (here.own_text, here.text))
    assert not torch.equal(own, under)
    assert not torch.equal(under, here.text(pictured(here)))  # and without the image


def page():
    """docs/calls.md."""
    lines = [
        "# Ways to call a model under a plan",
        "",
        "Inside `with headsink.apply(model, plan):` the calls below give what the plan's definition gives, or raise a",
        "`HeadsinkError` of one line. Each row is a test in `tests/runtime/test_table_of_calls.py`. *right* means that the",
        "text or the logits equal those of a pass over the whole text in which every head is masked by its pattern; a call",
        "of several tokens attends in full to the keys that are held and to itself. This page is the output of",
        "`PYTHONPATH=tests/support python tests/runtime/test_table_of_calls.py`.",
    ]
    for group, calls in CALLS.items():
        lines += ["", f"## {group.capitalize()}", "", "| Call | Under a plan |", "|---|---|"]
        for call in calls:
            outcome = f'refused: "{call.right.strip()} ..."' if isinstance(call.right, str) else "right"
            lines.append(f"| {call.name} | {outcome}{': ' + call.note if call.note else ''} |")
    return "\n".join(lines) + "\n"


def test_the_page_matches_this_table():
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    sys.stdout.write(page())
