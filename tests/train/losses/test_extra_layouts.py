"""Extra losses of nets that do not have the batch in dimension 0: they compare examples, not steps."""

import copy
import itertools

import pytest
import torch
from layouts import EachMember, EachStepFirst, Siamese, StepsFirst, made, pair_of
from torch.nn import functional as F

from sedona_fx.errors import ScheduleError
from sedona_fx.train import Greedy, InfoPro, KineticEnergy, PredSim


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def stepped(net, kind, extra):
    """Return what the gradients of the model's parameters were in a step with extra losses, and their modules."""
    schedule = Greedy(net, sgd, extra=[extra])
    modules = copy.deepcopy([list(own) for own in schedule.extras])
    before = {name: p.detach().clone() for name, p in net.model.named_parameters()}
    schedule.step(*pair_of(kind))
    after = dict(net.model.named_parameters())
    return {name: value - after[name].detach() for name, value in before.items()}, modules


def similarity(rows):
    rows = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    return rows @ rows.t()


def test_predsim_compares_examples():
    model, net = made(StepsFirst, cuts=["l.0"])
    found, ((module,), _) = stepped(net, StepsFirst, PredSim(weight=1.0, keep=0.0, channel_dim=-1))
    h = model.l[0](model.e(*StepsFirst.inputs).transpose(0, 1)).permute(1, 2, 0)  # (N, D, T)
    features = module.net(h).std(2)
    wanted = similarity(features) - similarity(F.one_hot(StepsFirst.target, 3).double())
    wanted.square().mean().backward()
    for name in ("e.weight", "l.0.linear1.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient.norm() > 1e-6
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13)


def test_infopro_reconstructs_examples():
    model, net = made(Siamese, cuts=["l.0"])
    found, ((module,), _) = stepped(net, Siamese, InfoPro(weight=1.0, keep=0.0, channel_dim=-1))
    h = torch.stack(model.l[0](torch.cat(Siamese.inputs)).chunk(2), 1)
    F.mse_loss(module.decoder(h.flatten(1)), Siamese.inputs[0]).backward()
    torch.testing.assert_close(found["l.0.weight"], model.l[0].weight.grad, rtol=1e-9, atol=1e-13)


def test_infopro_says_that_rows_are_no_examples():
    _, net = made(EachMember)
    with pytest.raises(ScheduleError, match=r"'x', \(4, 7, 6\), example by example, and the activation has 28 rows"):
        Greedy(net, sgd, extra=[InfoPro(channel_dim=-1)])


@pytest.mark.parametrize("kind", [Siamese, EachStepFirst])
def test_the_kinetic_energy_is_a_mean_over_examples(kind):
    model, net = made(kind, cuts=[":tanh#3"])
    assert net.plan.base_layers[:3] == (":tanh", ":tanh#2", ":tanh#3")
    found, _ = stepped(net, kind, KineticEnergy(weight=1.0, keep=0.0, average=False))
    layers = [model.l[0](model.into(*kind.inputs)).tanh()]
    for k in (1, 2):
        layers.append(model.l[k](layers[-1]).tanh())
    energy = sum((after - before).square().sum() for before, after in itertools.pairwise(layers))
    (energy / 4 / 2).backward()  # 4 examples, 2 tau
    for k in (0, 1, 2):
        torch.testing.assert_close(found[f"l.{k}.weight"], model.l[k].weight.grad, rtol=1e-9, atol=1e-13)
