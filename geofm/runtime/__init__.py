"""The process and its resources, and small helpers that several rooms share.

    threads.py      ordered work in a thread pool, memory, torch's threads and random state
    native.py       torch, faiss and timm, imported when they are first used
    parts.py        the chips of each tar: the parts of the stages that work on chips
    energy.py       energy and carbon of a stage
    cost.py         the cost of a lineage, as a table and as remarks
    text.py         numbers, units and reasons as short texts
    timestamps.py   times as catalogues write them

Every room may use them.
"""
