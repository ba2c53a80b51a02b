"""A graph returns what the model returns, of the model's own types."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import sedona_fx


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (lambda o: {"logits": o, "more": {"twice": [2 * o, None]}}, dict),
        (lambda o: OrderedDict(extra=o.sum(), logits=o), OrderedDict),
        (lambda o: [o, (o, {"x": o})], list),
        (lambda o: (o, [o]), tuple),
    ],
)
def test_containers_are_the_models_own(wrap, kind):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return wrap(self.b(self.a(x).tanh()))

    def loss(output, target):
        return nn.functional.cross_entropy(output["logits"] if isinstance(output, dict) else output[0], target)

    def types(value):
        if isinstance(value, dict):
            return type(value), [(key, types(inner)) for key, inner in value.items()]
        return (type(value), [types(v) for v in value]) if isinstance(value, (list, tuple)) else type(value)

    model, x = Wrapped(), torch.randn(2, 4)
    net = sedona_fx.decouple(model, (x, torch.tensor([0, 1])), blocks=2, search="uniform", loss=loss)
    for result in (net(x), net.inference_module()(x), net.backward(x, torch.tensor([0, 1])).output):
        assert type(result) is kind
        assert types(result) == types(model(x))


class Note:
    """Neither a tensor nor a container of any."""


def test_objects_beside_the_output_are_left_out():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return {"logits": self.b(self.a(x).tanh()), "notes": [Note()]}

    model, x, y = Wrapped(), torch.randn(2, 4), torch.tensor([0, 1])
    net = sedona_fx.decouple(
        model, (x, y), cuts=["a"], loss=lambda output, target: nn.functional.cross_entropy(output["logits"], target)
    )
    assert net.plan.capture.front_end == "symbolic"
    assert net.plan.capture.left_out == ("notes.0 (Note)",)
    assert net(x)["notes"] == [None]
    assert torch.equal(net(x)["logits"], model(x)["logits"])
    net.backward(x, y)
