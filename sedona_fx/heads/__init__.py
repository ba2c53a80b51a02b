"""Auxiliary heads: what a head is built for, the built-in heads, and the registry for heads of the user.

Files

batched         Run several heads on one activation with fewer operators: equal layers of different heads run as one
context         What an auxiliary head is built for, and the two ways to specify one: a registered name or a factory
dtypes          The dtypes of a head: it reads what is at its cut, and gives what the model gives
fit             Which built-in head fits which activation and output, and the head's sizes for them
layers          The layers that the built-in auxiliary heads are built of
nets            The nets of the built-in auxiliary heads: plain functions that return an `nn.Sequential`
objective       Local objectives of the user: what a block learns in place of the model's own task
pointwise_pool  1x1 convolution, BatchNorm, ReLU and global average pool as one layer that never stores the wide
                activation
pooled_relu     Mean over positions of relu(W x + b), twice differentiable, without ever storing what is averaged
registry        The registry of auxiliary heads: small nets that map the activation at a cut to the model's primary
                output
rows            Where a tensor holds the examples of a batch, and a head that gets them first wherever they are
"""

__all__: list[str] = []  # internal
