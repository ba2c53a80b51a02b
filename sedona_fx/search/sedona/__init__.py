"""SEDONA's search (Pyeon et al., ICLR 2021): bilevel optimisation of cuts and heads."""
