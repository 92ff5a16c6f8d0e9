"""Two processes on one machine compute what one does, and save whole adapters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inlay

from . import worker


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2"])
def test_gradients_and_files_equal_those_of_one_process(scenario, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launch, worker.__file__, scenario, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = worker.adapted()
    (sum(alone(worker.batch(rank)).square().mean() for rank in (0, 1)) / 2).backward()
    expected = worker.gradients(alone)
    found = torch.load(tmp_path / "gradients.pt")
    assert found.keys() == expected.keys()
    assert len(found) == 6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    loaded = inlay.PeftModel.from_pretrained(worker.model(), Path(tmp_path) / "adapter")
    x = worker.batch(5)
    torch.testing.assert_close(loaded(x), alone(x))
