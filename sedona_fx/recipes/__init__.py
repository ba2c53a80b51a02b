"""Plans that no search of this net makes: transferred from another net, released by the authors, or a whole front.

``transfer`` applies a plan to a wider or deeper net, ``released`` decodes the logits of SEDONA's authors, ``pareto``
finds the front of validation loss against cost.
"""
