"""Stage `cut`: chips on a fixed grid, each with its provenance.

    cut.py             the stage: plan, work, seal, and the reconciliation before the seal
    plan.py            the windows to cut and their forecast, from metadata
    sampling.py        limits and budgets that choose the windows
    overlap.py         which scene owns ground that several scenes cover
    fetch_cost.py      estimated requests and bytes
    items.py           the items that may be cut
    stand_ins.py       chips of an older item version, while the newer version can't be read
    writer.py          one scene: its pixels strip by strip, its tar and its rows
    offset_check.py    whether pixels agree with the offset that the item states
    schema.py          columns of chips.parquet and assets.parquet
    recut.py           cut chips again and compare them
    source_changes.py  changes of the source files since the cut

Other rooms use `cut.STAGE`, `plan.plan_windows`, `plan.forecast` and `recut.recut`.
"""
