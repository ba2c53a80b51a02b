"""The comparison of all methods, on digits: the same function as on CIFAR-10, a few seconds long."""

import tarfile
from io import BytesIO
from pathlib import Path

import cifar
import memory
import methods
import page
import pytest
import torch
from memory_ways import Measured, Way
from PIL import Image
from sklearn.datasets import load_digits

import sedona_fx

TEXT = "# Methods\n\nBefore.\n\n<!-- methods: begin -->\nold\n<!-- methods: end -->\n\nAfter.\n"


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    images = torch.nn.functional.interpolate(images, scale_factor=4)  # VGG halves a map five times
    labels = torch.tensor(data.target)
    return (images[:320], labels[:320]), (images[320:384], labels[320:384])


def small():
    return sedona_fx.models.vgg11(num_classes=10, width=1 / 16)


@pytest.fixture(scope="module")
def rows(digits):
    torch.manual_seed(0)
    return methods.compare(methods.METHODS, small, *digits, epochs=2, batch=32, lr=0.05, seeds=[0])


def test_every_method_learns(rows):
    assert [row["method"] for row in rows] == list(methods.METHODS)
    assert len(rows) == 12
    for row in rows:
        assert len(row["training loss"]) == len(row["test accuracy, %"]) == 2
        assert row["training loss"][1] < row["training loss"][0], row["method"]
        assert row["seconds an epoch"] > 0
        assert row["falls to"] < 1, row["method"]  # in every block


def test_replay_without_noise_is_greedy(rows):
    found = {row["method"]: row for row in rows}
    for column in ("training loss", "test accuracy, %", "falls to"):
        assert found["Replay"][column] == found["Greedy"][column]
        assert found["Backprop"]["training loss"] != found["Greedy"]["training loss"]


def test_seeds_are_averaged_and_each_begins_anew(digits):
    (images, labels), test = digits
    some = {"Backprop": methods.METHODS["Backprop"]}
    how = {"epochs": 1, "batch": 32, "lr": 0.02}
    part = images[:64], labels[:64]
    one, two, both = (methods.compare(some, small, part, test, seeds=seeds, **how)[0] for seeds in ([0], [1], [0, 1]))
    mean = (one["training loss"][0] + two["training loss"][0]) / 2
    assert both["training loss"][0] == pytest.approx(mean, abs=1e-4)
    assert "spread" in both
    assert "spread" not in one


def test_the_table_goes_into_the_page_and_leaves_the_rest(rows, tmp_path):
    path = tmp_path / "methods.md"
    path.write_text(TEXT)
    for _ in range(2):  # the second table replaces the first one
        page.fill(path, "methods", methods.page(rows, "Title"))
    written = path.read_text()
    assert written.startswith("# Methods\n\nBefore.\n\n<!-- methods: begin -->\n\nTitle.\n")
    assert written.endswith("|\n\n<!-- methods: end -->\n\nAfter.\n")
    assert "old" not in written
    assert written.count("| Greedy + PredSim |") == 1
    with pytest.raises(ValueError, match="memory: begin"):
        page.fill(path, "memory", "")


def test_the_page_that_is_shipped_has_both_places(tmp_path):
    copied = tmp_path / "methods.md"
    copied.write_text((Path(__file__).parents[2] / "docs/methods.md").read_text())
    for part in ("methods", "memory"):
        page.fill(copied, part, "a table")
    assert copied.read_text().count("a table") == 2


# ---- batches --------------------------------------------------------------------------------------------------------


def test_batches_are_the_same_for_everybody_and_new_in_every_epoch():
    images, labels = torch.randn(20, 3, 8, 8), torch.arange(20)
    first, second = (cifar.Batches(images, labels, 8, seed=3) for _ in range(2))
    assert len(first) == len(list(first)) == 2
    for (x, y), (a, b) in zip(first, second, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
    second.set_epoch(1)
    assert not torch.equal(next(iter(first))[1], next(iter(second))[1])
    assert len({int(label) for _, y in first for label in y}) == 16


def test_a_crop_is_a_part_of_the_padded_image_or_of_its_mirror():
    images = torch.arange(1, 17.0).view(1, 1, 4, 4).repeat(16, 3, 1, 1)
    padded = torch.nn.functional.pad(images[0], [2] * 4)
    windows = {tuple(w.flatten().tolist()) for w in padded[0].unfold(0, 4, 1).unfold(1, 4, 1).reshape(-1, 4, 4)}
    mirrored = {tuple(torch.tensor(w).view(4, 4).flip(1).flatten().tolist()) for w in windows}
    (x, _), seen = next(iter(cifar.Batches(images, torch.zeros(16), 16, seed=0, pad=2))), set()
    for image in x:
        assert torch.equal(image[0], image[2])
        seen.add(tuple(image[0].flatten().tolist()))
    assert seen <= windows | mirrored
    assert seen & mirrored - windows
    assert seen & windows - mirrored


# ---- CIFAR-10 in each of its forms ----------------------------------------------------------------------------------


def images_by_name():
    colours = {"cat": (250, 0, 0), "dog": (0, 0, 250)}
    return {
        f"{part}/{name}/{k:04}.png": Image.new("RGB", (32, 32), colour)
        for part in ("train", "test")
        for name, colour in colours.items()
        for k in (1, 0)
    }


def test_an_archive_and_folders_give_the_same_images(tmp_path):
    folders, archives = tmp_path / "folders", tmp_path / "archives"
    archives.mkdir()
    with tarfile.open(archives / cifar.ARCHIVE, "w:xz") as archive:
        for name, image in images_by_name().items():
            (folders / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(folders / name)
            content = BytesIO()
            image.save(content, "png")
            entry = tarfile.TarInfo(name)
            entry.size = content.tell()
            content.seek(0)
            archive.addfile(entry, content)
    for root in (folders, archives):
        for images, labels in cifar.cifar10(root, 10, 10):  # the first of each class
            assert images.shape == (2, 3, 32, 32)
            assert labels.tolist() == [0, 1]
            assert images[0, 0, 0, 0] > 0 > images[1, 0, 0, 0]


def test_where_there_is_no_cifar_it_says_so(tmp_path):
    with pytest.raises(SystemExit, match=r"no CIFAR-10 in .*cifar10-jpeg\.tar\.xz"):
        cifar.cifar10(tmp_path, 10, 10)


# ---- the table of memory, without measuring -------------------------------------------------------------------------


def test_goals_and_page_of_the_memory_benchmark():
    def measured(name, peak, seconds=1.0, **about):
        return Measured(Way(name, lambda: None, **about), peak << 20, seconds=seconds)

    names, late = ("Backprop", "Greedy", "BackLink, reach 1", "Replay"), ("Delayed, stashed", "Delayed, current")
    base = measured("plain backprop", 1000, 2.0)
    results = {
        "no blocks": [measured("plain backprop", 1000), measured("checkpoint, 9 segments", 200, 1.3)],
        "K = 4": [base, *(measured(name, 250, 1.8) for name in names)],
        "K = 4, delayed gradients": [base, *(measured(name, 250, 1.8) for name in late)],
        "K = 8": [base, *(measured(name, 150, 1.8) for name in names)],
        "K = 8, delayed gradients": [base, *(measured(name, 150, 1.8) for name in late)],
    }
    results["K = 4, delayed gradients"][-2] = Measured(Way("Delayed, stashed", lambda: None), needed=28 << 30)
    named = {group: {one.way.name: one for one in ways} for group, ways in results.items()}
    found = {entry["name"]: entry["value"] for entry in memory._goals(named)}
    assert found["K = 8, Greedy: bytes beside checkpoint, 9 segments"] == 0.75
    assert found["K = 8, Greedy: time beside checkpoint, 9 segments"] == pytest.approx(0.9 / 1.3, abs=1e-4)
    assert found["K = 4, BackLink, reach 1: bytes beside Greedy"] == 1
    assert "K = 4, Features Replay: bytes beside DDG" not in found
    rows = [row for group in named for row in memory._rows(group, named[group])]
    lines = memory.page(rows, "title").splitlines()
    assert lines[2] == "| way | K = 4 | K = 8 |"
    assert "| checkpoint, 9 segments | 20.0 %, 1.30 | 20.0 %, 1.30 |" in lines
    assert "| Greedy | 25.0 %, 0.90 | 15.0 %, 0.90 |" in lines
    assert "| Delayed, stashed | needs about 28 GiB | 15.0 %, 0.90 |" in lines
    assert not any(line.startswith("| plain backprop") for line in lines)
