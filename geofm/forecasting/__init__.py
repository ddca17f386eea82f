"""The forecast of a run: rows, time, energy, fetched bytes and disk of each stage, beforehand.

Files, from the outside in:
    run          the forecast of all stages of a recipe; which of them are unchanged
    limits       what makes a run fail: no GPU, too little disk or memory
    rates        seconds, energy and bytes per row: from records, from a probe, or built in
    figures      the figures of a stage and of a run, and their tables
"""
