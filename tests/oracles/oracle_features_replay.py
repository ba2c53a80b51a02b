"""Features Replay (Huo et al., NeurIPS 2018): old inputs through the current weights, by the recursion.

At step t, with w(t) throughout, all blocks run forward, each on its input of batch t, which is kept. Then

    last block:                        the gradient of the loss of batch t; delta_(K-1)(t) with respect to its input
    block k < K-1, s = t-(K-1-k) >= 0: runs its input of batch s again; vector-Jacobian product with delta_(k+1)(s),
                                       which block k+1 computed at step t-1; delta_k(s) with respect to its input
"""

import torch
from oracle_common import Oracle, add_gradients


class FeaturesReplayOracle(Oracle):
    heads = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.inputs = []  # [step][block]
        self.delta = {}  # (block, step of the batch): {value: gradient}

    def gradients_of(self, x, y):
        net, values, inputs = self.net, {"x": x}, []
        for k in range(len(net.blocks)):
            self.draw(k, self.t)
            values = {name: value.detach() for name, value in values.items()}
            inputs.append(values)
            values, layers = net.run_block(k, self.w, values)
            self.note_statistics(layers)
        self.inputs.append(inputs)
        total = {}
        for k in range(len(net.blocks)):
            s = self.t - (net.last - k)
            if s < 0:
                continue
            self.draw(k, s)
            entering = {name: value.clone().requires_grad_() for name, value in self.inputs[s][k].items()}
            leaving, layers = net.run_block(k, self.w, entering)
            if k == net.last:
                loss, end = net.run_end(k, self.w, leaving, y)
                outputs, upstream, layers = [loss], None, [*layers, end]
            else:
                above = self.delta[k + 1, s]
                outputs, upstream = [leaving[name] for name in above], list(above.values())
            add_gradients(total, outputs, layers, upstream)
            below = torch.autograd.grad(outputs, list(entering.values()), upstream, allow_unused=True)
            self.delta[k, s] = {name: g for name, g in zip(entering, below, strict=True) if g is not None}
        return total, [loss]
