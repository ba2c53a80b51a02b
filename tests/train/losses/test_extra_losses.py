"""The extra losses against plain formulas, their gradients against finite differences, and what they refuse."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sedona_fx
from sedona_fx.errors import DataError, ScheduleError
from sedona_fx.train import Greedy
from sedona_fx.train.losses.base import ExtraLoss, Sight
from sedona_fx.train.losses.infopro import InfoPro
from sedona_fx.train.losses.kinetic_energy import KineticEnergy
from sedona_fx.train.losses.predsim import PredSim

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sight(activation, *, inputs=None, target=None, layers=()):
    return Sight(activation, tuple(layers), inputs or {}, target)


def classes(count, seed=0):
    return torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))


def gradient_is_right(module, make, *tensors):
    """Compare the gradient of every parameter and tensor with finite differences."""
    parameters = list(module.parameters())
    leaves = [t.detach().clone().requires_grad_() for t in tensors]

    def loss(*values):
        named = dict(zip([name for name, _ in module.named_parameters()], values[len(leaves) :], strict=True))
        return torch.func.functional_call(module, named, (make(*values[: len(leaves)]),))

    assert torch.autograd.gradcheck(loss, (*leaves, *[p.detach().clone().requires_grad_() for p in parameters]))


# ---- similarity matching --------------------------------------------------------------------------------------------


def similarities(rows):
    """Return the cosines of centred rows, one pair after the other."""
    table = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            a0, b0 = a - sum(a) / len(a), b - sum(b) / len(b)
            table[i, j] = (a0 * b0).sum() / ((a0**2).sum() ** 0.5 * (b0**2).sum() ** 0.5)
    return table


def one_hot(target, count):
    return torch.tensor([[float(k == y) for k in range(count)] for y in target], dtype=torch.float64)


def test_predsim_of_vectors():
    h, y = numbers(7, 5), classes(7)
    module = PredSim(average=False).build(h, {}, 3)
    assert isinstance(module, ExtraLoss)
    (weight,) = module.parameters()
    assert weight.shape == (5, 5)
    expected = ((similarities(h @ weight.t()) - similarities(one_hot(y, 3))) ** 2).sum()
    torch.testing.assert_close(module(sight(h, target=y)), expected, **EXACT)
    mean = PredSim().build(h, {}, 3)
    mean.load_state_dict(module.state_dict())
    torch.testing.assert_close(mean(sight(h, target=y)), expected / 49, **EXACT)


@pytest.mark.parametrize("shape", [(6, 4, 5), (6, 5, 4, 3), (5, 4, 2, 3, 3)])
def test_predsim_of_maps_is_the_deviation_over_space(shape):
    h, y = numbers(*shape), classes(shape[0])
    module = PredSim(average=False).build(h, {}, 3)
    (weight,) = module.parameters()
    assert weight.shape == (shape[1], shape[1], *[3] * (len(shape) - 2))
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
    z = conv(h, weight, padding=1).flatten(2)
    assert z.shape == (shape[0], shape[1], h[0, 0].numel())
    centre = z.sum(2, keepdim=True) / z.shape[2]
    deviation = (((z - centre) ** 2).sum(2) / (z.shape[2] - 1)) ** 0.5
    expected = ((similarities(deviation) - similarities(one_hot(y, 3))) ** 2).sum()
    torch.testing.assert_close(module(sight(h, target=y)), expected, **EXACT)


@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (6, 8, 1, 1)])
def test_predsim_compares_small_maps_whole(shape):
    h, y = numbers(*shape), classes(6)
    module = PredSim(average=False).build(h, {}, 3)
    (weight,) = module.parameters()
    rows = F.conv2d(h, weight, padding=1).flatten(1)
    expected = ((similarities(rows) - similarities(one_hot(y, 3))) ** 2).sum()
    torch.testing.assert_close(module(sight(h, target=y)), expected, **EXACT)


def test_predsim_of_tokens():
    h, y = numbers(6, 9, 5), classes(6)
    module, other = PredSim(channel_dim=-1).build(h, {}, 3), PredSim().build(h.movedim(-1, 1), {}, 3)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(
        module(sight(h, target=y)), other(sight(h.movedim(-1, 1).contiguous(), target=y)), **EXACT
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_predsim_takes_soft_and_dense_targets_as_they_are(dtype):
    h = numbers(5, 6)
    module = PredSim(average=False).build(h, {}, 3)
    z = h @ module.net.weight.t()
    for target in (numbers(5, 4, seed=1, dtype=dtype), numbers(5, 2, 3, 3, seed=2, dtype=dtype).softmax(1)):
        expected = ((similarities(z) - similarities(target.double().flatten(1))) ** 2).sum()
        torch.testing.assert_close(module(sight(h, target=target)), expected, **EXACT)
    hard, smooth = one_hot(classes(5), 3), one_hot(classes(5), 3) * 0.9 + 0.1 / 3
    torch.testing.assert_close(module(sight(h, target=smooth)), module(sight(h, target=hard)), **EXACT)
    torch.testing.assert_close(module(sight(h, target=classes(5))), module(sight(h, target=hard)), **EXACT)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (3, 4, 3, 2), (4, 2, 3, 3)])
def test_predsims_gradient(shape):
    h, y = numbers(*shape), classes(shape[0], seed=1)
    gradient_is_right(PredSim(average=False).build(h, {}, 3), lambda h: sight(h, target=y), h)


def test_an_example_without_a_direction_has_no_similarity_and_no_gradient():
    h = numbers(4, 5, 3, 3)
    h[1] = 0.0  # dead units
    h.requires_grad_()
    module = PredSim().build(h, {}, 3)
    loss = module(sight(h, target=torch.tensor([0, 0, 1, 2])))
    loss.backward()
    assert loss.isfinite()
    assert h.grad.isfinite().all()
    assert (h.grad[1] == 0).all()
    assert h.grad[0].abs().sum() > 0
    found = PredSim(average=False).build(h, {}, 1)(sight(h.detach(), target=torch.zeros(4, dtype=torch.long)))
    assert found > 0  # one class: S(Y) is 0, and so is the similarity of example 1
    h.data[2] = float("nan")
    assert module(sight(h, target=torch.tensor([0, 0, 1, 2]))).isnan()


def test_predsim_in_half_precision_and_under_autocast():
    h, y = numbers(16, 6, 5, 5, dtype=torch.float32) * 300, classes(16)
    module = PredSim().build(h, {}, 3)
    exact = module(sight(h, target=y))
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(sight(h, target=y))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    half = PredSim().build(h.bfloat16(), {}, 3)
    assert half.net.weight.dtype == torch.bfloat16
    half.load_state_dict(module.state_dict())
    torch.testing.assert_close(half(sight(h.bfloat16(), target=y)), exact, rtol=0.05, atol=0.05)


def test_no_accelerator_is_seeded_for_heads_or_extra_losses(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    stream = torch.get_rng_state()
    net = sedona_fx.decouple(model, (torch.ones(4, 4), torch.tensor([0, 1, 2, 0])), cuts=["1"])
    Greedy(net, lambda p: torch.optim.SGD(p, lr=0.1), extra=[PredSim()])
    assert torch.equal(stream, torch.get_rng_state())
    assert not seeded


def test_predsim_refuses_what_it_cannot_compare():
    with pytest.raises(ScheduleError, match=r"a block's output is \(4,\) torch.float64"):
        PredSim().build(numbers(4), {}, 3)
    with pytest.raises(ScheduleError, match=r"vectors \(N, C\) and maps .* is \(4, 2\) torch.int64\. Leave it out"):
        PredSim().build(torch.zeros(4, 2, dtype=torch.long), {}, 3)
    with pytest.raises(ScheduleError, match=r"PredSim\(channel_dim=2\) is no dimension of channels .* \(4, 2\)"):
        PredSim(channel_dim=2).build(numbers(4, 2), {}, 3)
    module = PredSim().build(numbers(4, 5), {}, 3)
    for target, text in [
        (torch.zeros(4, 8, 8, dtype=torch.long), r"\(4, 8, 8\) torch.int64"),
        (numbers(4), r"\(4,\) torch.float64"),
        (numbers(4, 1), r"\(4, 1\) torch.float64"),
        ({"boxes": 1}, "dict"),
        (None, "NoneType"),
    ]:
        with pytest.raises(DataError, match=rf"one class an example \(N,\), or at least two .* This target is {text}"):
            module(sight(numbers(4, 5), target=target))


# ---- reconstruction -------------------------------------------------------------------------------------------------


def drawn_by_hand(module, h, size):
    conv, norm, relu, last = module.decoder
    assert (conv.out_channels, conv.kernel_size, conv.padding) == (12, (3, 3), (1, 1))
    assert isinstance(relu, nn.ReLU)
    wide = F.interpolate(h, size=size, mode="bilinear", align_corners=True)
    z = F.conv2d(wide, conv.weight, conv.bias, padding=1)
    centre = z.mean((0, 2, 3), keepdim=True)
    variance = ((z - centre) ** 2).mean((0, 2, 3), keepdim=True)
    z = (z - centre) / (variance + 1e-5) ** 0.5 * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    return F.conv2d(z.clamp(min=0), last.weight, last.bias, padding=1)


def test_infopro_draws_the_input_again():
    h, x = numbers(3, 5, 4, 4), numbers(3, 2, 8, 9, seed=1)
    module = InfoPro().build(h, {"x": x}, 3)
    expected = ((drawn_by_hand(module, h, (8, 9)) - x) ** 2).sum() / x.numel()
    torch.testing.assert_close(module(sight(h, inputs={"x": x})), expected, **EXACT)
    other = numbers(3, 2, 5, 6, seed=2)  # the decoder serves any size
    expected = ((drawn_by_hand(module, h, (5, 6)) - other) ** 2).sum() / other.numel()
    torch.testing.assert_close(module(sight(h, inputs={"x": other})), expected, **EXACT)


def test_infopro_with_the_normalisation_undone_is_the_papers_cross_entropy():
    mean, std = (0.4, 0.5), (0.2, 0.3)
    pixels = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = (pixels - torch.tensor(mean).double().view(2, 1, 1)) / torch.tensor(std).double().view(2, 1, 1)
    h = numbers(3, 5, 4, 4)
    module = InfoPro(mean=mean, std=std).build(h, {"image": x}, 3)
    p = 1 / (1 + torch.exp(-drawn_by_hand(module, h, (8, 8))))
    expected = -(pixels * p.log() + (1 - pixels) * (1 - p).log()).sum() / x.numel()
    torch.testing.assert_close(module(sight(h, inputs={"image": x})), expected, rtol=1e-7, atol=1e-7)
    assert set(module.state_dict()) == {name for name in module.state_dict() if name.startswith("decoder.")}
    with torch.autocast("cpu", torch.bfloat16):
        loss = InfoPro(mean=mean, std=std).build(h.float(), {"image": x.float()}, 3)(
            sight(h.float(), inputs={"image": x.float()})
        )
    assert loss.isfinite()
    one = InfoPro(mean=[0.5], std=[0.5]).build(h, {"image": x}, 3)
    assert one(sight(h, inputs={"image": x})).isfinite()


@pytest.mark.parametrize(
    ("h", "x"), [((4, 6), (4, 5)), ((4, 6), (4, 2, 3, 3)), ((4, 2, 3, 3), (4, 7)), ((4, 3, 5), (4,))]
)
def test_infopro_of_other_things_is_linear(h, x):
    h, x = numbers(*h), numbers(*x, seed=1)
    module = InfoPro().build(h, {"x": x}, 3)
    drawn = h.flatten(1) @ module.decoder.weight.t() + module.decoder.bias
    expected = ((drawn - x.reshape(4, -1)) ** 2).sum() / x.numel()
    torch.testing.assert_close(module(sight(h, inputs={"x": x})), expected, **EXACT)
    gradient_is_right(module, lambda h: sight(h, inputs={"x": x}), h)


@pytest.mark.parametrize("options", [{}, {"mean": [0.5], "std": [0.5]}])
def test_infopros_gradient(options):
    h, x = numbers(2, 2, 2, 3), numbers(2, 1, 4, 4, seed=1) * 0.3
    module = InfoPro(**options).build(h, {"x": x}, 3).eval()  # batch statistics are PyTorch's business
    gradient_is_right(module, lambda h: sight(h, inputs={"x": x}), h)
    x.requires_grad_()
    module(sight(h.requires_grad_(), inputs={"x": x})).backward()
    assert h.grad is not None
    assert x.grad is None


def test_infopro_picks_its_input():
    h, image, mask = numbers(2, 4, 3, 3), numbers(2, 1, 6, 6), numbers(2, 5)
    inputs = {"scale": 2.0, "image": image, "mask": mask}
    assert InfoPro().build(h, inputs, 3).decoder[-1].out_channels == 1
    assert InfoPro(input="mask").build(h, inputs, 3).decoder.out_features == 5
    last = InfoPro(channel_dim=-1).build(h.movedim(1, -1), inputs, 3)
    assert last.decoder[0].in_channels == 4
    first = InfoPro().build(h, inputs, 3)
    first.load_state_dict(last.state_dict())
    seen = {"inputs": inputs}
    torch.testing.assert_close(last(sight(h.movedim(1, -1), **seen)), first(sight(h, **seen)), **EXACT)


def test_infopro_says_what_it_cannot_draw():
    h, ids = numbers(2, 7, 4), torch.zeros(2, 7, dtype=torch.long)
    with pytest.raises(
        ScheduleError, match=r"in floating point, and 'ids' is \(2, 7\) torch.int64\. Use PredSim or Kin"
    ):
        InfoPro().build(h, {"ids": ids}, 3)
    with pytest.raises(ScheduleError, match=r"Name another with InfoPro\(input=\.\.\.\): \['mask'\]"):
        InfoPro().build(h, {"ids": ids, "mask": numbers(2, 7)}, 3)
    with pytest.raises(
        ScheduleError, match=r"input='imgae'\) is no tensor .* \['image'\]; the nearest names are 'image'"
    ):
        InfoPro(input="imgae").build(h, {"image": numbers(2, 3)}, 3)
    with pytest.raises(ScheduleError, match=r"none of \['images'\] is a tensor"):
        InfoPro().build(h, {"images": [numbers(2, 3)]}, 3)
    with pytest.raises(
        ScheduleError, match=r"\(2, 197, 768\) to the input 'x' of \(2, 3, 224, 224\) .* 22,774,\d+,\d+ par"
    ):
        InfoPro().build(torch.zeros(1).expand(2, 197, 768), {"x": torch.zeros(1).expand(2, 3, 224, 224)}, 3)
    with pytest.raises(ScheduleError, match="needs both"):
        InfoPro(mean=[0.5])
    with pytest.raises(
        ScheduleError, match=r"std=\[1.0, 1.0\]\) has 2 numbers, and the input 'x' of \(2, 3, 8, 8\) has 3"
    ):
        InfoPro(mean=[0.0] * 3, std=[1.0] * 2).build(numbers(2, 4, 4, 4), {"x": numbers(2, 3, 8, 8)}, 3)
    with pytest.raises(ScheduleError, match=r"images behind maps; here the input 'x' is \(2, 3\) and the activation"):
        InfoPro(mean=[0.0], std=[1.0]).build(numbers(2, 4), {"x": numbers(2, 3)}, 3)
    module = InfoPro().build(numbers(2, 4), {"x": numbers(2, 3)}, 3)
    with pytest.raises(
        DataError, match=r"made for 4 features and 3 numbers of the input 'x', and this batch has 4 and 6"
    ):
        module(sight(numbers(2, 4), inputs={"x": numbers(2, 6)}))
    with pytest.raises(DataError, match=r"reconstructs the input 'x', and this batch has only \['y'\]"):
        module(sight(numbers(2, 4), inputs={"y": 1}))


# ---- transport ------------------------------------------------------------------------------------------------------


def test_kinetic_energy_is_what_the_layers_move():
    layers = [numbers(4, *shape, seed=k) for k, shape in enumerate([(3, 5, 5), (6, 5, 5), (6, 5, 5), (6, 5, 5), (6,)])]
    total = mean = 0.0
    for before, after in [(1, 2), (2, 3)]:
        for example in range(4):
            moved = sum(((layers[after][example] - layers[before][example]) ** 2).flatten().tolist())
            total += moved / 4
            mean += moved / (4 * 150)
    for tau in (1.0, 0.1):
        module = KineticEnergy(tau=tau, average=False).build(layers[-1], {}, 3)
        assert not list(module.parameters())
        loss = module(sight(layers[-1], layers=layers))
        torch.testing.assert_close(loss.item(), total / (2 * tau), **EXACT)
        module = KineticEnergy(tau=tau).build(layers[-1], {}, 3)
        torch.testing.assert_close(module(sight(layers[-1], layers=layers)).item(), mean / (2 * tau), **EXACT)


def test_kinetic_energys_gradient():
    a, b, c = numbers(3, 4), numbers(3, 4, seed=1), numbers(3, 4, seed=2)
    module = KineticEnergy(tau=0.3).build(a, {}, 3)
    gradient_is_right(module, lambda a, b, c: sight(c, layers=(a, b, c)), a, b, c)


def test_kinetic_energy_of_layers_that_all_change_the_shape_is_nothing():
    module = KineticEnergy().build(torch.empty(()), {}, 3)
    layers = (torch.zeros(2, 3, dtype=torch.long), numbers(2, 3), numbers(2, 4))
    loss = module(sight(layers[-1], layers=layers))
    assert loss.shape == ()
    assert loss.item() == 0


def test_kinetic_energy_of_halves_does_not_overflow():
    layers = (torch.zeros(2, 8, dtype=torch.float16), torch.full((2, 8), 1000.0, dtype=torch.float16))
    loss = KineticEnergy(average=False).build(layers[0], {}, 3)(sight(layers[1], layers=layers))
    assert loss.item() == 4e6


# ---- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [PredSim(0.5), InfoPro(0.5), KineticEnergy(0.5)])
def test_what_a_schedule_reads(extra):
    assert extra.weight == 0.5
    assert extra.keep == 1.0
    assert extra.needs_layers == isinstance(extra, KineticEnergy)
    assert repr(extra).startswith(f"{type(extra).__name__}(weight=0.5, keep=1.0")
    assert extra == type(extra)(0.5)
    assert extra != type(extra)(0.5, keep=0.5)


@pytest.mark.parametrize("extra", [PredSim(), InfoPro(), KineticEnergy()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_have_the_activations_dtype_and_a_state(extra, dtype):
    h, x, y = numbers(4, 5, 3, 3, dtype=dtype), numbers(4, 2, 6, 6, dtype=dtype), classes(4)
    torch.manual_seed(1)
    module, other = extra.build(h, {"x": x}, 3), extra.build(h, {"x": x}, 3)
    assert all(p.dtype == dtype for p in module.parameters())
    batch = sight(h, inputs={"x": x}, target=y, layers=(h * 0, h))
    loss = module(batch)
    assert loss.shape == ()
    assert loss > 0
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(batch), module(batch))


def test_building_allocates_nothing_of_an_activations_size():
    h, x = torch.zeros(()).expand(2**20, 4, 2**10, 2**10), torch.zeros(()).expand(2**20, 3, 2**11, 2**11)
    for extra in (PredSim(), InfoPro(), KineticEnergy()):
        assert sum(p.numel() for p in extra.build(h, {"x": x}, 3).parameters()) < 10**4


@pytest.mark.parametrize("kind", [PredSim, InfoPro, KineticEnergy])
def test_weights_are_checked(kind):
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ScheduleError, match=rf"{kind.__name__}\(weight={weight}\) must be a number of 0 or more"):
            kind(weight)
    for keep in (-0.1, 1.1, float("nan")):
        with pytest.raises(ScheduleError, match=rf"keep={keep}\) must be in \[0, 1\]"):
            kind(keep=keep)
    assert kind(0).weight == 0
    assert kind(keep=0).keep == 0


def test_tau_divides():
    with pytest.raises(ScheduleError, match=r"KineticEnergy\(tau=0\) must be a positive number"):
        KineticEnergy(tau=0)


def test_a_loss_of_the_users_own_says_what_it_computes():
    with pytest.raises(NotImplementedError, match="Mine does not say"):
        type("Mine", (ExtraLoss,), {})()(sight(numbers(2, 2)))
