"""Stage ``pack``: kept chips as a dataset of WebDataset tars, and reading them for training.

Writing, in the order of the work:

- ``pack``: the stage; ``sample_join`` joins and sorts the rows, ``sample_metadata`` reads
  them, ``split``
  draws the holdout, ``stats`` adds up the pixels, ``index`` and ``card`` describe the result.

Reading and sharing:

- ``reader``: samples by number (``open_index``, ``ShardFiles``).
- ``loader``: batches for training, resumable at any sample (``SampleStream``).
- ``check``: finds what is damaged, by shard and sample (``verify_shards``).
- ``export``, ``croissant``: a copy for the Hugging Face hub with its metadata.
"""
