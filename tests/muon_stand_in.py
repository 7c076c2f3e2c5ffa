"""Stands in for the package emerging_optimizers, which needs Python 3.12: as much of its interface as megatron-core
0.16's Muon asks for, on one tensor-parallel rank and in fp32. Where the package is installed, it is taken itself."""

import importlib
import importlib.util
import sys
import types

import torch

NAME = "emerging_optimizers"
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class OrthogonalizedOptimizer(torch.optim.Optimizer):
    """SGD with a running mean of the gradients, of which each matrix's is orthogonalized."""

    def __init__(
        self, params, lr, momentum_beta, use_nesterov, weight_decay, weight_decay_method, fp32_matmul_prec,
        scaled_orthogonalize_fn,
    ):  # fmt: skip
        assert weight_decay_method == "decoupled"
        super().__init__(params, {"lr": lr, "momentum_beta": momentum_beta, "weight_decay": weight_decay})
        self.use_nesterov, self.scaled_orthogonalize_fn = use_nesterov, scaled_orthogonalize_fn

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                assert p.dim() == 2
                state, beta = self.state[p], group["momentum_beta"]
                mean = state.setdefault("momentum_buffer", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                mean.lerp_(p.grad, 1 - beta)
                p.sub_(group["lr"] * self.orthogonalize(p, p.grad.lerp(mean, beta) if self.use_nesterov else mean))


def newton_schulz_tp(x, steps, coefficient_type, tp_group, partition_dim=None, mode="duplicated"):
    assert tp_group.size() == 1 and coefficient_type == "quintic" and steps == len(QUINTIC)
    wide = x.mT if x.size(0) > x.size(1) else x
    wide = wide / wide.norm()
    for a, b, c in QUINTIC:
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.mT if x.size(0) > x.size(1) else wide


def get_muon_scale_factor(size_out, size_in, mode="spectral"):
    scales = {"spectral": max(size_out, size_in), "unit_rms_norm": size_out / size_in}
    return scales.get(mode, max(1, size_out / size_in)) ** 0.5


def install():
    """megatron-core's Muon as if the package were installed, where it is not."""
    if NAME in sys.modules or importlib.util.find_spec(NAME) is not None:
        return
    inner = f"{NAME}.orthogonalized_optimizers"
    modules = {name: types.ModuleType(name) for name in (NAME, inner, f"{inner}.muon_utils")}
    modules[inner].OrthogonalizedOptimizer = OrthogonalizedOptimizer
    modules[inner].get_muon_scale_factor = get_muon_scale_factor
    modules[f"{inner}.muon_utils"].newton_schulz_tp = newton_schulz_tp
    sys.modules.update(modules)
    sys.modules.pop("megatron.core.optimizer.muon", None)
    importlib.import_module("megatron.core.optimizer.muon")


def later():
    """Whether this megatron-core is later than 0.16: its Muon needs the package, and layer-wise bf16."""
    return importlib.util.find_spec("megatron.core.optimizer.emerging_optimizers") is not None


def available():
    return not later() or importlib.util.find_spec(NAME) is not None
