"""Captured programs hold the dtypes that Python code read: they are right in another precision, or refused there."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sedona_fx
from sedona_fx.errors import ScheduleError
from sedona_fx.train import Greedy

X, Y = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


class Exported(nn.Module):
    """Four layers over tokens; a branch on a size makes symbolic tracing fail."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.fc = nn.Linear(8, 3)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 5:
            raise ValueError
        for layer in self.layers:
            x = self.between(torch.tanh(layer(x)))
        return self.fc(x.mean(1))


class Norm(Exported):
    """Llama's norm: computes in float32, and goes back to the dtype that it got."""

    def between(self, h):
        wide = h.to(torch.float32)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


class Masked(Exported):
    """Masks with the least number of the dtype that it got."""

    def between(self, h):
        scores = h @ h.transpose(1, 2)
        mask = torch.full_like(scores, torch.finfo(scores.dtype).min).triu(1)
        return (scores + mask).softmax(-1) @ h


class FullyMasked(Exported):
    """A row that is masked altogether stays finite only if the mask does."""

    def between(self, h):
        scores = h @ h.transpose(1, 2)
        mask = torch.full((5, 5), torch.finfo(scores.dtype).min, dtype=scores.dtype)
        return (scores + mask).softmax(-1) @ h


class Branch(Exported):
    """Another program in another precision."""

    def between(self, h):
        return h * 2 if h.dtype == torch.float32 else h.sin()


class OutputDtype(Exported):
    def forward(self, x):
        out = super().forward(x)
        return out.float() if self.layers[0](x).dtype != torch.float32 else out * 2


MODELS = [Exported, Norm, Masked, FullyMasked]


def loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), target)


def decoupled(model: nn.Module, x: Tensor = X, **options) -> sedona_fx.Net:
    options = {"loss": loss, **(options or {"blocks": 3, "search": "uniform"})}
    net = sedona_fx.decouple(model, (x, Y), progress=False, **options)
    assert net.capture.front_end == "export"
    return net


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_net_computes_what_the_converted_model_computes(kind, dtype):
    torch.manual_seed(0)
    model = kind()
    net, twin = decoupled(model).to(dtype), copy.deepcopy(model).to(dtype)
    for training in (True, False):
        expected, actual = twin.train(training)(X.to(dtype)), net.train(training)(X.to(dtype))
        assert actual.dtype == expected.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Norm, FullyMasked])
def test_a_converted_net_trains_like_one_that_was_decoupled_so(kind):
    torch.manual_seed(0)
    model = kind()
    late, early = decoupled(model).bfloat16(), decoupled(copy.deepcopy(model).bfloat16(), X.bfloat16())
    early.load_state_dict(late.state_dict())
    for net in (late, early):
        net.backward(X.bfloat16(), Y)
    gradients = {name: parameter.grad for name, parameter in early.named_parameters()}
    assert gradients
    for name, parameter in late.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=0)


def test_variants_of_blocks_made_before_and_after_follow():
    torch.manual_seed(0)
    model = Norm()
    net, expected = decoupled(model), copy.deepcopy(model).bfloat16()(X.bfloat16())
    net.variants.headless()
    net.bfloat16()
    schedule = sedona_fx.train.Backprop(net, lambda p: torch.optim.SGD(p, lr=0.0))
    torch.testing.assert_close(schedule.step(X.bfloat16(), Y).output, expected.detach(), rtol=0, atol=0)
    link = sedona_fx.train.BackLink(net, lambda p: torch.optim.SGD(p, lr=0.0), reach=1)
    torch.testing.assert_close(link.step(X.bfloat16(), Y).output, expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("make", [lambda net: net.inference_module(), lambda net: net.early_exit(1.0)])
def test_exits_and_inference_follow(make):
    torch.manual_seed(0)
    model = Norm()
    net = decoupled(model).bfloat16().eval()
    output = make(net)(X.bfloat16())
    output = output if isinstance(output, Tensor) else output.output
    torch.testing.assert_close(output, copy.deepcopy(model).bfloat16().eval()(X.bfloat16()), rtol=0, atol=0)


def test_there_and_back():
    torch.manual_seed(0)
    model = Norm()
    net = decoupled(model)
    net.bfloat16()(X.bfloat16())
    net.float()
    torch.testing.assert_close(net(X), copy.deepcopy(model).bfloat16().float()(X), rtol=0, atol=0)


def test_a_copy_follows_as_well():
    torch.manual_seed(0)
    model = Norm()
    net = decoupled(model)
    twin = copy.deepcopy(net).bfloat16()
    torch.testing.assert_close(twin(X.bfloat16()), copy.deepcopy(model).bfloat16()(X.bfloat16()), rtol=0, atol=0)
    torch.testing.assert_close(net(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize("use", [lambda net: net(X.bfloat16()), lambda net: net.backward(X.bfloat16(), Y)])
def test_another_program_is_refused_after_a_conversion(use):
    net = decoupled(Branch())
    net.bfloat16()
    for _ in range(2):  # not only the first time
        with pytest.raises(ScheduleError, match=r"Branch does not compute .* with parameters of torch.bfloat16: "):
            use(net)
    net.float()
    net(X)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_values_are_the_models(kind, dtype):
    torch.manual_seed(0)
    model = kind()
    net = decoupled(model)
    with torch.autocast("cpu", dtype):
        expected, actual = model(X), net(X)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(net(X), model(X), rtol=0, atol=0)  # and without, as before
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(net(X), expected, rtol=0, atol=0)
    Greedy(net, lambda p: torch.optim.SGD(p, lr=0.1), autocast=dtype).step(X, Y)


@pytest.mark.parametrize("kind", [Branch, OutputDtype])
def test_another_program_is_refused_under_autocast(kind):
    torch.manual_seed(0)
    model = kind()
    net = decoupled(model)
    before = copy.deepcopy(net.state_dict())
    schedule = Greedy(net, lambda p: torch.optim.SGD(p, lr=0.1), autocast=torch.bfloat16)
    with pytest.raises(ScheduleError, match=r"under autocast to torch.bfloat16.*Decouple the model inside of"):
        schedule.step(X, Y)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ScheduleError, match="under autocast to"):
        net.losses(X, Y)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.steps == 0
    net(X)  # as before without


@pytest.mark.parametrize("kind", [Branch, OutputDtype])
def test_the_way_out_that_the_error_names(kind):
    torch.manual_seed(0)
    model = kind()
    first = decoupled(model)
    with torch.autocast("cpu", torch.bfloat16):
        net = decoupled(model, plan=first.plan)
        expected = model(X)
        torch.testing.assert_close(net(X), expected, rtol=0, atol=0)
    result = Greedy(net, lambda p: torch.optim.SGD(p, lr=0.0), autocast=torch.bfloat16).step(X, Y)
    torch.testing.assert_close(result.output, expected.detach(), rtol=0, atol=0)
    with pytest.raises(ScheduleError, match="with parameters of"):
        net(X)


def test_a_model_that_cannot_run_so_itself_is_no_matter_of_the_proof():
    class Strict(Exported):
        def between(self, h):
            if h.dtype != torch.float32:
                raise RuntimeError("only float32 here")
            return h

    net = decoupled(Strict())
    with torch.autocast("cpu", torch.bfloat16):
        net(X)


def test_it_is_proven_once_a_precision():
    net = decoupled(Norm())
    runs = []
    Norm.between, plain = lambda self, h: runs.append(1) or plain(self, h), Norm.between
    try:
        counts = []
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                net(X)
            net(X)
            counts.append(len(runs))
    finally:
        Norm.between = plain
    assert counts[0] > 0
    assert len(set(counts)) == 1


def test_a_saved_net_is_right_in_another_precision(tmp_path):
    torch.manual_seed(0)
    model = Norm()
    net = decoupled(model)
    net.save(tmp_path)
    loaded = sedona_fx.load(tmp_path, Norm(), data=(X, Y), loss=loss).bfloat16()
    torch.testing.assert_close(loaded(X.bfloat16()), copy.deepcopy(model).bfloat16()(X.bfloat16()), rtol=0, atol=0)


class Rounding(Exported):
    """Adds what the precision of its argument rounds away."""

    def between(self, h):
        return h + 100 * torch.finfo(h.dtype).eps


def test_parts_of_a_net_that_are_converted_one_by_one():
    """The parameters are the same objects then, and nobody tells the net."""
    net = sedona_fx.decouple(Rounding(), (X, Y), cuts=["layers.1"], heads="linear").eval()
    assert torch.equal(net(X), net.model(X))
    net.model.bfloat16()
    net.heads.bfloat16()
    assert torch.equal(net(X.bfloat16()), net.model(X.bfloat16()))
    net.model.float()
    net.heads.float()
    assert torch.equal(net(X), net.model(X))


class Resizable(Norm):
    """Any length will do, and the program for any length differs from the one for five tokens."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 2:
            raise ValueError
        for layer in self.layers:
            x = self.between(torch.tanh(layer(x)))
        return self.fc(x.mean(1) * x.shape[1])


@pytest.mark.parametrize("dynamic", [False, None])
def test_a_program_of_fixed_sizes_is_captured_anew_with_fixed_sizes(dynamic):
    net = decoupled(Resizable(), blocks=2, search="uniform", dynamic=dynamic)
    assert bool(net.capture.free_sizes) == (dynamic is None)
    model = copy.deepcopy(net.model).bfloat16()
    net.bfloat16()
    x = X.bfloat16()
    assert torch.equal(net(x), model(x))


class Told(Norm):
    """The program that code gives which is told of autocast is not the model; so it was captured with the truth."""

    def between(self, h):
        return super().between(h * 2 if torch.is_autocast_enabled("cpu") else h)


def test_code_that_was_told_the_truth_of_autocast_is_told_it_again():
    net = decoupled(Told())
    model = copy.deepcopy(net.model).bfloat16()
    net.bfloat16()
    x = X.bfloat16()
    assert torch.equal(net(x), model(x))
