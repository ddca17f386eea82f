"""The top floor: Prefect flows and the command line."""

import os

# Threads that wait must sleep, not spin: beside a server and its workers a spinning thread costs
# more than half of the training speed. Read by OpenMP when torch loads, so it is set first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
