"""Processes forked during or after compiled kernels: they work or raise one line, and never hang or crash."""

import os
import subprocess
import sys

import pytest
from families import tiny

from headsink.decoding.step import prepare

pytestmark = pytest.mark.slow

# A child puts what it found into a queue. Everything runs in one fresh process, since what has run before is what matters.
SCRIPT = """
import multiprocessing, threading
import torch
from families import tiny
from headsink import HeadsinkError, Pattern, Plan, apply
from headsink.attention.backends import AttentionParams, backend_of
from plans import random_plan

context = multiprocessing.get_context("fork")
model, ids = tiny("llama"), torch.arange(3, 33)[None]
plan = Plan.of(model, [[Pattern(1, 0, 4)] * 2] * 3)
counted_in_cache = plan.model_copy(update={"positions": "cache-relative"})  # which kernels do not support
key = torch.randn(1, 2, 5, 8)

def kernel():
    visible = torch.ones(1, 2, 5, dtype=torch.bool)
    return backend_of("cpu").decode(key[:, :, :1], key, key, visible, 5, AttentionParams(1.0)).shape[1]

def under(plan, **options):
    with apply(model, plan), torch.no_grad():
        return model.generate(ids, max_new_tokens=4, do_sample=False, **options).shape[1]

def products():
    return bool(torch.randn(700, 700).mm(torch.randn(700, 700)).exp().sum() > 0)

def found(work, *args, **options):
    try:
        return work(*args, **options)
    except HeadsinkError as error:
        return str(error)

def forked(*works):
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: [queue.put(found(*work)) for work in works])
    process.start()
    process.join(200)
    if process.exitcode is None:
        process.kill()
    return [process.exitcode, *[queue.get() for work in works if not queue.empty()]]

class Numbers(torch.utils.data.Dataset):
    def __init__(self, work=None): self.work = work
    def __len__(self): return 8
    def __getitem__(self, n):
        if self.work is not None: self.work()
        return torch.full((4,), float(n))

def trained(**options):
    weight, seen = torch.zeros(4, requires_grad=True), 0
    for batch in torch.utils.data.DataLoader(Numbers(**options), batch_size=2, num_workers=2):
        (batch @ weight).sum().backward()
        kernel()
        seen += len(batch)
    return seen

print("kernels in a child, none before:", forked((kernel,), (under, plan)))
print("kernels:", kernel(), under(plan))
products()
print("kernels in a child, some before:", forked((kernel,), (kernel,)))
print("torch in a child:", forked((products,), (under, counted_in_cache)))
print("training:", trained())
try:
    trained(work=kernel)
except Exception as error:
    print("kernels in a worker:", type(error).__name__, str(error).split("HeadsinkError: ")[-1].replace(chr(92) + "n", ""))

stop = threading.Event()
def busy():
    while not stop.is_set(): kernel()
threads = [threading.Thread(target=busy) for _ in range(3)]
for thread in threads: thread.start()
try:
    print("others inside kernels:", [forked((kernel,), (products,)) for _ in range(5)])
finally:
    stop.set()
    for thread in threads: thread.join()
print("kernels:", kernel())
"""

LINE = "compiled kernels cannot run in a forked process after the parent used them: start processes with the 'spawn' "
LINE += "method, e.g. multiprocessing.set_start_method('spawn') or DataLoader(multiprocessing_context='spawn')"


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_processes_work_or_raise_one_line(threads):
    prepare(tiny("llama"))  # so that no child has to compile, which takes longer than the timeout
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": "2", "PYTHONWARNINGS": "ignore"}
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    command, environment = [sys.executable, "-c", SCRIPT], environment | {"PYTHONPATH": path}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    found = dict(line.split(": ", 1) for line in ended.stdout.splitlines())
    assert found == {
        "kernels in a child, none before": str([0, 2, 34]),
        "kernels": "2",
        "kernels in a child, some before": str([0, LINE, LINE]),
        "torch in a child": str([0, True, 34]),
        "training": "8",
        "kernels in a worker": f"HeadsinkError {LINE}",
        "others inside kernels": str([[0, LINE, True]] * 5),
    }
