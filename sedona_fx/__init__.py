"""Decoupled training for any PyTorch model: search where to cut, train the blocks by local losses."""

from sedona_fx import models, search, train
from sedona_fx.data.args import Args
from sedona_fx.decouple import decouple, load
from sedona_fx.errors import SedonaError
from sedona_fx.heads.context import HeadContext
from sedona_fx.heads.objective import LocalLoss
from sedona_fx.heads.registry import register_head
from sedona_fx.net.net import Net
from sedona_fx.plan import Plan
from sedona_fx.recipes.pareto import Front, pareto
from sedona_fx.recipes.released import released_plan
from sedona_fx.recipes.transfer import transfer_plan
from sedona_fx.search import Limits
from sedona_fx.train import fit

__version__ = "0.1.0"

__all__ = [
    "Args",
    "Front",
    "HeadContext",
    "Limits",
    "LocalLoss",
    "Net",
    "Plan",
    "SedonaError",
    "__version__",
    "decouple",
    "fit",
    "load",
    "models",
    "pareto",
    "register_head",
    "released_plan",
    "search",
    "train",
    "transfer_plan",
]
