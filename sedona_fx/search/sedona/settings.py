"""Settings of SEDONA's search, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from sedona_fx.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class SedonaSettings:
    """Settings of the search. What is `None` is derived, so that the cost stays within `training_steps`.

    Args:
        training_steps: SGD steps of the training run this search serves. None: 100 epochs of the weights' data.
        warmup_steps: relaxed training steps before the search proper. None: half of the cost.
        meta_steps: updates of alpha and beta. None: what the rest of the cost allows.
        snapshots: states of the relaxed net to search at, spread over the warm-up. None: at most 10.
        unroll: training steps T that the validation loss is differentiated through; one takes no second-order graph.
        sampled_cuts: how many cuts, drawn anew in each ordinary relaxed step, have their heads run. The gradient of
            base layers is unbiased, heads train when they are drawn
            (:func:`~sedona_fx.search.relaxed.training_step.sample_cuts`). Unrolled steps always have all heads. None: all.
        lr: learning rate of relaxed training; cosine to a hundredth of it over the warm-up.
        momentum: of relaxed training.
        weight_decay: of relaxed training.
        meta_lr: Adam's learning rate for alpha and beta.
        meta_betas: Adam's decay rates.
        meta_weight_decay: Adam's weight decay.
        decode: how the decision follows from what was learned. ``"argmax"``: the paper's, the K-1 places with the
            largest p_isolate, the likeliest head of each. ``"perturbation"``: cuts and heads jointly, by what making
            each of them hard does to the validation loss (:mod:`~sedona_fx.search.sedona.perturbation`). That is a quarter of
            the cost (of `training_steps`, of `seconds`, or of the whole, if the steps are given); what it does not pay
            for, the learned weights prune.
        perturbation_steps: relaxed training steps of each of its trials. None: 5 to 50, what the cost pays for. With
            `warmup_steps` and `meta_steps` given too, nothing is pruned.
        val_batch_size: samples in a validation batch, for whoever makes the batches. None: as in training.
        seconds: how long the search may take, instead of the three numbers of steps above. A few steps are measured
            before the start, on copies; the counts that follow are kept in the plan and, with `folder`, there.
        snapshot_bytes: of the snapshots, how much to keep in memory; the others go to disk. None: all in memory.
        folder: where the search writes down where it stands. A search that was killed goes on from there when it is
            called again with the same settings, and ends as if it had never stopped; one that is finished is there at
            once (decoding by perturbation starts anew then, from the end of the search, and ends with the same plan).
            Not covered: data that carries a state of its own from epoch to epoch.
        save_seconds: how long to wait from one save to the next.
    """

    training_steps: int | None = None
    warmup_steps: int | None = None
    meta_steps: int | None = None
    snapshots: int | None = None
    unroll: int = 3
    sampled_cuts: int | None = None
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4
    meta_lr: float = 1e-2
    meta_betas: tuple[float, float] = (0.5, 0.999)
    meta_weight_decay: float = 1e-6
    decode: Literal["argmax", "perturbation"] = "argmax"
    perturbation_steps: int | None = None
    val_batch_size: int | None = None
    seconds: float | None = None
    snapshot_bytes: int | None = 2**30
    folder: str | Path | None = None
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in (
            "training_steps",
            "warmup_steps",
            "meta_steps",
            "snapshots",
            "unroll",
            "sampled_cuts",
            "perturbation_steps",
            "val_batch_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"Sedona({name}={value}): has to be at least 1")
        if self.decode not in ("argmax", "perturbation"):
            raise SettingsError(f"Sedona(decode={self.decode!r}): 'argmax' or 'perturbation'")
        if self.perturbation_steps is not None and self.decode == "argmax":
            raise SettingsError(f"Sedona(perturbation_steps={self.perturbation_steps}): needs decode='perturbation'")
        steps = [n for n in ("training_steps", "warmup_steps", "meta_steps") if getattr(self, n) is not None]
        if self.seconds is not None and (self.seconds <= 0 or steps):
            why = f"it would find {steps[0]} itself: give one of them" if steps else "has to be above 0"
            raise SettingsError(f"Sedona(seconds={self.seconds}): {why}")

    @classmethod
    def paper(cls) -> Self:
        """The paper's procedure for CIFAR-10, with all of its settings. They are not scaled to anything.

        40,000 steps of relaxed training (SGD, momentum 0.9, weight decay 1e-4, learning rate 0.1 to 0.001 by cosine),
        50 snapshots on the way; 2,000 meta-iterations of 5 unrolled steps, a validation batch of 1,024, and a step of
        Adam (0.01, (0.5, 0.999), weight decay 1e-6). The rest of it lies in what the user hands over:

        - batches of 128: the loader's;
        - label smoothing 0.1, which the authors spread over the *other* 9 classes: for PyTorch's loss that is
          ``functools.partial(F.cross_entropy, label_smoothing=0.111)``;
        - 60 % of the training set for the weights and 40 % for validation: what ``decouple`` does of itself to a
          map-style loader without ``val_data=``.

        In the paper the snapshots' spacing is left open; the authors' code keeps the last 50. Here they are spread over
        the whole warm-up.
        """
        return cls(
            warmup_steps=40_000,
            meta_steps=2_000,
            snapshots=50,
            unroll=5,
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            meta_lr=1e-2,
            meta_betas=(0.5, 0.999),
            meta_weight_decay=1e-6,
            val_batch_size=1024,
        )
