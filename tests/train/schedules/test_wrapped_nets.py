"""A net inside of PyTorch's wrappers: schedules and evaluate say where it is."""

import pytest
import torch
from small import batch, make_net, sgd
from torch import nn

from sedona_fx.errors import ScheduleError
from sedona_fx.train import Backprop, Delayed, Greedy, evaluate


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_a_wrapped_net_is_named(wrap):
    wrapped = wrap(make_net())
    for kind in (Greedy, Backprop, Delayed):
        with pytest.raises(ScheduleError, match=rf"{kind.__name__} takes a net, not .*\.module"):
            kind(wrapped, sgd)
    with pytest.raises(ScheduleError, match=r"evaluate takes a net, not .*\.module"):
        evaluate(wrapped, [batch()])


def test_a_model_is_no_net():
    with pytest.raises(ScheduleError, match="Greedy takes a net, not Linear: make one with decouple"):
        Greedy(nn.Linear(2, 2), sgd)
