"""How blocks update: unscale, clip and check the gradients, then step the optimizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from sedona_fx.net.net import Net
from sedona_fx.runtime.block import Block
from sedona_fx.runtime.guard import Gradients
from sedona_fx.runtime.precision import overflows


class Updating:
    """The part of a schedule that updates blocks. No optimizer steps with a gradient that is not finite.

    Attributes:
        net: the net to train.
        clip: largest gradient norm (L2) of each block, or None.
        optimizers: one per block, or None where nothing is trained.
        scalers: one gradient scaler per block, or None.
        parameters: for each block, the parameters that its optimizer steps.
        contributors: for each block, the blocks whose losses contribute to the gradients of `parameters`.
    """

    net: Net
    clip: float | None
    optimizers: list[torch.optim.Optimizer | None]
    scalers: list[torch.amp.GradScaler] | None
    parameters: list[list[nn.Parameter]]
    contributors: list[set[int]]
    _unscaled: set[int]  # ids of the scalers that unscaled gradients in this step
    _number: int  # of the step that runs

    def on_gradients(self, block: Block) -> None:
        """Change the gradients of a block; does nothing by default.

        Called once per update of a block, when the gradients of ``self.parameters[block.index]`` are complete (summed
        over the window, unscaled), right before they are clipped and the optimizer steps. A gradient may be None. It
        may also be called with gradients that are not finite; the optimizer does not step with them then.
        """

    def scaler(self, index: int) -> torch.amp.GradScaler | None:
        """Return the gradient scaler of block `index`, or None."""
        return self.scalers[index] if self.scalers is not None else None

    def step_block(self, index: int, contributors: Collection[int] | None = None) -> None:
        """Update block `index` and zero its gradients, which frees them before the next block runs.

        Args:
            index: the block.
            contributors: see :meth:`update`; None: those in ``self.contributors``.
        """
        self.update(index, self.contributors[index] if contributors is None else contributors)
        self.zero_grad(index)

    def update(self, index: int, contributors: Collection[int]) -> None:
        """Unscale and clip the gradients of block `index`, and step its optimizer; nothing if there are no gradients.

        Args:
            index: the block.
            contributors: the optimizer does not step if the loss of one of these blocks was not finite in this step.

        Raises:
            NonFiniteGradientError: a gradient is not finite, and the verdict was not deferred.
        """
        for gradients in self._complete([index]):
            self._check([gradients], defer=True)
            self._step_optimizer(index, contributors, [index])

    def update_all(self, *, wait: bool) -> None:
        """Update all blocks: none of them steps if the loss or a gradient of any is not finite.

        Where :meth:`on_gradients` is overridden and there is no waiting, blocks before the bad one have stepped.

        Args:
            wait: whether verdicts are not deferred.

        Raises:
            NonFiniteGradientError: a gradient is not finite, and the verdict was not deferred.
        """
        everyone = range(len(self.net.blocks))
        if not wait and getattr(self.on_gradients, "__func__", None) is not Updating.on_gradients:
            for index in everyone:  # whoever looks at the gradients of a block does so right before it steps
                self.update(index, everyone)
            return
        ready = self._complete(everyone)
        self._check(ready, defer=not wait)
        for gradients in ready:
            self._step_optimizer(gradients.block, everyone, everyone)

    def _complete(self, indices: Iterable[int]) -> list[Gradients]:
        """Unscale the gradients of these blocks, let :meth:`on_gradients` change them, clip them, and return them."""
        ready = []
        for index in indices:
            optimizer, scaler, overflow = self.optimizers[index], self.scaler(index), list[Tensor]()
            if optimizer is None or all(parameter.grad is None for parameter in self.parameters[index]):
                continue
            if scaler is not None:
                scaler.unscale_(optimizer)
                self._unscaled.add(id(scaler))
                overflow = overflows(scaler, optimizer)
            self.on_gradients(self.net.blocks[index])
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters[index], self.clip)
            ready.append(Gradients(index, self.parameters[index], overflow))
        return ready

    def _check(self, gradients: list[Gradients], *, defer: bool) -> None:
        engine = self.net.engine
        engine.guard.check_gradients(gradients, self._number, engine.parameter_names, defer=defer)

    def _step_optimizer(self, index: int, losses: Collection[int], gradients: Collection[int]) -> None:
        optimizer = self.optimizers[index]
        if optimizer is not None:
            self.net.engine.guard.step_optimizer(optimizer, losses, gradients, self.scaler(index))

    def zero_grad(self, index: int | None = None) -> None:
        """Set the gradients of block `index` to None; without an index, those of all blocks."""
        for block in range(len(self.optimizers)) if index is None else [index]:
            optimizer = self.optimizers[block]
            if optimizer is not None and any(p.grad is not None for p in self.parameters[block]):
                if type(optimizer).zero_grad is torch.optim.Optimizer.zero_grad:
                    for parameter in self.parameters[block]:  # what it does, without its profiling
                        parameter.grad = None
                else:
                    optimizer.zero_grad(set_to_none=True)
