"""Stream the shards of a dataset into a plain torch training loop.

    python examples/stream_shards.py demo --store geofm-store --epochs 2

The network is a small autoencoder; replace it with your own. The order of an epoch depends only
on the seed. `stream.state_dict()` is plain JSON: save it beside your checkpoint, and load it to
continue in the middle of an epoch with any number of readers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from data_catalog.catalogue import open_catalogue
from data_catalog.store import open_store
from geofm.shards.loader import SampleStream
from geofm.shards.reader import Sample, open_index


def stack(samples: Iterator[Sample]) -> Tensor:
    """Make a batch of float32 counts, shape (samples, bands, height, width)."""
    return torch.stack([torch.from_numpy(sample.pixels.astype("float32")) for sample in samples])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train an autoencoder for a few epochs and print its loss."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset", help="name, name@version or digest of a dataset")
    parser.add_argument("--store", default="geofm-store", type=Path, help="store with the dataset")
    parser.add_argument("--epochs", default=2, type=int)
    options = parser.parse_args(arguments)

    store = open_store(options.store, write=False)
    database = f"sqlite:///{options.store.absolute()}/catalogue.db"
    dataset = open_catalogue(database, store, write=False).resolve(options.dataset)
    stream = SampleStream(open_index(dataset), seed=0, batch=16, collate=stack)
    bands = len(dataset.json("stats.json")["bands"])
    normalise = nn.BatchNorm2d(bands, affine=False)
    layers = nn.Conv2d(bands, 16, 4, 4), nn.GELU(), nn.ConvTranspose2d(16, bands, 4, 4)
    network = nn.Sequential(*layers)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for epoch in range(options.epochs):
        losses = []
        for batch in stream.batches(workers=0):
            images = normalise(batch)
            loss = nn.functional.mse_loss(network(images), images)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: {len(losses)} batches, loss {sum(losses) / len(losses):.4f}")


if __name__ == "__main__":
    main()
