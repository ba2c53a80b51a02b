"""BackLink (Guo et al. 2022), as a gradient of one connected graph in which every layer has leaves of its own.

    block i:                   d l_i / d w
    tail of block i, besides:  d l_(i+1) / d w        (its last `reach` base layers)

Nothing is detached: what must not be followed is not asked for. reach = 0 is Greedy.
"""

from oracle_common import Oracle, add_gradients


class BackLinkOracle(Oracle):
    def __init__(self, *args, reach=0, **options):
        super().__init__(*args, **options)
        self.reach = reach

    def gradients_of(self, x, y):
        net, values = self.net, {"x": x}
        losses, bodies, ends = [], [], []
        for k in range(len(net.blocks)):
            self.draw(k, self.t)
            values, layers = net.run_block(k, self.w, values)
            loss, end = net.run_end(k, self.w, values, y)
            self.note_statistics([*layers, end])
            losses.append(loss)
            bodies.append(layers)
            ends.append(end)
        total = {}
        for k, loss in enumerate(losses):
            add_gradients(total, loss, [*bodies[k], ends[k]])
            if self.reach and k > 0:
                add_gradients(total, loss, bodies[k - 1][-self.reach :])
        return total, losses
