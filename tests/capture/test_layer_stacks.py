"""PyTorch's stacks of layers are entered: cuts between their layers, the model's own bits and gradients."""

import copy
import itertools
import threading
import warnings

import pytest
import torch
from graphs import analysed, assert_blocks_right, cut_names
from torch import Tensor, nn

import sedona_fx
from sedona_fx.capture.layer_stacks import enter_stacks, unknown_masks
from sedona_fx.data.args import Args
from sedona_fx.passes import trace

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning", "ignore:The PyTorch API of nested")


def layer(**options: object) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        **{"d_model": 8, "nhead": 2, "dim_feedforward": 12, "batch_first": True} | options
    )


class Encoder(nn.Module):
    """Tokens, an encoder, class scores of the mean. `mask`: how a causal mask is given, if it is."""

    def __init__(
        self, layers: int = 3, mask: str = "", norm: bool = True, nested: bool = True, **options: object
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.mask = options.get("batch_first", True), mask
        self.embed = nn.Embedding(11, 8)
        self.t = nn.TransformerEncoder(layer(**options), layers, nn.LayerNorm(8) if norm else None, nested)
        for parameter in self.t.parameters():  # the layers are copies of one
            nn.init.normal_(parameter, std=0.4)
        self.out = nn.Linear(8, 3)
        self.register_buffer("future", torch.full((6, 6), float("-inf")).triu(1))

    def forward(self, ids: Tensor, padded: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        x = x if self.first else x.transpose(0, 1)
        made = torch.ones(6, 6, dtype=torch.bool).triu(1)
        mask = {"": None, "buffer": self.future, "made": made, "given": scores}[self.mask]
        x = self.t(x, mask, padded, is_causal=True) if self.mask == "made" else self.t(x, mask, padded)
        return self.out(x.mean(1 if self.first else 0))


IDS = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([6, 3, 5, 2])
PADDED = torch.arange(6) >= LENGTHS[:, None]
CAUSAL = torch.full((6, 6), float("-inf")).triu(1)
TARGET = torch.tensor([0, 1, 2, 0])


def assert_same(model: nn.Module, inputs: dict[str, Tensor], **how: object) -> sedona_fx.Net:
    """The net gives the model's bits in both modes, with gradients and without, and the model's own gradients."""
    net = sedona_fx.decouple(model, (inputs, TARGET), **how)
    for training, grad in itertools.product((True, False), (True, False)):
        plain = copy.deepcopy(model).train(training)
        net.train(training)
        with torch.set_grad_enabled(grad):
            torch.manual_seed(3)
            expected = plain(**inputs)
            torch.manual_seed(3)
            found = net.call(inputs, backprop=True)
        # PyTorch's fast path gives NaN where a row of the mask is empty.
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        if grad:
            nn.functional.cross_entropy(expected, TARGET).backward()
            net.zero_grad()
            nn.functional.cross_entropy(found, TARGET).backward()
            for name, parameter in plain.named_parameters():
                found = net.model.get_parameter(name).grad
                torch.testing.assert_close(found, parameter.grad, rtol=0, atol=0, msg=name)
    return net


@pytest.mark.parametrize(
    ("padding", "mask", "options"),
    [
        ("none", "", {}),
        ("bool", "", {}),
        ("float", "", {}),
        ("not left aligned", "", {}),
        ("bool", "", {"nested": False}),
        ("bool", "", {"norm_first": True, "nested": False}),
        ("none", "buffer", {}),
        ("bool", "buffer", {}),
        ("none", "made", {}),
        ("bool", "made", {}),
        ("none", "given", {"norm_first": True}),
        ("float", "given", {}),
    ],
)
def test_encoder_is_the_models_own(padding, mask, options):
    inputs = {"ids": IDS}
    if padding != "none":
        inputs["padded"] = PADDED.flip(1) if "not" in padding else PADDED
    if padding == "float":
        inputs["padded"] = torch.zeros(4, 6).masked_fill(PADDED, float("-inf"))
    if mask == "given":
        inputs["scores"] = CAUSAL
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        net = assert_same(Encoder(mask=mask, **options), inputs, cuts=["t.layers.0", "t.layers.1"])
    assert net.plan.capture.front_end == "symbolic"
    assert net.lowered(training=True) is net.lowered(training=False)  # no decision of a mode is frozen


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"norm": False}, {"activation": "gelu"}, {"nhead": 1}], ids=str)
def test_options(options):
    assert_same(Encoder(**options), {"ids": IDS, "padded": PADDED}, cuts=["t.layers.1"])


class Checked(Encoder):
    def forward(self, ids: Tensor, padded: Tensor | None = None, scores: Tensor | None = None) -> Tensor:
        if ids.shape[1] > 9:
            raise ValueError("too long")
        return super().forward(ids, padded, scores)


@pytest.mark.parametrize("mask", ["", "buffer", "given"])
def test_exported_models_have_no_numbers_to_see_a_causal_mask_by(mask):
    inputs = {"ids": IDS} | ({"scores": CAUSAL} if mask == "given" else {"padded": PADDED} if not mask else {})
    model = Checked(mask=mask, dropout=0.0)
    net = sedona_fx.decouple(model, (inputs, TARGET), cuts=["t.layers.1"])
    assert net.plan.capture.front_end == "export"
    assert torch.equal(net(**inputs), model(**inputs))


def test_sequence_first():
    net = assert_same(Encoder(batch_first=False), {"ids": IDS, "padded": PADDED}, blocks=1)
    called = [str(node.target) for node in net.graph_module.graph.nodes if node.op == "call_module"]
    assert called == ["embed", "t.layers.0", "t.layers.1", "t.layers.2", "t.norm", "out"]


def test_packed_batches_change_zero_nothing_but_the_padded_places():
    """With frozen layers in eval mode, PyTorch packs with gradients enabled as well: heads still read plain tensors."""
    model = Encoder()
    model.t.requires_grad_(requires_grad=False)
    model.embed.requires_grad_(requires_grad=False)
    inputs = {"ids": IDS, "padded": PADDED}
    net = sedona_fx.decouple(model, (inputs, TARGET), cuts=["t.layers.1"], heads="linear")
    for module in (net.model.t, model.t):
        module.eval()
    packed = model.t(model.embed(IDS), src_key_padding_mask=PADDED)
    assert (packed[1, 3:] == packed[1, 3]).all()
    assert torch.equal(net(**inputs), model(**inputs))
    assert net.backward(inputs, TARGET).losses[0] > 0
    net.eval()
    with torch.no_grad():
        assert torch.equal(net(**inputs), model.eval()(**inputs))
        assert net.early_exit(0.01)(**inputs).output.shape == (4, 3)


def test_other_threads_are_left_alone():
    """While one thread records, an encoder that runs in another one packs its batch as ever."""
    encoder, results = Encoder().t.eval(), []
    x = torch.randn(4, 6, 8)

    def run() -> None:
        with torch.no_grad():
            results.append(encoder(x, src_key_padding_mask=PADDED))

    run()
    with enter_stacks([None]), unknown_masks():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(*results)
    assert (results[0][3, 2:] == results[0][3, 2]).all()  # the norm of zeros


def test_a_mask_is_causal_or_not_anew_in_every_call():
    inputs = {"ids": IDS, "scores": CAUSAL}
    model = Encoder(mask="given", dropout=0.0)
    net = sedona_fx.decouple(model, (inputs, TARGET), cuts=["t.layers.1"])
    for scores in (CAUSAL, torch.zeros(6, 6), CAUSAL.T.contiguous()):
        assert torch.equal(net(ids=IDS, scores=scores), model(ids=IDS, scores=scores))


def test_batches_and_lengths_are_free():
    model = Encoder(dropout=0.0)
    net = sedona_fx.decouple(model, ({"ids": IDS, "padded": PADDED}, TARGET), cuts=["t.layers.1"])
    for rows, steps in ((2, 6), (7, 9)):
        ids, padded = torch.randint(11, (rows, steps)), torch.arange(steps) >= torch.randint(1, steps, (rows, 1))
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.equal(net.eval()(ids=ids, padded=padded), model.eval()(ids=ids, padded=padded))


def test_blocks_get_the_gradients_of_a_detach_by_hand():
    net = assert_blocks_right(Encoder(dropout=0.0), IDS, TARGET, ["t.layers.0", "t.layers.1"])
    assert all(name.startswith("tokens") for name in net.plan.heads)


def test_six_layers_are_six_places():
    graphs = analysed(Encoder(layers=6, dropout=0.0), ids=IDS, padded=PADDED)
    assert cut_names(graphs) == ["embed", *(f"t.layers.{k}" for k in range(6)), "t", ":mean"]
    data = ({"ids": IDS, "padded": PADDED}, TARGET)
    net = sedona_fx.decouple(Encoder(layers=6), data, blocks=4, search="balanced", progress=False)
    assert max(cost.flops for cost in net.costs) < 0.4 * sum(cost.flops for cost in net.costs)


class Translator(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = bool(options.get("batch_first"))
        self.a, self.b = nn.Embedding(11, 8), nn.Embedding(11, 8)
        self.t = nn.Transformer(8, 2, 2, 2, 12, **options)
        self.out = nn.Linear(8, 11)

    def forward(self, ids: Tensor, padded: Tensor, given: Tensor) -> Tensor:
        source, target = self.a(ids), self.b(given)
        if not self.first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        kinds = {"src_key_padding_mask": padded, "memory_key_padding_mask": padded}
        out = self.t(source, target, tgt_mask=mask, **kinds)
        return self.out(out if self.first else out.transpose(0, 1)).mean(1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_and_decoder(first, norm_first):
    inputs = {"ids": IDS, "padded": PADDED, "given": IDS[:, :5]}
    options = {"cuts": ["t.encoder.layers.0", "t.decoder.layers.0"]} if first else {"blocks": 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Support for mismatched")
        net = assert_same(Translator(batch_first=first, norm_first=norm_first), inputs, heads=False, **options)
    called = {str(node.target) for node in net.graph_module.graph.nodes if node.op == "call_module"}
    assert {f"t.{half}.layers.{k}" for half in ("encoder", "decoder") for k in (0, 1)} < called
    assert {"t.encoder.norm", "t.decoder.norm"} < called


class OwnLayer(nn.TransformerEncoderLayer):
    """Inherits its forward, so it stays whole."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return super()._ff_block(x).tanh()


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return src + self._ff_block(src)


class OwnEncoder(nn.TransformerEncoder):
    def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
        return super().forward(src, mask, src_key_padding_mask, is_causal).tanh()


def test_classes_that_inherit():
    def with_stack(stack: nn.Module) -> nn.Module:
        model = Encoder(dropout=0.0)
        model.t = stack
        return model

    own = OwnLayer(8, 2, 12, 0.0, batch_first=True)
    for stack in (nn.TransformerEncoder(own, 3), OwnEncoder(layer(dropout=0.0), 3)):
        net = assert_same(with_stack(stack), {"ids": IDS, "padded": PADDED}, cuts=["t.layers.1"])
        assert net.plan.capture.front_end == "symbolic"
    mine = OwnForward(8, 2, 12, 0.0, batch_first=True)
    net = assert_same(
        with_stack(nn.TransformerEncoder(mine, 3, enable_nested_tensor=False)), {"ids": IDS}, cuts=["t.layers.1"]
    )
    assert net.plan.capture.front_end == "symbolic"
    assert_same(with_stack(nn.TransformerEncoder(mine, 3)), {"ids": IDS}, blocks=1)  # the encoder stays whole


def test_what_the_user_keeps_whole_stays_whole():
    def called(model: nn.Module, **how: object) -> list[str]:
        traced = trace(model, Args(ids=IDS), **how)
        return [str(node.target) for node in traced.train.graph.nodes if node.op == "call_module"]

    assert called(Encoder(), leaf_modules=["t"]) == ["embed", "t", "out"]
    hooked = Encoder()
    hooked.t.register_forward_hook(lambda *_: None)
    assert called(hooked) == ["embed", "t", "out"]
    assert called(Encoder(layers=2)) == ["embed", "t.layers.0", "t.layers.1", "t.norm", "out"]


def test_other_layers_of_pytorch_stay_whole():
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
            self.recur = nn.LSTM(8, 8, num_layers=3, batch_first=True)
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.recur(self.attend(x, x, x)[0])[0].mean(1))

    traced = trace(Several(), Args(x=torch.randn(2, 5, 8)))
    assert [n.target for n in traced.train.graph.nodes if n.op == "call_module"] == ["attend", "recur", "out"]


def test_every_schedule_trains_a_packing_encoder():
    inputs = {"ids": IDS, "padded": PADDED}
    for kind in ("Greedy", "Backprop", "BackLink", "Replay", "Delayed"):
        net = sedona_fx.decouple(Encoder(dropout=0.0), (inputs, TARGET), cuts=["t.layers.0", "t.layers.1"])
        options = {"capacity": 2} if kind == "Replay" else {}
        schedule = getattr(sedona_fx.train, kind)(net, lambda p: torch.optim.SGD(p, lr=0.05), **options)
        before = copy.deepcopy(net.model.state_dict())
        for _ in range(4):
            schedule.step(inputs, TARGET)
        after = net.model.state_dict()
        assert not torch.equal(before["t.layers.2.linear1.weight"], after["t.layers.2.linear1.weight"])
        assert not torch.equal(before["t.layers.0.linear1.weight"], after["t.layers.0.linear1.weight"])


def test_a_net_is_copied_saved_and_follows(tmp_path):
    inputs = {"ids": IDS, "padded": PADDED}
    model = Encoder(dropout=0.0)
    net = sedona_fx.decouple(model, (inputs, TARGET), cuts=["t.layers.1"])
    net.save(tmp_path)
    loaded = sedona_fx.load(tmp_path, Encoder(dropout=0.0))
    twin = copy.deepcopy(net)
    for parameter in net.model.parameters():
        nn.init.zeros_(parameter)
    expected = model.eval()(**inputs)
    with torch.no_grad():
        packed = model(**inputs)
    for other in (twin.eval(), loaded.eval()):
        assert torch.equal(other(**inputs), expected)
        with torch.no_grad():
            assert torch.equal(other(**inputs), packed)
    other = layer(dropout=0.0)
    twin.model.t.layers[0] = other
    model.t.layers[0] = copy.deepcopy(other)
    assert torch.equal(twin(**inputs), model.eval()(**inputs))


def test_searches_train_relaxed_packing_encoders():
    inputs = {"ids": IDS, "padded": PADDED}
    data = [(inputs, TARGET)] * 4
    search = sedona_fx.search.Sedona(training_steps=150)
    net = sedona_fx.decouple(Encoder(layers=4, dropout=0.0), data, blocks=2, search=search, progress=False)
    assert set(net.plan.cuts) < {"embed", "t.layers.0", "t.layers.1", "t.layers.2", "t.layers.3"}
