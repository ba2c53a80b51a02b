"""Extra losses that can be added to the local ones, one per file.

Files

base            Extra losses, to be added to the local ones: ``Greedy(net, optimizer, extra=[PredSim(0.99,
                keep=0.01)])``
infopro         InfoPro's reconstruction loss: a block keeps what is needed to reconstruct the input
kinetic_energy  Kinetic energy: base layers change their activations as little as they can (TRGL; Karkar et al.,
                2023)
predsim         PredSim: a block's activations are as similar as the targets are (Nokland, Eidnes; ICML 2019)
"""

__all__: list[str] = []  # internal
