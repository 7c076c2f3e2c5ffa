"""Weights of the two residual modes into each other.

A model trained in the forward mode needs its multipliers wherever it is used; `fold` writes them into the weights, and
the result is an ordinary GPT that any code for its architecture runs, as one trained in the folded mode is. `unfold`
gives the plain weights of Table 1, as the forward mode would have trained them.

Both keep the attention scale out: where the head size differs from the base's, run the model with the softmax_scale
that `prepare` set (`rules.attention_scale`), or give the weights to `fold_attention`, for use elsewhere and not for
training: queries share a matrix with keys and values.

What these functions return says so itself, in the ``_metadata`` that torch gives a ``state_dict()`` and keeps through
``torch.save``, so that the same is not done to it twice. Other formats lose that, as a plain dict does.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ds_plugin.completep import rules
from ds_plugin.completep.config import CompletePConfig
from ds_plugin.completep.model import applied_section, check_gains, finished_roles, is_tied, ratios_of
from ds_plugin.completep.roles import role_of
from ds_plugin.completep.sizes import head_size
from ds_plugin.completep.supported import unwrapped
from ds_plugin.core.errors import ConfigError

_METADATA, _OURS = "_metadata", "completep"  # torch's attribute of a state_dict(), by module; our entry beside those
_QKV = (".self_attention.linear_qkv.weight", ".self_attention.linear_qkv.bias")
_NO_WEIGHTS = ("_extra_state", ".router.expert_bias", ".router.qb_beta")  # the last two balance experts: no optimizer's


def fold(weights: Mapping[str, Any], config: Any, section: CompletePConfig, *, tied: bool) -> dict[str, Any]:
    """Weights of the forward mode with the multipliers folded in: those of a model without CompleteP.

    ``weights``: a GPTModel's ``state_dict()`` or a part of it (any tensor-parallel shard, any pipeline stage); values
    that are no tensors are passed on. ``config``: its TransformerConfig, from `prepare` or not. ``tied``: whether the
    output layer is the word embedding. Tensors keep their dtypes; those that do not change are not copied.

    Raises ConfigError: the weights are of the folded mode, or it cannot be told (``config`` is not `prepare`'s, and the
    section does not say ``residual``); a name has no role; or as `check_gains` does.
    """
    return _scaled(weights, config, section, tied, "folded")


def unfold(weights: Mapping[str, Any], config: Any, section: CompletePConfig, *, tied: bool) -> dict[str, Any]:
    """The inverse of `fold`, for weights of the folded mode: those of Table 1, for a model in the forward mode."""
    return _scaled(weights, config, section, tied, "forward")


def load_plain(
    model: torch.nn.Module, weights: Mapping[str, Any], section: CompletePConfig, *, strict: bool = True
) -> None:
    """Load the plain weights of Table 1 (the forward mode's, or `unfold`'s) into a finished model of either mode,
    folded on the way where it is folded; ``load_state_dict`` would take them as folded ones. ``weights``: of this
    tensor-parallel shard and pipeline stage; ``strict``: as ``load_state_dict``'s.

    Raises ConfigError: the model is not finished, the weights are folded already, or a name has no role.
    """
    model = unwrapped(model)
    finished_roles(model, section)
    marks = _marks(weights)
    if marks.get("residual", "forward") != "forward" or "attention" in marks:
        remedy = "load folded ones with load_state_dict, into a model of the folded mode"
        raise ConfigError(f"completep: load_plain() takes the plain weights, Table 1's, these are {marks}; {remedy}")
    if section.residual == "folded":
        weights = fold(_marked(weights, residual="forward"), model.config, section, tied=is_tied(model))
    model.load_state_dict(weights, strict=strict)


def fold_attention(weights: Mapping[str, Any], config: Any, section: CompletePConfig) -> dict[str, Any]:
    """Weights, of either mode, whose attention is the usual one: q.k over the square root of the head size.

    ``weights``, ``config``: as `fold`'s; give it that one's result for a model without any multiplier. Query rows are
    multiplied (with ``qk_layernorm``, the gains and biases of the queries' norm), unless the head size is the base's.

    Raises ConfigError: it was done already; query rows cannot be told apart (gates, a part of a query group); or a norm
    without gains, or with gains of 1 + weight, would undo it.
    """
    head = head_size(config)
    if "attention" in _marks(weights):
        raise ConfigError("completep: fold_attention() has been called on these weights already; give it those before")
    if section.base_head_dim in (None, head):
        return _marked(weights)
    scale = rules.attention_scale(head, section.base_head_dim, section.recipe) * math.sqrt(head)
    normed = config.qk_layernorm
    for name, why in {
        "attention_output_gate": "its gates share the queries' matrix, which is not known here",
        "qk_l2_norm": "queries are brought to one length, whatever they are multiplied by",
        **({"layernorm_zero_centered_gamma": "the gains of the queries' norm are 1 + weight"} if normed else {}),
    }.items():
        if getattr(config, name, False):
            raise ConfigError(f"completep: TransformerConfig.{name} is True: {why}; run the model with softmax_scale")
    queries = config.num_attention_heads // config.num_query_groups * head
    rows = queries + 2 * head  # of each group: its queries, a key and a value
    scaled = _marked(weights, attention="queries")
    for name, value in _tensors(weights):
        if ".self_attention.q_layernorm." in name:
            scaled[name] = value * scale
        elif not normed and name.endswith(_QKV):
            if value.shape[0] % rows:
                what = f"{name} has {value.shape[0]} rows, which are not whole query groups of {rows}"
                raise ConfigError(f"completep: {what}; give the weights of fewer tensor-parallel ranks")
            groups = value.clone().view(-1, rows, *value.shape[1:])
            groups[:, :queries] *= scale
            scaled[name] = groups.view_as(value)
    return scaled


def _scaled(weights: Mapping[str, Any], config: Any, section: CompletePConfig, tied: bool, to: str) -> dict[str, Any]:
    """Weights of the other mode as those of ``to``. Which they are, they say, or else their config and the section."""
    function, mode = ("fold", "forward") if to == "folded" else ("unfold", "folded")
    if marked := _marks(weights).get("residual"):
        said, are = [marked], 'are "%s" already'
    else:
        sections = [applied_section(config), section if "residual" in section.model_fields_set else None]
        said, are = [each.residual for each in sections if each is not None], 'were trained with "%s"'
    if not said:
        raise ConfigError(
            "completep.residual: not said, and its default depends on the framework: folded in Megatron-LM's scripts, "
            'forward with DeepSpeed; write "residual" into the section that is given with these weights'
        )
    if to in said:
        raise ConfigError(f'completep.residual: these weights {are % to}; {function}() takes those of "{mode}"')
    check_gains(config, tied=tied)
    ratios = ratios_of(config, section)
    scaled = _marked(weights, residual=to)
    for name, value in _tensors(weights):
        scale = rules.fold_factor(role_of(name, folded=True, tied=tied), ratios, section.recipe)
        if scale != 1.0:
            scaled[name] = value * scale if to == "folded" else value / scale
    return scaled


def _tensors(weights: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in weights.items():
        if isinstance(value, torch.Tensor) and not name.endswith(_NO_WEIGHTS):
            yield name, value


def _marks(weights: Mapping[str, Any]) -> dict[str, str]:
    return dict((getattr(weights, _METADATA, None) or {}).get(_OURS, {}))


def _marked(weights: Mapping[str, Any], **marks: str) -> dict[str, Any]:
    """The same weights in a new dict that says what they are, beside what torch has noted of them."""
    found = OrderedDict(weights)
    noted = getattr(weights, _METADATA, None) or {}
    setattr(found, _METADATA, OrderedDict({**noted, _OURS: {**_marks(weights), **marks}}))
    return found
