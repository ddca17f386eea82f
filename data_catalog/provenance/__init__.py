"""Provenance: where an artifact comes from, what it cost, and whether it is intact.

lineage        the chain of artifacts: ``ancestry``, ``trace_sample``, ``explain_chip``
licences       every rule on licences: ``spdx_expression``, ``licence_union``, ``card_licence``
costs          time, energy and carbon of a lineage: ``lineage_costs``, ``totals``
verify         hash an artifact and its chain: ``verify_artifact``, ``verify_chain``
cross_check    compare the catalogue's rows with the manifests
findings       the result of a verification
diff           the difference of two dataset versions: ``compare``, ``read_version``
model_diff     the difference of two models: ``compare_models``
past           chips of earlier versions: ``why_left``
"""
