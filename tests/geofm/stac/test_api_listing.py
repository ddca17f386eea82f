from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapely.geometry import box

from data_catalog.errors import RunError, UsageError
from geofm.config.recipe import SearchSettings
from geofm.stac import api_client, api_listing
from geofm.stac.api_listing import halve_query, matched_count, time_extent
from geofm.stac.canonical_item import CanonicalItem
from geofm.stac.query import Query, parse_interval
from geofm.stac.search import Listing, list_catalogue
from tests.geofm.stac.filter_api import Api, an_item

DAY = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture
def api(running: Api) -> Api:
    """An API with 120 items over a year and a continent, in two collections."""
    fresh = Api(url=running.url)
    running.__dict__.update(fresh.__dict__)
    year = {"temporal": {"interval": [["2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z"]]}}
    running.collections = [{"id": name, "extent": year} for name in "cd"]
    running.items = [
        an_item(
            f"i{n}", at=(n % 17 * 3.0 - 20, n % 7 * 3.0 + 35), collection="cd"[n % 2],
            datetime=(DAY + timedelta(hours=72 * n)).isoformat(),
        )
        for n in range(120)
    ]  # fmt: skip
    return running


def listing(api: Api, **more: Any) -> Listing:
    search_settings = SearchSettings.model_validate({"stac": api.url, **more})
    return list_catalogue(search_settings, [])


def digests(listing: Listing) -> list[tuple[str, str]]:
    return sorted((item.item_id, item.sha256) for item in listing.items)


@given(
    max_matched=st.sampled_from([20, 60, 120, 121]),
    more=st.sampled_from(
        [{}, {"datetime": "2020-03/2020-11"}, {"bbox": (-10, 36, 20, 50)}, {"collections": ["d"]},
         {"places": ["2/48/600", "10/40/300"]}]
    ),
)  # fmt: skip
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_result_does_not_depend_on_the_slicing(
    api: Api, max_matched: int, more: dict[str, Any]
) -> None:
    assert digests(listing(api, max_matched=max_matched, **more)) == digests(listing(api, **more))


def test_slices_stay_under_the_servers_limit(api: Api) -> None:
    api.deepest = 50
    assert len(listing(api, max_matched=50).items) == 120
    assert all("token" not in query for query in api.asked)
    # 150 items of the same time and place, which no slice separates
    api.items += [an_item(f"same{n}", at=(2.0, 48.0)) for n in range(150)]
    with pytest.raises(RunError, match="search failed"):
        listing(api, max_matched=50, datetime="2020-01-01T00:00:00Z", bbox=(2.1, 48.1, 2.2, 48.2))


def test_a_server_that_refuses_deep_pages_without_a_count(api: Api) -> None:
    api.counts, api.deepest = False, 100
    assert len(listing(api).items) == 120


def test_queries_that_tire_the_server_are_halved(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_client, "RETRIES", 0)
    api.tires = 20
    assert len(listing(api, collections=["c"]).items) == 60
    api.tires = -1
    before = len(api.asked)
    with pytest.raises(RunError, match="run again"):
        listing(api, collections=["c"])
    assert len(api.asked) - before <= 14  # seven halvings with two requests each


def test_an_item_on_the_edge_of_two_slices_counts_once_and_a_repeated_one_twice(api: Api) -> None:
    api.items = [an_item("a"), an_item("b"), an_item("b"), an_item("c", at=(2.5, 47.5))]
    for number in (3, 100):
        names = [name for name, _ in digests(listing(api, max_matched=number))]
        assert names == ["a", "b", "b", "c"]


def test_items_without_a_time_are_missed_by_slices_and_that_is_said(api: Api) -> None:
    api.items[0]["properties"]["datetime"] = None
    assert len(listing(api).items) == 120
    sliced = listing(api, max_matched=50)
    assert len(sliced.items) == 119
    assert sliced.metrics["unreached"] == 1


def test_an_api_without_intersects_is_asked_by_boxes(api: Api) -> None:
    places = {"places": ["2/48/600", "10/40/300", "179.9/50/100"]}
    whole = digests(listing(api, **places))
    api.intersects = False
    assert digests(listing(api, **places)) == whole
    assert 0 < len(whole) < 120
    assert all("bbox" in query for query in api.asked[-4:])


def test_a_box_across_the_antimeridian(api: Api) -> None:
    api.items = [an_item("west", at=(178.0, -18.0)), an_item("east", at=(-180.0, -18.0)),
                 an_item("far", at=(0.0, -18.0))]  # fmt: skip
    for knows in (True, False):
        api.intersects = knows
        rows = digests(listing(api, bbox=(177, -20, -179, -15)))
        assert [name for name, _ in rows] == ["east", "west"]


def test_too_many_items_over_all_slices(api: Api) -> None:
    with pytest.raises(UsageError, match=r"search\.max_items = 119"):
        listing(api, max_items=119, max_matched=50)


def test_halves_cover_the_whole() -> None:
    query = Query(("a", "b", "c"), area=box(0, 0, 4, 2))
    assert [part.collections for part in halve_query(query, (DAY, DAY))] == [("a",), ("b", "c")]
    query = Query(("a",))
    first, second = halve_query(query, (DAY, DAY + timedelta(days=2)))
    assert (first.times, second.times) == ("../2020-01-02T00:00:00Z", "2020-01-02T00:00:00Z/..")
    short = Query(("a",), DAY, DAY + timedelta(minutes=9), box(0, 0, 4, 2))
    assert [part.area.bounds for part in halve_query(short, (DAY, DAY)) if part.area] == [
        (0, 0, 2, 2), (2, 0, 4, 2),
    ]  # fmt: skip
    assert halve_query(Query(("a",), DAY, DAY, box(0, 0, 0.2, 0.2)), (DAY, DAY)) == []


def test_what_servers_say_of_extents_and_counts() -> None:
    known = {
        "extent": {"temporal": {"interval": [["2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z"]]}}
    }
    assert time_extent({"a": known})[0] == DAY
    for strange in ({}, {"extent": 7}, {"extent": {"temporal": {"interval": [[7, "x"]]}}}):
        start, end = time_extent({"a": strange, "b": known})
        assert start <= end
    assert matched_count({"numberMatched": 3}) == 3
    assert matched_count({"context": {"matched": 4}}) == 4
    pages: list[dict[str, Any]] = [{}, {"numberMatched": "7"}, {"context": 1}]
    assert [matched_count(page) for page in pages] == [None] * 3


def test_datetimes_that_are_none() -> None:
    assert parse_interval("2024-02")[1] == datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC)
    assert parse_interval("2024-01-01/..")[1] is None
    for text in ("yesterday", "2024-13", "1/2/3", "2024/x"):
        with pytest.raises(UsageError, match=r"search\.datetime: .*write e\.g\."):
            parse_interval(text)


class Paging:
    """Changes how an API pages: each page has two items, for any limit."""

    def __init__(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        self.api, self.times = api, 10**9
        self.whole = api.answer
        monkeypatch.setattr(api_listing, "LISTING_PAUSE_S", 0.0)
        monkeypatch.setattr(api, "answer", self.answer, raising=False)

    def answer(self, query: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, page = self.whole({**query, "limit": 2})
        if self.times > 0 and "ids" not in query and int(query["limit"]) > 1:
            self.times -= 1
            self.spoil(query, page)
        return status, page

    def spoil(self, query: dict[str, Any], page: dict[str, Any]) -> None:
        raise NotImplementedError


class EmptyPages(Paging):
    """An empty page with a next page comes before each page."""

    def spoil(self, query: dict[str, Any], page: dict[str, Any]) -> None:
        token = int(query.get("token", 0))
        if not query.get("empty"):
            body = {**query, "token": str(token), "empty": True}
            page["features"] = []
            page["links"] = [{"rel": "next", "method": "POST", "href": f"{self.api.url}/search",
                              "body": body}]  # fmt: skip
        for link in page["links"] if query.get("empty") else []:
            link["body"].pop("empty", None)


class NoNext(Paging):
    """The first page has no next page though there is more."""

    def spoil(self, query: dict[str, Any], page: dict[str, Any]) -> None:
        page["links"] = []


class Overlap(Paging):
    """Each page begins with the last item of the page before, and so the last item is lost."""

    def spoil(self, query: dict[str, Any], page: dict[str, Any]) -> None:
        token = int(query.get("token", 0))
        if token:
            matched = self.api.matching(query)
            page["features"] = matched[token // 2 : token // 2 + 2]


@pytest.fixture
def five(api: Api) -> Api:
    day = "2020-01-01T00:00:00Z"
    api.items = [an_item(f"i{n}", at=(0.0, 0.0), datetime=day) for n in range(5)]
    api.collections = api.collections[:1]
    return api


#: A search that can't be halved.
NARROW = {"datetime": "2020-01-01T00:00:00Z", "bbox": (0.1, 0.1, 0.2, 0.2)}


def test_an_empty_page_with_a_next_page_ends_nothing(
    five: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    EmptyPages(five, monkeypatch)
    assert [name for name, _ in digests(listing(five))] == [f"i{n}" for n in range(5)]


@pytest.mark.parametrize("kind", [NoNext, Overlap])
def test_an_incomplete_listing_is_asked_for_again_and_then_fails(
    five: Api, monkeypatch: pytest.MonkeyPatch, kind: type[Paging]
) -> None:
    whole = digests(listing(five, **NARROW))
    paging = kind(five, monkeypatch)
    paging.times = 1 if kind is NoNext else 3
    assert digests(listing(five, **NARROW)) == whole
    paging.times = 10**9
    with pytest.raises(RunError, match=r"of 5 items were listed.*search\.check_counts=false"):
        listing(five, **NARROW)
    assert len(listing(five, check_counts=False, **NARROW).items) < 5


def test_what_a_listing_skips_is_asked_for_by_id_before_it_is_called_withdrawn(
    five: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an API counts nothing."""
    five.counts = False
    previous = listing(five).items
    NoNext(five, monkeypatch)
    repeated = list_catalogue(SearchSettings(stac=five.url), previous)
    assert digests(repeated) == digests(listing_of(previous))
    withdrawn = five.items.pop()["id"]
    current = list_catalogue(SearchSettings(stac=five.url), previous)
    names = {item.item_id for item in current.items}
    assert names == {item.item_id for item in previous} - {withdrawn}


class ByIds:
    """Answers the requests by ids with a status; 0 stands for no answer in time."""

    def __init__(self, api: Api, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
        self.whole, self.status = api.answer, status
        monkeypatch.setattr(api_client, "TIMEOUT", (0.3, 0.3))
        monkeypatch.setattr(api_client, "RETRIES", 0)
        monkeypatch.setattr(api, "answer", self.answer, raising=False)

    def answer(self, query: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if "ids" not in query:
            return self.whole(query)
        if not self.status:
            time.sleep(1)
        return self.status or 200, {}


@pytest.mark.parametrize("status", [0, 403, 429, 500, 502, 503, 504])
def test_an_outage_while_items_are_asked_for_by_id_withdraws_nothing(
    five: Api, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    previous = listing(five).items
    five.items.pop()
    ByIds(five, monkeypatch, status)
    with pytest.raises(RunError, match=r"still has 1 items .*nothing was withdrawn, run again"):
        list_catalogue(SearchSettings(stac=five.url), previous)


@pytest.mark.parametrize("status", [400, 404, 405, 422, 501])
def test_the_listing_of_a_server_that_knows_no_ids_is_believed(
    five: Api, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    previous = listing(five).items
    five.items.pop()
    ByIds(five, monkeypatch, status)
    assert len(list_catalogue(SearchSettings(stac=five.url), previous).items) == 4


def listing_of(previous: list[CanonicalItem]) -> Listing:
    return Listing(list(previous), {}, "")


def test_an_item_that_is_updated_while_the_listing_runs_is_there_once(
    five: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Update(Paging):
        """The first item is updated after the first page, and is listed again at the end."""

        def spoil(self, query: dict[str, Any], page: dict[str, Any]) -> None:
            if int(query.get("token", 0)) == 2:
                properties = {**self.api.items[0]["properties"], "updated": "2024-01-02T00:00:00Z"}
                self.api.items.append({**self.api.items[0], "properties": properties})

    for item in five.items:
        item["properties"]["updated"] = "2024-01-01T00:00:00Z"
    Update(five, monkeypatch).times = 2
    items = {item.item_id: item for item in listing(five, check_counts=False).items}
    assert len(items) == 5
    assert "2024-01-02" in items["i0"].text
