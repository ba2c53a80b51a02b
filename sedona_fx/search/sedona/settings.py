"""Settings of SEDONA's search, checked on construction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from sedona_fx.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class SedonaSettings:
    """Settings of the search. Numbers of steps that are None are derived from the cost, `training_steps`.

    Args:
        training_steps: SGD steps of the training run that the search serves; the search costs no more than these. None:
            100 epochs of the training data.
        warmup_steps: relaxed training steps before alpha and beta are learned. None: what half of the cost pays for.
        meta_steps: updates of alpha and beta. None: what the rest of the cost pays for.
        snapshots: states of the relaxed net to learn alpha and beta at, spread over the warm-up. None: at most 10.
        unroll: T, the number of training steps that the validation loss is differentiated through. T = 1 needs no
            second-order graph of the net.
        sampled_cuts: number of cuts whose heads run in an ordinary relaxed step; they are drawn anew in each step. The
            gradient of the base layers stays unbiased, and a head trains in the steps in which it is drawn
            (:func:`~sedona_fx.search.relaxed.training_step.sample_cuts`). Unrolled steps always run all heads. None:
            all.
        lr: learning rate of relaxed training; over the warm-up it falls by a cosine to a hundredth of it.
        momentum: of relaxed training.
        weight_decay: of relaxed training.
        meta_lr: Adam's learning rate for alpha and beta.
        meta_betas: Adam's decay rates.
        meta_weight_decay: Adam's weight decay.
        decode: how cuts and heads follow from what was learned. ``"argmax"``: as in the paper, the K-1 places with the
            largest p_isolate, and the most likely head of each. ``"perturbation"``: cuts and heads jointly, by the
            validation loss after each of them has been made a hard choice
            (:mod:`~sedona_fx.search.sedona.perturbation`). It takes a quarter of the cost (of `training_steps`, of
            `seconds`, or of the whole where the numbers of steps are given). If that does not pay for trying every
            choice, those with the largest learned weights are tried.
        perturbation_steps: relaxed training steps per trial of that decoding. None: 5 to 50, as the cost allows. If
            `warmup_steps` and `meta_steps` are given too, every choice is tried, whatever it costs.
        val_batch_size: samples per validation batch, for the caller who makes the batches. None: as in training.
        seconds: how long the search may take, in place of the three numbers of steps above. A few steps are timed on
            copies before the start; the numbers of steps that follow are kept in the plan and in `folder`.
        snapshot_bytes: how many bytes of snapshots are kept in memory; the others go to disk. None: all in memory.
        folder: where the state of the search is saved. A search that was killed resumes from there when it is called
            again with the same settings, and gives the result that it would have given without the interruption. If
            the folder holds a finished search, its result is returned at once (decoding by perturbation is repeated,
            from the end of the search, with the same result). Not covered: data with a state of its own that lasts
            from epoch to epoch. None: nothing is saved.
        save_seconds: how long to wait after a save until the next one.
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
        given = [name for name in ("training_steps", "warmup_steps", "meta_steps") if getattr(self, name) is not None]
        if self.seconds is not None and (self.seconds <= 0 or given):
            why = f"it would find {given[0]} itself: give one of them" if given else "has to be above 0"
            raise SettingsError(f"Sedona(seconds={self.seconds}): {why}")

    @classmethod
    def paper(cls) -> Self:
        """Return the settings of the paper's search on CIFAR-10, as they are; nothing is scaled to another model.

        40,000 steps of relaxed training (SGD, momentum 0.9, weight decay 1e-4, learning rate 0.1 to 0.001 by cosine)
        with 50 snapshots; 2,000 meta-iterations of 5 unrolled steps, a validation batch of 1,024, and a step of Adam
        (0.01, (0.5, 0.999), weight decay 1e-6). The rest of the paper's setup is up to the caller:

        - batches of 128: the loader's;
        - label smoothing 0.1, which the authors spread over the *other* 9 classes: for PyTorch's loss that is
          ``functools.partial(F.cross_entropy, label_smoothing=0.111)``;
        - 60 % of the training set for the weights and 40 % for validation: ``decouple`` splits a map-style loader this
          way if it gets no ``val_data=``.

        The paper does not say how snapshots are spaced, and the authors' code keeps the last 50. Here they are
        spread over the whole warm-up.
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
