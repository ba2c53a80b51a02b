"""Compression of buffered activations: error bounds, shapes, dtypes, what is not finite, and the learned codebook."""

import io

import pytest
import torch
from torch import nn

from sedona_fx.errors import CheckpointError, ScheduleError
from sedona_fx.train.buffers.codec import Codec, encodable, encoded_bytes, make_codec
from sedona_fx.train.buffers.vector_quantizer import VectorQuantizer

NAMES = ["fp16", "bf16", "int8", "vq"]
SHAPES = [(8, 5, 4, 3), (8, 16), (4, 7, 9), (2, 3, 2, 2, 2), (11,), (), (1, 1), (3, 8, 1, 1)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def activation(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- what holds for all of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shape_dtype_and_nearness(name, dtype, shape):
    x = activation(*shape, dtype=dtype)
    codec = make_codec(name)
    encoded = through_a_file(codec.encode(x.requires_grad_()))
    y = codec.decode(encoded)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert not y.requires_grad
    assert not any(v.requires_grad for v in encoded.values() if isinstance(v, torch.Tensor))
    largest = {"fp16": 2e-3, "bf16": 2e-2, "int8": 4e-2, "vq": 1e-2}[name]  # fewer vectors than codes
    assert (x.detach() - y).abs().max().item() <= largest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 4), (2, 3, 0), (0,), (0, 8)])
def test_nothing_encodes_to_nothing(name, shape):
    codec = make_codec(name)
    y = codec.decode(codec.encode(torch.zeros(shape)))
    assert y.shape == shape
    tensors = [v for v in codec.encode(torch.zeros(shape)).values() if isinstance(v, torch.Tensor)]
    assert tensors[0].numel() == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_never_turns_into_a_number(name, dtype, value):
    x = activation(4, 3, 5, 5, dtype=dtype)
    x[1, 2, 3, 4] = value
    codec = make_codec(name)
    y = codec.decode(codec.encode(x))
    assert not y[1, 2, 3, 4].isfinite()
    assert y.isnan().any() or value != value or name in ("fp16", "bf16")
    if name != "vq":
        assert y[:, 0].isfinite().all()  # the other channels are as they were


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_codec_is_another(name):
    codec = make_codec(name)
    codec.decode(codec.encode(activation(4, 8)))
    other = codec.fresh()
    assert type(other) is type(codec)
    assert other is not codec
    assert repr(other) == repr(codec)
    x = activation(4, 8, seed=1)
    assert torch.equal(other.decode(other.encode(x)), (new := make_codec(name)).decode(new.encode(x)))


@pytest.mark.parametrize("name", NAMES)
def test_encoding_is_outside_of_the_users_autocast(name):
    x = activation(4, 16, 3, 3)
    plain, within = make_codec(name), make_codec(name)
    expected = plain.decode(plain.encode(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(within.decode(within.encode(x)), expected)


def test_names_and_codecs():
    assert make_codec(None) is None
    mine = VectorQuantizer(16, 4)
    assert make_codec(mine) is mine
    assert all(isinstance(make_codec(name), Codec) for name in NAMES)
    with pytest.raises(
        ScheduleError, match=r"'fp8' is unknown; the nearest names are 'fp16'.*Known are 'fp16', 'bf16'"
    ):
        make_codec("fp8")
    with pytest.raises(ScheduleError, match=r"codec=8 is unknown\. Known are"):
        make_codec(8)
    with pytest.raises(ScheduleError, match="or hand a codec"):
        make_codec(VectorQuantizer)


def test_only_floating_point_is_encodable():
    assert all(encodable(torch.zeros(2, dtype=dtype)) for dtype in DTYPES)
    for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn):
        assert not encodable(torch.zeros(2, dtype=dtype))
    assert not encodable(torch.zeros(2, 2).to_sparse())


@pytest.mark.parametrize(("name", "expected"), [("fp16", 2048), ("bf16", 2048), ("int8", 1024 + 2 * 16 * 4)])
def test_bytes(name, expected):
    codec = make_codec(name)
    assert encoded_bytes(codec.encode(activation(4, 16, 4, 4))) == expected
    assert codec.overhead_bytes == 0
    assert codec.state_dict() == {}
    codec.load_state_dict({})
    with pytest.raises(CheckpointError, match=r"with \['book'\] is none of"):
        codec.load_state_dict({"book": 1})


# ---- halves ---------------------------------------------------------------------------------------------------------


def test_fp16_rounds_and_clamps():
    x = torch.tensor([1.0, 1 + 2**-11, 65504.0, 65520.0, 1e6, -1e30, 1e-9, float("inf"), -float("inf"), float("nan")])
    y = make_codec("fp16").decode(make_codec("fp16").encode(x))
    assert y[:7].tolist() == [1.0, 1.0, 65504.0, 65504.0, 65504.0, -65504.0, 0.0]
    assert y[7:9].tolist() == [float("inf"), -float("inf")]
    assert y[9].isnan()


def test_fp16_of_bfloat16_clamps_too():
    x = torch.tensor([65280.0, 65536.0, -3e38], dtype=torch.bfloat16)  # 65504 is no bfloat16
    encoded = make_codec("fp16").encode(x)
    assert encoded["numbers"].tolist() == [65280.0, 65504.0, -65504.0]


def test_bf16_keeps_the_range():
    x = torch.tensor([1e30, -1e-30, 1.0])
    y = make_codec("bf16").decode(make_codec("bf16").encode(x))
    assert torch.allclose(x, y, rtol=2**-8, atol=0)
    assert make_codec("bf16").decode(make_codec("bf16").encode(torch.tensor([1e300], dtype=torch.float64))).isfinite()


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_halves_of_halves_are_exact(name, dtype):
    x = activation(5, 7, dtype=dtype)
    assert torch.equal(make_codec(name).decode(make_codec(name).encode(x)), x)


# ---- int8 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 6, 5, 5), (32, 6), (4, 6, 9), (50,)])
def test_int8_is_wrong_by_half_a_scale_at_most(shape):
    x = activation(*shape, dtype=torch.float64)
    if x.dim() > 1:
        x *= torch.logspace(-3, 3, shape[1]).view(1, -1, *[1] * (x.dim() - 2))  # each channel has a range of its own
    encoded = make_codec("int8").encode(x)
    error = (make_codec("int8").decode(encoded) - x).abs()
    assert encoded["whole"].dtype == torch.uint8
    assert encoded["whole"].min() == 0
    assert encoded["whole"].max() == 255
    assert (error <= encoded["scale"] * 0.5000001).all()
    channels = x.transpose(0, 1).flatten(1) if x.dim() > 1 else x[None]
    wide = (channels.max(1)[0] - channels.min(1)[0]) / 255
    assert torch.allclose(encoded["scale"].flatten(), wide)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_exact_for_constant_channels(dtype):
    x = torch.tensor([0.0, -3.1415, 1e4, 6e-5], dtype=torch.float64).to(dtype).view(1, 4, 1).expand(5, 4, 6)
    assert torch.equal(make_codec("int8").decode(make_codec("int8").encode(x)), x)


def test_int8_of_halves_with_the_widest_range():
    x = torch.tensor([[-60000.0], [60000.0], [0.0]], dtype=torch.float16)  # the range itself is no half
    y = make_codec("int8").decode(make_codec("int8").encode(x))
    assert y.isfinite().all()
    assert (y - x).abs().max() <= 240


def test_int8_keeps_the_zeros_of_relu():
    x = activation(8, 16, 6, 6).relu()
    y = make_codec("int8").decode(make_codec("int8").encode(x))
    assert torch.equal(y[x == 0], x[x == 0])


# ---- vector quantisation --------------------------------------------------------------------------------------------


def test_few_different_vectors_are_exact():
    kinds = activation(6, 4)
    numbers = torch.randint(6, (10, 3, 5, 5), generator=torch.Generator().manual_seed(1))
    x = kinds[numbers].movedim(-1, 2).flatten(1, 2)  # (10, 3 * 4, 5, 5): three groups of four channels
    quantizer = VectorQuantizer(codes=8, group=4)
    encoded = quantizer.encode(x)
    assert encoded["numbers"].dtype == torch.uint8
    assert encoded["numbers"].shape == (10, 3, 5, 5)
    torch.testing.assert_close(quantizer.decode(encoded), x, rtol=1e-6, atol=1e-6)


def test_nearest_codes_and_moving_averages_as_in_the_paper():
    """Against loops over vectors and codes; what a dead code does has a test below."""
    codes, group, decay = 5, 2, 0.9
    quantizer = VectorQuantizer(codes, group, decay)
    counts, sums = torch.zeros(codes), torch.zeros(codes, group)
    for step in range(4):
        x = activation(12, 4, seed=step)
        encoded = quantizer.encode(x)
        vectors, found = x.view(-1, 2), encoded["numbers"].flatten().tolist()
        if step:  # the first codes are vectors of the first batch; they come out as the means of their vectors
            nearest = [min(range(codes), key=lambda i: (v - book[i]).square().sum().item()) for v in vectors]
            assert found == nearest
        for i in range(codes):
            mine = vectors[[k for k, code in enumerate(found) if code == i]]
            assert len(mine)
            counts[i] = decay * counts[i] + (1 - decay) * len(mine)
            sums[i] = decay * sums[i] + (1 - decay) * mine.sum(0)
        book = sums / counts[:, None]
        torch.testing.assert_close(quantizer.state_dict()["book"], book)
        torch.testing.assert_close(quantizer.decode(encoded).view(-1, 2), book[found])


def test_channels_are_filled_up_with_zeros():
    x = activation(6, 10, 3, 3)
    quantizer = VectorQuantizer(codes=256, group=4)
    encoded = quantizer.encode(x)
    assert encoded["numbers"].shape == (6, 3, 3, 3)
    assert quantizer.decode(encoded).shape == x.shape
    padded = torch.cat([x, torch.zeros(6, 2, 3, 3)], 1)
    other = VectorQuantizer(codes=256, group=4)
    assert torch.equal(other.encode(padded)["numbers"], encoded["numbers"])


def test_channels_may_come_last():
    x = activation(6, 5, 16)
    tokens, maps = VectorQuantizer(64, 8, channel_dim=-1), VectorQuantizer(64, 8)
    y = tokens.decode(tokens.encode(x))
    assert torch.equal(y, maps.decode(maps.encode(x.movedim(-1, 1))).movedim(1, -1))
    with pytest.raises(ScheduleError, match=r"channel_dim=2\) is no dimension of channels of a tensor with 2"):
        VectorQuantizer(channel_dim=2).encode(activation(3, 8))


def test_more_codes_and_more_batches_are_nearer():
    mixture = activation(32, 6, seed=5)

    def batch(seed):
        return torch.einsum("cd,ndhw->nchw", mixture, activation(16, 6, 6, 6, seed=seed)).relu()

    def error(quantizer, batches):
        for seed in range(batches):
            encoded = quantizer.encode(batch(seed))
        return ((quantizer.decode(encoded) - batch(batches - 1)).norm() / batch(batches - 1).norm()).item()

    small, large = error(VectorQuantizer(16, 8), 30), error(VectorQuantizer(512, 8), 30)
    assert large < small < 1
    assert error(VectorQuantizer(64, 8), 30) < error(VectorQuantizer(64, 8), 1)
    assert VectorQuantizer(512, 8).encode(batch(0))["numbers"].dtype == torch.int16
    assert VectorQuantizer(2**15 + 1, 1).encode(batch(0)[:1, :1])["numbers"].dtype == torch.int32


def test_the_codebook_follows_activations_that_move():
    def error(quantizer):
        for step in range(200):  # 4 standard deviations in all
            x = activation(32, 8, seed=step) + step * 0.02
            encoded = quantizer.encode(x)
        return ((quantizer.decode(encoded) - x).norm() / (x - x.mean()).norm()).item()

    first, stuck = VectorQuantizer(32, 4), VectorQuantizer(32, 4, decay=0.9999, patience=1000)
    assert error(first) < 0.7 < error(stuck)


def test_dead_codes_come_back_from_the_current_batch():
    quantizer = VectorQuantizer(4, 1, decay=0.5, patience=3)
    quantizer.encode(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    before = quantizer.state_dict()["book"].flatten().sort()[0]
    assert before.tolist() == [0.0, 1.0, 2.0, 3.0]
    for _ in range(2):  # 0 and 1 wait, 2 and 3 are used
        quantizer.encode(torch.tensor([[2.0], [3.0]]))
        assert quantizer.state_dict()["book"].flatten().sort()[0].tolist() == [0.0, 1.0, 2.0, 3.0]
    quantizer.encode(torch.tensor([[2.0], [3.0]]))
    assert set(quantizer.state_dict()["book"].flatten().tolist()) == {2.0, 3.0}


def test_a_code_that_a_buffered_batch_needs_is_not_placed_elsewhere():
    quantizer = VectorQuantizer(8, 2, patience=5)
    x = activation(4, 8)
    encoded = quantizer.encode(x)
    needed = encoded["numbers"].long().unique()
    codes = quantizer.state_dict()["book"][needed]
    for step in range(4):  # of other places; the buffer holds these four and the first
        quantizer.encode(torch.full((4, 8), 100.0 + step))
    kept = quantizer.state_dict()["book"][needed]
    far = (kept - codes).abs().sum(1) > 0
    assert far.sum() <= 1  # at most one code is nearest to the new place, and moves there
    quantizer.encode(torch.full((4, 8), 105.0))
    assert (quantizer.state_dict()["book"] > 90).all()  # the first batch has left: all others are dead


def test_a_batch_that_is_not_finite_leaves_the_codebook_alone():
    quantizer = VectorQuantizer(16, 4)
    quantizer.encode(activation(8, 8))
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    bad = activation(8, 8, seed=1)
    bad[0, 0] = float("nan")
    assert quantizer.decode(quantizer.encode(bad)).isnan().all()
    after = quantizer.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in ("book", "sums", "counts", "idle"))
    assert quantizer.decode(quantizer.encode(activation(8, 8))).isfinite().all()
    first = VectorQuantizer(16, 4)
    assert first.decode(first.encode(bad)).isnan().all()
    assert first.decode(first.encode(activation(8, 8))).isfinite().all()


def test_draws_are_its_own():
    x = [activation(8, 16, 3, 3, seed=seed) for seed in range(3)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, third = VectorQuantizer(32, 4), VectorQuantizer(32, 4), VectorQuantizer(32, 4, seed=1)
    ours = [first.encode(batch)["numbers"] for batch in x]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(second.encode(b)["numbers"], n) for b, n in zip(x, ours, strict=True))
    assert not torch.equal(third.encode(x[0])["numbers"], ours[0])


@pytest.mark.parametrize("before", [0, 1, 7])
def test_a_state_goes_on_as_if_never_stopped(before):
    ours, theirs = VectorQuantizer(16, 4, patience=2), VectorQuantizer(16, 4, patience=2)
    theirs.encode(activation(3, 8, seed=99))  # is replaced
    for seed in range(before):
        held = ours.encode(activation(6, 8, seed=seed))
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    if before:
        assert torch.equal(theirs.decode(held), ours.decode(held))
    for seed in range(before, before + 5):
        x = activation(6, 8, seed=seed)
        assert torch.equal(ours.encode(x)["numbers"], theirs.encode(x)["numbers"])
        assert torch.equal(ours.state_dict()["book"], theirs.state_dict()["book"])


def test_a_state_is_a_picture_of_its_moment():
    quantizer = VectorQuantizer(16, 4)
    quantizer.encode(activation(6, 8))
    state = quantizer.state_dict()
    book = state["book"].clone()
    quantizer.encode(activation(6, 8, seed=1))
    assert torch.equal(state["book"], book)
    assert not torch.equal(quantizer.state_dict()["book"], book)


def test_states_of_other_sizes_are_refused():
    quantizer = VectorQuantizer(16, 4)
    with pytest.raises(CheckpointError, match=r"codes=8, group=4\), here it is codes=16, group=4"):
        quantizer.load_state_dict(VectorQuantizer(8, 4).state_dict())
    with pytest.raises(CheckpointError, match=r"\['book', 'counts', 'idle', 'random', 'sums'\] are missing"):
        quantizer.load_state_dict({})
    encoded = quantizer.encode(activation(3, 8))
    with pytest.raises(ScheduleError, match="this one has no codebook"):
        quantizer.fresh().decode(encoded)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"codes": 1}, r"codes=1\) must be a whole number of 2"),
        ({"group": 0}, r"group=0\) must be a whole number of 1"),
        ({"codes": 2.5}, r"codes=2.5\)"),
        ({"patience": 0}, r"patience=0\)"),
        ({"decay": 1.0}, r"decay=1.0\) must be in \[0, 1\)"),
        ({"decay": float("nan")}, r"decay=nan\)"),
    ],
)
def test_settings_are_checked(options, text):
    with pytest.raises(ScheduleError, match=text):
        VectorQuantizer(**options)


def test_bytes_of_codes_and_of_the_codebook():
    quantizer = VectorQuantizer(codes=256, group=8)
    encoded = quantizer.encode(activation(4, 16, 8, 8))
    assert encoded_bytes(encoded) == 4 * 2 * 8 * 8 + 1  # one byte a group and position, and one that tells NaN
    state = quantizer.state_dict()
    assert quantizer.overhead_bytes == sum(state[k].nbytes for k in ("book", "sums", "counts", "idle"))
    assert quantizer.overhead_bytes == VectorQuantizer().overhead_bytes


def test_a_codec_of_the_users_own():
    class Sign:
        overhead_bytes = 0

        def encode(self, tensor):
            return {"positive": tensor > 0}

        def decode(self, encoded):
            return encoded["positive"].float() * 2 - 1

        def fresh(self):
            return self

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    mine = Sign()
    assert make_codec(mine) is mine
    assert encoded_bytes(mine.encode(torch.zeros(9))) == 9
    with pytest.raises(ScheduleError, match="is unknown"):
        make_codec(nn.Identity())
