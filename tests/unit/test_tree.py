"""The tree's one rule: which part of the project may import which. Every import is read, those inside functions too.
What tests may reach into: no private name of ours. And how many lines there may be."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests import lines
from tests.distributed.megatron_stand_in import OPTIONS
from tests.harness import RANK_ENV

ROOT = Path(__file__).parents[2]

#: from the bottom up; a module imports parts of lower floors and its own part
FLOORS = (
    ("ds_plugin.core",),
    ("ds_plugin.sequence_length_warmup", "ds_plugin.completep", "ds_plugin.weight_averaging"),
    ("ds_plugin.config",),
    ("ds_plugin.deepspeed_engine", "megatron_patches"),
    ("ds_plugin.huggingface",),
    ("ds_plugin.plan", "ds_plugin.tune", "ds_plugin.sweeps"),
    ("ds_plugin.cli",),
    ("launch_scripts",),
)
#: what makes `import ds_plugin` and `import megatron_patches` short to write: names that are looked up when used
FRONTS = ("ds_plugin", "ds_plugin.__main__", "megatron_patches", "megatron_patches.__main__")


def floor_of(module: str) -> tuple[int, str]:
    """(floor, part) of a module, by the longest prefix."""
    found = [(i, part) for i, floor in enumerate(FLOORS) for part in floor if f"{module}.".startswith(f"{part}.")]
    return max(found, key=lambda at: len(at[1]))


def modules(root: Path) -> dict[str, Path]:
    """The dotted name of every module; a package's is that of its ``__init__``."""
    found = {}
    for top in ("ds_plugin", "megatron_patches", "launch_scripts"):
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> dict[str, set[str]]:
    """Which of our modules each of them imports."""
    ours, found = modules(root), {}
    for module, path in ours.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                    base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
                named |= {f"{base}.{a.name}" if f"{base}.{a.name}" in ours else base for a in node.names}
        found[module] = {name for name in named if name in ours and name != module}
    return found


def forbidden(root: Path) -> list[str]:
    """Imports against the rule, as ``importer -> imported``."""
    found = []
    for module, named in imports(root).items():
        if module in FRONTS:
            continue
        floor, part = floor_of(module)
        for name in sorted(named):
            if name in FRONTS:
                if floor < 5:  # tools and scripts may use the front door
                    found.append(f"{module} -> {name}")
                continue
            other, other_part = floor_of(name)
            if other > floor or (other == floor and other_part != part):
                found.append(f"{module} -> {name}")
    return found


def circles(root: Path) -> list[str]:
    """The modules that import themselves by way of others, fronts aside."""
    edges = {m: {n for n in named if n not in FRONTS} for m, named in imports(root).items() if m not in FRONTS}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += edges.get(name, ())
        return seen

    return [module for module in edges if module in reached(module)]


def test_nothing_imports_what_lies_above_it_or_beside_it():
    assert forbidden(ROOT) == []


def test_no_module_imports_itself_by_way_of_others():
    assert circles(ROOT) == []


#: private names that tests may use: of frameworks, of Python
THEIRS = {
    "torch": "_backward_hooks _dynamo _forward_hooks _forward_pre_hooks _get_current_function_mode_stack _lazy_call "
    "_make_subclass _orig_mod _python_dispatch _pytree _results_queue _StorageInfo _world",
    "DeepSpeed": "_get_expert_parallel_rank _get_max_expert_size_name _REMOVED_TOP_LEVEL_CONFIG_KEYS _step_applied "
    "_take_model_step",
    "megatron-core": "_build_document_index _build_shuffle_index _CUDA_RNG_STATE_TRACKER "
    "_CUDA_RNG_STATE_TRACKER_INITIALIZED _te_version",
    "Hugging Face, Lightning": "_is_hf_initialized _prepare_backend _reset_state _validate_device_index_selection",
    "Python": "_asdict _exit",
}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def reached_into(text: str) -> set[tuple[int, str]]:
    """(line, name) of every private name of another module or object that a file uses, the patched ones too."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None) or ""
            found += [(node.lineno, part) for a in node.names for part in f"{module}.{a.name}".split(".")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in PATCHING:
            given = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found += [(node.lineno, value.rpartition(".")[2]) for value in given]
    return {(line, name) for line, name in found if private(name)}


PATCHING = {"setattr", "getattr", "hasattr", "delattr", "replaced", "Patch", "attrgetter", "object"}


def test_tests_reach_into_no_private_name_of_ours():
    theirs = set(" ".join(THEIRS.values()).split())
    seen, ours = set(), []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for line, name in sorted(reached_into(path.read_text())):
            seen.add(name)
            if name not in theirs:
                ours.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert ours == [] and theirs <= seen  # the list holds what is used


def test_no_budget_of_lines_is_overspent():
    assert {name: both for name, both in lines.spent().items() if both[0] > both[1]} == {}


def test_what_reaches_into_another_module_is_seen():
    code = """
from ds_plugin.a import _b, c as _c
import ds_plugin._d
self._own, x._e, x.y._f.__class__, x._g()
patched.setattr(x, "_h", 1), patched.setattr("ds_plugin.a._i", 1), getattr(x, "_j", None), mock.patch.object(x, "_k")
"""
    assert "".join(name[1:] for _, name in sorted(reached_into(code))) == "bdefghijk"


BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)

sys.meta_path.insert(0, Blocked())
"""

IMPORTED = """
import importlib, pkgutil
package = importlib.import_module({package!r})
names = [m.name for m in pkgutil.walk_packages(package.__path__, {package!r} + ".")]
for name in names:
    if name not in {joins!r} and not name.endswith("__main__"):
        importlib.import_module(name)
print("modules", len(names))
"""

TRAINED_WITHOUT_MEGATRON = """
import torch, ds_plugin
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
config = {
    "train_micro_batch_size_per_gpu": 2, "steps_per_print": 10**9,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "sequence_length_warmup": {
        "enabled": True, "start_length": 4, "end_length": 8, "multiple_of": 4, "duration": {"steps": 2},
        "preflight": False},
    "weight_averaging": {"enabled": True, "interval": 1},
}
engine = ds_plugin.initialize(model=model, config=config)[0]
lengths = []
for _ in range(3):
    found = engine(torch.ones(2, 8, dtype=torch.long))
    lengths.append(found.shape[1])
    engine.backward(found.square().mean())
    engine.step()
engine.save_checkpoint("checkpoints")
engine.load_checkpoint("checkpoints")
print("trained", lengths, ds_plugin.get_plugin(engine).averager.steps)
from ds_plugin.cli.main import main
given = ["--widths", "16", "--depths", "1", "--steps", "1", "--seeds", "1", "--recipes", "completep"]
print("swept", main(["coord-check", "--hf", "config.json", *given]))
"""
#: of a model that the sweeps can build without megatron-core
LLAMA = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}

TRAINED_WITHOUT_DEEPSPEED = """
import torch
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
from megatron_patches.training_loop import script
print("exit code", script.run(sys.argv[1:]))
print("deepspeed" in sys.modules)
from ds_plugin.cli.main import main
print("env", main(["env"]), "to-universal", main(["to-universal", "a", "b"]))
"""


def _run(code: str, folder: Path, *arguments: str) -> list[str]:
    env = {**os.environ, **RANK_ENV, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": str(ROOT)}
    env |= {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_deepspeed_alone_is_enough(tmp_path):
    """Nothing of megatron-core can be imported: every module of ours can, and a run trains, averages and resumes."""
    imported = IMPORTED.format(package="ds_plugin", joins=())
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "intermediate_size": 32}))
    said = _run(BLOCK.format(blocked="megatron") + imported + TRAINED_WITHOUT_MEGATRON, tmp_path)
    assert "trained [4, 8, 8] [1, 2, 3]" in said and any(line.startswith("modules ") for line in said)
    assert said[-1] == "swept 0"


def test_megatron_alone_is_enough(tmp_path):
    """Nothing of DeepSpeed can be imported: all of megatron_patches can, but for its pipeline; its loop trains."""
    folder = ROOT / "tests" / "reference" / "megatron_loop"
    sections = {"weight_averaging": {"enabled": True, "interval": 1, "window": 2}}
    (tmp_path / "methods.json").write_text(json.dumps(sections))
    imported = IMPORTED.format(package="megatron_patches", joins=("megatron_patches.models.pipeline_gpt",))
    code = BLOCK.format(blocked="deepspeed") + f"sys.path.insert(0, {str(folder)!r})\n" + imported
    arguments = ["--options", json.dumps(OPTIONS), "--ds-plugin-config", str(tmp_path / "methods.json")]
    said = _run(code + TRAINED_WITHOUT_DEEPSPEED, tmp_path, str(folder / "pretrain_small.py"), *arguments)
    assert said[said.index("exit code 0") + 1] == "False" and said[-1] == "env 0 to-universal 2"
    assert any(re.fullmatch(r"accelerator +cpu, 1 threads per process, gloo", line) for line in said)
