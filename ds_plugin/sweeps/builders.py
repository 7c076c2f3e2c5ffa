"""What the sweeps train, of any width and depth: megatron-core's GPT, also with experts, latent attention or Muon, a
model of transformers, what a function gives.

A builder is small and travels to other processes; each of its models is told by `Trial` alone.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from ds_plugin.completep import clip_grad_norm_, optimizer_groups, prepare_decoder
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.decoder import layers_of
from ds_plugin.completep.model import finished_roles, ratios_of
from ds_plugin.completep.muon import with_muon
from ds_plugin.completep.param_groups import refuse_unused
from ds_plugin.completep.rules import Ratios, Role
from ds_plugin.core.errors import ConfigError
from ds_plugin.core.settings_model import parse_section
from ds_plugin.sweeps.mixtures import Mixture
from ds_plugin.sweeps.trial import Base, Batch, Shape, Trial, section_of
from megatron_patches import megatron_on_cpu
from megatron_patches.models import gpt

#: of transformers' configs, what grows with the width; the size of a head stays
_PROPORTIONAL = (
    "num_attention_heads", "num_key_value_heads", "intermediate_size", "ffn_dim", "n_inner", "word_embed_proj_dim",
)  # fmt: skip


# -- megatron-core ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Megatron:
    """megatron-core's GPT with heads of the base's size, in the forward mode.

    ``experts``: the base's, in place of its MLPs; there are no biases then, and no loss that balances them. ``shared``:
    the hidden size of those that every token goes through, over the width. ``moe``: the section's rule for shapes whose
    experts are others. ``latent``: the ranks of queries (0: none) and of keys and values, constant; no biases either.
    ``optimizer``: "muon" of the matrices inside blocks, with Moonlight's scale, made for AdamW's rates."""

    experts: Mixture | None = None
    shared: Fraction | None = None
    moe: str | None = None
    latent: tuple[int, int] | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"

    def described(self) -> dict[str, Any]:
        """What a sweep is of, in JSON types: runs of another are not gone on with."""
        asked = {name: value for name, value in vars(self).items() if value != getattr(Megatron, name)}
        return {"model": "megatron-core GPT", **asked}

    def start(self) -> None:
        """Called once in each process."""
        start_megatron()

    def check(self, shape: Shape, base: Base) -> None:
        """Raises ConfigError for a shape that cannot be."""
        section, cfg, kind = self._settings(shape, base)
        self._ratios(gpt.transformer_config(cfg, torch.float32, **kind), section)

    def build(self, shape: Shape, base: Base, seed: int) -> Trial:
        from megatron_patches.completep import build_param_groups, finish, prepare
        from megatron_patches.completep.residual import scaled_before

        section, cfg, kind = self._settings(shape, base)
        gpt.initialize_parallel(cfg, seed)
        experts, latent = kind.get("num_moe_experts"), self.latent is not None
        spec = gpt.layer_spec(cfg, num_experts=experts, multi_latent_attention=latent)
        config, spec = prepare(gpt.transformer_config(cfg, torch.float32, **kind), spec, section)
        model = gpt.build_gpt(cfg, base.vocab, config, spec)
        roles, last = finish(model, section), model.decoder.layers[-1]
        refuse_unused(section, roles.values())
        ratios = self._ratios(config, section)
        groups = functools.partial(build_param_groups, model, roles, ratios, section)
        watched = (model.embedding, last.self_attention, last.mlp, last, model.output_layer)
        clip = functools.partial(nn.utils.clip_grad_norm_, list(model.parameters()), base.clip)
        loss, scaled = functools.partial(loss_of, model), (1.0, 1.0, scaled_before(last), 1.0, 1.0)
        return Trial(model, _optimizer(groups, base, ratios), loss, clip, watched, scaled)

    def _ratios(self, config: Any, section: CompletePConfig) -> Ratios:
        ratios = ratios_of(config, section)
        return with_muon(ratios, config, section, "spectral") if self.optimizer == "muon" else ratios

    def _settings(self, shape: Shape, base: Base) -> Any:
        """The section, the GPTConfig, and a TransformerConfig's fields beside it."""
        if odd := [width for width in (base.width, shape.width) if width % base.head_dim]:
            raise ConfigError(f"width {odd[0]} is not divisible by --head-dim {base.head_dim}; write a multiple of it")
        model: dict[str, Any] = {"num_layers": shape.depth, "hidden_size": shape.width, "seq_length": base.length}
        model |= {"num_attention_heads": shape.width // base.head_dim, "bias": not self.experts}  # a router's: no role
        model |= {} if base.init_std is None else {"init_std": base.init_std}
        kind = self._kind(Mixture.of(shape.experts) if shape.experts else self.experts, shape.width)
        bases = {f"base_{name}": size for name, size in self._kind(self.experts, base.width).items()}
        if self.latent is not None:
            ranks = dict(zip(("q_lora_rank", "kv_lora_rank"), self.latent, strict=True))
            bases |= {f"base_{name}": rank for name, rank in ranks.items() if rank}
            turned = base.head_dim // 4 * 2  # of a head; rotary embeddings go in pairs
            kind |= {name: rank or None for name, rank in ranks.items()}
            kind |= {"multi_latent_attention": True, "rope_type": "rope"}
            kind |= {"qk_head_dim": base.head_dim - turned, "qk_pos_emb_head_dim": turned, "v_head_dim": base.head_dim}
            model |= {"normalization": "RMSNorm", "position_embedding": "rope"} | {"bias": False, "qk_norm": True}
        section = section_of(shape, base, base.head_dim, **bases, **({} if self.moe is None else {"moe": self.moe}))
        if section.residual == "folded":  # its clipping norm and its branches' outputs are others
            raise ConfigError('--section: residual is "folded"; Megatron\'s GPT is swept in the forward mode')
        return section, parse_section(gpt.GPTConfig, "model", model), kind

    def _kind(self, mixture: Mixture | None, width: int) -> dict[str, Any]:
        """A TransformerConfig's fields of a mixture; the section has the same of the base's."""
        if mixture is None:
            return {}
        fields = {"num_moe_experts": mixture.experts, "moe_router_topk": mixture.active}
        hidden = {"moe_ffn_hidden_size": mixture.ratio}
        if self.shared is not None:
            hidden["moe_shared_expert_intermediate_size"] = self.shared
        for name, ratio in hidden.items():
            if (size := ratio * width).denominator != 1:
                what = f"{name} is {ratio} of width {width}, which is no whole number"
                raise ConfigError(f"--experts: {what}; give another ratio, or other widths")
            fields[name] = int(size)
        return fields


def start_megatron() -> None:
    """Make this process a world of one rank, on the GPU if there is one; does nothing when there is a world already."""
    if not torch.cuda.is_available():
        megatron_on_cpu.enable()
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def loss_of(model: Any, batch: Batch) -> torch.Tensor:
    """Mean loss of one batch of a megatron-core GPT."""
    tokens, labels = (t.to(next(model.parameters()).device) for t in batch)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None, labels=labels).mean()


# -- decoders that `prepare_decoder` takes ---------------------------------------------------------------------------


class Decoders:
    """What builds them is one of these; heads have one size at every width."""

    def maker(self, width: int, depth: int, base: Base) -> Callable[[], Any]:
        """A function that makes one. Raises ConfigError for a shape that cannot be."""
        raise NotImplementedError

    def model(self, width: int, depth: int, base: Base) -> Any:
        """A fresh one in fp32."""
        return self.maker(width, depth, base)()

    def described(self) -> dict[str, Any]:
        return {"model": str(self)}

    def start(self) -> None:
        """Nothing is needed."""

    def check(self, shape: Shape, base: Base) -> None:
        section_of(shape, base, None)
        self.maker(shape.width, shape.depth, base)

    def build(self, shape: Shape, base: Base, seed: int) -> Trial:
        section = section_of(shape, base, None).folded_by_default()
        torch.manual_seed(seed)
        model = self.model(shape.width, shape.depth, base)
        self._check_proportions(model, shape, base)
        prepare_decoder(model, section, seed=seed, init_std=base.init_std)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        if (known := model.get_input_embeddings().num_embeddings) < base.vocab:
            raise ConfigError(f"the model knows {known} tokens and the text has {base.vocab}; build it for as many")
        last, roles = layers_of(model)[-1], finished_roles(model, section)
        ending = [name.rpartition(".")[0] for name, role in roles.items() if role.value.startswith("branch_out")]
        ended = [module for name in ending if (module := model.get_submodule(name)) in set(last.modules())]
        branch = section.fold_factor(Role.BRANCH_OUT, ratios_of(model.config, section))
        watched = (model.get_input_embeddings(), ended[0], ended[-1], last, model.get_output_embeddings())
        adamw = _optimizer(functools.partial(optimizer_groups, model), base)
        loss, clip = functools.partial(_decoder_loss, model), functools.partial(clip_grad_norm_, model, base.clip)
        return Trial(model, adamw, loss, clip, watched, (1.0, branch, branch, 1.0, 1.0))

    def _check_proportions(self, model: nn.Module, shape: Shape, base: Base) -> None:
        """The rules hold for widths at which all of a layer's matrices grow alike."""
        ratio = shape.width / base.width
        of_base = dict(layers_of(self.model(base.width, base.depth, base))[0].named_parameters())
        for name, p in layers_of(model)[0].named_parameters():
            if p.dim() > 1 and [size * ratio for size in of_base[name].shape] != list(p.shape):
                raise ConfigError(
                    f"{name} of a layer is {list(of_base[name].shape)} at width {base.width} and {list(p.shape)} at "
                    f"{shape.width}; heads, KV heads and FFN must grow with the width, heads stay of one size"
                )


@dataclass(frozen=True)
class HuggingFace(Decoders):
    """A causal language model of transformers from its config, in width and depth: ``path`` is its config.json or the
    folder of it. Dropout is off, and the vocabulary is the text's."""

    path: str

    def described(self) -> dict[str, Any]:
        config = self._config().to_dict()
        return {"model": {name: value for name, value in config.items() if name != "transformers_version"}}

    def _config(self) -> Any:
        if not Path(self.path).exists():  # transformers would look for it on its hub
            raise ConfigError(f"--hf: {self.path} is no file or folder; give a config.json of transformers")
        try:
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(self.path)
        except (ImportError, OSError, ValueError, KeyError) as error:
            raise ConfigError(f"--hf: {self.path}: {str(error).splitlines()[0]}") from None

    def maker(self, width: int, depth: int, base: Base) -> Callable[[], Any]:
        config = self._config()
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "vocab_size": base.vocab, "use_cache": False}
        for name in _PROPORTIONAL:
            if (value := getattr(config, name, None)) is not None:
                if value * width % config.hidden_size:
                    what = f"{name} is {value} at width {config.hidden_size}, which is no whole number at {width}"
                    raise ConfigError(f"--hf: {what}; give other widths, or a config with more of them")
                sizes[name] = value * width // config.hidden_size
        if kinds := getattr(config, "layer_types", None):
            sizes["layer_types"] = (kinds * math.ceil(depth / len(kinds)))[:depth]
        if (positions := getattr(config, "max_position_embeddings", None)) is not None:
            sizes["max_position_embeddings"] = max(positions, base.length)
        no_dropout = {name: 0.0 for name, v in config.to_dict().items() if "drop" in name and isinstance(v, float)}
        no_tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        config.update({**sizes, **no_dropout, **no_tokens})  # it is read anew for each model
        from transformers import AutoModelForCausalLM

        return functools.partial(AutoModelForCausalLM.from_config, config, dtype=torch.float32)


@dataclass(frozen=True)
class Function(Decoders):
    """What ``package.module:function`` of (width, depth) returns: a decoder of at least the text's vocabulary."""

    name: str

    def maker(self, width: int, depth: int, base: Base) -> Callable[[], Any]:
        module, _, name = self.name.partition(":")
        try:
            return functools.partial(getattr(importlib.import_module(module), name), width, depth)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            remedy = "give package.module:function of (width, depth), which Python can import here"
            raise ConfigError(f"--builder: {self.name}: {error}; {remedy}") from None

    def model(self, width: int, depth: int, base: Base) -> nn.Module:
        if not isinstance(model := super().model(width, depth, base), nn.Module):
            raise ConfigError(f"--builder: {self.name} returned {model!r:.80}; return a model, in fp32")
        return model


def _decoder_loss(model: Any, batch: Batch) -> torch.Tensor:
    tokens, labels = (t.to(next(model.parameters()).device) for t in batch)
    output = model(tokens)
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _together(*parts: torch.optim.Optimizer) -> Any:
    def each(do: str) -> None:
        for part in parts:
            getattr(part, do)()

    every = {"parts": parts, "param_groups": [group for part in parts for group in part.param_groups]}
    return SimpleNamespace(**every, **{do: functools.partial(each, do) for do in ("zero_grad", "step")})


def _optimizer(groups: Callable[..., Any], base: Base, ratios: Ratios | None = None) -> Callable[[float], Any]:
    """AdamW, or Muon beside it where ``ratios`` have rates of it."""
    by_muon = {role.value for role in ratios.muon.rates} if ratios else set()

    def build(lr: float) -> Any:
        adam: dict[str, Any] = {"lr": lr, "betas": base.betas}
        found = groups(**adam, weight_decay=base.weight_decay, eps=base.eps)
        adamw = torch.optim.AdamW([group for group in found if group["role"] not in by_muon], **adam)
        matrices = [{key: g[key] for key in ("params", "lr", "weight_decay")} for g in found if g["role"] in by_muon]
        return _together(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"), adamw) if matrices else adamw

    return build


Builder = Megatron | Decoders
