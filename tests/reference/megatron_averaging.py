"""Whole fp32 masters of a megatron-core optimizer, the naive way: every rank's piece, end to end in rank order.

megatron-core cuts each parameter into runs that lie on the data-parallel ranks in their order, so no layout is needed.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model


def full_masters(optimizer, chunks):
    """Every trained parameter's fp32 master, whole on this model-parallel rank, by name. All ranks call it."""
    found = {}
    for index, model in enumerate(unwrap_model(list(chunks))):
        for name, p in model.named_parameters():
            is_expert = not getattr(p, "allreduce", True)
            if p.dtype is torch.float32:  # its own master, and gathered with the others
                whole = p.detach().clone()
            elif hasattr(optimizer, "allgather_params"):  # layer-wise: all of it lies on one rank
                owned: list = [None] * dist.get_world_size()
                dist.all_gather_object(owned, getattr(p, "main_param", None))
                (whole,) = (master.detach().clone() for master in owned if master is not None)
            elif not getattr(p, "main_param_sharded", False):
                whole = p.main_param.detach().clone()
            else:
                groups = parallel_state
                group = (groups.get_expert_data_parallel_group if is_expert else groups.get_data_parallel_group)()
                pieces = [None] * dist.get_world_size(group)
                dist.all_gather_object(pieces, _piece(optimizer, p), group=group)
                whole = torch.cat(pieces)
            found[f"model{index}.{name}" if len(chunks) > 1 else name] = whole.view(p.shape)
    return found


def full_parameters(chunks):
    """Every parameter the model computes with, by name."""
    return {
        f"model{index}.{name}" if len(chunks) > 1 else name: p.detach().clone()
        for index, model in enumerate(unwrap_model(list(chunks)))
        for name, p in model.named_parameters()
    }


def _piece(optimizer, p):
    if getattr(p, "main_param", None) is not None:
        return p.main_param.detach().clone()
    # A precision-aware optimizer holds it in the state of a view of the parameter: look for one in p's memory.
    end = p.data_ptr() + p.numel() * p.element_size()
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        for view, state in member.optimizer.state.items():
            if "master_param" in state and p.data_ptr() <= view.data_ptr() < end:
                return state["master_param"].clone()
    return torch.empty(0)
