"""Stages `describe`, `calibrate`, `buckets`, `pairs`, `alike`: which chips are duplicates.

Stages, in the order in which they run:

    describe     descriptors, perceptual hash, signature and thumbnail of each chip
                   descriptors      entropy, gradient, band moments, thumbnail
                   perceptual_hash  a hash with known flips and rotations, and its search
                   signature        what stays of a spectrum when a view is shifted or turned
    calibrate    the similarity from which two chips are duplicates
                   known_pairs      pairs whose truth is known from metadata
    buckets      cells in which near vectors are searched, and an audited sample
                   identical        equal vectors and equal pixels are collapsed first
                   partition        centroids, margin, residents and visitors of cells
    pairs        near duplicates by embedding, with a certificate
                   join             the similarity join of cells; dense cells
                   matmul           products of blocks that propose pairs
                   certificate      the audited sample and the bound on the recall
                   incremental      a refresh searches only new vectors
    alike        pixel duplicates, by thumbnails of pairs whose hashes or signatures agree

The decision, made by stage `curate` in `geofm/selection`:

    methods      the registry of dedup methods; to add a method, read this file
    edges        pairs of rows with their similarity
    leader       the leader rule: which chips stay

Other rooms use `methods.METHODS`, `leader.choose_leaders`, `buckets.thresholds_of`,
`pairs.read_pair_search`, `describe.load_descriptors`, `descriptors.measure`,
`perceptual_hash.match_hashes` and `alike.compare_thumbnails`.
"""
