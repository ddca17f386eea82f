"""Stage `pool`: which chips are candidates of the search and the selection.

    pool             the stage: gates, evaluation sets, identical pixels
    gates            hard gates, and the quality that orders chips
    evaluation_sets  the images of evaluation sets as parts of the stage
    registry         the registry of evaluation sets, and its files
    decontaminate    chips that show the same ground or picture as an evaluation set
    proximity        areas within some metres of each other, anywhere on Earth

Other rooms use `pool.load_pool` and `registry.check_registry`.
"""
