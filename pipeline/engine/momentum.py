"""A slow copy of a module: the moving average of its weights, for features that change slowly.

Enters: the module as it is built, then the engine after each update. Leaves: features without
gradient. The copy is whole and in fp32 on every worker, whatever the ZeRO stage: a share of 1 in
200 of a change would be lost in bf16, and all workers average the same weights to the same copy.
Must not know: what the module computes.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.engine.zero import Engine


class Momentum:
    """w <- decay w + (1 - decay) w', w' being the trained weights: He et al. 2020 (MoCo), eq. 2."""

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        *,
        prefix: str,
        device: torch.device,
        precision: torch.dtype,
    ):
        """Copy `module`, not yet partitioned; its forward runs in `precision`.

        Names of its parameters begin with `prefix` in what an engine trains; empty if it is that.
        """
        self._copy = copy.deepcopy(module).float().to(device).eval().requires_grad_(False)
        self._decay = decay
        self._prefix = prefix
        self._device = device
        self._precision = precision

    def __call__(self, *inputs: Tensor | None) -> Any:
        """Run the copy's forward."""
        is_mixed = self._precision != torch.float32
        with torch.no_grad(), torch.autocast(self._device.type, self._precision, is_mixed):
            return self._copy(*inputs)

    def update(self, engine: Engine) -> None:
        """Follow the engine's parameters; all ranks call it.

        At stage 3 each parameter is gathered for it, as for a forward.
        """
        slow = dict(self._copy.named_parameters())
        for name, parameter in engine.whole_parameters(self._prefix):
            slow[name].lerp_(parameter.to(torch.float32), 1 - self._decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The copy's weights, by name: the same on every rank."""
        return self._copy.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take weights that `state_dict` gave, at any number of workers."""
        self._copy.load_state_dict(state)
