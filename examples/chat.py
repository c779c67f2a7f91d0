"""Chat with bounded memory: every turn goes through one KV cache that holds what the plan keeps.

python examples/chat.py "Who wrote Hamlet?" "When was that?"
"""

import argparse
from pathlib import Path

import headsink
from headsink.generation.chat import Conversation

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("messages", nargs="+", help="what the user says, turn by turn")
parser.add_argument("--model", default="smollm2")
parser.add_argument(
    "--plan", type=Path, help="a plan file; without one, 4 sink tokens and a window of 252 for every head"
)
parser.add_argument("--tokens", type=int, default=60, help="tokens of an answer")
arguments = parser.parse_args()

model, tokenizer = headsink.load(arguments.model)
plan = (
    headsink.Plan.load(arguments.plan)
    if arguments.plan
    else headsink.Plan.uniform(model, headsink.Pattern(sink=4, window=252))
)
chat = Conversation(model, tokenizer, plan, max_new_tokens=arguments.tokens)
for message in arguments.messages:
    answer = chat.ask(message)
    print(f"> {message}\n{answer.text}\n  [{len(chat.ids)} tokens so far, KV cache {answer.kv_bytes / 1e6:.2f} MB]")
