"""Helpers on modules."""

import torch
from torch import nn

from sedona_fx.ir.modules import first_float_parameter


def test_the_first_float_parameter_is_taken_in_the_order_of_registration():
    module = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 3, dtype=torch.bfloat16), nn.Linear(3, 1))
    module[0].codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert first_float_parameter(module) is module[1].weight


def test_buffers_and_integers_are_no_float_parameters():
    module = nn.BatchNorm1d(2, affine=False)
    assert first_float_parameter(module) is None
    module.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert first_float_parameter(module) is None
