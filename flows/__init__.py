"""The top floor: Prefect flows and the command line."""

import os
import sys

from data_catalog.storage.process import end_with_parent

# Threads that wait must sleep, not spin: beside a server and its workers a spinning thread costs
# more than half of the training speed. Read by OpenMP when torch loads, so it is set first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if "--multiprocessing-fork" in sys.orig_argv:
    # A worker process imports the main module, and so this package, before anything else. Its
    # initializer (``pipeline.task_runner``) comes only after seconds of other imports.
    end_with_parent()
