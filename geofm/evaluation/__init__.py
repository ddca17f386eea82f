"""Stage `evaluate`: score a model on downstream tasks, beside its teacher and a random network.

Files, from the outside in:
    evaluate     the stage: one part per task and model; check: the tasks, before a run begins
    tasks        folders of labelled images: open, cap, split; images: decode one image
    models       the three networks that are compared, each as a function from images to features
    runner       one network on one task: encode, split, probe, predict
    probes       k nearest neighbours and linear probe on frozen features; bootstrap intervals
    scores       tables of scores and paired differences; arp: the GFM paper's summary figure

For others: ``tasks.open_task`` and ``check.check_tasks``.
"""
