from __future__ import annotations

import platform
import subprocess
import sys

import pytest

#: Allocates blocks like a batch's activations, two at a time, and counts the pages requested.
PROGRAM = """
import resource, numpy as np
from geofm.runtime.threads import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def batch():
    for mib in (25, 26, 6, 25, 12):
        first = np.ones(mib * 2**17)
        second = first + 1
for _ in range(3):
    batch()
before = pages()
for _ in range(10):
    batch()
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_freed_memory_is_not_asked_for_again():
    def pages(keep: bool) -> int:
        program = PROGRAM.format(keep=keep)
        return int(subprocess.check_output([sys.executable, "-c", program], timeout=120))

    assert pages(keep=True) < 1000
    assert pages(keep=False) > 10_000
