"""Where a process computes: what was asked for, or one sentence and no start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from certs.site import make_all
from fedqlora.engine.device import choose_device
from fedqlora.errors import ConfigError

ROOT = Path(__file__).parents[2]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@without_gpu
def test_a_gpu_that_is_not_there_is_refused_and_not_replaced_by_the_cpu() -> None:
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cuda finds no usable GPU"):
        choose_device("cuda")


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_of_memory_is_above_nothing_and_up_to_all(fraction: float) -> None:
    with pytest.raises(ConfigError, match="is not above 0 and up to 1"):
        choose_device("auto", fraction)


def test_a_share_of_memory_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="for a GPU only"):
        choose_device("cpu", 0.5)


@without_gpu
@pytest.mark.parametrize("program", ["client.trainer", "server.evaluator"])
def test_a_program_without_its_gpu_ends_before_it_serves(program: str, tmp_path: Path) -> None:
    make_all(tmp_path / "certs", ["a"])
    policy = tmp_path / "policy.toml"
    policy.write_text('[models]\ndigests = ["d"]\n')
    own = {
        "client.trainer": [
            "--site", "a", "--data", str(tmp_path), "--policy", str(policy),
            "--keys", str(tmp_path / "certs" / "sites" / "a" / "current"),
        ],
        "server.evaluator": [
            "--held-out", str(tmp_path), "--keys", str(tmp_path / "certs" / "evaluator"),
        ],
    }[program]  # fmt: skip
    shared = ["--models", str(tmp_path), "--state", str(tmp_path / "state")]
    socket = tmp_path / "s.sock"
    result = subprocess.run(
        [sys.executable, "-m", program, *own, *shared, "--socket", str(socket), "--device", "cuda"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "--device cuda finds no usable GPU" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not socket.exists()


@pytest.mark.gpu
def test_a_share_of_a_gpu_is_a_cap() -> None:
    code = (
        "import torch; from fedqlora.engine.device import choose_device\n"
        "choose_device('cuda', 0.1)\n"
        "total = torch.cuda.get_device_properties(0).total_memory\n"
        "torch.zeros(total // 20, dtype=torch.uint8, device='cuda')\n"
        "try: torch.zeros(total // 5, dtype=torch.uint8, device='cuda')\n"
        "except torch.OutOfMemoryError: print('capped')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "capped\n"
