"""Query a server that runs under a plan.

headsink plan smollm2 --no-top-k --context 4000 --out windows.json
headsink serve smollm2 --plan windows.json --port 8000 &
python examples/serve_and_query.py --url http://localhost:8000/v1 "The capital of France is"
"""

import argparse
import json
import urllib.request

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompts", nargs="+")
parser.add_argument("--url", default="http://localhost:8000/v1")
parser.add_argument("--model", default="smollm2", help="the name that the server was started with")
parser.add_argument("--tokens", type=int, default=40)
arguments = parser.parse_args()

for prompt in arguments.prompts:
    body = {"model": arguments.model, "prompt": prompt, "max_tokens": arguments.tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{arguments.url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        print(prompt + json.load(answer)["choices"][0]["text"])
