"""What is said where a model has fewer places to cut than the blocks asked for need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import fx

from sedona_fx.capture.whole.chosen import CHOSEN
from sedona_fx.capture.whole.grad_calls import derivatives
from sedona_fx.heads.context import HeadSpec
from sedona_fx.heads.registry import is_built_in


def shortage(
    train: fx.GraphModule,
    blocks: int,
    legal: Collection[str],
    candidates: Mapping[str, Sequence[HeadSpec]],
    places: int,
) -> str:
    """Return how many cuts are needed, and how many places there are and why no more.

    Args:
        train: the ANALYSED train graph.
        blocks: K.
        legal: names of the legal cut points.
        candidates: those of them at which a head can stand -> the heads.
        places: how many of these leave no block without parameters.
    """
    cuts = f"{blocks - 1} cuts"
    points = f"{len(legal)} legal cut point{'' if len(legal) == 1 else 's'}{_with_heads(legal, candidates)}"
    enough = f"{places + 1} block{'s' if places else ''}"
    return (
        f"{blocks} blocks need {cuts}; this model has {points}, enough for {enough} with parameters in each."
        f"{_frozen(train)}{_whole(train)}{derivatives(train.graph)}"
    )


def _with_heads(legal: Collection[str], candidates: Mapping[str, Sequence[HeadSpec]]) -> str:
    """Return at how many of the legal cut points a head can stand, where that is not all of them."""
    if len(candidates) == len(legal):
        return ""
    built_in = all(is_built_in(spec) for specs in candidates.values() for spec in specs)
    return f", {len(candidates)} of them with a {'built-in ' if built_in else ''}head that fits"


def _whole(train: fx.GraphModule) -> str:
    """Return which modules stay whole because their code cannot be recorded, and why the first does."""
    reasons: Mapping[str, str] = train.meta.get(CHOSEN, {})
    if not reasons:
        return ""
    paths = ", ".join(map(repr, reasons))
    return (
        f" {paths} stay{'' if len(reasons) > 1 else 's'} whole ({next(iter(reasons.values()))}) Put these lines into a "
        "module of their own: only that one stays whole then."
    )


def _frozen(train: fx.GraphModule) -> str:
    """Return what is to be said of frozen parameters, if there are any, where there are too few cut points."""
    flags = [parameter.requires_grad for parameter in train.parameters()]
    if all(flags):
        return ""
    return (
        f" {flags.count(False)} of its {len(flags)} parameters are frozen (requires_grad=False), and no block is made "
        "without parameters to train: take fewer blocks, unfreeze some, or name cuts=[...]."
    )
