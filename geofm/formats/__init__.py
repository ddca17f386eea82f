"""File layouts: the only place that knows how their bytes are arranged.

- ``tar``: tars that are the same bytes for the same members (``write_tar``, ``read_ranges``).
- ``npy``: chips as ``.npy`` members (``chip_bytes``, ``chip_from_bytes``, ``read_chip``).
- ``cards``: cards of datasets and models with their YAML head (``write_card``).
"""
