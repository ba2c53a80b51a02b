"""A net in a wrapper of PyTorch for several processes or devices is refused, with the way that works; that works."""

import copy
import gc
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import two_ranks
from small import batch, make_net, same, sgd
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import sedona_fx
from sedona_fx.errors import ParallelError
from sedona_fx.train import BackLink, Backprop, Delayed, Greedy, Replay

WAY = (
    r"(?s)net\.backward\(x, y\).*dist\.all_reduce\(p\.grad\); p\.grad /= dist\.get_world_size\(\).*optimizer\.step\(\)"
)


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Holder(nn.Module):
    """Someone's module that holds a net."""

    def __init__(self, net):
        super().__init__()
        self.inner = nn.ModuleDict({"net": net})
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.inner["net"](x)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "FullyShardedDataParallel": lambda m: FullyShardedDataParallel(m, device_id=torch.device("cpu")),
    "fully_shard": lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (1,))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapping_a_net_is_refused_with_the_way_that_works(name, one_process):
    net, plain = make_net(), make_net()
    before = dict(net.named_parameters())
    with pytest.raises(ParallelError, match=rf"{name}.* does not train a net") as caught:
        WRAPPERS[name](net)
    assert caught.match(WAY)
    assert all(net.get_parameter(key) is p and type(p) is nn.Parameter for key, p in before.items())
    for each in (net, plain):  # it is as good as one that was never touched
        Greedy(each, sgd).step(*batch())
    same(net, plain)


@pytest.mark.parametrize("name", WRAPPERS)
def test_so_is_wrapping_what_holds_a_net(name, one_process):
    with pytest.raises(ParallelError, match="does not train a net"):
        WRAPPERS[name](Holder(make_net(dtype=torch.float32)))


def test_replicas_of_a_net_are_refused_however_they_are_made(one_process):
    with pytest.raises(ParallelError, match="one device alone would train"):
        make_net()._replicate_for_data_parallel()
    with pytest.raises(ParallelError, match="fully_shard or replicate does not train a net"):
        replicate(make_net())


def test_subclasses_of_wrappers_are_noticed(one_process):
    class Own(DistributedDataParallel):
        pass

    with pytest.raises(ParallelError, match="every process would train by itself"):
        Own(make_net())


def test_hooks_and_modules_of_other_people_are_let_pass(one_process):
    net, calls = make_net(), []
    net.register_forward_pre_hook(lambda module, args: calls.append(1))
    assert Holder(net)(batch()[0]).shape == (8, 3)
    assert calls == [1]
    model = nn.Linear(2, 2)
    assert DistributedDataParallel(model).module is model
    assert nn.DataParallel(model).module is model
    assert isinstance(torch.compile(net), nn.Module)


SCHEDULES = {
    "greedy": Greedy,
    "backprop": Backprop,
    "backlink": lambda net, optimizer: BackLink(net, optimizer, reach=1),
    "replay": lambda net, optimizer: Replay(net, optimizer, capacity=2),
    "delayed": Delayed,
}


@pytest.mark.parametrize("name", [*SCHEDULES, "net.backward", "net.losses"])
def test_no_step_while_the_model_inside_is_in_a_wrapper(name, one_process):
    net, plain = make_net(), make_net()
    wrapper = DistributedDataParallel(net.model)
    x, y = batch()

    def step(each):
        if name in SCHEDULES:
            SCHEDULES[name](each, sgd).step(x, y)
        elif name == "net.losses":
            sum(each.losses(x, y)).backward()
        else:
            each.backward(x, y)

    assert torch.equal(copy.deepcopy(plain).eval()(x), net.eval()(x))  # to look at outputs is right
    net.train()
    with pytest.raises(ParallelError, match=r"net\.model is inside of DistributedDataParallel") as caught:
        step(net)
    assert caught.match(WAY)
    del wrapper, caught
    gc.collect()
    step(net)
    step(plain)
    same(net, plain)


def test_backpropagation_through_a_wrapped_model_is_right(one_process):
    net, plain = make_net(), make_net()
    wrapper, (x, y) = DistributedDataParallel(net.model), batch()
    nn.functional.cross_entropy(wrapper(x), y).backward()
    nn.functional.cross_entropy(plain.model(x), y).backward()
    for ours, theirs in zip(net.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


SHARDED = {
    "FullyShardedDataParallel": lambda net: FullyShardedDataParallel(net.model, device_id=torch.device("cpu")),
    "fully_shard": lambda net: fully_shard(net.model, mesh=init_device_mesh("cpu", (1,))),
    "fully_shard, a stage": lambda net: fully_shard(net.model.stages[1], mesh=init_device_mesh("cpu", (1,))),
}


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("kind", [Greedy, Backprop, Delayed])
def test_a_model_that_was_sharded_inside_of_a_net_is_refused_by_name(name, kind, one_process):
    net = make_net(dtype=torch.float32)
    wrapper = SHARDED[name](net)
    with pytest.raises(
        ParallelError, match=r"was sharded by torch\.distributed since the model was decoupled"
    ) as caught:
        kind(net, sgd).step(*batch(dtype=torch.float32))
    assert caught.match(WAY)
    del wrapper


def test_two_processes(tmp_path):
    """The lines of the message train as one process does on both halves of every batch; a wrapper trains nothing."""
    command = [sys.executable, two_ranks.__file__, str(tmp_path)]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(two_ranks.RANKS)]
    net = two_ranks.net_of(two_ranks.model())
    alone = Greedy(net, two_ranks.sgd)
    for x, y in two_ranks.data():
        alone.step(x, y)
    for name in ("loop", "schedule"):
        for key, value in net.state_dict().items():
            assert torch.equal(ranks[0][name][key], ranks[1][name][key]), key
            torch.testing.assert_close(ranks[0][name][key], value, rtol=1e-12, atol=1e-14, msg=key)
    model, (x, y) = two_ranks.model(), two_ranks.data()[0]
    optimizer = two_ranks.sgd(model.parameters())
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    for rank in ranks:
        assert rank["wrapped"].startswith("ParallelError: DistributedDataParallel does not train a net")
        assert rank["model wrapped"].startswith("ParallelError: net.model is inside of DistributedDataParallel")
        assert len(rank["told"]) == 1
        assert "made of the model inside of DistributedDataParallel, which averages no gradients" in rank["told"][0]
        for key, value in model.state_dict().items():
            torch.testing.assert_close(rank["backprop"][key], value, rtol=1e-12, atol=1e-14, msg=key)


def test_a_wrapped_model_of_one_process_is_taken_without_a_word(one_process):
    model = two_ranks.model()
    net = sedona_fx.decouple(DistributedDataParallel(model), two_ranks.data()[0], cuts=["0"], heads="linear")
    x, _ = two_ranks.data()[0]
    assert torch.equal(net(x), model(x))
