"""The models of the support table, by family. timm and transformers are imported when a model of theirs is built."""

from catalogue.entry import Entry
from catalogue.language import entries as language
from catalogue.timm_models import entries as timm_models
from catalogue.vision import entries as vision

__all__ = ["Entry", "catalogue"]


def catalogue() -> dict[str, Entry]:
    """Return every entry by ``family/name``, in the order of the table."""
    return {f"{entry.family}/{entry.name}": entry for entry in (*vision(), *timm_models(), *language())}
