"""A tiny Megatron-Bridge pre-training on CPU processes: ``torchrun --nproc-per-node N bridge_training.py JSON``.

The JSON holds the arguments of `config`, and ``out``: the file to which the last rank writes the losses, bit for bit.
A save starts a process that imports the main script again; ``--no-python python -c "import bridge_training;
bridge_training.main()" JSON`` spares it this module's imports, which are seconds.
"""

import json
import os
import sys
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests import bridge_on_cpu

bridge_on_cpu.enable()  # before the first import of Bridge

from megatron.bridge import AutoBridge  # noqa: E402
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider  # noqa: E402
from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec  # noqa: E402
from megatron.bridge.training import config as bridge  # noqa: E402
from megatron.bridge.training.callbacks import Callback, CallbackContext  # noqa: E402
from megatron.bridge.training.gpt_step import forward_step  # noqa: E402
from megatron.bridge.training.pretrain import pretrain  # noqa: E402
from megatron.bridge.training.tokenizers.config import TokenizerConfig  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from ds_plugin.config import PluginConfig  # noqa: E402
from megatron_patches.bridge import attach  # noqa: E402

LENGTH, VOCABULARY, BATCH, MICRO_BATCH = 32, 64, 8, 2
EVALUATE_EVERY, EVALUATION_BATCHES = 5, 2


class Sequences(torch.utils.data.Dataset):
    """Noisy arithmetic sequences of tokens: each is drawn from its index alone, and can be learned in part."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(1_000_003 * self.seed + int(index))
        first, step = torch.randint(VOCABULARY, (2,), generator=random)
        noise = torch.rand(LENGTH + 1, generator=random) < 0.1
        tokens = (first + (step % 4) * torch.arange(LENGTH + 1) + noise) % VOCABULARY
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(LENGTH),
            "position_ids": torch.arange(LENGTH),
        }


@dataclass
class Data(DatasetProvider):
    """What Bridge asks for the data sets."""

    dataloader_type: str = "single"
    num_workers: int = 0
    pin_memory: bool = False
    seq_length: int = LENGTH

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Sequences, Sequences, Sequences]:
        """The training, validation and test data."""
        sizes = context.train_samples, context.valid_samples, context.test_samples
        train, valid, test = (Sequences(size, seed) for seed, size in enumerate(sizes))
        return train, valid, test


def llama() -> AutoBridge:
    """Of a tiny Llama."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    lengths = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
    return AutoBridge.from_hf_config(LlamaConfig(architectures=["LlamaForCausalLM"], **sizes, **lengths))


def config(
    folder: str,
    *,
    iterations: int,
    tp: int = 1,
    pp: int = 1,
    export: str | None = None,
    **changes: Any,
) -> bridge.ConfigContainer:
    """A tiny GPT that is trained for so many iterations, with its checkpoints in ``folder``; a Llama, if it is to be
    exported. ``changes`` are fields by dotted name: ``{"checkpoint.save_interval": 5}``."""
    own: dict[str, Any] = {"transformer_layer_spec": local_layer_spec, "seq_length": LENGTH, "vocab_size": VOCABULARY}
    sizes: dict[str, Any] = {
        "transformer_impl": "local",
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "cross_entropy_loss_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    model: Any = GPTModelProvider(**own, **sizes)
    if export is not None:
        model = llama().to_megatron_provider(load_weights=False)
        off = dict.fromkeys(("persist_layer_norm", "apply_rope_fusion", "bf16", "fp16"), False)
        dtypes = dict.fromkeys(("params_dtype", "pipeline_dtype", "autocast_dtype"), torch.float32)
        for name, value in {**own, **sizes, **off, **dtypes}.items():
            setattr(model, name, value)
    model.register_pre_wrap_hook(_initialize)
    container = bridge.ConfigContainer(
        train=bridge.TrainingConfig(
            train_iters=iterations, global_batch_size=BATCH, micro_batch_size=MICRO_BATCH, manual_gc=False
        ),
        validation=bridge.ValidationConfig(eval_interval=EVALUATE_EVERY, eval_iters=EVALUATION_BATCHES),
        model=model,
        optimizer=bridge.OptimizerConfig(
            optimizer="adam", lr=1e-2, min_lr=1e-3, weight_decay=0.01, clip_grad=1.0, use_distributed_optimizer=True
        ),
        ddp=bridge.DistributedDataParallelConfig(use_distributed_optimizer=True),
        # the schedules do not depend on how long the run is, so that a short run is the head of a long one
        scheduler=bridge.SchedulerConfig(
            max_steps=100, lr_decay_style="cosine", lr_warmup_iters=2, start_weight_decay=0.01, end_weight_decay=0.01
        ),
        dataset=Data(),
        logger=bridge.LoggerConfig(log_interval=1),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY - 1),
        checkpoint=bridge.CheckpointConfig(save=folder, load=folder, save_interval=1000, async_save=False),
        dist=bridge.DistributedInitConfig(distributed_backend="gloo"),
        rng=bridge.RNGConfig(seed=1234),
    )
    for name, value in changes.items():
        *path, last = name.split(".")
        owner: Any = container
        for part in path:
            owner = getattr(owner, part)
        if not hasattr(owner, last):
            raise AttributeError(f"{type(owner).__name__} has no field {last!r}")
        setattr(owner, last, value)
    return container


def _initialize(chunks: list[Any]) -> list[Any]:
    """Draw each weight from its name in the whole model, and cut out this rank's part, so that every layout of ranks
    starts from the same model: Bridge seeds pipeline stages differently."""
    for chunk in chunks:
        layers = {f"decoder.layers.{i}.": layer for i, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in chunk.named_parameters():
            if parameter.dim() < 2:  # norms and biases are constants
                continue
            for local, layer in layers.items():
                if name.startswith(local):
                    name = f"decoder.layers.{layer.layer_number - 1}.{name.removeprefix(local)}"
                    break
            if name == "output_layer.weight":  # tied
                name = "embedding.word_embeddings.weight"
            dim, group = getattr(parameter, "partition_dim", -1), chunk.pg_collection.tp
            ranks = group.size() if getattr(parameter, "tensor_model_parallel", False) else 1
            shape = [size * ranks if i == dim else size for i, size in enumerate(parameter.shape)]
            whole = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            parameter.data.copy_(whole.chunk(ranks, dim)[group.rank()] if ranks > 1 else whole)
    return chunks


@dataclass
class Losses(Callback):
    """Collects, on the last pipeline stage, each iteration's training loss, and the losses of each iteration's
    evaluations: after the last one Bridge evaluates once more, on the batches that follow."""

    train: dict[int, str] = field(default_factory=dict)
    valid: dict[int, list[str]] = field(default_factory=dict)
    test: list[str] = field(default_factory=list)

    def on_train_step_end(self, context: CallbackContext) -> None:
        """An iteration is over, but not counted yet."""
        if context.loss_dict:
            self.train[context.state.train_state.step + 1] = _hex(context.loss_dict)

    def on_eval_end(self, context: CallbackContext) -> None:
        """An evaluation on the validation data is over."""
        if context.total_loss_dict:
            self.valid.setdefault(context.state.train_state.step, []).append(_hex(context.total_loss_dict))

    def on_test_end(self, context: CallbackContext) -> None:
        """The evaluation on the test data is over."""
        if context.total_loss_dict:
            self.test.append(_hex(context.total_loss_dict))


class Export(Callback):
    """The average as a Hugging Face model in ``folder``, and that model's own loss on the test data."""

    def __init__(self, plugin: Any, folder: str) -> None:
        self.plugin, self.folder, self.loss = plugin, folder, ""

    def on_train_end(self, context: CallbackContext) -> None:
        """The training is over."""
        self.plugin.save_average(llama(), self.folder)
        torch.distributed.barrier()
        model, told = LlamaForCausalLM.from_pretrained(self.folder, output_loading_info=True)
        assert not (told["missing_keys"] or told["unexpected_keys"] or told["mismatched_keys"]), told
        samples = [Sequences(BATCH * EVALUATION_BATCHES, 2)[i] for i in range(BATCH * EVALUATION_BATCHES)]
        tokens, labels = (torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels"))
        with torch.no_grad():
            logits = model.float()(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        self.loss = float(loss).hex()


def _hex(losses: dict[str, torch.Tensor]) -> str:
    return float(losses["lm loss"]).hex()


def main() -> None:
    """Train as the JSON in the first argument says."""
    settings = json.loads(sys.argv[1])
    out, sections, losses = settings.pop("out", None), settings.pop("sections", None), Losses()
    container, callbacks, exported = config(**settings), [losses], {}
    if sections is not None:
        plugin = attach(container, PluginConfig.from_dict(sections))
        if "export" in settings:
            callbacks.append(export := Export(plugin, settings["export"]))
        callbacks = plugin.callbacks(*callbacks)
    pretrain(container, forward_step, callbacks=callbacks)
    if "export" in settings:
        exported = {"exported": export.loss}
    if out and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        Path(out).write_text(json.dumps(asdict(losses) | exported, indent=1))


if __name__ == "__main__":
    main()
