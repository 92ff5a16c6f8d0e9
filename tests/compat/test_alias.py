"""The alias itself: what is served, what is refused, and how it reaches the processes that a program starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Comes before everything: whoever gets here past the alias was about to reach the real peft.
REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "peft", "the real peft was asked for " + name
sys.meta_path.insert(0, Refuse())
"""


def python(code: str) -> str:
    """Run code in a process of its own and give back what it prints."""
    found = run(["-c", REFUSE + code])
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("COV_")}
    return subprocess.run([sys.executable, "-W", "ignore", *arguments], env=own | environment, capture_output=True, text=True, check=False)


def test_objects_are_inlays_own():
    python("""
import inlay.compat.peft
assert "torch" not in sys.modules, "importing the alias is to cost nothing"
import importlib.util, importlib.metadata, inlay
assert importlib.util.find_spec("peft") is not None
assert importlib.metadata.version("peft") == "0.21.2" == importlib.metadata.metadata("peft")["Version"]
assert "peft" in importlib.metadata.packages_distributions()
import peft
assert peft.__version__ == "0.21.2"
from peft import LoraConfig, PeftModel, get_peft_model, LoraModel, OFTConfig, TaskType, PeftMixedModel, PrefixTuningConfig
from peft.tuners import LoraConfig as second
from peft.tuners.lora.config import LoraConfig as third
assert LoraConfig is second is third is inlay.LoraConfig
assert PeftModel is peft.peft_model.PeftModel is inlay.PeftModel
assert isinstance(LoraConfig(), peft.PeftConfig)
import pickle
assert pickle.loads(pickle.dumps(LoraConfig(r=3))).r == 3
namespace = {}
exec("from peft import *", namespace)
assert namespace["LoraConfig"] is LoraConfig and "_get_submodules" not in namespace
config = LoraConfig(r=3, target_modules=["q"])
assert LoraConfig(**config.to_dict()) == config
try:
    LoraConfig(no_such_field=1)
except TypeError as error:
    assert "no_such_field" in str(error)
else:
    raise AssertionError
""")


def test_every_name_of_the_contract():
    python("""
import inlay.compat.peft
from peft import (__version__, PeftModel, PeftMixedModel, PeftConfig, PeftType, LoraConfig, PrefixTuningConfig, PromptLearningConfig,
    get_peft_model, inject_adapter_in_model, get_peft_model_state_dict, set_peft_model_state_dict, prepare_model_for_kbit_training)
from peft.functional import (cast_adapter_dtype, delete_adapter, get_peft_model_state_dict, inject_adapter_in_model, set_adapter,
    set_peft_model_state_dict, set_requires_grad)
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale, check_if_peft_model
from peft.utils import (ModulesToSaveWrapper, _get_submodules, get_peft_model_state_dict, WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME,
    CONFIG_NAME, transpose, infer_device, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
from peft.utils.other import AuxiliaryTrainingWrapper, fsdp_auto_wrap_policy
from peft.utils.hotswap import (check_hotswap_configs_compatible, hotswap_adapter_from_state_dict, hotswap_adapter,
    prepare_model_for_compiled_hotswap)
from peft.utils.save_and_load import load_peft_weights
from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import LoraLayer as again, Linear, Embedding, Conv2d
from peft.tuners.ia3 import IA3Layer
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lokr.layer import LoKrLayer, factorization
from peft.import_utils import is_bnb_available, is_bnb_4bit_available
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
assert LoraLayer is again and issubclass(Linear, LoraLayer) and "lora_A" in LoraLayer.adapter_layer_names
assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig and PEFT_TYPE_TO_PREFIX_MAPPING["LORA"] == "lora_"
assert PEFT_TYPE_TO_TUNER_MAPPING["LORA"] is LoraModel
assert (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME) == ("adapter_model.bin", "adapter_model.safetensors", "adapter_config.json")
assert TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"] == ["q_proj", "v_proj"]
""")


def test_what_is_absent_is_named():
    python("""
import inlay.compat.peft, peft
for statement, error, said in (
    ("from peft import NoSuchConfig", ImportError, "NoSuchConfig"),
    ("import peft.tuners.no_such_method", ModuleNotFoundError, "peft.tuners.no_such_method"),
    ("peft.NoSuchConfig", AttributeError, "NoSuchConfig"),
):
    try:
        exec(statement)
    except error as raised:
        assert said in str(raised), raised
    else:
        raise AssertionError(statement)
assert not hasattr(peft, "NoSuchConfig")
""")


def test_layers_are_recognised_by_what_is_on_them():
    python("""
import inlay.compat.peft, torch
from torch import nn
from peft import LoraConfig, IA3Config, get_peft_model
from peft.tuners.lora import LoraLayer, Linear, Embedding
from peft.tuners.ia3 import IA3Layer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, _get_submodules
from peft.utils.other import AuxiliaryTrainingWrapper
model = nn.Sequential()
model.add_module("table", nn.Embedding(9, 8))
model.add_module("first", nn.Linear(8, 8))
model.add_module("second", nn.Linear(8, 8))
model.add_module("head", nn.Linear(8, 3))
peft_model = get_peft_model(model, LoraConfig(target_modules=["first", "table"], modules_to_save=["head"]))
peft_model.add_adapter("i", IA3Config(target_modules=["second"], feedforward_modules=[]))
kinds = (BaseTunerLayer, LoraLayer, Linear, Embedding, IA3Layer, ModulesToSaveWrapper, AuxiliaryTrainingWrapper)
found = {n: "".join("x" if isinstance(m, k) else "." for k in kinds) for n, m in model.named_children()}
assert found == {"table": "xx.x...", "first": "xxx....", "second": "x...x..", "head": ".....xx"}, found
assert model.head.adapter_state_dict_load_map("default") == {
    "weight": "adapters.default.weight", "bias": "adapters.default.bias"}
assert _get_submodules(model, "first") == (model, model.first, "first")
# What reads a retrained head's weight itself gets the one that acts.
assert model.head.weight is model.head.adapters["default"].weight
with peft_model.disable_adapter():
    assert model.head.weight is model.head._parameters["weight"]
""")


def test_helpers_do_what_they_say():
    python("""
import inlay.compat.peft, torch
from torch import nn
from peft import LoraConfig, get_peft_model
from peft.functional import delete_adapter, set_adapter, set_requires_grad, cast_adapter_dtype
from peft.helpers import rescale_adapter_scale
from peft.utils import transpose
torch.manual_seed(0)
model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], init_lora_weights=False))
x = torch.randn(2, 8)
y = model(x)
with model.disable_adapter():
    base = model(x)
with rescale_adapter_scale(model, 0.5):
    torch.testing.assert_close(model(x) - base, 0.5 * (y - base))
assert torch.equal(model(x), y)
set_requires_grad(model, "default", False)
assert not any(q.requires_grad for q in model.parameters())
set_requires_grad(model, "default")
model.half()
cast_adapter_dtype(model, "default")
assert {q.dtype for n, q in model.named_parameters() if "lora_" in n} == {torch.float32}
model.add_adapter("other", LoraConfig(target_modules=["0"]))
set_adapter(model, ["other", "default"])
assert model.active_adapters == ["other", "default"]
assert delete_adapter(model, "default", "lora_") == ["other"]
assert list(model.peft_config) == ["other"]
assert transpose(torch.zeros(2, 3), True).shape == (3, 2) and transpose(x, False) is x
""")


@pytest.mark.parametrize("library", ["transformers", "accelerate"])
def test_too_late_is_refused_with_the_remedy(library: str):
    said = python(f"""
import {library}
try:
    import inlay.compat.peft
except RuntimeError as error:
    print(error)
""")
    assert library in said
    assert "before" in said
    assert "python -m inlay.compat.peft" in said


def test_beside_the_real_peft_it_is_refused():
    said = python("""
import types
sys.modules["peft"] = types.ModuleType("peft")
try:
    import inlay.compat.peft
except RuntimeError as error:
    print(error)
""")
    assert "imported already" in said


PROGRAM = """
import sys, importlib.metadata, multiprocessing, subprocess
from peft import LoraConfig
import inlay

def ours(_):
    from peft import LoraConfig
    return LoraConfig.__module__

if __name__ == "__main__":
    assert LoraConfig is inlay.LoraConfig
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(ours, [0]))
    code = "import peft, sys; print(peft.__version__, peft.LoraConfig.__module__, 'startup' in str(sys.path))"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    print(*sys.argv[1:])
"""


def test_a_script_and_its_processes_run_under_the_alias(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    found = run(["-m", "inlay.compat.peft", str(script), "--option", "value"])
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["inlay.methods.lora", "0.21.2 inlay.methods.lora False", "--option value"]


def test_another_sitecustomize_still_runs(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.other_one_ran = True\n")
    (tmp_path / "script.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(other_one_ran)'], check=True)"
    )
    found = run(["-m", "inlay.compat.peft", str(tmp_path / "script.py")], PYTHONPATH=str(tmp_path))
    assert found.stdout.strip() == "True", found.stderr
    assert "sitecustomize" not in found.stderr


def test_the_launcher_says_what_is_wrong(tmp_path: Path):
    assert "usage" in run(["-m", "inlay.compat.peft", "--help"]).stdout
    assert "no such file" in run(["-m", "inlay.compat.peft", str(tmp_path / "absent.py")]).stderr
    assert run(["-m", "inlay.compat.peft"]).returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "inlay.compat.peft"],
        ["-m", "inlay.compat.peft", "-m", "torch.distributed.run", "--nproc-per-node=2"],
        ["-m", "inlay.compat.peft", "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"],
    ],
    ids=["torchrun, then the alias", "the alias, then torchrun", "the alias, then accelerate"],
)
def test_launchers_of_several_processes(launcher: list[str], tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfrom peft import LoraConfig\nprint('rank', os.environ.get('RANK', 0), LoraConfig.__module__, flush=True)\n"
    )
    found = run([*launcher, str(script)])
    assert found.returncode == 0, found.stderr
    assert "rank 0 inlay.methods.lora" in found.stdout
    assert "peft." not in found.stdout
