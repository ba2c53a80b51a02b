"""How a lowered net is trained: the block engine, one file a schedule, and ``fit``."""

from sedona_fx.train.backlink import BackLink
from sedona_fx.train.backprop import Backprop
from sedona_fx.train.block import Block, StepResult
from sedona_fx.train.codec import Codec
from sedona_fx.train.delayed import Delayed
from sedona_fx.train.evaluate import evaluate
from sedona_fx.train.extra_losses import KineticEnergy, PredSim
from sedona_fx.train.fit import History, fit
from sedona_fx.train.greedy import Greedy
from sedona_fx.train.infopro import InfoPro
from sedona_fx.train.quantize import VectorQuantizer
from sedona_fx.train.random import block_seed
from sedona_fx.train.replay import Replay
from sedona_fx.train.schedule import Schedule

__all__ = [
    "BackLink",
    "Backprop",
    "Block",
    "Codec",
    "Delayed",
    "Greedy",
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
