"""Pretraining: a student that fills in what is masked and follows a frozen teacher (GFM)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geofm.pretraining.export.model import features, load_model, random_model

__all__ = ["features", "load_model", "random_model"]


def __getattr__(name: str) -> Any:
    """Load the models' module (and torch) when one of its functions is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from geofm.pretraining.export import model as export

    return getattr(export, name)
