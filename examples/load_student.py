"""Load a pretrained student into timm and compute features of chips.

    geofm export demo-model --format hf --out demo-model-hf
    python examples/load_student.py demo-model-hf chip.npy

The exported folder is all that is needed: the script imports timm and numpy, not geofm. A chip is
a .npy file of shape (bands, height, width) with the bands of the dataset, as in the shards.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the network, normalise the chips, and print the features."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder written by geofm export --format hf")
    parser.add_argument("chips", nargs="*", type=Path, help=".npy files; default: a random chip")
    parser.add_argument("--scale", default=0.0001, type=float, help="reflectance per uint16 count")
    options = parser.parse_args(arguments)

    network = timm.create_model(f"local-dir:{options.model}", pretrained=True).eval()
    config = json.loads((options.model / "config.json").read_text())
    bands, height, width = config["pretrained_cfg"]["input_size"]
    mean = torch.tensor(config["pretrained_cfg"]["mean"]).reshape(-1, 1, 1)
    std = torch.tensor(config["pretrained_cfg"]["std"]).reshape(-1, 1, 1)
    print(f"{config['architecture']}: bands {', '.join(config['geofm']['bands'])}")

    random = np.random.default_rng(0).integers(0, 3000, (bands, height, width), dtype=np.uint16)
    chips = {path.name: np.load(path) for path in options.chips} or {"random": random}
    for name, pixels in chips.items():
        # Unit pixels, as in pretraining: 8-bit counts / 255; reflectance / 0.3.
        unit = pixels / 255 if pixels.dtype == np.uint8 else pixels * (options.scale / 0.3)
        image = torch.from_numpy(unit.astype(np.float32))[None]
        image = torch.nn.functional.interpolate(image, (height, width), mode="bilinear")
        with torch.inference_mode():
            features = network((image - mean) / std)
        print(f"{name}: {features.shape[1]} features, first {features[0, :4].tolist()}")


if __name__ == "__main__":
    main()
