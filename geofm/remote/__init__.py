"""Reach untrusted hosts, buckets and the folder of a local catalogue.

    url_policy.py   which addresses may be read; the only parser of http addresses; signing
    http.py         requests over pooled connections, redirects, deadlines
    retry.py        the retry policy, request rates, hosts that are left alone
    assets.py       an asset by http(s), in a bucket or in a folder: whole, or by range
    ranges.py       a remote file with prefetched ranges, as a source for `raster`
    json.py         JSON that is nested too deeply
    quarantine.py   the error of a single item

Other rooms use `assets.remote`, `ranges.RangeSource`, `url_policy.Access`, `http.send_request`,
`retry.call_with_retries` and `quarantine.Quarantine`.
"""
