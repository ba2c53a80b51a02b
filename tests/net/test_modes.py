"""Promise 5 of docs/architecture.md, the corners: frozen normalisation, flags of single modules, draws."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import GoogLeNetOutputs
from zoo import ZOO, same_bits, same_state

import sedona_fx
from sedona_fx.errors import ScheduleError
from sedona_fx.search import Search
from sedona_fx.train import Greedy

X, Y = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


class Small(nn.Module):
    """Four layers, a BatchNorm behind each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.conv3, self.fc = nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(self.conv3(x).mean((2, 3)))


class Frozen(Small):
    """Fine-tuning's usual way: train() leaves the BatchNorms in eval mode."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.bn1.eval()
        self.bn2.eval()
        return self


class Dropping(Small):
    """Drops by a module, and by a function that reads the flag of the module it stands in."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.drop, self.p = nn.Dropout(p), p

    def forward(self, x):
        x = self.drop(F.relu(self.bn1(self.conv1(x))))
        x = F.dropout(F.relu(self.bn2(self.conv2(x))), self.p, self.training)
        return self.fc(self.conv3(x).mean((2, 3)))


def decouple(model: nn.Module, **how) -> sedona_fx.Net:
    return sedona_fx.decouple(model, (X, Y), cuts=["bn1", "conv2"], **how)


def flags(module: nn.Module) -> dict[str, bool]:
    return {path: m.training for path, m in module.named_modules()}


def statistics(net: sedona_fx.Net) -> list[torch.Tensor]:
    return [b.clone() for name, b in net.model.named_buffers() if name.startswith("bn")]


def test_an_overridden_train_is_respected():
    model = Frozen().train()
    net = decouple(model)
    before = statistics(net)
    for training in (True, False, True):
        net.train(training)
        assert flags(net.model) == flags(Frozen().train(training))
        assert same_bits(net(X), copy.deepcopy(model).train(training)(X))
        assert all(head.training == training for head in net.heads.values())
    Greedy(net, optimizer=lambda params: torch.optim.SGD(params, lr=0.1)).step(X, Y)
    assert same_bits(before, statistics(net))
    assert not same_bits(model.bn1.weight, net.model.bn1.weight)  # frozen statistics, trained weights


def test_gradients_go_through_frozen_statistics():
    model = Frozen().train()
    nn.init.uniform_(model.bn1.running_mean)
    nn.init.uniform_(model.bn1.running_var, 0.5, 2.0)
    net = decouple(model)
    net.backward(X, Y)
    F.cross_entropy(copy.deepcopy(net.heads["0"])(model.bn1(model.conv1(X))), Y).backward()
    torch.testing.assert_close(net.model.conv1.weight.grad, model.conv1.weight.grad)


@pytest.mark.parametrize("given", [True, False], ids=["train", "eval"])
def test_the_net_comes_in_the_mode_of_the_model(given):
    model = Small().train(given)
    net = decouple(model)
    assert net.training is given
    assert flags(net.model) == flags(model)
    assert {m.training for m in net.heads.modules()} == {given}
    assert same_bits(net(X), copy.deepcopy(model)(X))


def test_flags_of_single_modules_come_along_and_last():
    model = Small().train()
    model.bn1.eval()
    net = decouple(model)
    assert flags(net.model) == flags(model)
    expected = copy.deepcopy(model)
    assert same_bits(net(X), expected(X))
    assert same_state(net.model, expected)
    before = [b.clone() for b in net.model.bn1.buffers()]
    net.backward(X, Y)
    net.losses(X, Y)
    assert same_bits(before, list(net.model.bn1.buffers()))
    assert int(net.model.bn2.num_batches_tracked) == 3


def test_flags_set_on_the_net_later_are_respected_too():
    net = decouple(Small().train())
    net.model.bn2.eval()
    expected = copy.deepcopy(net.model)
    assert same_bits(net(X), expected(X))
    net.backward(X, Y)
    assert int(net.model.bn2.num_batches_tracked) == 0
    assert int(net.model.bn1.num_batches_tracked) == 2
    assert net.train().model.bn2.training  # as PyTorch does it: train() sets every flag


def test_dropout_draws_in_train_mode_only():
    net = decouple(Dropping())
    assert not same_bits(net(X), net(X))
    assert same_bits(net.losses(X, Y), net.losses(X, Y))  # the draws of a step are those of the step
    first = net.losses(X, Y)
    net.steps += 1
    assert not same_bits(first, net.losses(X, Y))
    net.eval()
    assert same_bits(net(X), net(X))
    expected = net.losses(X, Y)
    net.steps += 1
    assert same_bits(expected, net.losses(X, Y))


def test_a_flag_that_the_graph_cannot_follow_is_an_error():
    """A functional dropout is in the train graph or not; the mode of its module cannot differ from the net's."""
    outer = nn.Sequential(nn.Conv2d(3, 3, 1), Dropping())
    net = sedona_fx.decouple(outer, (X, Y), cuts=["0"])
    net.model[1].training = False
    for call in (lambda: net(X), lambda: net.losses(X, Y), lambda: net.backward(X, Y)):
        with pytest.raises(ScheduleError, match="leaf_modules"):
            call()
    kept_whole = sedona_fx.decouple(outer, (X, Y), cuts=["0"], leaf_modules=["1"])
    kept_whole.model[1].eval()
    expected = copy.deepcopy(kept_whole.model)
    assert same_bits(kept_whole(X), expected(X))


def test_auxiliary_outputs_come_in_train_mode_only():
    entry = ZOO["googlenet"]
    x, y = entry.pair()
    net = sedona_fx.decouple(entry.make(), (x, y), blocks=3, search="uniform")
    assert isinstance(net.train()(x), GoogLeNetOutputs)
    assert isinstance(net.eval()(x), torch.Tensor)
    auxiliary = [p for name, p in net.model.named_parameters() if name.startswith("aux")]
    net.backward(x, y)
    assert all(p.grad is None for p in auxiliary)
    net.train().backward(x, y)
    assert all(p.grad is not None for p in auxiliary)


class Looks(Search):
    """A search that runs the train graph which it is given, then cuts by rule."""

    needs_data = False

    def decide(self, problem):
        given = copy.deepcopy(problem.train)  # running statistics move
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.output = given(X)
        return sedona_fx.search.Balanced().decide(problem)


def test_a_model_in_eval_mode_is_searched_as_it_will_be_trained():
    for made in (Dropping, Frozen):
        torch.manual_seed(0)
        model, search = made().eval(), Looks()
        net = sedona_fx.decouple(model, (X, Y), blocks=2, search=search)
        torch.manual_seed(5)
        assert same_bits(search.output, copy.deepcopy(model).train()(X))
        assert not any(module.training for module in (*model.modules(), *net.modules()))


def test_a_single_module_in_eval_mode_stays_so_in_the_search():
    torch.manual_seed(0)
    model, search = Small(), Looks()
    model.bn1.eval()
    net = sedona_fx.decouple(model, (X, Y), blocks=2, search=search)
    assert same_bits(search.output, copy.deepcopy(model)(X))
    assert [name for name, module in model.named_modules() if not module.training] == ["bn1"]
    assert sum(not module.training for module in net.modules() if isinstance(module, nn.BatchNorm2d)) == 1
