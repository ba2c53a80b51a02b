"""DDG (Huo et al., ICML 2018): the gradient of an old batch's final loss at that time's weights, the formula itself.

With s = t-(K-1-k), for s >= 0:    w_k(t+1) = SGD step of w_k(t) with d f_batch(s)(w(s)) / d w_k

All past weights are kept, and the whole forward pass of batch s is run again for every block and step.
"""

from oracle_common import Oracle, add_gradients


class DelayedOracle(Oracle):
    heads = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.past, self.batches = [], []

    def gradients_of(self, x, y):
        self.past.append(dict(self.w))
        self.batches.append((x, y))
        newest, blocks = self.loss_of(self.t)
        for layers in blocks:
            self.note_statistics(layers)
        total = {}
        for k in range(len(blocks)):
            s = self.t - (self.net.last - k)
            if s >= 0:
                loss, blocks_then = self.loss_of(s)
                add_gradients(total, loss, blocks_then[k])
        return total, [newest]

    def loss_of(self, s):
        """Return the loss of batch s at the weights of step s, and the operations of each block."""
        (x, y), w = self.batches[s], self.past[s]
        values, blocks = {"x": x}, []
        for k in range(len(self.net.blocks)):
            self.draw(k, s)
            values, layers = self.net.run_block(k, w, values)
            blocks.append(layers)
        loss, end = self.net.run_end(self.net.last, w, values, y)
        blocks[-1].append(end)
        return loss, blocks
