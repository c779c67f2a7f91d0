"""The sandbox: limits of generated code, and a verdict of passed only if all tests ran without an error."""

import sys
import time

import pytest

from headsink.bench.tasks.sandbox import PROCESSES, judge

RIGHT = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(2) == 4\n"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock are of Linux")


def quickly(solution, tests="", **limits):
    return judge(solution, tests, **({"cpu_seconds": 1, "seconds": 3} | limits))


def test_correct_code_passes_and_wrong_code_gives_the_reason():
    assert judge(RIGHT, TESTS).passed
    wrong = judge(RIGHT, "assert double(2) == 5, 'not five'\n")
    assert (wrong.passed, wrong.reason) == (False, "failed: AssertionError: not five")
    assert judge("def double(x:\n", TESTS).reason.startswith("failed: SyntaxError")
    assert judge("", TESTS).reason.startswith("failed: NameError")


@pytest.mark.parametrize(
    "ending", ["import sys; sys.exit(0)", "import os; os._exit(0)", "import os; os._exit(1)", "raise SystemExit"]
)
def test_code_that_ends_before_its_tests_does_not_pass(ending):
    assert not quickly(f"{RIGHT}{ending}\n", TESTS).passed


def test_printed_output_is_not_a_verdict():
    assert quickly("print('passed')\n", "assert False\n").reason == "failed: AssertionError"


@pytest.mark.slow
def test_loops_and_sleep_end():
    assert quickly("while True: pass\n").reason == "timed out"
    start = time.monotonic()
    assert quickly("import time; time.sleep(100)\n", seconds=1).reason == "timed out"
    assert time.monotonic() - start < 10


def test_memory_and_files_are_limited():
    assert quickly("x = 'a' * (1 << 31)\n").reason.startswith("failed: MemoryError")
    assert quickly("open('x', 'wb').write(bytes(1 << 26))\n").reason.startswith("failed: OSError")


@pytest.mark.slow
def test_processes_are_limited():
    bomb = "import os\nn = 1\ntry:\n  while os.fork(): n += 1\n  os._exit(0) if n else 0\nexcept OSError: pass\n"
    slow = bomb.replace("os._exit(0) if n else 0", "import time; time.sleep(100)")
    start = time.monotonic()
    assert quickly(slow, f"assert n <= {PROCESSES}\n").passed
    assert not quickly("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass\n").passed
    assert time.monotonic() - start < 30


def test_the_environment_is_empty_and_the_folder_temporary(monkeypatch):
    monkeypatch.setenv("HEADSINK_SECRET", "x")
    assert quickly("import os\n", "assert 'HEADSINK_SECRET' not in os.environ and not os.listdir('.')\n").passed
    assert quickly("open('a', 'w').write('b')\n", "assert open('a').read() == 'b'\n").passed
    assert quickly("input()\n").reason.startswith("failed: EOFError")


def test_sets_have_the_same_order_in_every_run():
    code = "order = list({'one', 'two', 'three', 'four', 'five'})\n"
    assert len({quickly(code, "assert 0, order\n").reason for _ in range(4)}) == 1


@LINUX
def test_nothing_outside_is_written(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("kept")
    found = quickly(f"open({str(outside)!r}, 'w').write('gone')\n")
    if found.passed:
        pytest.skip("this kernel has no Landlock")
    assert "PermissionError" in found.reason
    assert "PermissionError" in quickly(f"import os; os.remove({str(outside)!r})\n").reason
    assert outside.read_text() == "kept"


@LINUX
def test_there_is_no_network():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        found = judge(f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)\n", "")
        if found.passed:
            pytest.skip("this kernel allows no namespaces")
        assert found.reason.startswith("failed: OSError")
