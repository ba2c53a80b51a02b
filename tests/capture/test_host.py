"""``root=``: a sub-module is cut, the code around it runs as it is."""

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx import LocalLoss
from sedona_fx.errors import CutError, DataError, ExportError, HeadError, ScheduleError, TraceError
from sedona_fx.train import Backprop, Greedy


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.mid, self.end = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor, gain: float = 1.0) -> dict[str, Tensor]:
        low = self.stem(x)
        high = self.end(self.mid(low).tanh() * self.scale * gain).tanh()
        return {"low": low, "high": high}


class Host(nn.Module):
    """Normalises, embeds, draws numbers, branches on values before and behind its backbone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.before = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.backbone = Backbone()
        self.drop, self.fc, self.skip = nn.Dropout(0.5), nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, images: list[Tensor], target: Tensor | None = None) -> dict[str, Tensor] | list[Tensor]:
        x = torch.stack([(image - image.mean()) / (image.std() if image.std() > 0 else 1) for image in images])
        x = self.before(self.embed(x))
        if self.training and torch.rand([]) < 2:
            x = x + 0.1 * torch.rand_like(x)
        maps = self.backbone(x, gain=0.5)
        features = maps["high"].mean((2, 3)) + maps["low"].amax((2, 3))
        scores = self.fc(self.drop(features)) + self.skip(x.mean((2, 3)))
        if not self.training:
            return [s for s in scores.argmax(1) if s >= 0]
        assert target is not None
        return {"loss": F.cross_entropy(scores, target), "size": 1e-3 * scores.square().mean()}


def batch(count: int = 4, dtype: torch.dtype = torch.float32) -> tuple[tuple[list[Tensor], Tensor], None]:
    generator = torch.Generator().manual_seed(1)
    return (
        [torch.randn(3, 8, 8, generator=generator, dtype=dtype) for _ in range(count)],
        torch.arange(count) % 5,
    ), None


def total(losses: dict[str, Tensor], _: object) -> Tensor:
    return sum(losses.values(), torch.tensor(0.0))


PRESENT = LocalLoss(
    lambda output, inputs, _: F.cross_entropy(output, inputs["target"]),
    head=lambda c: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c.channels, 5)),
)


def make(**how: object) -> tuple[Host, sedona_fx.Net]:
    dtype = how.pop("dtype", torch.float32)
    model = Host().to(dtype)
    how = {"cuts": ["backbone.stem", "backbone.mid"], "heads": False} | how
    return model, sedona_fx.decouple(model, batch(dtype=dtype), root="backbone", loss=total, **how)


def test_the_host_runs_as_it_is_and_the_net_is_the_model():
    model, net = make()
    assert net.plan.root == "backbone"
    assert net.plan.capture.hosted
    (images, target), _ = batch(6)
    for training in (True, False):
        plain = copy.deepcopy(model).train(training)
        net.model.load_state_dict(model.state_dict())
        torch.manual_seed(3)
        expected = plain(images, target)
        after = torch.rand(())
        torch.manual_seed(3)
        actual = net.train(training)(images, target)
        assert torch.equal(torch.rand(()), after)
        if training:
            assert list(actual) == list(expected)
            actual, expected = list(actual.values()), list(expected.values())
        assert all(map(torch.equal, actual, expected))
        assert all(map(torch.equal, plain.state_dict().values(), net.model.state_dict().values()))
    assert all(map(torch.equal, net.eval()(images), model.eval()(images)))  # a detector takes no targets here


def test_blocks_own_the_hosts_parameters_by_name():
    model, net = make()
    names = [{n for n, _ in block.module.named_parameters()} for block in net.blocks]
    everything = dict(net.model.named_parameters())
    assert set().union(*names) == set(everything)
    for block in net.blocks:
        assert all(everything[name] is parameter for name, parameter in block.module.named_parameters())
    assert {"embed.weight", "before.weight", "backbone.stem.0.weight"} <= names[0]
    assert names[1] == {"backbone.mid.weight", "backbone.mid.bias"}
    assert {"backbone.end.weight", "fc.weight", "skip.bias"} <= names[2]
    model.load_state_dict(net.original_state_dict(), strict=True)


def test_backprop_is_plain_training():
    model, net = make()
    (inputs, _), optimizer = batch(), torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Backprop(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = total(model(*inputs), None)
        loss.backward()
        optimizer.step()
        torch.manual_seed(step)
        assert torch.equal(schedule.step(inputs, None).losses[0], loss.detach())
    assert all(map(torch.equal, model.state_dict().values(), net.model.state_dict().values()))


def test_local_losses_train_the_blocks_and_the_host_gets_both_its_gradients():
    model, net = make(local_loss=PRESENT, heads=None, dtype=torch.float64)
    (images, target), _ = batch(dtype=torch.float64)
    result = net.backward((images, target), None)
    heads = copy.deepcopy(net.heads)
    heads.zero_grad()

    def start() -> Tensor:
        torch.manual_seed(sedona_fx.train.block_seed(0, 0, 0))
        x = torch.stack([(image - image.mean()) / image.std() for image in images])
        x = model.before(model.embed(x))
        torch.rand([])
        return x + 0.1 * torch.rand_like(x)

    low = model.backbone.stem(start())
    losses = [F.cross_entropy(heads["0"](low), target)]
    mid = model.backbone.mid(low.detach())
    losses.append(F.cross_entropy(heads["1"](mid), target))
    high = model.backbone.end(mid.detach().tanh() * 2.0 * 0.5).tanh()
    retraced = start()
    torch.manual_seed(sedona_fx.train.block_seed(0, 2, 0))
    features = high.mean((2, 3)) + low.detach().amax((2, 3))
    scores = model.fc(model.drop(features)) + model.skip(retraced.mean((2, 3)))
    losses.append(F.cross_entropy(scores, target) + 1e-3 * scores.square().mean())
    sum(losses).backward()
    for found, wanted in zip(result.losses, losses, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=0)
    for name, parameter in model.named_parameters():
        found = net.model.get_parameter(name).grad
        assert (found - parameter.grad).norm() <= 1e-12 * parameter.grad.norm() + 1e-15, name
    assert "embed.weight in blocks 0, 2" in str(net)
    Greedy(net, lambda parameters: torch.optim.SGD(parameters, lr=0.1)).step((images, target), None)


def test_saved_and_loaded(tmp_path):
    _, net = make(local_loss=PRESENT, heads=None)
    net.backward(batch()[0], None)
    net.save(tmp_path)
    again = sedona_fx.load(tmp_path, Host(), loss=total, local_loss=PRESENT, data=batch())
    (images, target), _ = batch()
    assert all(map(torch.equal, again.eval()(images, target), net.eval()(images, target)))


def test_a_traceable_model_needs_no_host():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 3))
    net = sedona_fx.decouple(model, (torch.randn(2, 4), torch.tensor([0, 1])), root="1", blocks=3, search="uniform")
    assert "host" not in net.plan.provenance
    assert all(cut.startswith("1") for cut in net.plan.cuts)


class Unreached(Host):
    def forward(self, images, target=None):
        if images[0].sum() > 1e9:
            return super().forward(images, target)
        return {"loss": self.fc(torch.ones(2, 6)).sum()}


class Twice(Host):
    def forward(self, images, target=None):
        super().forward(images, target)
        return super().forward(images, target)


@pytest.mark.parametrize(
    ("kind", "how", "error", "what"),
    [
        (Host, {"root": "backbon"}, CutError, "root names 'backbon', which the model does not have; .*'backbone'"),
        (Unreached, {"root": "backbone"}, CutError, "root='backbone' is called 0 times in a forward of Unreached"),
        (Twice, {"root": "backbone"}, CutError, "is called 2 times"),
        (Host, {"root": ""}, TraceError, "if image.std.* > 0 else 1.*root="),
        (Host, {"root": "backbone", "heads": None}, HeadError, r"\(.*\).*local_loss=.*heads=False.*Backprop"),
    ],
)
def test_bad_roots(kind, how, error, what):
    torch.manual_seed(0)
    how = {"heads": False, "cuts": ["backbone.stem"]} | how
    with pytest.raises(error, match=what):
        sedona_fx.decouple(kind(), batch(), loss=total, search="balanced", blocks=2, **how)


def test_a_root_beside_the_way_is_refused():
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.other(x)
            return self.fc(self.used(x))

    with pytest.raises(CutError, match="root='other' does not lie on the way from the inputs to the output"):
        sedona_fx.decouple(Beside(), (torch.randn(2, 4), torch.tensor([0, 1])), root="other", search="balanced")


def test_a_net_of_a_host_says_what_it_cannot_do(tmp_path):
    _, net = make()
    with pytest.raises(ExportError, match="code around root='backbone' runs as Python"):
        net.to_onnx(tmp_path / "net.onnx")
    with pytest.raises(ScheduleError, match=r"blocks \[0, 1\] have no head.*Backprop"):
        net.backward(batch()[0], None)
    with pytest.raises(DataError, match="missing a required argument: 'images'"):
        net.train()(target=torch.tensor([1]))


class RandomHost(nn.Module):
    """Draws from Python's generator around its body."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * random.random())


def test_draws_of_the_host_depend_on_seed_block_and_step_alone() -> None:
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    net = sedona_fx.decouple(RandomHost(), (x, y), root="body", cuts=["body.1"], heads="linear")
    losses = []
    for seed in (1, 2):
        random.seed(seed)
        net.steps = 0
        losses.append(net.backward(x, y).losses[0])
    assert torch.equal(*losses)


def test_one_leaf_module_may_be_a_text() -> None:
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    for leaves in ("body.1", ["body.1"]):
        net = sedona_fx.decouple(RandomHost(), (x, y), root="body", blocks=1, leaf_modules=leaves)
        called = {str(node.target) for node in net.graph_module.graph.nodes if node.op == "call_module"}
        assert called == {"body.0", "body.1", "body.2"}
