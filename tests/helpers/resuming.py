"""Training runs that can be killed, on loaders of all kinds."""

import random

import numpy as np
import torch
from small import batch, batches, make_net, sgd
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from sedona_fx.rng import random_states
from sedona_fx.train import Greedy, fit

EPOCHS, STEPS = 3, 4  # batches of 6, 6, 6 and 2


class Noisy(Dataset):
    """Examples with noise from all three global streams, as augmentation has it."""

    def __init__(self):
        self.x, self.y = batch(20)

    def __len__(self):
        return 20

    def __getitem__(self, k):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return self.x[k] + 0.1 * noise, self.y[k]


class Stateful:
    """A loader with an order, a position and a state of its own."""

    def __init__(self):
        self.generator, self.position, self.order = torch.Generator().manual_seed(5), 0, None
        self.data = batches(STEPS)

    def __len__(self):
        return STEPS

    def __iter__(self):
        if self.order is None:
            self.order = torch.randperm(STEPS, generator=self.generator).tolist()
        while self.position < STEPS:
            self.position += 1
            yield self.data[self.order[self.position - 1]]
        self.position, self.order = 0, None

    def state_dict(self):
        return {"position": self.position, "order": self.order, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.position, self.order = state["position"], state["order"]
        self.generator.set_state(state["generator"])


class Finished(Stateful):
    """As torchdata's: at the end of an epoch its state says so, and loading that gives an empty pass first."""

    def __iter__(self):
        if self.position >= STEPS and not self.loaded:
            self.position, self.order = 0, None
        self.loaded = False
        if self.order is None:
            self.order = torch.randperm(STEPS, generator=self.generator).tolist()
        while self.position < STEPS:
            self.position += 1
            yield self.data[self.order[self.position - 1]]

    loaded = False

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.loaded = True


LOADERS = {
    "shuffled": lambda: DataLoader(Noisy(), batch_size=6, shuffle=True),
    "own generator": lambda: DataLoader(
        Noisy(), batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "batch sampler": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(range(20), generator=torch.Generator()), 6, False)
    ),
    "list": lambda: batches(STEPS),
    "own state": Stateful,
    "finished state": Finished,
}


class Killed(Exception):
    pass


class Run:
    """One process of a training run."""

    def __init__(self, make_loader, kind=Greedy, optimizer=sgd, rates=True):
        self.net = make_net(drop=0.3)
        self.schedule = kind(self.net, optimizer)
        self.loader = make_loader()
        self.rates = []
        self.make_rates = self.rate if rates else None

    def rate(self, optimizer):
        self.rates.append(lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=EPOCHS * STEPS + 1))
        return self.rates[-1]

    def go(self, path=None, every=None, kill=None, epochs=EPOCHS):
        step, taken = self.schedule.step, []

        def killable(x, y):
            if len(taken) == kill:
                raise Killed
            taken.append(1)
            return step(x, y)

        self.schedule.step = killable
        options = {"lr_scheduler": self.make_rates, "lr_interval": "step", "val_loader": batches(2), "progress": False}
        try:
            self.history = fit(
                self.net,
                self.loader,
                epochs=epochs,
                schedule=self.schedule,
                checkpoint=path,
                checkpoint_every=every,
                **options,
            )
        except Killed:
            return len(taken)
        return len(taken)

    def state(self):
        """Return everything that must be equal, bit for bit."""
        epochs = [(e.epoch, e.losses, e.val_loss, e.val_accuracy) for e in self.history.epochs]
        return {
            "net": dict(self.net.state_dict()),
            "schedule": self.schedule.state_dict(),
            "rates": [rate.state_dict() for rate in self.rates],
            "history": epochs,
            "random": random_states([]),
        }


def assert_equal(a, b, where="state"):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{k}")
    else:
        assert a == b, where


def assert_killed_runs_agree(loader, kind, kills, folder):
    """Assert that runs of two epochs that were killed after some steps end as one does that never stopped."""
    straight = Run(loader, kind)
    assert straight.go(epochs=2) == 2 * STEPS
    expected = straight.state()
    for kill in kills:
        path = folder / f"{kill}.pt"
        assert Run(loader, kind).go(path, every=1, kill=kill, epochs=2) == kill
        disturb()
        again = Run(loader, kind)
        assert again.go(path, every=1, epochs=2) == 2 * STEPS - kill
        assert_equal(again.state(), expected, f"killed after {kill} steps")


def disturb():
    """Leave the global streams as a fresh process does not find them."""
    torch.manual_seed(987)
    random.seed(654)
    np.random.seed(321)
