"""Stage `search`: from a STAC catalogue to a table of items, each with a decision and its reason.

    search.py           the stage (`STAGE`): list, canonical form, validate, write
    api_client.py       reading a STAC API: pages, collections, errors
    api_listing.py      listing an API completely, in slices that it can answer
    incremental.py      listing only changes since the last search
    static_catalog.py   listing catalogues of linked JSON files
    geoparquet.py       listing a stac-geoparquet file; writing ``stac.parquet``
    query.py            the query: parameters for an API, filter for files
    canonical_item.py   one text for an item, whatever server it comes from
    item.py             checks of the fields of an item
    validate_items.py   the decision on every item
    supersede.py        items of one acquisition: which supersedes which
    bands.py            bands of an item by common name
    profile_check.py    check of a source profile against one item

Other rooms use `bands` (Band, find_band, find_layer), `item` (is_number), `supersede` (Acquisition,
find_superseded, version_key) and `profile_check` (check_profile).
"""
