"""Checkpoints that do not fit, or are damaged: an error, nothing loaded, nothing lost."""

import copy
import random

import pytest
import torch
from resuming import EPOCHS, LOADERS, Run, Stateful, assert_equal
from small import Chain, batches, make_net, sgd

from sedona_fx.errors import CheckpointError, NonFiniteLossError
from sedona_fx.train import Backprop, Greedy, fit


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "c.pt"
    Run(LOADERS["list"]).go(path, every=1, kill=6)
    return path


def refused(path, match, run=None, **options):
    """Assert that nothing was loaded, and that the file is still there as it was."""
    run = run or Run(LOADERS["list"])
    content = path.read_bytes()
    net = copy.deepcopy(run.net.state_dict())
    rates = options.pop("lr_scheduler", run.make_rates)
    with pytest.raises(CheckpointError, match=match):
        fit(
            run.net,
            run.loader,
            epochs=EPOCHS,
            schedule=run.schedule,
            checkpoint=path,
            lr_scheduler=rates,
            progress=False,
            **options,
        )
    assert_equal(dict(run.net.state_dict()), dict(net))
    assert run.net.steps == 0
    assert not any(o.state for o in run.schedule.optimizers)
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no temporary files"


@pytest.mark.parametrize("keep", [0, 10, 500, -1])
def test_truncated(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, r"cannot read the checkpoint.*Delete it to start anew")


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {"format": 1}, torch.zeros(3), {"format": 2}])
def test_foreign(path, content):
    torch.save(content, path)
    refused(path, r"is no checkpoint of this version|is damaged: the field 'epoch'")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sums": None}, "damaged: the field 'sums'"),
        ({"history": [{"epoch": 0}]}, "is damaged: its history"),
        ({"schedule": {}}, "its schedule is None"),
        ({"rates": [3]}, "damaged"),
        ({"rates": [["OneCycleLR", {}]]}, "holds the LR schedulers"),
        ({"streams": [torch.zeros(3)]}, "a loader of another kind"),
        ({"net": {}}, r"belongs to another net: 'heads.0.*missing in the file"),
    ],
)
def test_damaged(path, change, match):
    torch.save({**torch.load(path), **change}, path)
    refused(path, match)


def test_of_another_run(path):
    refused(path, r"written with seed=0, not 1", seed=1)
    refused(path, r"LR schedulers \['OneCycleLR'.*this run has \[\]", lr_scheduler=None)
    refused(path, r"its schedule is 'Greedy', here it is 'Backprop'", Run(LOADERS["list"], Backprop))
    refused(path, r"optimizer types", Run(LOADERS["list"], optimizer=torch.optim.Adam))
    other = Run(LOADERS["list"])
    other.net = make_net(Chain(norm=False), norm=False)
    other.schedule = Greedy(other.net, sgd)
    refused(path, r"optimizer shapes", other)
    single = Run(LOADERS["list"])
    single.net = make_net(drop=0.3, dtype=torch.float32)
    single.schedule = Greedy(single.net, sgd)
    refused(path, r"'heads.0.0.bias' is \(5,\) float64 in the file and \(5,\) float32 here", single)


def test_the_loader_has_become_shorter(path):
    run = Run(lambda: batches(1))
    with pytest.raises(CheckpointError, match=r"behind batch 2 of an epoch, and the loader now gives 1 batches"):
        run.go(path)


def test_a_state_that_could_not_be_read_again_is_known_at_once(tmp_path):
    class Strange(Stateful):
        def state_dict(self):
            return {"order": random.Random(3)}

    with pytest.raises(CheckpointError, match=r"could be written but not read again.*plain numbers"):
        Run(Strange).go(tmp_path / "c.pt", every=1)
    assert not list(tmp_path.iterdir())


def test_the_last_checkpoint_stands_after_a_bad_loss(tmp_path):
    run = Run(LOADERS["list"])
    path = tmp_path / "c.pt"
    run.go(path, every=1, kill=5)
    run = Run(LOADERS["list"])
    run.net.engine.loss = lambda output, target: output.sum() * float("nan")
    with pytest.raises(NonFiniteLossError, match=r"block 0 is nan at step 5"):
        run.go(path, every=1)
    straight, again = Run(LOADERS["list"]), Run(LOADERS["list"])
    straight.go()
    again.go(path)
    assert_equal(again.state(), straight.state())
