"""Greedy (DGL, Belilovsky et al. 2020, Algorithm 1): each block alone, on the detached output of the one before."""

from oracle_common import Oracle, add_gradients


class GreedyOracle(Oracle):
    def gradients_of(self, x, y):
        values, losses, total = {"x": x}, [], {}
        for k in range(len(self.net.blocks)):
            self.draw(k, self.t)
            values = {name: value.detach() for name, value in values.items()}
            values, layers = self.net.run_block(k, self.w, values)
            loss, end = self.net.run_end(k, self.w, values, y)
            self.note_statistics([*layers, end])
            add_gradients(total, loss, [*layers, end])
            losses.append(loss)
        return total, losses
