"""Stage `embed`: chips become vectors, and the space in which vectors are compared.

    embed          the stage
    encoders       frozen networks: load, encode, speed up on a CPU
    images         a chip as an encoder's input
    weights        files of weights: digests and checks
    weight_inputs  names of weights in settings -> digests, files and inputs of a job
    store          read the vectors of an artifact
    vectors        cosine similarity in three precisions; quantized vectors
    clusters       spherical k-means with exact sums
    neighbours     nearest neighbours of each chip, and the density of the pool

Other rooms use `encoders.load_encoder`, `encoders.encode`, `embed.chip_encoder`,
`weight_inputs.resolve_weights` and its siblings, `store.load_vectors`, `vectors.make_space`,
`clusters.cluster` and `neighbours.knn_radius`.
"""
