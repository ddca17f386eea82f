"""Limits: too little disk is refused with a remedy, too little memory is a warning."""

from __future__ import annotations

import pytest

from data_catalog.errors import UsageError
from data_catalog.store import Store
from geofm.forecasting.limits import available_memory, check_disk, explain_memory, free_disk


def test_a_run_that_does_not_fit_on_the_disk_is_refused_with_the_remedy() -> None:
    check_disk(2**30, 2**30)
    check_disk(2**60, None)
    with pytest.raises(UsageError, match=r"about 2.0 GiB .* where 1.0 GiB are free.*--store"):
        check_disk(2**31, 2**30)


def test_vectors_that_do_not_fit_into_memory_are_reported() -> None:
    assert explain_memory(1000, 1280, 1000 * 1280 * 4) == ""
    assert explain_memory(10**9, 1280, None) == ""
    assert "cut.max_chips" in explain_memory(1001, 1280, 1000 * 1280 * 4)


def test_free_space_is_known_of_local_stores_only(store: Store) -> None:
    free = free_disk(store)
    assert free is not None
    assert free > 0
    assert free_disk(Store("s3://bucket/geofm")) is None
    memory = available_memory()
    assert memory is None or memory > 0
