"""Stage `curate`: the decision on each chip of the pool.

    curate     the stage: graph of duplicates, leader rule, budget, witnesses, tables
    methods    seven methods to select a number of chips
    greedy     facility location and farthest first, exact, within a group of chips
    balanced   balanced k-means over a hierarchy of clusters
    strata     budgets, strata, quotas, and the survivors of each stratum
    rarity     soft scores: novelty, density, spectral rarity
    metrics    how well a selection represents its pool

Other rooms use `methods.select`, `methods.Candidates` and `metrics.coverage`.
"""
