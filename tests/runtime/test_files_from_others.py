"""Mutated prefix and plan files: each is refused in one line, or it loads and the model runs with it.

The files are valid safetensors and JSON; their fields and tensors are changed at random. Cases run in a child process, because a
kernel that reads out of bounds ends the process. To run 10,000 files of each kind, instead of a few, and to print how many
were refused: `HEADSINK_FUZZ=10000 pytest -rP tests/runtime/test_files_from_others.py`. `HEADSINK_FUZZ_SEED=1` gives other files.
"""

import json
import multiprocessing
import os
import random
import re
import resource
import tempfile
import traceback
import warnings
from collections import Counter
from functools import cache as once
from pathlib import Path

import numpy as np
import pytest
import torch
from families import tiny
from plans import QUALITY, random_plan, window_plan
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

import headsink
from headsink import HeadsinkError, Pattern, Plan
from headsink.attention.kv_table import KVField
from headsink.cache.kv_table import KVTable
from headsink.cache.layer import PlanLayer
from headsink.decoding.step import open_decoder, refusal
from headsink.eviction.pattern import FOREVER
from headsink.runtime.prefix_format import Header, _expected_tensors

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("HEADSINK_FUZZ", "150"))
SEED = int(os.environ.get("HEADSINK_FUZZ_SEED", "0"))
MEMORY = 16 * 2**30  # maximum memory of the process, bytes
PATIENCE = 400  # maximum seconds per file, kernel compilation for the first one included

NUMBERS = (
    0,
    1,
    2,
    3,
    5,
    7,
    8,
    13,
    60,
    61,
    62,
    128,
    1000,
    -1,
    -5,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63,
    2**64,
    2**70,
)
ODD = (
    None,
    True,
    False,
    "",
    "8",
    "float16",
    0.5,
    -0.0,
    1e308,
    -1e308,
    5.0,
    [],
    {},
    [1],
    [[]],
    {"a": 1},
    "\x1b]0;title\x07\n",
)
RAW = "NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, "[" * 5000 + "]" * 5000, '"\\ud800"', "1.0", "-0", "01", ""
FLOATS = float("nan"), float("inf"), float("-inf"), 0.0, 1e-45, 65504.0, 3e38
DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.uint16, torch.uint64, torch.float8_e5m2, torch.complex64),
)


# valid files


@once
def model(family, dtype):
    return tiny(family, dtype=dtype)


def tokens(rows, count, seed=0):
    return torch.randint(3, 211, (rows, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(family, dtype, plan, ids, mask=None, exact=True, prefill="dense"):
    """Return a model, the cache of a text, and the text."""
    loaded = model(family, dtype)
    cache = headsink.new_cache(loaded, plan, exact, prefill=prefill)
    with headsink.apply(loaded, plan):
        options = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        loaded(ids, past_key_values=cache, **options)
    return loaded, cache, ids


@once
def prefixes():
    """Model, header and tensors of prefixes in all states of a cache."""
    wide, half = torch.float32, torch.bfloat16
    llama, mask = model("llama", wide), torch.ones(3, 61, dtype=torch.long)
    mask[1, :7] = mask[2, :40] = 0
    bases = [
        *(read("llama", dtype, random_plan(llama, seed), tokens(1, 61)) for seed, dtype in ((1, wide), (2, half))),
        read("llama", wide, random_plan(llama, 3), tokens(3, 61), mask),
        read("llama", half, random_plan(llama, 4), tokens(2, 61), prefill="sparse"),
        read("llama", wide, random_plan(llama, 5), tokens(1, 9)),
        read("llama", half, window_plan(llama, 1), tokens(2, 61)),
        read("llama", half, Plan.full(llama), tokens(2, 140), exact=False),
        read("gemma3", wide, random_plan(model("gemma3", wide), 7), tokens(1, 61)),
        read("qwen3", half, random_plan(model("qwen3", wide), 8, lambda rng: Pattern(2, 5, 8)), tokens(1, 200)),
    ]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for loaded, cache, ids in bases:
            with safe_open(headsink.save_prefix(Path(folder) / "prefix", cache, ids), "pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                found.append((loaded, file.metadata()["headsink"], tensors))
    return found


@once
def plans():
    """Models and texts of plan files with every field."""
    llama, gemma = model("llama", torch.float32), model("gemma3", torch.float32)
    fields = {"quality": (QUALITY,), "calibration": {"texts": [1, 2], "seed": None}}
    found = [
        (llama, random_plan(llama, 1), fields),
        (model("llama", torch.bfloat16), random_plan(llama, 2), {}),
        (llama, random_plan(llama, 3), {**fields, "reconstruction_prompt": (7, 8, 9)}),
        (llama, window_plan(llama, 4), fields),
        (gemma, random_plan(gemma, 5), {}),
    ]
    return [(loaded, Plan(**{**plan.model_dump(), **more}).to_json()) for loaded, plan, more in found]


# mutations


def paths(value, start=()):
    """Return the paths of the values of parsed JSON; of a long list of numbers only the first."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(children)[: 20 if isinstance(value, dict) else 3]:
        yield (*start, key)
        yield from paths(child, (*start, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def change_json(value, rng, where=lambda path: True):
    """Change one value in place. A string that starts with @ is later replaced by the rest of it, without quotes."""
    every = [path for path in paths(value) if where(path)]
    if not every:  # an earlier change removed it
        return
    numbers = [path for path in every if type(at(value, path)) is int]
    *parents, last = rng.choice(numbers if numbers and rng.random() < 0.6 else every)
    value = at(value, parents)
    old, way = value[last], rng.choice([0, 1, 2, 3, *[4] * 9, *[8] * 3])
    if way == 0 and not isinstance(value, list):
        del value[last]
    elif way == 0:
        value.pop(last)
    elif way == 1 and isinstance(value, dict):
        value[rng.choice(["", "other", "\x1b[2J", "window", "seen"])] = rng.choice(NUMBERS)
    elif way == 1:
        value.insert(last, rng.choice([old, *NUMBERS]))
    elif way == 2:
        value[last] = rng.choice(ODD)
    elif way == 3:
        value[last] = "@" + rng.choice(RAW)
    elif isinstance(old, int) and way == 4:
        value[last] = old + rng.choice([-8, -3, -2, -1, 1, 2, 3, 8, 128])
    elif isinstance(old, list) and old and way == 4:
        value[last] = rng.choice([old[:-1], old + old[-1:], old[::-1], old * 2])
    else:
        value[last] = rng.choice(NUMBERS)


def as_text(value, rng):
    """Return JSON as text, sometimes with a duplicate key."""
    text = re.sub(r'"@((?:[^"\\]|\\.)*)"', lambda raw: json.loads(f'"{raw[1]}"'), json.dumps(value))
    if rng.random() < 0.05:
        text = text.replace('"window": 8', f'"window": 8, "window": {rng.choice(NUMBERS)}')
    return text


def change_tensor(tensors, rng):
    """Change one tensor: its shape, dtype, numbers, name."""
    name = rng.choice(sorted(tensors))
    tensor, way = tensors[name], rng.randrange(12)
    axis = rng.randrange(max(tensor.dim(), 1))
    if way == 0:
        del tensors[name]
    elif way == 1:
        tensors[
            rng.choice(["padding", "other", "layers.0.keys", "layers.0.0.scores", "layers.9.0.keys", name + "x"])
        ] = tensor.clone()
    elif way == 2:
        tensors[name] = tensor.reshape(-1) if rng.random() < 0.5 else tensor[None]
    elif way in (3, 4) and tensor.dim() and tensor.shape[axis]:
        size = tensor.shape[axis]
        keep = rng.choice([0, 1, size - 1, size // 2])
        tensors[name] = (
            tensor.narrow(axis, 0, keep) if way == 3 else torch.cat([tensor, tensor.narrow(axis, 0, keep)], axis)
        )
    elif way == 5:
        tensors[name] = tensor.to(rng.choice(DTYPES))
    elif way == 6 and tensor.dim() and tensor.numel():
        try:
            tensors[name] = tensor.contiguous().view(rng.choice(DTYPES))
        except RuntimeError:  # its last dimension cannot be divided so
            tensors[name] = tensor.to(rng.choice(DTYPES))
    elif way == 7:
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
    elif way == 8 and tensor.dim() > 1:
        tensors[name] = tensor.transpose(0, axis)
    elif tensor.numel():
        flat = tensor.reshape(-1).clone()
        at = rng.randrange(len(flat)) if rng.random() < 0.7 else slice(None)
        if tensor.dtype == torch.bool:
            flat.view(torch.uint8)[at] = rng.choice([0, 1, 2, 255])
        elif tensor.is_floating_point() or tensor.is_complex():
            flat[at] = rng.choice(FLOATS) if tensor.dtype != torch.float8_e5m2 else 0.0
        elif tensor.dtype == torch.int64:
            flat[at] = rng.choice([0, 1, 60, 61, 62, 210, 211, -1, 2**31, 2**40, 2**63 - 1, -(2**63)])
        tensors[name] = flat.view(tensor.shape)


def fit(loaded, header, tensors, rng):
    """Return random tensors of the shapes in a changed header; the same tensors if it has none."""
    try:
        read = Header.model_validate_json(header)
        kinds = _expected_tensors(read, headsink.new_cache(loaded, read.plan), rows := rng.choice([1, 2, 3]))
    except (HeadsinkError, ValidationError, ValueError):
        return tensors
    if sum(np.prod(shape, dtype=float) for _, shape in kinds.values()) > 1e6:
        return tensors
    found = {}
    for name, (dtype, shape) in kinds.items():
        if name == "input_ids":
            found[name] = torch.randint(0, 211, shape)
        elif dtype == torch.bool:
            found[name] = torch.rand(shape) < rng.choice([0.0, 0.5, 1.0, 2.0])
        else:
            found[name] = torch.randn(shape).to(dtype)
            if name.endswith("scores") and rng.random() < 0.7:
                found[name][torch.rand(shape) < rng.random()] = float("-inf")
    if rng.random() < 0.4:
        found["padding"] = torch.randint(0, read.seen + 1, (rows,))
    return found


def prefix_case(rng, file):
    """Write a mutated prefix. Returns its model."""
    loaded, header, tensors = rng.choice(prefixes())
    header, tensors = json.loads(header), dict(tensors)
    for _ in range(rng.choice([0, 0, 1, 1, 1, 2])):
        part = rng.choice([("seen",), ("prefix_slots",), ("prefix_slots",), ("plan", "layers"), ("plan", "layers"), ()])
        change_json(header, rng, lambda path, part=part: path[: len(part)] == part)
    text = as_text(header, rng)
    if rng.random() < 0.5:
        tensors = fit(loaded, text, tensors, rng)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        if tensors:
            change_tensor(tensors, rng)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"headsink": text})
    return loaded


def plan_case(rng, file):
    """Write a mutated plan. Returns its model."""
    loaded, text = rng.choice(plans())
    plan = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 3])):
        layers = rng.random() < 0.6
        change_json(plan, rng, lambda path, layers=layers: (path[0] == "layers") == layers)
    file.write_text(("\ufeff" if rng.random() < 0.02 else "") + as_text(plan, rng), encoding="utf-8")
    return loaded


# checks


def check_bounds(cache):
    """Raise if a kernel would write outside a buffer with the next token."""
    for layer in cache.layers:
        if isinstance(layer, PlanLayer):
            assert {group.length for group in layer.groups} == {layer.seen} == {cache.get_seq_length()}
            table = KVTable(layer.groups, 1).at(layer.seen)
            layer.layout = None
            for group in layer.groups:
                own, slots = table[:, group.heads], group.keys.shape[2]
                assert group.keys.shape == group.values.shape == (*group.visible.shape, group.keys.shape[3])
                assert (own[..., KVField.END] <= slots).all()
                assert (own[..., KVField.SLOT] < slots).all()
                if group.window is not None and layer.seen >= group.window:
                    assert (own[..., KVField.SINK] + own[..., KVField.TOP_K] <= slots).all()
                    assert (own[..., KVField.WINDOW] < FOREVER).all()


@torch.no_grad()
def run(loaded, cache, rows):
    """Run several tokens in one pass, single tokens with the layers' kernels and the compiled step, and several again."""
    with headsink.apply(loaded, cache.plan):
        for count in (5, 1, 1, 1, "step", 4):
            check_bounds(cache)
            if count == "step":
                if refusal(loaded) is None:
                    with open_decoder(loaded, cache) as step:
                        assert step.run(tokens(rows, 1)[:, 0]).shape == (rows, 211)
                continue
            assert loaded(tokens(rows, count), past_key_values=cache).logits.shape == (rows, count, 211)


def try_prefix(rng, folder):
    loaded = prefix_case(rng, folder / "prefix")
    cache, ids = headsink.load_prefix(folder / "prefix", loaded)
    run(loaded, cache, len(ids))


@torch.no_grad()
def try_plan(rng, folder):
    loaded = plan_case(rng, folder / "plan.json")
    plan = Plan.load(folder / "plan.json")
    with headsink.apply(loaded, plan):
        cache = headsink.new_cache(loaded, plan)
        loaded(tokens(2, 40), past_key_values=cache)
        run(loaded, cache, 2)
    if plan.reconstruction_prompt:
        run(loaded, headsink.compress(loaded, plan, tokens(1, 40), reconstruct=True), 1)


TRY = {"prefix": try_prefix, "plan": try_plan}


def work(pipe, cases):
    """Run cases in the child process and report the outcome of each."""
    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # CUDA libraries reserve far more address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for kind, seed in cases:
            pipe.send((kind, seed, "started", ""))
            torch.manual_seed(seed)
            outcome, said = "ran", ""
            try:
                TRY[kind](random.Random(f"{kind} {seed}"), Path(folder))
            except HeadsinkError as error:
                outcome, said = ("refused", "") if "\n" not in str(error) else ("failed", f"two lines: {error}")
            except Exception:
                outcome, said = "failed", traceback.format_exc()
            pipe.send((kind, seed, outcome, said))


@pytest.fixture(scope="module")
def outcomes():
    """Return, by kind, the numbers of refused and accepted files, and the failures with their seeds."""
    spawn = multiprocessing.get_context("spawn")  # a child forked after a kernel has run would deadlock
    cases = [(kind, seed) for kind in TRY for seed in range(SEED * CASES, (SEED + 1) * CASES)]
    counts, wrong = {kind: Counter() for kind in TRY}, {kind: [] for kind in TRY}
    while cases:
        here, there = spawn.Pipe(duplex=False)
        child = spawn.Process(target=work, args=(there, cases), daemon=True)
        child.start()
        there.close()
        kind, seed = cases[0]
        try:
            while here.poll(PATIENCE):
                kind, seed, outcome, said = here.recv()
                if outcome != "started":
                    counts[kind][outcome] += 1
                    wrong[kind] += [f"{kind} {seed}: {said}"] if said else []
                    cases.remove((kind, seed))
            raise EOFError
        except EOFError:
            child.kill()
            child.join()
        if cases:
            wrong[kind].append(f"{kind} {seed}: the process ended with {child.exitcode}, or took over {PATIENCE} s")
            cases.remove((kind, seed))
    return counts, wrong


@pytest.mark.parametrize("kind", TRY)
def test_a_mutated_file_is_refused_or_runs(kind, outcomes):
    counts, wrong = outcomes
    print(f"{kind} files from seed {SEED * CASES}: {dict(counts[kind])}")  # noqa: T201
    assert not wrong[kind], "\n".join([f"{len(wrong[kind])} files", *wrong[kind][:5]])
    assert min(counts[kind]["refused"], counts[kind]["ran"]) > CASES / 20  # some files are refused and some run


@torch.no_grad()
def test_a_streaming_plan_may_have_a_window_as_long_as_the_models_context():
    loaded = model("llama", torch.float32)
    plan = Plan.uniform(loaded, Pattern(4, 0, loaded.config.max_position_embeddings - 4), positions="cache-relative")
    text, longer = tokens(1, 20), tokens(1, 100, seed=1)
    cache, same = headsink.new_cache(loaded, plan), headsink.new_cache(loaded, plan)
    with headsink.apply(loaded, plan):
        loaded(text, past_key_values=cache)
        loaded(text, past_key_values=same)
        with open_decoder(loaded, cache) as step:
            for token in longer.split(1, 1):
                expected = loaded(token, past_key_values=same).logits[:, 0]
                assert torch.allclose(step.run(token[:, 0]), expected, atol=1e-4)
