"""Two processes on one machine compute what one does, and save whole adapters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inlay

from . import worker


def launch(scenario, folder):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker.__file__, scenario, str(folder)]
    done = subprocess.run([sys.executable, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-1000:]


@pytest.mark.parametrize("scenario", ["ddp", "fsdp2"])
def test_gradients_and_files_equal_those_of_one_process(scenario, tmp_path):
    launch(scenario, tmp_path)
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


@pytest.mark.parametrize("backend", ["bitsandbytes", "inlay"])
def test_training_on_four_bits_under_fsdp2_equals_that_of_one_process(backend, tmp_path):
    """bitsandbytes' codes are sharded in the dtype that they are stored in; Inlay's are left whole by `ignored_params`."""
    launch(f"quantised {backend}", tmp_path)
    alone = worker.quantised(backend)
    before = {n: q.detach().clone() for n, q in alone.named_parameters() if q.requires_grad}
    expected, found = worker.three_steps(alone, (0, 1)), torch.load(tmp_path / "found.pt")
    assert found["trained"].keys() == expected.keys()
    assert len(expected) == 4
    for name, value in expected.items():
        assert not torch.equal(value, before[name])
        torch.testing.assert_close(found["trained"][name], value, rtol=1e-3, atol=1e-5)
    if backend == "bitsandbytes":
        # Half of the bytes: two codes in one, two bytes in a number of the storage.
        assert [tuple(size) for size in found["sizes"].values()] == [
            (64 * 128 // 4 // 2, 1),
            (64 * 128 // 4 // 2, 1),
            (64 * 64 // 4 // 2, 1),
        ]
    else:
        assert found["kind"] == "QuantizedTensor"
    loaded = inlay.PeftModel.from_pretrained(worker.quantised(backend).unload(), Path(tmp_path) / "adapter")
    x = worker.wide_batch(5)
    torch.testing.assert_close(loaded(x), alone(x), rtol=2e-2, atol=2e-2)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Where two processes left what adapters do on a model that is split between them."""
    folder = tmp_path_factory.mktemp("split")
    worker.llama(folder)
    launch("split", folder)
    return folder


@pytest.mark.parametrize("case", worker.SPLIT)
def test_a_model_that_is_split_over_devices_computes_what_a_whole_one_does(case, split, tmp_path):
    """Tensor parallelism as transformers has it. Adapters are whole on each device, with the same gradients."""
    from transformers import AutoModelForCausalLM

    expected = worker.used(AutoModelForCausalLM.from_pretrained(split / "base"), case, tmp_path)
    first, second = (torch.load(split / f"{case} on {rank}.pt") for rank in (0, 1))
    assert first.keys() == expected.keys()
    assert sum(name.startswith("gradient") for name in expected) > 2
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert torch.equal(first[name], second[name]), name
    written, alone = (inlay.load_peft_weights(str(folder)) for folder in (split / case, tmp_path))
    assert written.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(written[key], value)
