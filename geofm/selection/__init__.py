"""Stage `curate`: the decision on each chip of the pool.

    curate     the stage: graph of duplicates, leader rule, budget, witnesses, tables
    methods    seven methods that select a given number of chips
    greedy     facility location and farthest first, exact, within a group of chips
    balanced   balanced k-means over a hierarchy of clusters
    strata     budgets, strata, quotas, and counts of the chips that survive in each stratum
    rarity     soft scores: novelty, density, spectral rarity
    metrics    measures of how well a selection represents its pool

Other rooms use `methods.select`, `methods.Candidates` and `metrics.coverage`.
"""
