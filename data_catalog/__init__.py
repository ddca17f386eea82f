"""The record: artifacts, stages and the catalogue of their runs.

The record handles no pixels and imports no torch and no Prefect. Its modules:

artifact      a sealed folder: ``Artifact``
manifest      the properties that determine an artifact's digest: ``Manifest``
store         artifacts and finished parts on a disk or object store: ``Store``, ``open_store``
catalogue     the database of artifacts, runs and versions: ``Catalogue``, ``open_catalogue``
stage         stages, their jobs and parts: ``Stage``, ``Job``, ``Part``, ``Sealed``
run           the orchestrator: ``run_stage``, ``run_job``, ``map_in_process``
sources       source profiles: ``Source``, ``load_sources``, ``source_for``
tables        Parquet and Arrow tables: ``write_table``, ``read_table``
redaction     credentials in addresses: ``mask``, ``without_secrets``
errors        ``UsageError``, ``RunError``, ``CheckError`` with their exit codes
progress      ``tick`` and ``listen``
hashing       canonical JSON and SHA-256

database/     the catalogue's tables, migrations, leases and item states
provenance/   lineage, licences, costs, verification and differences of versions
storage/      local and remote files: addresses, locks, atomic writing, reading, S3, processes
sources/      the built-in source profiles (YAML)
"""
