"""Which batch a worker takes from its buffer, against a model of the rule written as naively as possible."""

from hypothesis import example, given
from hypothesis import strategies as st

from sedona_fx.train.buffers.ring import Ring


class Naive:
    """Everything ever written, with its number and its use count; what is no longer in the buffer is not looked at."""

    def __init__(self, capacity, max_uses):
        self.capacity, self.max_uses = capacity, max_uses
        self.items, self.uses = [], []

    def write(self, item):
        self.items.append(item)
        self.uses.append(1)

    def held(self):
        return range(max(0, len(self.items) - self.capacity), len(self.items))

    def take(self):
        """Of the batches with the smallest use count the most recently written; None if all reached the bound."""
        best = None
        for number in self.held():
            if self.max_uses is not None and self.uses[number] == self.max_uses + 1:
                continue
            if best is None or self.uses[number] <= self.uses[best]:
                best = number
        if best is None:
            return None
        self.uses[best] += 1
        return self.items[best]

    def counts(self):
        return [self.uses[number] for number in self.held()]


@given(
    capacity=st.integers(1, 6),
    max_uses=st.none() | st.integers(1, 4),
    turns=st.lists(st.sampled_from(["write", "take", "take"]), max_size=60),
)
@example(capacity=3, max_uses=None, turns=["write"] * 5 + ["take"] * 7 + ["write"] + ["take"] * 4)
@example(capacity=2, max_uses=1, turns=["take", "write", "take", "take", "write", "write", "take", "take", "take"])
def test_the_ring_takes_what_the_rule_says(capacity, max_uses, turns):
    ring, naive = Ring(capacity, max_uses=max_uses), Naive(capacity, max_uses)
    for number, turn in enumerate(turns):
        if turn == "write":
            item = [number % 2]  # equal items are different batches
            ring.write(item)
            naive.write(item)
        else:
            assert ring.take() is naive.take()
        assert list(ring.counts) == naive.counts()
        assert len(ring) == len(naive.counts())


def test_a_full_buffer_gives_its_newest_batch_first():
    ring = Ring(3)
    for number in range(5):
        ring.write(number)
    assert [ring.take() for _ in range(7)] == [4, 3, 2, 4, 3, 2, 4]
    ring.write(5)
    assert [ring.take() for _ in range(5)] == [5, 5, 5, 3, 5]
    assert ring.counts == [4, 4, 5]
