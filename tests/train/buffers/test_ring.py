"""The ring buffer: which batch is taken, which one is written over, and its state."""

import io

import pytest
import torch

from sedona_fx.errors import CheckpointError, ScheduleError
from sedona_fx.train.buffers.ring import Ring


def filled(capacity, items, **options):
    ring = Ring(capacity, **options)
    for item in items:
        ring.write(item)
    return ring


def test_an_empty_ring_has_nothing_to_take():
    ring = Ring(3)
    assert ring.take() is None
    assert len(ring) == 0
    assert ring.counts == []


def test_one_batch_after_the_other_is_plain_training():
    ring = Ring(4)
    for item in range(20):
        ring.write(item)
        assert ring.take() == item  # the newest has count 1, all others more


def test_the_newest_of_those_used_least():
    ring = filled(3, "abc")
    assert [ring.take() for _ in range(7)] == list("cbacbac")
    assert ring.counts == [3, 3, 4]


def test_a_full_ring_takes_the_newest_too_and_not_the_oldest():
    ring = filled(3, "abcde")
    assert len(ring) == 3
    assert [ring.take() for _ in range(3)] == list("edc")


def test_the_oldest_is_written_over_whatever_its_count():
    ring = filled(2, "ab")
    assert ring.take() == "b"
    ring.write("c")  # over "a", which nobody used
    assert ring.counts == [2, 1]
    assert [ring.take() for _ in range(3)] == list("ccb")


def test_counts_decide_before_age():
    ring = filled(3, "ab")
    assert [ring.take() for _ in range(2)] == ["b", "a"]
    ring.write("c")
    assert ring.counts == [2, 2, 1]
    assert [ring.take() for _ in range(4)] == list("ccba")
    assert ring.counts == [3, 3, 3]


def test_a_batch_is_used_max_uses_times():
    ring = filled(2, "ab", max_uses=2)
    assert [ring.take() for _ in range(6)] == ["b", "a", "b", "a", None, None]
    assert ring.counts == [3, 3]
    ring.write("c")
    assert [ring.take() for _ in range(3)] == ["c", "c", None]


def test_a_capacity_of_one_holds_the_last():
    ring = filled(1, "abc", max_uses=1)
    assert ring.take() == "c"
    assert ring.take() is None


def test_a_state_goes_on_as_if_never_stopped():
    ring = filled(3, [{"h": torch.full((2,), float(i)), "step": i} for i in range(5)], max_uses=3)
    for _ in range(4):
        ring.take()
    file = io.BytesIO()
    torch.save(ring.state_dict(), file)
    file.seek(0)
    other = Ring(3, max_uses=3)
    other.write({"step": 77})  # is replaced
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.counts == ring.counts
    for _ in range(12):
        ours, theirs = ring.take(), other.take()
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours["step"] == theirs["step"]
            assert torch.equal(ours["h"], theirs["h"])
    assert other.take() is None


def test_a_state_is_a_picture_of_its_moment():
    ring = filled(2, "ab")
    state = ring.state_dict()
    ring.take()
    ring.write("c")
    assert state == {"capacity": 2, "max_uses": None, "items": ["a", "b"], "counts": [1, 1]}


@pytest.mark.parametrize("value", [0, -1, 2.0, None, True])
def test_a_capacity_must_be_a_number_of_batches(value):
    with pytest.raises(ScheduleError, match=rf"capacity={value!r} must be a whole number of 1 or more: a buffer"):
        Ring(value)


@pytest.mark.parametrize("value", [0, -3, 1.5])
def test_uses_must_be_a_number(value):
    with pytest.raises(ScheduleError, match=rf"max_uses={value!r} must be .* trains nothing; None is no limit"):
        Ring(2, value)


def test_a_state_of_other_limits_is_refused_whole():
    ring = filled(2, "ab")
    with pytest.raises(CheckpointError, match=r"a buffer with capacity=3, here it is 2\. Make the schedule with capac"):
        ring.load_state_dict(Ring(3).state_dict())
    with pytest.raises(CheckpointError, match=r"max_uses=4, here it is None"):
        ring.load_state_dict(Ring(2, max_uses=4).state_dict())
    state = filled(2, "xy").state_dict()
    with pytest.raises(CheckpointError, match="one use count a batch"):
        ring.load_state_dict({**state, "counts": [1]})
    with pytest.raises(CheckpointError, match="3 batches in 2 slots"):
        ring.load_state_dict({**state, "items": list("xyz"), "counts": [1, 1, 1]})
    with pytest.raises(CheckpointError, match="with capacity=None"):
        ring.load_state_dict({})
    assert ring.state_dict()["items"] == ["a", "b"]


def test_a_ring_says_what_it_holds():
    ring = filled(3, "ab", max_uses=2)
    ring.take()
    assert repr(ring) == "Ring(2 of 3 batches, counts=[1, 2], max_uses=2)"
