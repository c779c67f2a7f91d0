"""Read a document once, keep a part of its KV cache, and ask several questions about it.

python examples/compress_document.py --file README.md "What is a plan?" "Which models are tested?"
"""

import argparse
import copy
from pathlib import Path

import torch

import headsink
from headsink.generation.templates import document_prompt, question_prompt
from headsink.models.transformers_names import cache_argument

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("questions", nargs="+")
parser.add_argument("--file", type=Path, required=True, help="the document")
parser.add_argument("--model", default="smollm2")
parser.add_argument("--plan", type=Path, help="a plan file; calibrated here if not given, which takes minutes")
parser.add_argument("--tokens", type=int, default=60, help="tokens of an answer")
arguments = parser.parse_args()

model, tokenizer = headsink.load(arguments.model)
given = arguments.plan
plan = headsink.Plan.load(given) if given else headsink.calibrate(model, tokenizer, context=2000, budget=0.25)

text, document = document_prompt(tokenizer, arguments.file.read_text(encoding="utf-8"))
compressed = headsink.compress(model, plan, torch.tensor([document], device=model.device))
print(f"{len(document)} tokens are read; the KV cache holds {compressed.nbytes() / 1e6:.2f} MB")

for question in arguments.questions:
    cache = copy.deepcopy(compressed)  # each question starts from the document alone
    ids = torch.tensor([document + question_prompt(tokenizer, text, question)], device=model.device)
    with headsink.apply(model, plan):
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(cache),  # cache=cache; past_key_values=cache before transformers 5.24
            max_new_tokens=arguments.tokens,
            do_sample=False,
        )
    print(f"\n{question}\n{tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)}")
