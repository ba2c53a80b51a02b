"""How a lowered net is trained: one file per schedule, extra losses, buffers, and ``fit``.

Files

buffers/    What schedules keep between steps: buffers of activations, stashed weights, batches in flight
losses/     Extra losses that can be added to the local ones, one per file
schedules/  Training methods, one per file, and their base classes
checkpoint  Checkpoint files of ``fit``: replaced whole, read back once per run, and fully checked before anything
            is loaded
evaluate    ``evaluate``: the mean loss, the accuracy and metrics of a net's final output
fit         ``fit``: train for some epochs, with learning rates, evaluation, progress, checkpoints and exact resume
history     What ``fit`` did, epoch by epoch
"""

from sedona_fx.rng import block_seed
from sedona_fx.runtime.block import Block, StepResult
from sedona_fx.train.buffers.codec import Codec
from sedona_fx.train.buffers.vector_quantizer import VectorQuantizer
from sedona_fx.train.evaluate import evaluate
from sedona_fx.train.fit import fit
from sedona_fx.train.history import History
from sedona_fx.train.losses.infopro import InfoPro
from sedona_fx.train.losses.kinetic_energy import KineticEnergy
from sedona_fx.train.losses.predsim import PredSim
from sedona_fx.train.schedules.backlink import BackLink
from sedona_fx.train.schedules.backprop import Backprop
from sedona_fx.train.schedules.base import Schedule
from sedona_fx.train.schedules.delayed import Delayed
from sedona_fx.train.schedules.greedy import Greedy
from sedona_fx.train.schedules.headed import Headed
from sedona_fx.train.schedules.replay import Replay

__all__ = [
    "BackLink",
    "Backprop",
    "Block",
    "Codec",
    "Delayed",
    "Greedy",
    "Headed",
    "History",
    "InfoPro",
    "KineticEnergy",
    "PredSim",
    "Replay",
    "Schedule",
    "StepResult",
    "VectorQuantizer",
    "block_seed",
    "evaluate",
    "fit",
]
