"""A worker that is killed comes back where it was; one that fails ends the job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def test_torchrun_restarts_take_up_the_run(tmp_path: Path) -> None:
    """All in one job, as starting processes takes seconds."""
    job = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "--max-restarts", "1"),
            # on a busy machine torchrun may miss heartbeats of its own, and take itself for dead
            *("--rdzv-conf", "keep_alive_max_attempt=100"),
            *(str(Path(__file__).parent.with_name("elastic.py")), str(tmp_path)),
        ],
        # by default torchrun gives a second attempt the addresses of the first one's processes
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert (tmp_path / "died").exists(), job.stderr
    found, expected = (
        torch.load(tmp_path / name, weights_only=True) for name in ("taken up", "whole")
    )
    assert (found["steps"], expected["steps"]) == (10, 18)  # the checkpoint was at step 8
    assert found["losses"] == expected["losses"]
    assert len(expected["weights"]) == 12
    for name, value in expected["weights"].items():
        assert torch.equal(found["weights"][name], value), name
    assert job.returncode != 0
    assert "OSError: disk full" in job.stderr
