"""Training methods, one per file, and their base classes.

Files

backlink    BackLink: the last base layers of every block are also trained by the next block's loss
backprop    Backprop: ordinary backpropagation through the whole net, as the baseline
base        Base class of all schedules: one optimizer per block, accumulation windows, gradient scaling, saved
            state
delayed     Delayed gradients: DDG and Features Replay
fitted      What a schedule remembers between two calls of ``fit``: the epochs trained, and the LR schedulers
greedy      Greedy: every block trains by its own local loss alone
headed      Base class of the schedules with local losses: extra losses added to them, and when blocks may step
optimizers  One optimizer and one gradient scaler per block, and which parameters they are for
replay      Replay: blocks train from buffers of past activations, so that they need not wait for each other
state       Check a schedule's saved state before anything of it is loaded
updating    How blocks update: unscale, clip and check the gradients, then step the optimizer
"""

__all__: list[str] = []  # internal
