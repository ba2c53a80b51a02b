"""Asynchronous DGL with replay buffers (Belilovsky et al. 2020, Algorithm 2), as one list of slots a buffer.

A buffer is a list of [use count, values, target, number of the batch's write]; the newest stands last.
"""

from oracle_common import Oracle, add_gradients


class ReplayOracle(Oracle):
    """Args: `skips(j, t)`: whether noise makes worker j skip its turn at step t, once buffer 0 has been filled."""

    def __init__(self, *args, capacity, max_uses=None, skips=lambda j, t: False, **options):
        super().__init__(*args, **options)
        self.capacity, self.max_uses, self.skips = capacity, max_uses, skips
        self.buffers_of = [[] for _ in self.net.blocks[1:]]
        self.latest = [None] * len(self.net.blocks)
        self.full_size, self.full_batches = None, 0
        self.skipped, self.reused = 0, 0  # for tests, to see that the rules had work to do

    def gradients_of(self, x, y):
        if self.full_size is None:
            self.full_size = len(x)
        filling = self.full_batches < self.capacity
        full = len(x) == self.full_size
        total = {}
        for j in range(len(self.net.blocks)):
            if not filling and self.skips(j, self.t):
                self.skipped += 1
                continue
            item = ({"x": x}, y) if j == 0 else self.pick(j - 1)
            if item is None:
                self.skipped += 1
                continue
            values = self.train(j, *item, total)
            if j < self.net.last and (full or j > 0):
                self.buffers_of[j] = [*self.buffers_of[j], [1, values, item[1]]][-self.capacity :]
        self.full_batches += full
        return total, list(self.latest)

    def pick(self, j):
        """Of the batches with the smallest use count, the one written last; None if all have been used enough."""
        eligible = [s for s in self.buffers_of[j] if self.max_uses is None or s[0] < self.max_uses + 1]
        if not eligible:
            return None
        fewest = min(slot[0] for slot in eligible)
        slot = [slot for slot in eligible if slot[0] == fewest][-1]
        self.reused += slot[0] > 1
        slot[0] += 1
        return slot[1], slot[2]

    def train(self, j, values, y, total):
        self.draw(j, self.t)
        values, layers = self.net.run_block(j, self.w, values)
        self.latest[j], end = self.net.run_end(j, self.w, values, y)
        self.note_statistics([*layers, end])
        add_gradients(total, self.latest[j], [*layers, end])
        return {name: value.detach() for name, value in values.items()}
