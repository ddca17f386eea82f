"""Stage `pretrain`: a student that reconstructs masked patches and follows a frozen teacher (GFM).

Files, from the outside in:
    pretrain     the stage: from a dataset to a model; check: the same on a blank image,
                 beforehand; probe: its speed on synthetic batches
    launch       several processes by torchrun
    loop         the training program: setup, steps, checkpoints, divergence guard
    step         one optimisation step; data, augment, masking: its batch
    objective    the loss; student, teacher, backbone: its networks; optimiser: AdamW and schedule
    parallel     devices, reproducibility, processes; checkpoint, flops, trackers: around the loop
    export/      the model artifact, its card, the folder for Hugging Face, its STAC item

For others: ``load_model``, ``random_model`` and ``features``, which load a trained model, build its
untrained form, and compute pooled features of images.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geofm.pretraining.export.model import features, load_model, random_model

__all__ = ["features", "load_model", "random_model"]


def __getattr__(name: str) -> Any:
    """Import the model functions, and torch with them, on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from geofm.pretraining.export import model

    return getattr(model, name)
