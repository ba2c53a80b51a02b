"""CONTRIBUTING's worked examples: each is one short file outside of the package that runs and does what it says."""

import copy
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sedona_fx
from sedona_fx.errors import HeadError
from sedona_fx.heads.registry import head_names
from sedona_fx.search import Uniform

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "extending").glob("*.py"))
NAMES = {"sign_sgd", "bottleneck_head", "count_nodes", "random_search"}


def example(name):
    return runpy.run_path(str(ROOT / "examples" / "extending" / f"{name}.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_is_short_and_stands_in_contributing(path):
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert f"```python\n{text}```\n" in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_runs_from_anywhere_without_a_warning(path, tmp_path):
    command = [sys.executable, "-W", "error", str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr


def test_all_four_kinds_are_there():
    assert {path.stem for path in EXAMPLES} == NAMES


def chain():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)), nn.Linear(6, 3)).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 6, generator=generator, dtype=torch.float64), torch.randint(3, (5,), generator=generator)


def test_sign_sgd_moves_every_weight_by_the_learning_rate_against_its_greedy_gradient():
    """The reference: blocks detached by hand, the sign of each block's own gradient, two steps."""
    net = sedona_fx.decouple(chain(), batch(), cuts=["1", "2"], heads="linear")
    body = [list(range(2)), [2], [3, 4]]
    copies = chain()
    heads = [copy.deepcopy(block.head) for block in net.blocks[:-1]]
    schedule = example("sign_sgd")["SignSGD"](net, lambda params: torch.optim.SGD(params, lr=0.01))
    for _ in range(2):
        x, y = batch()
        schedule.step(x, y)
        for index, layers in enumerate(body):
            out = x
            for k in layers:
                out = copies[k](out)
            loss = F.cross_entropy(heads[index](out) if index < 2 else out, y)
            owned = [p for k in layers for p in copies[k].parameters()]
            owned += list(heads[index].parameters()) if index < 2 else []
            for p, g in zip(owned, torch.autograd.grad(loss, owned), strict=True):
                p.data -= 0.01 * g.sign()
            x = out.detach()
    ours = dict(net.model.named_parameters())
    for name, p in copies.named_parameters():
        torch.testing.assert_close(ours[name], p, rtol=0, atol=1e-12)


def test_the_head_is_known_by_name_and_refuses_what_it_cannot_read():
    example("bottleneck_head")
    assert "bottleneck" in head_names()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    data = (torch.randn(2, 3, 6, 6), torch.tensor([0, 1]))
    net = sedona_fx.decouple(model, data, cuts=["1"], heads="bottleneck")
    assert net.plan.heads == ("bottleneck",)
    assert tuple(next(net.blocks[0].head.parameters()).shape) == (4, 8, 1, 1)
    with pytest.raises(HeadError, match="a head for images and class scores"):
        sedona_fx.decouple(chain(), batch(), cuts=["1"], heads="bottleneck")


def test_the_pass_counts_and_is_verified():
    count_nodes = example("count_nodes")["count_nodes"]
    net = sedona_fx.decouple(chain(), batch(), cuts=["1", "2"], heads="linear")
    nodes = net.graph_module.graph.nodes
    counts = count_nodes(net.graph_module).meta["nodes"]
    assert sum(counts.values()) == sum(node.op in ("call_function", "call_method", "call_module") for node in nodes)
    assert counts == {0: 6, 1: 4, 2: 3}  # layers and activations; block 0 and 1 a head and a detach as well
    with pytest.raises(sedona_fx.errors.GraphSpecError):
        count_nodes(torch.fx.symbolic_trace(chain()))


def test_the_search_draws_among_the_places_by_its_seed():
    search = example("random_search")["RandomSearch"]()

    def make(seed):
        return sedona_fx.decouple(chain(), batch(), blocks=3, search=search, heads=["linear", "mlp"], seed=seed)

    places = list(sedona_fx.decouple(chain(), batch(), blocks=3, search=Uniform(), heads=["linear"]).plan.base_layers)
    for seed in range(4):
        plan = make(seed).plan
        draws = random.Random(seed)
        chosen = sorted(draws.sample(range(len(places)), 2))
        assert plan.cuts == tuple(places[k] for k in chosen)
        assert plan.heads == tuple(("linear", "mlp")[draws.randrange(2)] for _ in chosen)
        assert plan.provenance["search"] == "random"
