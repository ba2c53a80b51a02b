"""Searches that choose cuts by rule: balanced, uniform, latest.

Files

balanced    Balanced cuts: the largest block costs as little as it can, exactly
head_rule   The rules by which a cut gets one of its candidate heads: the first one, or the largest
latest      Latest cuts: a control with one deep first block, followed by the shortest blocks possible
layer_rule  Rules that name the base layers to cut after; a budget moves the cuts as little as it must
uniform     Uniform cuts, the baseline of SEDONA's paper
"""

__all__: list[str] = []  # internal
