"""The code blocks of README, the cards and the site: what is asked of each, and how a page is run.

A block is a fence with a language. The line before it may say how it is tested:

    <!-- test: NAME -->           it runs with the fixture NAME of `FIXTURES`
    <!-- test: skip REASON -->    it cannot be run here; it is checked all the same

Without such a line Python runs in a process of its own, JSON is checked, and bash runs in the page's folder. A block
with ``title="FILE"`` is that file in the page's folder, for the blocks that run there. Every block is checked: Python
compiles, JSON is accepted as a DeepSpeed config with our sections, bash parses, the flags of our commands exist, and so
do the files of the repository that it names. A fence without a language, or four spaces, are what a program printed.
"""

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from tests.harness import RANK_ENV, ROOT, free_port

LANGUAGES = ("python", "bash", "json", "diff", "yaml", "text")
_FENCE = re.compile(
    r"^(?:[ ]*<!-- test: (?P<how>.+?) -->\n)?(?P<indent>[ ]*)```(?P<head>[^\n`]+)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
_MARK = re.compile(r"^[ ]*<!--\s*test\b.*$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Block:
    """One code block; ``name``: its fixture, ``skip``: why it is not run, ``title``: the file that it is."""

    page: str
    line: int
    language: str
    text: str
    name: str | None = None
    skip: str | None = None
    title: str | None = None

    @property
    def where(self) -> str:
        """For a test's message."""
        return f"{self.page}:{self.line}"


def hook(name: str) -> ModuleType:
    """A module of docs/hooks, read from its file."""
    spec = spec_from_file_location(f"docs_hooks_{name}", ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages() -> list[str]:
    """Every page with blocks to look at: README, cards, recipes, the site's."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in sorted(names) if (ROOT / name).is_file() and blocks_of(name)]


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """The blocks of a page, from the top. Raises ValueError: a ``<!-- test`` line that says nothing about a block."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    found, used = [], 0
    for fence in _FENCE.finditer(text):
        head, how = fence["head"].split(maxsplit=1), fence["how"] or ""
        used += bool(how)
        title = re.search(r'title="([^"]+)"', fence["head"])
        skip = how.partition(" ")[2] if how.split(" ")[0] == "skip" else None
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, fence.start("text")),
                language=head[0],
                text=textwrap.dedent(fence["text"]),
                name=how or None if skip is None else None,
                skip=skip,
                title=title and title[1],
            )
        )
        if skip == "":
            raise ValueError(f"{page}: a block is skipped without a reason; write <!-- test: skip REASON -->")
    if used != len(_MARK.findall(text)):
        raise ValueError(f"{page}: a <!-- test line does not stand right before a fence with a language")
    return found


def after_diff(text: str) -> str:
    """What a diff's lines look like afterwards."""
    return "".join(line[1:] for line in text.splitlines(keepends=True) if not line.startswith("-"))


def check(block: Block, flags: Mapping[str, set[str]], extras: set[str]) -> None:
    """Everything that can be asked of a block without running it. Raises AssertionError, which names it."""
    where, text = block.where, block.text
    assert block.language in LANGUAGES, f"{where}: the language {block.language!r}; write one of {LANGUAGES}"
    assert block.name is None or block.name in FIXTURES, f"{where}: no fixture {block.name!r} in tests/documents.py"
    if block.language == "python":
        compile(text, where, "exec")
    elif block.language == "diff":
        after = after_diff(text)
        try:
            compile(after, where, "exec")
        except SyntaxError:  # then it is of a command line
            check(dataclasses.replace(block, language="bash", text=after), flags, extras)
    elif block.language == "bash":
        check_commands(where, text, flags, extras)
    elif block.language == "json":
        check_config(where, json.loads(text))
    elif block.language == "yaml":
        yaml.safe_load(text)


def check_config(where: str, config: Any) -> None:
    """A JSON is a DeepSpeed config with our sections, or a part of one."""
    from ds_plugin.config import SECTIONS, split_config
    from ds_plugin.core.errors import PluginError
    from ds_plugin.deepspeed_engine import json_check

    assert isinstance(config, dict), f"{where}: not a JSON object"
    resolved = json.loads(json.dumps(config))
    for section in SECTIONS:  # Hugging Face's, of which a number is known later
        if resolved.get(section, {}).get("end_length") == "auto":
            resolved[section]["end_length"] = 1024
    own = {"model", "training", "megatron"}
    try:
        deepspeed, _ = split_config({key: value for key, value in resolved.items() if key not in own})
        if "optimizer" in deepspeed and '"auto"' not in json.dumps(deepspeed):
            json_check.check(deepspeed, auto=True)
    except PluginError as error:
        raise AssertionError(f"{where}: {error}") from None


def check_commands(where: str, text: str, flags: Mapping[str, set[str]], extras: set[str]) -> None:
    """Bash parses; our commands, their flags, extras and the repository's files are there."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, f"{where}: {done.stderr}"
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = _words(line)
        for word in words:
            path = re.match(r"(launch_scripts|configs|benchmarks|tests)/[\w./-]+", word)
            assert path is None or (ROOT / path[0]).exists(), f"{where}: {path and path[0]} is not there"
        for i, word in enumerate(words):
            if word.endswith("ds-plugin") or (word == "ds_plugin" and words[i - 1 : i] == ["-m"]):
                command = words[i + 1 : i + 2]
                assert command and command[0] in flags, f"{where}: ds-plugin {command}; commands are {sorted(flags)}"
                given = _own(command[0], words[i + 2 :])
                wrong = [flag for flag in given if flag not in flags[command[0]]]
                assert not wrong, f"{where}: ds-plugin {command[0]} has no {wrong}"
            if word.endswith(("launch_scripts/pretrain_gpt.py", "launch_scripts/quickstart.sh")):
                wrong = _flags(words[i + 1 :]) - flags["launch_scripts/pretrain_gpt.py"]
                assert not wrong, f"{where}: {word} has no {wrong}"
            if word == "megatron_patches" and words[i - 1 : i] == ["-m"]:
                own = {flag for flag in _flags(words[i + 1 :]) if flag.startswith("--ds")}
                assert own <= {"--ds-plugin-config", "--ds-plugin-no-verify"}, f"{where}: megatron_patches has no {own}"
        if "pip" in words and "install" in words:
            for asked in (found[1] for word in words if (found := re.search(r"(?:\.|ds-plugin)\[([\w,-]+)\]", word))):
                assert set(asked.split(",")) <= extras, f"{where}: of the extras {asked} there are {sorted(extras)}"


def _words(line: str) -> list[str]:
    """As bash would, near enough: a comment ends the line, a command in $(...) is of words, too."""
    lexer = shlex.shlex(line.replace("$(", " ").replace(")", " "), posix=True, punctuation_chars="|&;")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        return list(lexer)
    except ValueError:  # a quote that ends on another line
        return line.split()


def _flags(words: list[str]) -> set[str]:
    end = next((i for i, word in enumerate(words) if word in ("|", "&&", ";", "&", "||")), len(words))
    return {word.partition("=")[0] for word in words[:end] if re.match(r"--?[a-z]", word)}


def _own(command: str, words: list[str]) -> set[str]:
    """The flags of ours: of ``run`` those before the script, of ``tune-warmup`` those before ``--``."""
    if command == "run":
        at = 0
        while at < len(words) and words[at].startswith("-") and words[at - 1 : at] not in (["-m"], ["--module"]):
            at += 1 if words[at] in ("-m", "--module") else 2
        words = words[:at]
    return _flags(words[: words.index("--")] if "--" in words else words)


def extras() -> set[str]:
    """The names of pyproject.toml's extras."""
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


# --- how blocks are run ---


@dataclasses.dataclass(frozen=True)
class Fixture:
    """What is around the blocks of one name on a page. ``setup``: Python that runs before, once for a page; ``before``,
    ``after``: around its Python, whose blocks then are one program; without them each block is its own. ``config``: its
    config.json, in place of the page's. ``runs``: False where nothing is run but what is checked."""

    setup: str = ""
    before: str = ""
    after: str = ""
    config: Mapping[str, Any] | None = None
    runs: bool = True


_ADAMW = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}}
_DEEPSPEED = {"train_micro_batch_size_per_gpu": 2, "steps_per_print": 10**9, "optimizer": _ADAMW}
_WARMUP = {"enabled": True, "start_length": 8, "end_length": 16, "duration": {"steps": 4}}
_METHODS = {**_DEEPSPEED, "sequence_length_warmup": _WARMUP, "weight_averaging": {"enabled": True, "interval": 1}}

#: DeepSpeed compiles a kernel for inference when it first communicates on a CPU: a minute or two
_QUICK = """
import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
"""
_LLAMA = f"""{_QUICK}
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

shape = {{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=16, **shape))
lengths = []
model.register_forward_pre_hook(
    lambda module, args, given: lengths.append(given.get("input_ids", *args).shape[1]), with_kwargs=True
)
rows = torch.randint(0, 64, (8, 16))
loader = [{{"input_ids": rows[i : i + 2], "labels": rows[i : i + 2]}} for i in range(0, 8, 2)]
"""
_ENGINE = f"""{_LLAMA}
import ds_plugin

engine, *_ = ds_plugin.initialize(model=model, config="config.json")

def train():
    for batch in loader:
        engine.backward(engine(**batch).loss)
        engine.step()

def evaluate(engine):
    engine.eval()
    assert torch.isfinite(engine(**loader[0]).loss)
    engine.train()
"""
_SAVED = f"{_ENGINE}\ntrain()\nengine.save_checkpoint('checkpoints')\n"
_MEGATRON = """
import os
os.environ["TORCH_EXTENSIONS_DIR"] = "extensions"
from megatron_patches import megatron_on_cpu

megatron_on_cpu.enable()  # the first thing, as the page has it
import deepspeed, torch
import ds_plugin
from ds_plugin.completep.config import CompletePConfig
from megatron.core.models.gpt import GPTModel
from megatron_patches import active, completep
from megatron_patches.models import gpt

deepspeed.initialize = ds_plugin.initialize  # before it is used for the first time
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
cfg = gpt.GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=2, seq_length=16)
gpt.initialize_parallel(cfg, 1)
config, spec = gpt.transformer_config(cfg, torch.float32), gpt.layer_spec(cfg)
vocab_size, max_sequence_length = 32, 16
section = CompletePConfig(enabled=True, base_width=16, base_depth=1)
"""
_MEGATRON_TRAINED = """
roles = completep.finished_roles(model, section)
assert roles
if "engine" in globals():
    assert "deepspeed.comm.torch.build_shm_op" in [name for name, _ in active()], active()
    positions = torch.arange(16).expand(2, -1)
    engine.train()
    for _ in range(2):
        tokens = torch.randint(0, vocab_size, (2, 17))
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        engine.backward(engine(inputs, positions, None, labels=labels).mean())
        engine.step()
    assert ds_plugin.get_plugin(engine).averager.steps == [1, 2]
"""
_DECODER = f"""{_LLAMA}
import ds_plugin.completep

config = LlamaConfig(vocab_size=64, max_position_embeddings=16, **shape)
ds_plugin.completep.prepare_decoder(model, {{"enabled": True, "base_width": 256, "base_depth": 2}}, seed=1)
model(**loader[0]).loss.backward()
"""
FIXTURES = {
    "quickstart": Fixture(runs=False),  # trains for minutes: tests/unit/launch_scripts/test_quickstart.py
    "files": Fixture(),  # the files that the page gives
    "recipes": Fixture(),  # beside the repository's configs/
    "deepspeed": Fixture(
        before=f"import ds_plugin\n{_LLAMA}",
        after="""
for batch in loader[: 4 - engine.global_steps]:
    engine.backward(engine(**batch).loss)
    engine.step()
assert lengths == [8, 8, 8, 16], lengths  # 8 + 8 * step // 4, floored to 8; preflight aside
assert ds_plugin.get_plugin(engine).averager.steps == [1, 2, 3, 4]
""",
        config={**_METHODS, "sequence_length_warmup": {**_WARMUP, "preflight": False}},
    ),
    "huggingface": Fixture(
        before=f"""{_LLAMA}
from transformers import Trainer, TrainingArguments

dataset = [{{"input_ids": row.tolist(), "labels": row.tolist()}} for row in rows]
""",
        after="""
assert lengths == [16, 8, 8, 8], lengths  # the preflight, three epochs of one batch
assert (ds_plugin.huggingface.enable() is None), "again is a no-op"
""",
        config={
            **_METHODS,
            "train_micro_batch_size_per_gpu": "auto",
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
        },
    ),
    "carry": Fixture(
        before=f"""{_ENGINE}
def from_micro_batch(n):
    while True:
        yield loader[n % len(loader)]
        n += 1
""",
        after="""
assert loss.isfinite() and lengths[-1] == 8, lengths
engine.backward(loss)
engine.step()
assert next(batches)["input_ids"].shape == (2, 8)
""",
        config={**_METHODS, "sequence_length_warmup": {**_WARMUP, "mode": "carry"}},
    ),
    "megatron_core": Fixture(
        before=_MEGATRON,
        after=_MEGATRON_TRAINED,
        config={**_METHODS, "completep": {"enabled": True, "base_width": 16, "base_depth": 1}},
    ),
    "decoder": Fixture(
        before=_DECODER,
        after="assert ds_plugin.completep.decoder and model",
        config={**_DEEPSPEED, "completep": {"enabled": True, "base_width": 256, "base_depth": 2}},
    ),
    "trained": Fixture(
        before=f"{_ENGINE}\ntrain()\n",
        after="assert plugin.averager is not None",
        config={**_METHODS, "zero_optimization": {"stage": 1}},
    ),
    "saved": Fixture(setup=_SAVED, config={**_METHODS, "zero_optimization": {"stage": 1}}),
    "resumed": Fixture(
        setup=_SAVED,
        before=f"""{_LLAMA}
import deepspeed
import ds_plugin

plain, _ = ds_plugin.split_config("config.json")
engine, *_ = deepspeed.initialize(model=model, config=plain)
engine.load_checkpoint("checkpoints")
""",
        after="assert engine.global_steps == 4 and plugin.averager.steps == [1, 2, 3, 4]",
        config=_METHODS,
    ),
}


class Page:
    """A page's folder, with what its blocks need, and the package from ``installed``."""

    def __init__(self, page: str, folder: Path, installed: Path, names: set[str] | None = None) -> None:
        """``names``: run the blocks of these fixtures alone."""
        self.folder, self.done = folder, set[str]()
        self.blocks = [each for each in blocks_of(page) if each.skip is None and self._asked(each, names)]
        self.files = {block.title: block.text for block in blocks_of(page) if block.title is not None}
        shutil.copytree(ROOT / "configs", folder / "configs")
        tools = folder / "bin"
        tools.mkdir()
        for name, what in (("python", ""), ("python3", ""), ("torchrun", " -m torch.distributed.run --standalone")):
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{what} "$@"\n')
            (tools / name).chmod(0o755)
        path = os.pathsep.join([str(tools), str(installed / "bin"), os.environ["PATH"]])
        self.env = {**os.environ, **RANK_ENV, "PYTHONPATH": str(installed), "PATH": path, "HF_HUB_OFFLINE": "1"}
        self.env |= {"PYTHONWARNINGS": "ignore"}

    @staticmethod
    def _asked(block: Block, names: set[str] | None) -> bool:
        return names is None or block.name in names

    def run(self) -> int:
        """Run what is to be run, from the top; how many processes that were. Raises AssertionError: one failed."""
        count = 0
        for block in self.blocks:
            program = self._program(block)
            if program is not None:
                self._run(block, program)
                count += 1
        return count

    def _program(self, block: Block) -> list[str] | None:
        """The command of a block; None: nothing is run, or it ran with an earlier one of its name."""
        fixture = FIXTURES.get(block.name or "", Fixture())
        languages = ("python", "bash", "diff") if fixture.before else ("python", "bash")
        if block.title is not None or not fixture.runs or block.language not in languages:
            return None
        if block.name is not None and fixture.before and block.name in self.done:
            return None
        given = {} if fixture.config is None else {"config.json": json.dumps(fixture.config)}
        for name, text in {**self.files, **given}.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        if fixture.setup and fixture.setup not in self.done:
            self._run(block, self._python("setup.py", fixture.setup))
            self.done.add(fixture.setup)
        if block.language == "bash":
            return ["bash", "-euo", "pipefail", "-c", block.text]
        own = [block]
        if fixture.before:
            own = [each for each in self.blocks if each.name == block.name and each.language in ("python", "diff")]
            self.done.add(block.name or "")
        text = "\n".join(each.text if each.language == "python" else after_diff(each.text) for each in own)
        return self._python("block.py", "\n".join([fixture.before, text, fixture.after]))

    def _python(self, name: str, text: str) -> list[str]:
        (self.folder / name).write_text(text, encoding="utf-8")
        return [sys.executable, name]

    def _run(self, block: Block, command: list[str]) -> None:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        env = {**self.env, **({} if command[0] == "bash" else {**alone, "MASTER_PORT": str(free_port())})}
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=280)
        said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        assert done.returncode == 0, f"{block.where}: exit code {done.returncode}\n{said}"


def literals(root: Path = ROOT) -> Iterator[str]:
    """Every piece of text in the library's code, f-strings with … for what is filled in."""
    for top in ("ds_plugin", "megatron_patches", "launch_scripts"):
        for path in sorted((root / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value
