"""Decouple a residual network by search, and compare it with backpropagation and with uniform cuts, three seeds each.

    make demo
    python examples/quickstart.py
    python examples/quickstart.py --data cifar10 --data-root DIR --epochs 30

The data are scikit-learn's 1,797 handwritten digits, which are part of that package, or CIFAR-10 from a folder of
yours, in the layout of torchvision's ``CIFAR10`` or as images (``train/<class>/*``, ``test/<class>/*``). Nothing is
downloaded.

Prints the net and a table of accuracy, seconds and memory; writes ``plan.json``, ``plan.png`` and ``model.onnx`` to
``runs/quickstart/``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import onnxruntime
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import sedona_fx
from sedona_fx.measure import peak_bytes
from sedona_fx.report import plan_picture, table
from sedona_fx.search import Guided, Sedona
from sedona_fx.train import Backprop, Greedy, Schedule, evaluate

BLOCKS = 4
LEAST_STEPS = 200
"""Least cost of the search in plain training steps. With fewer it compares gradients once or twice, which is noise."""


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,257 digits to train on and 540 to test on: images (3, 8, 8) float32 in [-1, 1], labels int64."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(data.target)
    train, test = order[:1257], order[1257:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def cifar10(root: Path) -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the test images of CIFAR-10: (3, 32, 32) float32 in [-1, 1], labels int64.

    Args:
        root: folder in one of the two layouts.
    """
    import numpy as np
    from torchvision import datasets

    parts = []
    for train in (True, False):
        if (root / ("train" if train else "test")).is_dir():
            folder = datasets.ImageFolder(str(root / ("train" if train else "test")))
            images = np.stack([np.asarray(folder[k][0]) for k in tqdm(range(len(folder)), desc="reading images")])
            labels = folder.targets
        else:
            raw = datasets.CIFAR10(str(root), train=train)
            images, labels = raw.data, raw.targets
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(TensorDataset(tensor, torch.tensor(labels)))
    return parts[0], parts[1]


def main() -> None:
    """Search for a plan, train with it and with two baselines, print the comparison, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--data-root", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", choices=("guided", "sedona"), default="guided", help="sedona: the paper's search")
    parser.add_argument(
        "--search-steps",
        type=int,
        help="plain training steps that the search may cost; if not given, a quarter of a run's, 200 at least",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()
    if options.data == "cifar10" and options.data_root is None:
        parser.error("--data cifar10 needs --data-root DIR")
    train, test = digits() if options.data == "digits" else cifar10(options.data_root)
    loader = DataLoader(train, batch_size=options.batch_size, shuffle=True, drop_last=True)
    test_loader = DataLoader(test, batch_size=500)

    torch.manual_seed(0)
    model = sedona_fx.models.resnet32(num_classes=10)
    start = time.perf_counter()
    search = search_of(options.search, options.search_steps, options.epochs * len(loader))
    searched_net = sedona_fx.decouple(model, loader, blocks=BLOCKS, search=search)
    search_seconds = time.perf_counter() - start
    plan = searched_net.plan
    plan.save(options.out / "plan.json")
    plan_picture(plan, options.out / "plan.png")
    print(searched_net)

    rows, accuracies, last_net = [], {}, None
    methods = ("backprop", "uniform cuts", "found plan")
    with tqdm(total=len(methods) * options.seeds, desc="training", unit="run") as bar:
        for method in methods:
            scores, seconds, memory = [], [], 0
            for seed in range(options.seeds):
                net, schedule = make(method, plan, next(iter(loader)), seed)
                memory = peak_bytes(schedule.step, *next(iter(loader)))
                net, schedule = make(method, plan, next(iter(loader)), seed)  # fresh: that step was only measured
                history = sedona_fx.fit(
                    net,
                    loader,
                    epochs=options.epochs,
                    schedule=schedule,
                    lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, options.epochs),
                    seed=seed,
                    progress=False,
                )
                scores.append(100 * evaluate(net, test_loader)["accuracy"])
                seconds.append(history.seconds)
                last_net = net
                bar.update()
            accuracies[method] = scores
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            rows.append(
                [
                    method,
                    f"{statistics.mean(scores):.1f} ± {spread:.1f}",
                    f"{statistics.median(seconds):.1f}",
                    f"{memory / 2**20:.1f} MiB",
                ]
            )

    print()
    print(table(["", "test accuracy, %", "seconds", "peak activation memory"], rows))
    print(f"({options.seeds} seeds each, mean ± standard deviation; the search took {search_seconds:.0f} s)")
    for other in ("uniform cuts", "backprop"):
        print(verdict(accuracies["found plan"], accuracies[other], other))
    assert last_net is not None
    check_onnx(last_net, next(iter(test_loader))[0], options.out / "model.onnx")
    print(f"wrote {', '.join(str(options.out / name) for name in ('plan.json', 'plan.png', 'model.onnx'))}")


def search_of(name: str, search_steps: int | None, run_steps: int) -> Guided | Sedona:
    """Return the search.

    Args:
        name: ``"guided"`` or ``"sedona"``.
        search_steps: plain training steps that it may cost. None: as many as one training run has for ``"sedona"``, a
            quarter of that, but at least `LEAST_STEPS`, for ``"guided"``.
        run_steps: steps of one training run.
    """
    if name == "sedona":
        return Sedona(training_steps=search_steps or run_steps, unroll=1)
    return Guided(training_steps=search_steps or max(LEAST_STEPS, run_steps // 4))


def make(method: str, plan: sedona_fx.Plan, batch: list[Tensor], seed: int) -> tuple[sedona_fx.Net, Schedule]:
    """Return a new net with weights drawn from `seed`, and the schedule that trains it."""
    torch.manual_seed(seed)
    model = sedona_fx.models.resnet32(num_classes=10)
    pair = (batch[0], batch[1])

    def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)

    if method == "backprop":
        net = sedona_fx.decouple(model, pair, blocks=1, seed=seed)
        return net, Backprop(net, optimizer)
    if method == "uniform cuts":
        net = sedona_fx.decouple(model, pair, blocks=BLOCKS, search="uniform", heads=["sedona-1"], seed=seed)
    else:
        net = sedona_fx.decouple(model, pair, plan=plan, seed=seed)
    return net, Greedy(net, optimizer)


def verdict(found: list[float], other: list[float], name: str) -> str:
    """Return in words whether the accuracies of two methods differ significantly (Welch's t-test at 5 %)."""
    difference = statistics.mean(found) - statistics.mean(other)
    if len(found) < 2:
        return f"found plan against {name}: {difference:+.1f} points; one seed says nothing about noise"
    p = float(stats.ttest_ind(found, other, equal_var=False).pvalue)
    what = "exceeds the noise" if p < 0.05 else "is within the noise"
    return f"found plan against {name}: {difference:+.1f} points, which {what} (Welch's t-test, p = {p:.2f})"


def check_onnx(net: sedona_fx.Net, images: Tensor, path: Path) -> None:
    """Export a net, run the file with ONNX Runtime, and compare the result with PyTorch's."""
    net.eval()
    net.to_onnx(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net(images)
    (actual,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-4)
    print(f"ONNX Runtime and PyTorch agree on {len(images)} images: {path}")


if __name__ == "__main__":
    main()
