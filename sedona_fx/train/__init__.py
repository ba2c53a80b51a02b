"""How a lowered net is trained: the block engine, one file a schedule, and ``fit``."""

from sedona_fx.train.backprop import Backprop
from sedona_fx.train.engine import Block, StepResult
from sedona_fx.train.evaluate import evaluate
from sedona_fx.train.fit import History, fit
from sedona_fx.train.greedy import Greedy
from sedona_fx.train.random import block_seed
from sedona_fx.train.schedule import Schedule

__all__ = ["Backprop", "Block", "Greedy", "History", "Schedule", "StepResult", "block_seed", "evaluate", "fit"]
