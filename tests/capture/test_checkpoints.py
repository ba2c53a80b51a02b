"""Reentrant checkpoints: their layers train, or are refused by name where PyTorch gives them no gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sedona_fx
from sedona_fx.errors import TraceError
from sedona_fx.passes import trace

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Checkpointed(nn.Module):
    def __init__(self, captured=False, reentrant=True):
        super().__init__()
        torch.manual_seed(0)
        self.captured, self.reentrant = captured, reentrant
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)), nn.Linear(8, 3)
        self.double()

    def forward(self, x):
        if self.captured and x.shape[1] != 4:
            raise ValueError("four features")
        h = self.a(x).tanh()
        return self.c(checkpoint(self.b, h, use_reentrant=self.reentrant).tanh())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])
def test_layers_in_a_checkpoint_train(captured, reentrant):
    model = Checkpointed(captured, reentrant)
    net = sedona_fx.decouple(model, (X, Y), blocks=1, search="uniform")
    torch.manual_seed(1)
    net.backward(X, Y)
    torch.manual_seed(1)
    F.cross_entropy(model(X), Y).backward()
    for (name, p), q in zip(net.model.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(p.grad, q[1].grad), name


class First(Checkpointed):
    def forward(self, x):
        if self.captured and x.shape[1] != 4:
            raise ValueError("four features")
        return self.c(self.b(checkpoint(self.a, x, use_reentrant=True).tanh()).tanh())


@pytest.mark.parametrize("captured", [False, True], ids=["symbolic", "export"])
def test_a_checkpoint_that_gives_no_gradient_is_refused(captured):
    with pytest.raises(TraceError, match=r"checkpoint of First.*no input that needs a gradient.*use_reentrant=False"):
        trace(First(captured), sedona_fx.Args(X))
