"""Optimiser groups: which parameters decay, which have a rate of their own."""

from typing import Any

import torch
from torch import nn

from pipeline.config.schema import OptimConfig

PRIOR_PREFIX = "prior."
ALIGNMENT = 8  # elements: 16 bytes of bf16


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Split trainable parameters into decayed matrices, undecayed rest, and the prior.

    Norms, biases and the logit scale have fewer than two dimensions and are not decayed; neither
    is the prior. `peak_lr` is what a schedule's factor multiplies.
    """
    matrices, vectors, prior = [], [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith(PRIOR_PREFIX):
            prior.append(parameter)
        elif parameter.ndim >= 2:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    for group in (matrices, vectors, prior):
        # ZeRO lays a group's parameters end to end: after one of odd length all others begin at
        # addresses for which cuBLAS has only slow kernels.
        group.sort(key=lambda parameter: parameter.numel() % ALIGNMENT != 0)
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay, "peak_lr": optim.lr},
        {"params": vectors, "weight_decay": 0.0, "peak_lr": optim.lr},
        # The prior's gradients come scaled down; AdamW's eps must stay below them.
        {"params": prior, "weight_decay": 0.0, "peak_lr": optim.prior_lr, "eps": 1e-12},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over `groups`; torch's own, so that no operator has to be compiled on a new node."""
    return torch.optim.AdamW(
        groups,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True if device.type == "cuda" else None,
    )
