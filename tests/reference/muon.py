"""Muon with AdamW beside it, in plain torch: orthogonalized by singular values in double precision, slowly."""

import torch

#: of five iterations: megatron-core's, which are modded-nanogpt's, and DeepSpeed's, Keller Jordan's
MEGATRONS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
DEEPSPEEDS = ((3.4445, -4.7750, 2.0315),) * 5
SCALES = {
    "unit_rms_norm": lambda out, fan_in: (out / fan_in) ** 0.5,
    "spectral": lambda out, fan_in: max(out, fan_in) ** 0.5,
    "shape_scaling": lambda out, fan_in: max(1, out / fan_in) ** 0.5,
}


def orthogonalized(matrix, scale, coefficients):
    """What Newton-Schulz iterations make of a matrix, times the scale: they change its singular values alone."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return ((u * s) @ v * SCALES[scale](*matrix.shape)).to(matrix.dtype)


class MuonAndAdamW:
    """``groups``: one parameter each, and with ``scale`` for Muon; ``blocks``: its rows, repeated, that are taken for
    matrices of their own."""

    def __init__(self, groups, momentum, nesterov, coefficients, betas):
        groups = list(groups)
        self.muon = [group for group in groups if "scale" in group]
        self.adamw = torch.optim.AdamW([group for group in groups if "scale" not in group], betas=betas)
        self.momentum, self.nesterov, self.coefficients, self.means = momentum, nesterov, coefficients, {}

    def zero_grad(self):
        for group in [*self.muon, *self.adamw.param_groups]:
            group["params"][0].grad = None

    @torch.no_grad()
    def step(self):
        self.adamw.step()
        for group in self.muon:
            p = group["params"][0]
            mean = self.means.setdefault(p, torch.zeros_like(p))
            mean += (1 - self.momentum) * (p.grad - mean)
            update = (1 - self.momentum) * p.grad + self.momentum * mean if self.nesterov else mean
            blocks = group.get("blocks", (p.shape[0],))
            repeated = update.view(-1, sum(blocks), p.shape[1]).split(blocks, dim=1)
            parts = [part.reshape(-1, p.shape[1]) for part in repeated]
            parts = [orthogonalized(part, group["scale"], self.coefficients) for part in parts]
            parts = [part.view(-1, rows, p.shape[1]) for part, rows in zip(parts, blocks, strict=True)]
            p *= 1 - group["lr"] * group["weight_decay"]
            p -= group["lr"] * torch.cat(parts, dim=1).view_as(p)
