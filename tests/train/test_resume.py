"""A run that was killed and goes on in a fresh net ends bit for bit where one that never stopped ends."""

import copy
import random

import numpy as np
import pytest
import torch
from resuming import EPOCHS, LOADERS, STEPS, Killed, Noisy, Run, assert_equal, assert_killed_runs_agree, disturb
from small import batches, make_net, sgd
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from sedona_fx.rng import random_states, restore_random
from sedona_fx.train import Backprop, Greedy, fit


@pytest.mark.parametrize("kind", [Greedy, Backprop])
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS.keys())
def test_killed_after_any_step(loader, kind, tmp_path):
    assert_killed_runs_agree(loader, kind, range(1, 2 * STEPS), tmp_path)


def test_a_chain_of_kills_goes_back_to_the_last_checkpoint_each_time(tmp_path):
    loader = LOADERS["shuffled"]
    straight = Run(loader)
    straight.go()
    path, steps = tmp_path / "c.pt", []
    for kill in (3, 2, 5, 1, 4):  # a checkpoint every second step of an epoch, and behind each epoch
        disturb()
        steps.append(Run(loader).go(path, every=2, kill=kill))
    disturb()
    last = Run(loader)
    steps.append(last.go(path, every=2))
    assert sum(steps) > EPOCHS * STEPS
    assert_equal(last.state(), straight.state())


@pytest.mark.parametrize("epochs", [1, 2])
def test_stopped_behind_an_epoch_and_given_more(epochs, tmp_path):
    loader = LOADERS["own generator"]
    straight = Run(loader)
    straight.go()
    Run(loader).go(tmp_path / "c.pt", epochs=epochs)
    disturb()
    again = Run(loader)
    assert again.go(tmp_path / "c.pt") == (EPOCHS - epochs) * STEPS
    assert_equal(again.state(), straight.state())
    done = Run(loader)
    assert done.go(tmp_path / "c.pt") == 0
    assert_equal(done.state()["net"], straight.state()["net"])
    assert_equal(done.state()["history"], straight.state()["history"])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_with_workers(tmp_path):
    def loader():
        return DataLoader(Noisy(), batch_size=6, shuffle=True, num_workers=2)

    straight = Run(loader)
    straight.go(epochs=2)
    for kill in (2, 4, 7):
        path = tmp_path / f"{kill}.pt"
        Run(loader).go(path, every=1, kill=kill, epochs=2)
        disturb()
        again = Run(loader)
        again.go(path, every=1, epochs=2)
        assert_equal(again.state(), straight.state(), f"killed after {kill} steps")


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
        lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
        lambda params: torch.optim.Adafactor(params, lr=0.01),  # state of other shapes than its parameters
    ],
    ids=["adamw", "fused adam", "adafactor"],
)
def test_other_optimizers(optimizer, tmp_path):
    runs = [Run(LOADERS["shuffled"], optimizer=optimizer, rates=False) for _ in range(3)]
    runs[0].go()
    runs[1].go(tmp_path / "c.pt", every=1, kill=6)
    disturb()
    runs[2].go(tmp_path / "c.pt")
    assert_equal(runs[2].state(), runs[0].state())


def test_resumed_behind_the_last_batch_of_an_epoch_there_is_no_false_warning(tmp_path):
    """The LR scheduler has not seen its optimizer step: that was another process."""

    def go(kill):
        net = make_net()
        schedule = Greedy(net, sgd)
        options = {"epochs": 2, "schedule": schedule, "progress": False, "checkpoint": tmp_path / "c.pt"}
        val = Evaluation(kill)
        fit(net, batches(2), checkpoint_every=1, lr_scheduler=rate, val_loader=val, **options)
        return schedule.optimizers[0].param_groups[0]["lr"]

    def rate(optimizer):
        return lr_scheduler.ExponentialLR(optimizer, 0.5)

    with pytest.raises(Killed):
        go(True)
    assert torch.load(tmp_path / "c.pt")["batch"] == 2
    assert go(False) == pytest.approx(0.025)


class Evaluation:
    def __init__(self, kill):
        self.kill = kill

    def __iter__(self):
        if self.kill:
            raise Killed
        return iter(batches(1))


# ---- random states --------------------------------------------------------------------------------------------------


def test_all_streams_are_restored():
    disturb()
    random.gauss(0, 1)
    np.random.randn()  # both keep half of a pair of normal numbers

    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.rand(3).tolist()

    states = copy.deepcopy(random_states([torch.device("cpu"), torch.device("meta")]))
    first = draw()
    restore_random(states)
    assert draw() == first
