"""Backpropagation: the final loss, walked back through everything. Draws come from the global stream."""

from oracle_common import Oracle, add_gradients


class BackpropOracle(Oracle):
    heads = False

    def gradients_of(self, x, y):
        net, values, everything = self.net, {"x": x}, []
        for k in range(len(net.blocks)):
            values, layers = net.run_block(k, self.w, values)
            everything += layers
        loss, ops = net.run_end(net.last, self.w, values, y)
        self.note_statistics(everything)
        total = {}
        add_gradients(total, loss, [*everything, ops])
        return total, [loss]
