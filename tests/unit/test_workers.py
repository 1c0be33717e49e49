"""How the suite itself is shared among workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = {
    "one": "def test_a(): pass\ndef test_b(): pass\n",
    "two": "import os, time\ndef test_a(): time.sleep(0.5)\ndef test_b(): os._exit(1)\ndef test_c(): pass\n",
    "three": "import time\ndef test_a(): time.sleep(0.2)\n",
    "four": "import time\ndef test_a(): time.sleep(0.2)\ndef test_b(): pass\n",
    "five": "def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass\n",
}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_worker_that_dies_costs_one_test(tmp_path: Path, workers: int) -> None:
    for name, text in FILES.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "workers", "-p", "no:cacheprovider", f"--numprocesses={workers}", "."],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTEST_ADDOPTS": ""},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 1, run.stdout + run.stderr
    assert "crashed while running 'test_two.py::test_b'" in run.stdout
    assert "1 failed, 10 passed" in run.stdout
