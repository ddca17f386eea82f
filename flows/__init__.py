"""Prefect flows, the Prefect server, and the command line.

    pipeline      the flows: refresh, pretrain, evaluate, audit
    form          the fields of their forms in the Prefect UI; ``run_name`` names their runs
    stage_flow    the stages as one graph of Prefect tasks; ``tasks`` has the task of their parts
    gpu           a stage as a child run in the pool of GPU workers
    nights        scheduled and clicked runs: what is left out, takes turns, or is tried again
    preflight     checks before the first stage
    versions      published versions of datasets and models, and their differences
    summary       the result of a run, as a table and as JSON
    launch        a run from the terminal: server, flow, progress bars, summary
    deployments   the forms and the nightly schedule in the Prefect UI
    automations   what the server does by itself: lost runs, time limit, failure notice
    open_lineage  what a run reports to a lineage service; ``open_lineage_events`` has the events
    service       the Prefect server and the workers of a home
    settings      open the store and the catalogue
    cli           the command ``geofm``

Others may use ``pipeline.refresh_flow``, ``pipeline.pretrain_flow`` and ``settings.open_place``.
"""

import os
import sys

from data_catalog.storage.process import end_with_parent

# OpenMP threads that wait must sleep instead of spin: beside a server and its workers, spinning
# threads cost more than half of the training speed. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if "--multiprocessing-fork" in sys.orig_argv:
    # A worker process imports the main module, and so this package, first. Its initializer
    # (``pipeline.task_runner``) runs only after other imports, which take seconds.
    end_with_parent()
