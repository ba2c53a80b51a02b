"""A net inside of what torch.compile returns: schedules and evaluate say where it is."""

import pytest
import torch
from small import batch, make_net, sgd
from torch import nn

from sedona_fx.errors import ScheduleError
from sedona_fx.train import Backprop, Delayed, Greedy, evaluate


def test_a_compiled_net_is_named():
    compiled = torch.compile(make_net())
    for kind in (Greedy, Backprop, Delayed):
        with pytest.raises(ScheduleError, match=rf"{kind.__name__} takes a net, not .*\._orig_mod"):
            kind(compiled, sgd)
        assert kind(compiled._orig_mod, sgd).step(*batch()).losses[-1].isfinite()
    with pytest.raises(ScheduleError, match=r"evaluate takes a net, not .*\._orig_mod"):
        evaluate(compiled, [batch()])


def test_a_model_is_no_net():
    with pytest.raises(ScheduleError, match="Greedy takes a net, not Linear: make one with decouple"):
        Greedy(nn.Linear(2, 2), sgd)
