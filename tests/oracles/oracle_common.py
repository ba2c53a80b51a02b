"""What all oracles share: operations, nets and momentum SGD, written out by hand over dicts of tensors.

The oracles know nothing of sedona_fx, of ``torch.nn`` modules or of ``torch.optim``. A net is a list of stages over
named values; every use of a weight is a leaf of its own, so that the gradient of each use can be asked for by itself.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


class Ops:
    """The operations of one layer on the weights `w`; notes the leaves it made and the statistics BatchNorm saw."""

    def __init__(self, net, w):
        self.net, self.w = net, w
        self.leaves, self.seen = {}, []

    def weight(self, name):
        name = self.net.tied.get(name, name)
        if name not in self.leaves:
            self.leaves[name] = self.w[name].detach().clone().requires_grad_()
        return self.leaves[name]

    def linear(self, name, x):
        return x @ self.weight(f"{name}.weight").T + self.weight(f"{name}.bias")

    def norm(self, name, x):
        mean, var = x.mean(0), x.var(0, unbiased=False)
        self.seen.append((name, mean.detach(), x.detach().var(0, unbiased=True)))
        return (x - mean) / (var + 1e-5).sqrt() * self.weight(f"{name}.weight") + self.weight(f"{name}.bias")


@dataclass(frozen=True)
class HandNet:
    """A net by hand.

    Attributes:
        program: what each stage reads (added up) and the value it writes.
        blocks: for each block, its base layers, each a list of stages.
        tied: names of weights that are another weight.
    """

    program: list
    blocks: list
    norm: bool = True
    drop: float = 0.0
    tied: dict = field(default_factory=dict)

    @property
    def last(self):
        return len(self.blocks) - 1

    def stage(self, ops, i, values):
        reads, write = self.program[i]
        h = ops.linear(f"model.stages.{i}.0", sum(values[name] for name in reads))
        if self.norm:
            h = ops.norm(f"model.stages.{i}.1", h)
        return {**values, write: F.dropout(torch.tanh(h), self.drop)}

    def end(self, ops, k, values):
        """The logits at the end of block k: of its head, or of the net's own output layer."""
        h = values[self.program[self.blocks[k][-1][-1]][1]]
        if k == self.last:
            return ops.linear("model.out", h)
        h = ops.linear(f"heads.{k}.0", h)
        if self.norm:
            h = ops.norm(f"heads.{k}.1", h)
        return ops.linear(f"heads.{k}.4", F.dropout(torch.relu(h), self.drop))

    def run_block(self, k, w, values):
        """Return the values behind block k, and the operations of each of its base layers."""
        layers = []
        for stages in self.blocks[k]:
            layers.append(Ops(self, w))
            for i in stages:
                values = self.stage(layers[-1], i, values)
        return values, layers

    def run_end(self, k, w, values, y):
        """Return the loss at the end of block k, and the operations of what stands there."""
        ops = Ops(self, w)
        return F.cross_entropy(self.end(ops, k, values), y), ops

    def owners(self, w, x, heads):
        """Return, for each block, the weights that belong to it: those that no later block uses."""
        names, values = [], {"x": x}
        with torch.random.fork_rng(devices=[]):
            for k in range(len(self.blocks)):
                values, layers = self.run_block(k, w, values)
                used = {name for ops in layers for name in ops.leaves}
                if heads or k == self.last:
                    used |= self.run_end(k, w, values, torch.zeros(len(x), dtype=torch.long))[1].leaves.keys()
                names.append(used)
        return [used - set().union(*names[k + 1 :]) for k, used in enumerate(names)]


def add_gradients(total, outputs, layers, upstream=None):
    """Add the gradients of `outputs` with respect to all leaves of `layers` to the dict `total`, by name."""
    leaves = [(name, leaf) for ops in layers for name, leaf in ops.leaves.items()]
    found = torch.autograd.grad(outputs, [leaf for _, leaf in leaves], upstream, retain_graph=True, allow_unused=True)
    for (name, _), g in zip(leaves, found, strict=True):
        if g is not None:
            total[name] = total.get(name, 0) + g


class Oracle:
    """Weights `w`, BatchNorm's `buffers`, and momentum SGD with weight decay, written out.

    Args:
        net: a `HandNet`.
        w: the weights at the start, by name. `buffers`: likewise.
        draw: called with (k, t) before block k works on batch t for its step; seeds the draws.
        frozen: names of weights that are not trained.

    Attributes:
        heads: whether the method trains heads.
    """

    heads = True

    def __init__(self, net, w, buffers, draw, lr=0.1, momentum=0.9, decay=1e-3, clip=None, accumulate=1, frozen=()):
        self.net, self.w, self.buffers, self.draw = net, dict(w), dict(buffers), draw
        self.lr, self.momentum, self.decay = lr, momentum, decay
        self.clip, self.accumulate, self.frozen = clip, accumulate, frozen
        self.clipped = 0  # for tests, to see that there was something to clip
        self.velocity, self.gradients, self.t, self.owned = {}, {}, 0, None

    def step(self, x, y):
        """Train on one batch; return the losses."""
        if self.owned is None:
            self.owned = self.net.owners(self.w, x, self.heads)
        gradients, losses = self.gradients_of(x, y)
        for name in gradients.keys() - self.frozen:
            g = gradients[name]
            self.gradients[name] = self.gradients.get(name, 0) + g / self.accumulate
        self.t += 1
        if self.t % self.accumulate == 0:
            self.update()
        return [loss.item() for loss in losses]

    def update(self):
        """Take one step of momentum SGD with every weight that has a gradient; clip each block's own."""
        for names in self.owned:
            present = [name for name in names if name in self.gradients]
            factor = 1.0
            if self.clip is not None and present:
                norm = sum(self.gradients[name].square().sum() for name in present).sqrt()
                factor = min(1.0, self.clip / (norm.item() + 1e-6))
                self.clipped += factor < 1.0
            for name in present:
                g = self.gradients[name] * factor + self.decay * self.w[name]
                self.velocity[name] = self.momentum * self.velocity[name] + g if name in self.velocity else g
        new = {name: self.w[name] - self.lr * self.velocity[name] for name in self.gradients}
        self.w = {**self.w, **new}
        self.gradients = {}

    def note_statistics(self, layers):
        """Move the running statistics as one forward pass in training does."""
        for ops in layers:
            for name, mean, var in ops.seen:
                old = self.buffers
                self.buffers = {
                    **old,
                    f"{name}.running_mean": 0.9 * old[f"{name}.running_mean"] + 0.1 * mean,
                    f"{name}.running_var": 0.9 * old[f"{name}.running_var"] + 0.1 * var,
                    f"{name}.num_batches_tracked": old[f"{name}.num_batches_tracked"] + 1,
                }
