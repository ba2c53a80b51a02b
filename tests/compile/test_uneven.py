"""Uneven blocks are told of, with the reason and with what would help; even ones are not."""

import itertools
import re

import pytest
import torch
from skips import UNet, images
from torch import nn

import sedona_fx
from sedona_fx.errors import CutError, HeadError


def batch(width=8):
    return torch.randn(4, width), torch.tensor([0, 1, 2, 0])


def chain(*widths, classes=3):
    layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def decouple(model, blocks, search="balanced", data=None, **how):
    how = {"heads": "linear", "progress": False, **how}
    return sedona_fx.decouple(model, batch() if data is None else data, blocks=blocks, search=search, **how)


def told(net):
    """Return the line about the largest block, why it is large, and what helps."""
    text = str(net)
    line = re.search(r"^largest block: .*$", text, re.M)
    why, helps = (re.search(rf"^  {name}: (.*)$", text, re.M) for name in ("why", "helps"))
    return line[0], why[1] if why else "", helps[1] if helps else ""


def test_even_blocks_are_told_of_in_one_line():
    # By hand: four layers of 64 weights, one of 24, and a head of 24: 152 and 152.
    net = decouple(chain(8, 8, 8, 8, 8), 2)
    assert told(net) == ("largest block: 0, with 50% of the FLOPs; an even share is 50%", "", "")
    assert told(decouple(chain(8, 8, 8), 1)) == ("largest block: 0, with 100% of the FLOPs", "", "")


def test_cuts_of_another_rule():
    net = decouple(chain(*[8] * 9), 4, "latest")
    line, why, helps = told(net)
    flops = [cost.flops for cost in net.costs]
    assert line == f"largest block: 0, with {flops[0] / sum(flops):.0%} of the FLOPs; an even share is 25%"
    assert why == "the cuts were chosen by Latest"
    assert helps == "search='balanced', which makes the largest block 28% without its head"  # 2 x 64 + 24 of 536
    assert "0, with" in line
    own = decouple(chain(*[8] * 9), 4, cuts=["0", "1", "2"])
    assert told(own)[1] == "the cuts are your own"
    again = decouple(chain(*[8] * 9), 4, plan=own.plan)
    assert told(again)[1] == "the cuts are those of the plan"


def test_one_operation_with_most_of_the_work():
    # By hand, in weights: 5 x 64 + 256, 1024, 256 + 5 x 64 + 24.
    most = "most of it is one operation, 12"
    model = chain(*[8] * 6, 32, 32, *[8] * 6)
    assert told(decouple(model, 3))[1:] == ("", "")  # 47 % is no more than half
    _, why, helps = told(decouple(model, 4))
    assert why == f"from behind '11' to '13' there is 47% of the work and no place to cut: {most}"
    assert helps == "blocks=3, for 47%"


def test_a_module_that_is_kept_whole():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), chain(*[8] * 7, classes=8), nn.Tanh(), nn.Linear(8, 8))
    model.append(nn.Linear(8, 3))
    _, why, helps = told(decouple(model, 3, leaf_modules=["2"]))
    assert why.endswith("most of it is one operation, 2, which is kept whole")
    assert "fewer modules in leaf_modules=['2']" in helps
    assert told(decouple(model, 3))[1] == ""


def test_no_cut_and_root():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), chain(*[8] * 7, classes=8), nn.Tanh(), nn.Linear(8, 8))
    model.append(nn.Linear(8, 3))
    _, why, helps = told(decouple(model, 3, no_cut=["2"]))
    assert why.endswith("no_cut=['2'] forbids it")
    assert "fewer modules in no_cut=['2']" in helps
    model = nn.Sequential(chain(*[8] * 3, classes=8), chain(*[8] * 9))
    _, why, helps = told(decouple(model, 3, root="0"))
    assert why.endswith("it lies outside of root='0'")
    assert "another root than '0'" in helps


def test_a_limit_of_crossings():
    net = sedona_fx.decouple(UNet(), images(), blocks=3, search="balanced", max_live=1)
    line, why, helps = told(net)
    assert float(re.search(r"with (\d+)%", line)[1]) > 70
    assert re.search(r"no place to cut: \d activations or more cross everywhere in it, and 1 may$", why)
    limit = int(re.search(r"max_live=(\d+), for \d+%", helps)[1])
    better = sedona_fx.decouple(UNet(), images(), blocks=3, search="balanced", max_live=limit)
    assert told(better)[1] == ""
    assert sedona_fx.decouple(UNet(), images(), blocks=3, search="balanced").plan.max_live <= limit


def test_a_head_that_is_larger_than_its_block():
    def wide(context):
        return nn.Sequential(nn.Linear(8, 4000), nn.Tanh(), nn.Linear(4000, 3))

    _, why, helps = told(decouple(chain(*[8] * 5), 2, heads=[wide]))
    assert why == "its head has 100% of that"
    assert helps == "smaller heads, heads=[...]"


def test_frozen_parameters_run_forward_only():
    model = chain(*[8] * 9)  # eight layers, of which the first five are frozen: 5 + 3 x 3 units, and a head each
    for k in range(0, 10, 2):
        model[k].requires_grad_(False)
    line, why, _helps = told(decouple(model, 2, cuts=["13"]))
    assert "largest block: 0, with 84%" in line  # 7 x 64 + 24 weights of 560
    assert re.fullmatch(r"frozen parameters run forward only: of a training step the largest block has 73%", why)


def test_branches_side_by_side():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = chain(*[8] * 8, classes=8), chain(*[8] * 7, classes=8)
            self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.mix(self.first(x) * self.second(x))))

    _line, why, helps = told(decouple(Towers(), 4))
    assert why.endswith("its branches lie side by side, and blocks follow one another")
    assert helps


def test_no_value_at_which_a_block_can_end():
    class Halves(nn.Module):
        """Work on twice as many rows as the output has, in an order of their own."""

        def __init__(self):
            super().__init__()
            self.first, self.middle = nn.Linear(8, 8), chain(*[8] * 8, classes=8)
            self.second, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            rows = torch.tanh(self.first(x)).reshape(-1, 4).repeat(1, 2).roll(1, 0)
            h = self.middle(rows).roll(-1, 0).reshape(x.shape[0], 2, 8).sum(1)
            return self.out(torch.tanh(self.second(torch.tanh(h))))

    _, why, helps = told(decouple(Halves(), 3))
    assert "a block can end at none of its values" in why
    assert helps == ""  # 87 % stay in one piece


@pytest.mark.parametrize("search", ["uniform", "balanced", "latest"])
def test_too_few_places_name_the_best_balance_and_the_way_out(search):
    model = chain(8, 8, 8, 8)  # 64, 64, 64, 24 weights: three places, the last in front of the classifier
    with pytest.raises(CutError) as caught:
        decouple(model, 6, search)
    text = str(caught.value)
    assert text.startswith("6 blocks need 5 cuts; this model has 6 legal cut points, enough for 4 blocks")
    assert "The largest of these would have 30% of the FLOPs, with 1 activation at most crossing a cut." in text
    assert "What would help: blocks=4; cuts=[...] by hand, which may leave a block without parameters." in text
    assert decouple(model, 4, search).plan.blocks == 4


def test_too_few_places_at_the_users_limit():
    with pytest.raises(CutError) as caught:
        sedona_fx.decouple(UNet(), images(), blocks=12, search="balanced", max_live=1)
    text = str(caught.value)
    found = re.search(r"enough for 10 blocks .*blocks=10; max_live=(\d), which is enough for 12 blocks", text)
    net = sedona_fx.decouple(UNet(), images(), blocks=12, search="balanced", max_live=int(found[1]))
    assert net.plan.blocks == 12


def test_too_few_places_for_other_reasons():
    model = nn.Sequential(chain(*[8] * 4, classes=8), nn.Tanh(), chain(*[8] * 3))
    with pytest.raises(CutError, match=r"helps?: blocks=\d; fewer modules in no_cut=\['0'\]; cuts="):
        decouple(model, 7, no_cut=["0"])
    with pytest.raises(CutError, match=r"fewer modules in leaf_modules=\['0'\]"):
        decouple(model, 7, leaf_modules=["0"])
    with pytest.raises(CutError, match=r"this model has 0 legal cut points, enough for 1 block.* help: blocks=1; "):
        decouple(nn.Linear(8, 3), 2)


def test_too_few_places_say_at_how_many_a_head_can_stand():
    class Steps(nn.Module):
        """Scores a step, behind values of other numbers of steps and of a kind that no built-in head reads."""

        def __init__(self):
            super().__init__()
            self.layers, self.out = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3)

        def forward(self, x):
            h = x
            for layer in self.layers[:3]:
                h = torch.tanh(layer(h))
            h = torch.complex(h, h)
            h = torch.tanh(self.layers[3](h.abs()))
            return self.out(h)

    data = torch.randn(4, 8), torch.tensor([0, 1, 2, 0])
    told = (
        r"^9 blocks need 8 cuts; this model has 10 legal cut points, 9 of them with a built-in head that fits, enough"
    )
    with pytest.raises(CutError, match=told):
        sedona_fx.decouple(Steps(), data, blocks=9, search="uniform")
    with pytest.raises(CutError, match=r"10 legal cut points, enough"):
        sedona_fx.decouple(Steps(), data, blocks=9, search="uniform", heads=False)
    with pytest.raises(HeadError, match=r"no built-in head for any of the 2 legal cut points of this model: no built-"):
        sedona_fx.decouple(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Unflatten(1, (2, 1, 2, 1, 2))),
            data,
            blocks=2,
            search="uniform",
            loss=lambda output, y: output.sum(),
        )
