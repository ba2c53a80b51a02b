"""Promise 4 of docs/architecture.md: every block's gradient is right, in float64 to 1e-12 of its norm."""

import copy
from collections.abc import Callable

import pytest
import torch
from catalogue.entry import perturb
from reference import net_gradients, reference_gradients
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import SHORT, ZOO, Entry, tensors

import sedona_fx
from sedona_fx.compile.analyse import analyse
from sedona_fx.data.args import Args
from sedona_fx.train import Backprop, block_seed

TOLERANCE = 1e-12


def decoupled(entry: Entry, **how) -> tuple[nn.Module, sedona_fx.Net, Tensor, Tensor]:
    """Return a model in float64 without zero weights, its net, whose heads have none either, and a batch."""
    model = entry.make().double()
    x, y = entry.pair()
    net = sedona_fx.decouple(model, (x.double(), y), seed=11, **how)
    perturb(net.heads)
    return model, net, x.double(), y


def assert_right(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare a block's gradients as one vector; none may be missing or too many, and they are not all zero."""
    assert found.keys() == wanted.keys()
    expected = torch.cat([wanted[name].flatten() for name in wanted])
    difference = torch.cat([found[name].flatten() for name in wanted]) - expected
    assert expected.norm() > 1e-6
    assert difference.norm() <= TOLERANCE * expected.norm()


# ---- against the untouched model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_gradients_are_those_of_the_untouched_model(name):
    model, net, x, y = decoupled(ZOO[name], search="balanced", blocks=4)
    net.steps = 3  # draws come from (seed, block, step)
    wanted_losses, wanted = reference_gradients(model, net, x, y, auxiliary=ZOO[name].auxiliary, step=3)
    result = net.backward(x, y)
    torch.testing.assert_close(result.losses, wanted_losses, rtol=TOLERANCE, atol=0)
    assert tensors(result.output)[0].norm() > 1e-6
    assert len(net.blocks) == 4
    for found, reference in zip(net_gradients(net), wanted, strict=True):
        assert_right(found, reference)


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "googlenet", "shufflenet_v2_x0_5", "swin_t", "paper_resnet32"])
def test_gradients_with_a_cut_wherever_one_is_legal(name):
    """All graphs are kept till the end, so that an in-place operation behind a cut would spoil what a head reads."""
    entry = SHORT.get(name, ZOO[name])
    legal = analyse(entry.make(), Args(x=entry.pair()[0]), None, ()).contexts
    model, net, x, y = decoupled(entry, cuts=list(legal), heads="linear")
    wanted_losses, wanted = reference_gradients(model, net, x, y, auxiliary=entry.auxiliary)
    losses = net.losses(x, y)
    torch.testing.assert_close(losses, wanted_losses, rtol=TOLERANCE, atol=0)
    torch.stack(losses).sum().backward()
    for found, reference in zip(net_gradients(net), wanted, strict=True):
        assert_right(found, reference)


@pytest.mark.parametrize("name", ["googlenet", "vit"])
def test_gradients_in_eval_mode(name):
    model, net, x, y = decoupled(ZOO[name], search="balanced", blocks=3)
    _, wanted = reference_gradients(model.eval(), net.eval(), x, y)
    net.backward(x, y)
    for found, reference in zip(net_gradients(net), wanted, strict=True):
        assert_right(found, reference)


# ---- by hand, in plain PyTorch --------------------------------------------------------------------------------------

Seed = Callable[[int], object]


def alexnet(model: nn.Module, heads: nn.Module, x: Tensor, y: Tensor, seed: Seed) -> list[Tensor]:
    """Cut behind a convolution, whose in-place ReLU must not spoil what the head reads, and before the dropout."""
    seed(0)
    h = model.features[:4](x)
    first = F.cross_entropy(heads["0"](h), y)
    seed(1)
    h = model.avgpool(model.features[4:](h.detach().clone()))
    second = F.cross_entropy(heads["1"](h), y)
    seed(2)
    return [first, second, F.cross_entropy(model.classifier(h.detach().flatten(1)), y)]


def resnet18(model: nn.Module, heads: nn.Module, x: Tensor, y: Tensor, seed: Seed) -> list[Tensor]:
    """Cut behind a BatchNorm, whose in-place ReLU comes next, and behind two residual blocks."""
    h = model.bn1(model.conv1(x))
    losses = [F.cross_entropy(heads["0"](h), y)]
    h = model.layer1(model.maxpool(model.relu(h.detach().clone())))
    h = model.layer2[0](h)
    losses.append(F.cross_entropy(heads["1"](h), y))
    h = model.layer3(model.layer2[1](h.detach()))
    losses.append(F.cross_entropy(heads["2"](h), y))
    h = model.avgpool(model.layer4(h.detach())).flatten(1)
    return [*losses, F.cross_entropy(model.fc(h), y)]


def vit(model: nn.Module, heads: nn.Module, x: Tensor, y: Tensor, seed: Seed) -> list[Tensor]:
    """Cut between encoder layers; the class token and the positions belong to the first block."""
    tokens = model.conv_proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([model.class_token.expand(len(x), -1, -1), tokens], dim=1)
    h = model.encoder.layers[:2](model.encoder.dropout(tokens + model.encoder.pos_embedding))
    losses = [F.cross_entropy(heads["0"](h), y)]
    h = model.encoder.layers[2:4](h.detach())
    losses.append(F.cross_entropy(heads["1"](h), y))
    h = model.encoder.ln(model.encoder.layers[4:](h.detach()))
    return [*losses, F.cross_entropy(model.heads(h[:, 0]), y)]


def googlenet(model: nn.Module, heads: nn.Module, x: Tensor, y: Tensor, seed: Seed) -> list[Tensor]:
    """The auxiliary classifiers belong to the last block: what they read crosses to it detached."""
    seed(0)
    h = model.conv3(model.conv2(model.maxpool1(model.conv1(x))))
    losses = [F.cross_entropy(heads["0"](h), y)]
    seed(1)
    h = model.maxpool2(h.detach())
    h = model.inception4a(model.maxpool3(model.inception3b(model.inception3a(h))))
    to_aux1 = h.detach()
    h = model.inception4b(h)
    losses.append(F.cross_entropy(heads["1"](h), y))
    seed(2)
    h = model.inception4d(model.inception4c(h.detach()))
    to_aux2 = h.detach()
    h = model.inception4e(h)
    losses.append(F.cross_entropy(heads["2"](h), y))
    seed(3)
    aux1, aux2 = model.aux1(to_aux1), model.aux2(to_aux2)
    h = model.inception5b(model.inception5a(model.maxpool4(h.detach())))
    logits = model.fc(model.dropout(model.avgpool(h).flatten(1)))
    loss = F.cross_entropy(logits, y) + 0.3 * (F.cross_entropy(aux2, y) + F.cross_entropy(aux1, y))
    return [*losses, loss]


BY_HAND = {
    "alexnet": (alexnet, ["features.3", "avgpool"], "sedona-1"),
    "resnet18": (resnet18, ["bn1", "layer2.0", "layer3.1"], "sedona-2"),
    "vit": (vit, ["encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_3"], "tokens-2"),
    "googlenet": (googlenet, ["conv3", "inception4b", "inception4e"], "sedona-1"),
}


@pytest.mark.parametrize("way", ["backward", "losses"])
@pytest.mark.parametrize("name", BY_HAND)
def test_gradients_are_those_written_by_hand(name, way):
    by_hand, cuts, head = BY_HAND[name]
    model, net, x, y = decoupled(ZOO[name], cuts=cuts, heads=head)
    heads = copy.deepcopy(net.heads)
    wanted_losses = by_hand(model, heads, x, y, lambda block: torch.manual_seed(block_seed(11, block, 0)))
    torch.stack(wanted_losses).sum().backward()  # the detaches keep the blocks apart
    if way == "backward":
        losses = net.backward(x, y).losses
    else:
        losses = net.losses(x, y)
        torch.stack(losses).sum().backward()
    torch.testing.assert_close(losses, wanted_losses, rtol=TOLERANCE, atol=0, check_device=False)
    for block, found in zip(net.blocks, net_gradients(net), strict=True):
        wanted = {key: model.get_parameter(key).grad for key in found if not key.startswith("head.")}
        if block.head is not None:
            wanted |= {f"head.{key}": p.grad for key, p in heads[str(block.index)].named_parameters()}
        assert_right(found, {key: wanted[key] for key in found})


# ---- what the zoo does not have ------------------------------------------------------------------------------------


class SinksBehindWrite(nn.Module):
    """Computes early what only the last block reads, from a value that the first block overwrites in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 5)

    def forward(self, x):
        scaled = 2 * x
        late = scaled + 1
        scaled.mul_(3)
        h = self.second(self.first(scaled))
        return self.fc((h.sin() + late).mean((2, 3)))


def test_what_sinks_behind_a_write_reads_the_old_numbers():
    model, x, y = SinksBehindWrite().double(), torch.randn(4, 3, 8, 8).double(), torch.arange(4)
    net = sedona_fx.decouple(model, (x, y), cuts=["first"])
    assert torch.equal(net.backward(x, y).output, model(x))
    _, wanted = reference_gradients(model, net, x, y)
    for found, reference in zip(net_gradients(net), wanted, strict=True):
        assert_right(found, reference)


# ---- what code without gradients returns as it is -------------------------------------------------------------------

SAME = {
    "to": lambda m, h: h.to(torch.float64),
    "double": lambda m, h: h.double(),
    "contiguous": lambda m, h: h.contiguous(),
    "dropout": lambda m, h: F.dropout(h, 0.5, training=False),
    "module": lambda m, h: m.same(h),
    "tuple": lambda m, h: torch.broadcast_tensors(h, h.sum(1, keepdim=True))[0],
    "view": lambda m, h: h.view(h.shape),
    "written": lambda m, h: h.mul_(0.5),
}


class Same(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.same = way, nn.Dropout(0.0) if way == "module" else None
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def first(self, x: Tensor) -> Tensor:
        return self.a(x).tanh() + 1

    def check(self, x: Tensor) -> None:
        """Nothing that hinders symbolic tracing."""

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        h = self.first(x)
        with torch.no_grad():
            kept = SAME[self.way](self, h)
        return self.c(self.b(h).tanh() * kept)


class CapturedSame(Same):
    def check(self, x: Tensor) -> None:
        if x.shape[1] != 6:
            raise ValueError


@pytest.mark.parametrize("kind", [Same, CapturedSame])
@pytest.mark.parametrize("way", SAME)
def test_a_tensor_that_code_without_gradients_returns_as_it_is_keeps_its_gradient_and_crosses_detached(way, kind):
    model, x, y = kind(way).double(), torch.randn(4, 6).double(), torch.randn(4, 6).double()
    net = sedona_fx.decouple(model, (x, y), loss=F.mse_loss, cuts=["b"], max_live=2, heads="linear")
    assert net.capture.front_end == ("symbolic" if kind is Same else "export")
    local, output = net.graph_module(x)
    (F.mse_loss(local, y) + F.mse_loss(output, y)).backward()
    chained = sedona_fx.decouple(model, (x, y), loss=F.mse_loss, cuts=["b"], max_live=2, heads=False)
    Backprop(chained, lambda parameters: torch.optim.SGD(parameters, lr=1.0)).step(x, y)

    h = model.first(x)
    with torch.no_grad():
        kept = SAME[way](model, h)
    F.mse_loss(model.c(model.b(h).tanh() * kept), y).backward()
    for name, parameter in chained.model.named_parameters():
        own = model.get_parameter(name)
        torch.testing.assert_close(own - parameter, own.grad, rtol=1e-9, atol=1e-12)
    model.zero_grad()

    head = net.heads["0"]
    h = model.first(x)
    with torch.no_grad():
        kept = SAME[way](model, h)
    between = model.b(h)
    F.mse_loss(copy.deepcopy(head)(between), y).backward()
    F.mse_loss(model.c(between.detach().tanh() * kept.detach()), y).backward()
    for name, parameter in net.model.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, rtol=TOLERANCE, atol=0)
