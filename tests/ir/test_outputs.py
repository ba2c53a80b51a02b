"""The primary output, and how a head's output takes its place in the model's own type."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from sedona_fx.errors import OutputError
from sedona_fx.ir.output_format import OutputFormat
from sedona_fx.ir.outputs import fields, find_primary, leaves, map_tensors, pick, without_objects

Z, H, N = torch.zeros(2, 3), torch.ones(2, 5), torch.tensor([1, 2])
Pair = namedtuple("Pair", "aux logits")


@dataclass
class Plain:
    hidden: torch.Tensor
    logits: torch.Tensor
    loss: torch.Tensor | None = None


@dataclass(frozen=True)
class Frozen:
    scores: torch.Tensor
    extra: torch.Tensor | None = None


@dataclass
class Demanding:
    scores: torch.Tensor
    hidden: torch.Tensor
    size: int = field(init=False)

    def __post_init__(self):
        self.size = self.hidden.shape[0]  # fails without


class Custom(dict):
    pass


@pytest.mark.parametrize(
    ("output", "wanted", "key"),
    [
        (Z, None, None),
        ((N, Z, H), None, 1),
        ([N, Z, H], 2, 2),
        ({"hidden": H, "logits": Z}, None, "logits"),
        ({"hidden": H, "scores": Z}, None, "hidden"),
        ({"hidden": H, "scores": Z}, "scores", "scores"),
        (OrderedDict(ids=N, scores=Z), None, "scores"),
        ({0: N, 1: Z}, None, 1),
        ((Z, H, N), -2, 1),
        ([N, Z, H], -1, 2),
        ({0: N, 1: Z}, 1, 1),
        ({-1: Z, 0: H}, -1, -1),
        ({"hidden": H, "scores": Z}, -1, "scores"),
        (Pair(H, Z), 0, "aux"),
        (Plain(H, Z), 0, "hidden"),
        (Pair(H, Z), None, "logits"),
        (Plain(H, Z), None, "logits"),
        (Frozen(Z), None, "scores"),
        ({"many": {"boxes": Z, "rest": [H, N]}, "one": {"boxes": H}}, None, ("many", "boxes")),
        ({"many": {"boxes": Z, "rest": [H, N]}, "one": {"boxes": H}}, "many.rest.0", ("many", "rest", 0)),
        ({"many": {"boxes": Z, "rest": [H, N]}, "one": {"boxes": H}}, ("one", "boxes"), ("one", "boxes")),
        ({"many": {"boxes": Z, "rest": [N, H]}, "one": H}, "many.rest.-1", ("many", "rest", 1)),
        ({"many": {"boxes": Z}, "one": H}, None, "one"),
        ({"a.b": Z, "one": H}, "a.b", "a.b"),
        ([N, Pair(H, Z)], None, (1, "aux")),
    ],
)
def test_find_primary(output, wanted, key):
    assert find_primary(output, wanted) == key
    assert pick(output, key).dtype is torch.float32


def test_find_primary_says_what_there_is():
    with pytest.raises(OutputError, match=r"output='nope' names no float tensor.*\['hidden', 'logits'\]"):
        find_primary(Plain(H, Z), "nope")
    with pytest.raises(OutputError, match="names no float tensor"):
        find_primary({"ids": N}, "ids")
    for wanted in ("many.rest.1", "many", "none.boxes", ("many", "boxes", "x")):
        with pytest.raises(OutputError, match=r"names no float.*\['many\.boxes', 'many\.rest\.0', 'one\.boxes'\]"):
            find_primary({"many": {"boxes": Z, "rest": [H, N]}, "one": {"boxes": Z}}, wanted)
    with pytest.raises(OutputError, match="no float tensor that a loss could be about"):
        find_primary((N, None))


@pytest.mark.parametrize(
    ("output", "key"),
    [
        ((N, Z), 1),
        ([N, Z], 1),
        ({"hidden": H, "logits": Z}, "logits"),
        ({0: N, 1: Z}, 1),
        (OrderedDict(hidden=H, logits=Z), "logits"),
        (Custom(hidden=H, logits=Z), "logits"),
        (Plain(H, Z), "logits"),
        (Frozen(Z, H), "scores"),
        (Demanding(Z, H), "scores"),
    ],
)
def test_wrap_gives_the_models_own_type_with_the_other_fields_none(output, key):
    head = torch.full((2, 3), 7.0)
    wrapped = OutputFormat.of(output, key).wrap(head)
    assert type(wrapped) is type(output)
    assert [name for name, _ in fields(wrapped)] == [name for name, _ in fields(output)]
    for name, value in fields(wrapped):
        assert value is (head if name == key else None)


def test_wrap_fills_in_a_field_of_a_field():
    output = {"ids": N, "many": [Pair(H, Z), H], "one": {"boxes": Z}}
    wrapped = OutputFormat.of(output, ("many", 0, "logits")).wrap(H, {"ids": N})
    assert wrapped == {"ids": N, "many": [Pair(None, H), None], "one": None}
    assert type(wrapped["many"][0]) is Pair
    assert OutputFormat.of(Pair([H], Z), ("aux", 0)).wrap(H) == Pair([H], None)


@pytest.mark.parametrize("output", [Z, Pair(H, Z)])
def test_bare_tensors_and_namedtuples_are_not_wrapped(output):
    form = OutputFormat.of(output, find_primary(output))
    assert form.bare
    assert form.wrap(H) is H


def test_auxiliary_training_outputs_count_with_their_weight():
    target = torch.tensor([0, 1])
    logits, aux = torch.randn(2, 3), torch.randn(2, 3)
    form = OutputFormat.of(Pair(aux, logits), "logits", ("aux",))
    expected = F.cross_entropy(logits, target) + 0.3 * F.cross_entropy(aux, target)
    assert torch.equal(form.final_loss(F.cross_entropy, Pair(aux, logits), target), expected)
    assert torch.equal(
        form.final_loss(F.cross_entropy, Pair(None, logits), target), F.cross_entropy(logits, target)
    )  # evaluation
    assert torch.equal(form.final_loss(F.cross_entropy, logits, target), F.cross_entropy(logits, target))
    assert torch.equal(form.head_loss(F.cross_entropy, aux, target), F.cross_entropy(aux, target))


def test_other_types_reach_the_loss_whole():
    seen = []

    def loss(output, target):
        seen.append(output)
        return output.logits.sum()

    form = OutputFormat.of(Plain(H, Z), "logits", ("hidden",))
    whole = Plain(H, Z)
    form.final_loss(loss, whole, None)
    assert seen == [whole]


@pytest.mark.parametrize(
    "value",
    [
        Z,
        (N, [Z, {"a": H}]),
        Pair(H, Z),
        OrderedDict(a=Z),
        Custom(a=Z, b=[H]),
        Plain(H, Z),
        Frozen(Z),
        {"deep": Frozen(Z, Frozen(H))},
        None,
        3,
    ],
)
def test_map_tensors_reaches_every_tensor_and_keeps_types(value):
    seen = []
    same = map_tensors(lambda t: (seen.append(t), t + 1)[1], value)
    assert type(same) is type(value)
    assert same is not value or not seen
    again = []
    map_tensors(again.append, same)
    assert len(again) == len(seen)
    assert all(torch.equal(a, b + 1) for a, b in zip(again, seen, strict=True))
    map_tensors(lambda t: again.append(t), value)
    assert all(a is b for a, b in zip(again[len(seen) :], seen, strict=True)), "the original is untouched"


class Cache:
    """No container that we know."""


C = Cache()


@pytest.mark.parametrize(
    ("output", "without", "names"),
    [
        ({"logits": Z, "cache": C}, {"logits": Z, "cache": None}, ("cache (Cache)",)),
        ((Z, [C, {"a": C, "b": 3}]), (Z, [None, {"a": None, "b": 3}]), ("1.0 (Cache)", "1.1.a (Cache)")),
        (Pair(C, Z), Pair(None, Z), ("aux (Cache)",)),
        (Frozen(Z, C), Frozen(Z, None), ("extra (Cache)",)),
        (OrderedDict(a=Custom(b={Z}), c=Z), OrderedDict(a=Custom(b=None), c=Z), ("a.b (set)",)),
    ],
)
def test_objects_in_an_output_become_none(output, without, names):
    before = repr(output)
    found, left_out = without_objects(output)
    assert left_out == names
    assert type(found) is type(output)
    assert repr(found) == repr(without)
    assert repr(output) == before, "the original is untouched"
    assert all(leaf is Z for leaf in leaves(output))


@pytest.mark.parametrize("output", [Z, None, (Z, 3, "a", [None, 2.5]), Pair(H, Z), Plain(H, Z), {"a": Frozen(Z)}, C])
def test_outputs_without_objects_in_them_stay(output):
    found, left_out = without_objects(output)
    assert found is output
    assert left_out == ()


def test_leaves_come_in_the_order_of_the_fields():
    assert [id(leaf) for leaf in leaves({"b": (N, [Z, None]), "a": Plain(H, Z)})] == list(map(id, (N, Z, H, Z)))
