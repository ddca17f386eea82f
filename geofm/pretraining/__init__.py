"""Pretraining: a student that fills in what is masked and follows a frozen teacher (GFM)."""

from geofm.pretraining.export import features, load_model, random_model

__all__ = ["features", "load_model", "random_model"]
