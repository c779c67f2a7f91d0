"""Compile Triton kernels for an H100 without a GPU, from the calls that would launch them.

    python tests/support/offline.py FILE    # run FILE, where launches only compile; print a JSON object for each kernel

Run it in a separate process, without Triton's interpreter. Outputs of kernels are not written.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGET = 90  # compute capability, times ten
LONG = 60  # minimum instructions of a loop that is reported


def compiled(script: str, folder: Path) -> list[dict[str, Any]]:
    """Compile the launches of a script. Returns for each kernel: name, bytes of shared memory, registers, bytes spilled,
    instructions of its loops, and its code (`ptx`)."""
    path = folder / "launches.py"
    path.write_text(script)
    here = Path(__file__)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path]),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run([sys.executable, here, path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _run(path: str) -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        """A driver for a GPU that does not exist."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", TARGET, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            print(
                json.dumps(
                    {"name": kernel.name, "shared": kernel.metadata.shared, **_resources(kernel.asm["cubin"])}
                    | {"ptx": kernel.asm["ptx"]}
                )
            )
        return kernel

    seen: set[str] = set()
    triton.runtime.driver.set_active(Driver())
    launch = triton.runtime.jit.JITFunction.run
    triton.runtime.jit.JITFunction.run = run  # type: ignore[method-assign]
    from headsink.utils import device as gpu

    gpu.DEVICES = {"cpu"}
    torch.manual_seed(0)
    runpy.run_path(path)


def _resources(cubin: bytes) -> dict[str, Any]:
    """Return registers per thread, bytes of local memory (spills), and the instructions of the longer loops, in order."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            _tool(*command, file.name) for command in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loops, labels, count = [], dict[str, int](), 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = count
        elif re.match(r"/\*[0-9a-f]+\*/", line.strip()):
            count += 1
            back = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels and count - labels[back[1]] >= LONG:
                loops.append(count - labels[back[1]])
    return {"registers": numbers["REG"], "spilled": max(numbers["STACK"], numbers["LOCAL"]), "loops": loops}


def _tool(name: str, *options: str) -> str:
    """Return the output of one of Triton's tools."""
    from triton import backends

    path = Path(backends.__path__[0]) / "nvidia/bin" / name
    return subprocess.run([path, *options], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    _run(sys.argv[1])
