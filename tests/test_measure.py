"""PeakBytes against bytes counted by hand."""

import torch
from torch import nn

from sedona_fx.measure import PeakBytes, device_peak_bytes, peak_bytes

KB = 4 * 256  # a float32 tensor of 256 numbers


def test_counts_new_storages_and_forgets_freed_ones():
    x = torch.ones(256)
    with PeakBytes() as meter:
        a = x + 1
        b = a + 1
        assert meter.current == meter.peak == 2 * KB
        del a
        assert meter.current == KB
        c = torch.cat([b, b])
        assert (meter.current, meter.peak) == (3 * KB, 3 * KB)
        del b
    del c  # freed outside of the context
    assert (meter.current, meter.peak) == (0, 3 * KB)


def test_views_share_and_keep_their_storage():
    x = torch.ones(16, 16)
    with PeakBytes() as meter:
        view = (x + 1).view(256)[3:5]  # the base is gone, its storage is not
        assert meter.current == KB
        other = view.unsqueeze(0)
        del view
        assert meter.current == KB
        del other
        assert meter.current == 0
        inputs = x.t()
        assert meter.current == 0
        del inputs


def test_in_place_operations_and_out_arguments_are_free():
    x, out = torch.ones(256), torch.empty(256)
    with PeakBytes() as meter:
        y = x * 2
        y.add_(1).relu_()
        x.mul_(2)
        torch.add(x, x, out=out)
        assert meter.peak == KB
        del y


def test_resized_storages_are_followed():
    with PeakBytes() as meter:
        x = torch.empty(256)
        x.resize_(512)
        assert meter.current == 2 * KB
        x.untyped_storage().resize_(0)
        x.detach()  # seen again
        assert (meter.current, meter.peak) == (0, 2 * KB)


def test_many_short_lives_do_not_pile_up():
    x = torch.ones(256)
    with PeakBytes() as meter:
        for _ in range(50):
            x = x + 1
    assert meter.peak == 2 * KB
    assert meter.current == KB


def test_nested_meters_both_count():
    x = torch.ones(256)
    with PeakBytes() as outer:
        a = x + 1
        with PeakBytes() as inner:
            b = a + 1
            del b
        c = a + 1
    assert inner.peak == KB
    assert outer.peak == 2 * KB
    assert outer.current == 2 * KB
    del a, c
    assert inner.current == outer.current == 0


def test_what_existed_before_or_is_ignored_is_not_counted():
    made = torch.ones(256)
    with PeakBytes(ignore=[made]) as meter:
        made.view(16, 16)
        made[:3].clone()
    assert meter.peak == 12
    with PeakBytes(ignore=[torch.ones(256)]) as meter:  # freed at once: its address may come back
        kept = [torch.ones(256) for _ in range(8)]
    assert meter.peak == 8 * KB
    del kept


def test_a_training_step_counted_by_hand():
    # Two linear layers without bias, batch 8, width 16, one ReLU; saved: relu's output. float32.
    first, second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    x = torch.ones(8, 16)
    activation, weight, scalar = 8 * 16 * 4, 16 * 16 * 4, 4
    with PeakBytes() as meter:
        h = first(x)
        h = torch.relu(h)
        loss = second(h).sum()
        assert meter.current == activation + scalar  # relu keeps its output, sum keeps nothing, h is that output
        del h
        loss.backward()
        assert meter.current == scalar + 2 * weight  # only the gradients are left
    assert meter.peak >= scalar + 2 * weight
    grads = [first.weight.grad, second.weight.grad]
    del loss
    assert meter.current == sum(g.numel() * 4 for g in grads)


def test_sparse_gradients_do_not_break_it():
    table = nn.Embedding(10, 4, sparse=True)
    with PeakBytes() as meter:
        table(torch.tensor([1, 2])).sum().backward()
    assert table.weight.grad.is_sparse
    assert meter.peak > 0


def test_peak_bytes_of_a_call():
    assert peak_bytes(lambda x, times: x * times, torch.ones(256), times=2) == KB
    assert device_peak_bytes(torch.device("cpu")) is None
