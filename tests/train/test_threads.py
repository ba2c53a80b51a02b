"""Nets that train in several threads draw what they draw alone."""

import threading

import pytest
import torch
from kinds import ALL
from small import batch, batches, make_net, same, sgd
from torch.utils.data import DataLoader, TensorDataset

from sedona_fx.rng import block_random, seeded, seeded_init, turn
from sedona_fx.train import Backprop, Greedy, fit


def together(*functions):
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "backprop"])
def test_two_schedules(kind):
    data = batches(60, size=32)

    def train(net):
        schedule = ALL[kind](net, sgd)
        for x, y in data:
            schedule.step(x, y)

    nets = [make_net(drop=0.3) for _ in range(3)]
    train(nets[0])
    state = torch.get_rng_state()
    together(lambda: train(nets[1]), lambda: train(nets[2]))
    same(nets[0], nets[1])
    same(nets[0], nets[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_beside_a_net_that_draws_from_the_global_stream():
    data = batches(60, size=32)

    def train(schedule):
        for x, y in data:
            schedule.step(x, y)

    nets = [make_net(drop=0.3) for _ in range(4)]
    train(Greedy(nets[0], sgd))
    torch.manual_seed(1)
    train(Backprop(nets[1], sgd))
    torch.manual_seed(1)
    together(lambda: train(Greedy(nets[2], sgd)), lambda: train(Backprop(nets[3], sgd)))
    same(nets[0], nets[2])
    same(nets[1], nets[3])


def test_two_fits_shuffle_as_they_do_alone():
    def train(net, seed):
        loader = DataLoader(TensorDataset(*batch(24)), batch_size=8, shuffle=True)
        fit(net, loader, epochs=12, schedule=Greedy(net, sgd), seed=seed, progress=False)

    nets = [make_net(drop=0.3) for _ in range(4)]
    train(nets[0], 0)
    train(nets[1], 1)
    together(lambda: train(nets[2], 0), lambda: train(nets[3], 1))
    same(nets[0], nets[2])
    same(nets[1], nets[3])


def test_one_thread_may_take_its_turn_twice():
    device = torch.device("cpu")
    with turn(), block_random(0, 0, 0, device), seeded_init(1), seeded(device, 2):
        pass
