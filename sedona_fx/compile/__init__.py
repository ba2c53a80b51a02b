"""From a model and a decision to a net: analyse, choose, build."""
