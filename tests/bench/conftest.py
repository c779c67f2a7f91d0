"""The command line of `headsink bench quality`, in this process."""

import pytest

from headsink.cli import main


@pytest.fixture
def bench(monkeypatch, capsys):
    """Run the command with words and return its exit status, standard output and standard error."""

    def bench(*words):
        monkeypatch.setattr("sys.argv", ["headsink", "bench", "quality", *map(str, words), "--device", "cpu"])
        with pytest.raises(SystemExit) as stop:
            main.main()
        return stop.value.code or 0, *capsys.readouterr()

    return bench
