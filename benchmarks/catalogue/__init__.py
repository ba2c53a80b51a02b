"""The models of the support table, by family. Packages are imported when a model is built; see ``Entry.needs``."""

from catalogue.adapters import entries as adapters
from catalogue.diffusers_models import entries as diffusers_models
from catalogue.entry import Entry
from catalogue.graphs import entries as graphs
from catalogue.language import entries as language
from catalogue.monai_models import entries as monai_models
from catalogue.segmentation_models import entries as segmentation_models
from catalogue.timm_models import entries as timm_models
from catalogue.towers import entries as towers
from catalogue.ultralytics_models import entries as ultralytics_models
from catalogue.vision import entries as vision
from catalogue.x_transformers_models import entries as x_transformers_models

__all__ = ["Entry", "catalogue"]

FAMILIES = (
    vision,
    timm_models,
    language,
    segmentation_models,
    monai_models,
    diffusers_models,
    x_transformers_models,
    graphs,
    adapters,
    ultralytics_models,
    towers,
)
"""In the order of the table."""


def catalogue() -> dict[str, Entry]:
    """Return every entry by ``family/name``, in the order of the table."""
    return {f"{entry.family}/{entry.name}": entry for entries in FAMILIES for entry in entries()}
