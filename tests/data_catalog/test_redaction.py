"""Credentials in addresses: every spelling is removed and masked, and nothing else is touched."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_catalog.redaction import (
    MASK,
    NO_SECRET,
    mask,
    resolve,
    secrets_in,
    without_secrets,
    without_secrets_in,
)

S = "s3cr3tValue0123456789"
#: Names that make a whole signature, all of which differs from night to night.
SIGNATURES = {
    "azure": ["sv", "se", "sr", "sp", "sig"],
    "azure by a stored policy": ["sv", "si", "sr", "sig"],
    "azure account": ["sv", "ss", "srt", "sp", "se", "st", "spr", "sig"],
    "azure user delegation": ["skoid", "sktid", "skt", "ske", "sks", "skv", "sv", "se", "sig"],
    "aws 4": ["X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires",
              "X-Amz-SignedHeaders", "X-Amz-Security-Token", "X-Amz-Signature"],
    "aws 2": ["AWSAccessKeyId", "Expires", "Signature"],
    "google 4": ["X-Goog-Algorithm", "X-Goog-Credential", "X-Goog-Date", "X-Goog-Expires",
                 "X-Goog-SignedHeaders", "X-Goog-Signature"],
    "google 2": ["GoogleAccessId", "Expires", "Signature"],
    "cloudfront": ["Expires", "Signature", "Key-Pair-Id"],
    "cloudfront by a policy": ["Policy", "Signature", "Key-Pair-Id", "Hash-Algorithm"],
    "cloud cdn": ["Expires", "KeyName", "Signature"],
    "alibaba": ["OSSAccessKeyId", "Expires", "Signature"],
    "tencent": ["q-sign-algorithm", "q-ak", "q-sign-time", "q-key-time", "q-signature"],
    "swift": ["temp_url_sig", "temp_url_expires"],
    "token with its time": ["token", "expires"],
}  # fmt: skip
NAMES = [
    "api_key", "apikey", "api-key", "x-api-key", "access_token", "token", "auth", "authorization",
    "password", "passwd", "pwd", "pass", "secret", "client_secret", "key", "signature", "jwt",
    "subscription-key", "sas_token", "edl_token", "session_token", "hdnts", "access_code", "tok",
]  # fmt: skip
INNOCENT = [
    "version=3", "versionId=abc", "id=17", "collections=a,b", "f=json", "sig=7", "sig",
    "key=a/b.tif", "key=12", "page_token=4", "next-token=5", "pass=descending", "code=fr",
    "x=%2Fa+b%20c", "s=1",
    "sp=1", "sr=4326", "se=2", "expires=never", "policy=open", "bbox=1,2,3,4", "empty=", "q=a;b",
    "author=me", "keyword=x", "monkey=1", "tokens=3", "assets=red&assets=nir", "design=1",
]  # fmt: skip


def spellings(name: str) -> list[str]:
    """A parameter's name as it is written, in other cases, and percent-encoded."""
    return [name, name.lower(), name.upper(), "".join(f"%{ord(c):02x}" for c in name)]


@pytest.mark.parametrize("names", SIGNATURES.values(), ids=SIGNATURES)
def test_a_signature_goes_as_a_whole(names: list[str]) -> None:
    for spell in range(4):
        fields = [f"{spellings(name)[spell]}={S}{n}" for n, name in enumerate(names)]
        for order in (fields, fields[::-1]):
            signed = "https://h.example/a%20b.tif?version=3&" + "&".join(order) + "&x=%2F"
            assert without_secrets(signed) == "https://h.example/a%20b.tif?version=3&x=%2F"
            assert S not in mask(signed)
            assert secrets_in(signed)
    bare = "https://h.example/a.tif?" + "&".join(f"{name}={S}" for name in names)
    assert without_secrets(bare) == "https://h.example/a.tif"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "form",
    [
        "https://h/a.tif?{}={}", "./a.tif?v=1&{}={}", "/vsicurl/https://h/a.tif?{}={}",
        "s3://b/k?{}={}", "https://h/a#{}={}", "https://h/a?v=1;{}={}", "?{}={}",
        "see https://h/a?{}={}, please", "[a](https://h/a?{}={})",
        "https://tiles.example/x?url=https%3A%2F%2Fh%2Fa.tif%3F{}%3D{}",
        "https://tiles.example/x?url=https://h/a.tif?{}={}",
    ],
)  # fmt: skip
def test_a_secret_goes_wherever_it_stands(name: str, form: str) -> None:
    for spelling in spellings(name):
        address = form.format(spelling, S)
        assert S not in without_secrets(address)
        assert S not in mask(address)
        assert without_secrets(without_secrets(address)) == without_secrets(address)
        assert mask(mask(address)) == mask(address)


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("https://u:p4ss@h:8/a?v=1", "https://h:8/a?v=1"),
        ("HTTPS://tok3n@h/a", "HTTPS://h/a"),
        ("https://u:p4%40ss@h/a", "https://h/a"),
        ("https://u:p4@ss@h/a", "https://h/a"),
        ("https://u:p4/ss@h/a", "https://h/a"),
        ("https://u:p4?ss@h/a", "https://h/a"),
        ("https://u:p4#ss@h/a", "https://h/a"),
        ("s3://AKIA:p4ss@bucket/key", "s3://bucket/key"),
        ("//u:p4ss@h/a", "//h/a"),
        ("/vsicurl/https://u:p4ss@h/a.tif", "/vsicurl/https://h/a.tif"),
        ("https://[::1]:8/a@b", "https://[::1]:8/a@b"),
        ("abfs://container@account.dfs.core.windows.net/x",
         "abfs://container@account.dfs.core.windows.net/x"),
        ("me@example.org", "me@example.org"),
        ("mailto:me@example.org", "mailto:me@example.org"),
        ("a text with a question? and an @ sign", "a text with a question? and an @ sign"),
        ("https://h/a;jsessionid=AB12/x", "https://h/a/x"),
    ],
)  # fmt: skip
def test_user_info_goes_and_nothing_else(address: str, kept: str) -> None:
    assert without_secrets(address) == kept
    assert "p4" not in mask(address)
    assert "ss@" not in mask(address)


@pytest.mark.parametrize("name", ["key", "pass", "Key", "PASS", "access_code", "tok"])
@pytest.mark.parametrize("value", ["AbC1/dEf2GhI3jKl4", "12345678", "7", "descent", "a.tif"])
def test_a_user_s_own_address_holds_no_key_or_password_whatever_its_value(
    name: str, value: str
) -> None:
    address = f"https://h/v1?v=2&{name}={value}"
    assert secrets_in(address) == [name]
    assert mask(address) == f"https://h/v1?v=2&{name}={MASK}"
    assert secrets_in(f"https://h/v1?{name}=${{KEY}}") == []


@pytest.mark.parametrize("field", INNOCENT)
def test_parameters_that_choose_the_bytes_stay(field: str) -> None:
    for address in (f"https://h/a.tif?{field}", f"https://h/a.tif?a=1&{field}&b=2#x"):
        assert without_secrets(address) == address


KEPT = st.lists(st.sampled_from([f for f in INNOCENT if not re.match("s[erp]=|sig|exp|pol", f)]))
CASES = st.sampled_from([str.lower, str.upper, str.title, str])


@settings(max_examples=60, deadline=None)
@given(KEPT, KEPT, st.sampled_from(NAMES), CASES, st.booleans(), st.integers(1, 3),
       st.text("abcdefXYZ0189-_.~+/=: @&", min_size=6, max_size=30))  # fmt: skip
def test_no_secret_survives_and_the_rest_is_unchanged(
    before: list[str], after: list[str], name: str, case: Any, encoded: bool, times: int, tail: str
) -> None:
    value = quote("Zq7" + tail + "9x", safe="")
    written = "".join(f"%{ord(c):02X}" for c in name) if encoded else case(name)
    if name == "key" and ("/" in tail or "." in tail):
        return  # the name of a file
    secret = [f"{written}={value}"] * times
    address = "https://h/a%20b.tif?" + "&".join([*before, *secret, *after])
    left = without_secrets(address)
    rest = "&".join([*before, *after])
    assert left == "https://h/a%20b.tif" + (f"?{rest}" if rest else "")
    assert without_secrets(left) == left
    assert value not in mask(address)
    assert mask(mask(address)) == mask(address)
    assert written in secrets_in(address)


@given(st.text())
def test_any_text_is_rewritten_once_and_for_all(text: str) -> None:
    once = without_secrets(text)
    assert without_secrets(once) == once
    assert mask(mask(text)) == mask(text)


def test_json_is_cleaned_to_its_leaves() -> None:
    value = {
        "alternate": {"s3": {"href": f"https://u:{S}@h/x", "more": [f"https://h?token={S}"]}},
        "api_key": S, "headers": {"Authorization": f"Basic {S}"}, "n": 1.5, "none": None,
        f"https://h/?sig={S}&se=1": True,
    }  # fmt: skip
    assert without_secrets_in(value) == {
        "alternate": {"s3": {"href": "https://h/x", "more": ["https://h"]}},
        "headers": {}, "n": 1.5, "none": None, "https://h/": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        f"HTTPConnectionPool(host='h', port=80): Max retries exceeded with url: /v1?token={S} (x)",
        f"connection to host=h password={S} user=me failed",
        f"{{'Authorization': 'Bearer {S}', 'x': 1}}",
        f"cannot open \"https://u:{S}@h/x\", see 'https://h/?key={S}'",
        f"search.stac=https://u:{S}@h/x",
        f"PREFECT_API_AUTH_STRING=geofm:{S}",
    ],
)
def test_messages_are_masked(text: str) -> None:
    assert S not in mask(text)
    assert MASK in mask(text)


def test_messages_without_a_secret_stay() -> None:
    for text in (
        "no sample 'demo@2026-11-30/x?'",
        "set search.stac=https://h/v1?v=1",
        "the key (digest)=(ab12) exists",
        "https://${U}:${P}@h/v1?token=${T} is down",
    ):
        assert mask(text) == text


def test_references_are_read_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T", "a/b")
    assert resolve("x${T}y", lambda value: quote(value, safe="")) == "xa%2Fby"
    with pytest.raises(KeyError, match="NOT_SET"):
        resolve("${NOT_SET}")
    assert secrets_in("https://${U}:${P}@h/v1?token=${T}") == []
    assert secrets_in("https://u:x${P}@h/v1") == ["password"]


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("", True), ("planet", True), ("https://h/v1?v=2", True),
        ("https://${U}:${P}@h?token=${T}", True), ("sqlite:////a/b@c/d.db", True),
        ("postgresql://me@h/d", False), ("postgresql://me:x@h/d", False),
        ("https://h?Api_Key=x", False),
        ("https://h?pass=12345678", False), ("postgresql://h/d?password=x", False),
    ],
)  # fmt: skip
def test_the_pattern_of_the_form(address: str, allowed: bool) -> None:
    assert bool(re.search(NO_SECRET, address)) is allowed
