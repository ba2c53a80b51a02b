"""The decoupled net: the user's model as blocks, with its weights, devices, signature and exits."""
