"""Compile the CPU kernels for models of a dtype: python tests/support/compile_step.py float32"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headsink.decoding.step import prepare

sizes = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
model = LlamaForCausalLM(LlamaConfig(**sizes)).to(getattr(torch, sys.argv[1]))
for kv_dtype in ("auto", "int8", "k8v4"):
    prepare(model, kv_dtype)
