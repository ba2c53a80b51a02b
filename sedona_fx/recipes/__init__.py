"""Plans that no search of this net makes: transferred from another net, released by the authors, or a whole front.

``transfer`` applies a plan to a wider or deeper net, ``released`` decodes the logits of SEDONA's authors, ``pareto``
finds the front of validation loss against cost.

Files

pareto    The front of validation loss against cost: plans at every level of a cost, trained for a short while side
          by side
released  The decisions that SEDONA's authors released, as plans: their learned logits, decoded for one of their
          nets
transfer  Transfer of a plan to another net, a wider or a deeper one than it was found on
"""

__all__: list[str] = []  # internal
