"""Remove credentials from stored addresses, and mask them in messages.

without_secrets    remove the credentials of an address
mask               put ``***`` in place of the credentials in a message
secrets_in         name the parts of an address that hold a secret
resolve            replace ``${NAME}`` by an environment variable
printable          escape the control characters of a text

An address can hold a secret in its user info, its query, its fragment, or in another address that
is one of its parameters. Artifacts hold none, so the same file has the same address every night.

A user who needs a secret in an address writes ``${NAME}`` in its place. Only ``resolve`` reads the
environment variable, when the address is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote, unquote, unquote_plus

#: A reference to an environment variable.
REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
MASK = "***"
#: JSON schema pattern of a field with an address that must not hold a secret. Prefect checks it
#: before it stores the parameters of a run; ``secrets_in`` is stricter and runs later.
_ANY_CASE = "".join(
    f"[{letter.upper()}{letter}]" if letter.isalpha() else letter
    for letter in "(?:token|password|passwd|secret|signature|credential|auth|key)"
)
_SHORT = "[Ss][Ii][Gg]|[Pp][Ww][Dd]|[Pp][Aa][Ss][Ss]|[Tt][Oo][Kk]"
_NO_FIELD = rf"(?!.*[?&#;](?:[^=&#]*{_ANY_CASE}|{_SHORT})=(?!\$\{{)[^&#])"
_REFERENCE_ENDS = r"(?!\$\{\w+\}@)"
NO_SECRET = (
    rf"^(?!\w[\w+.-]*://(?:{_REFERENCE_ENDS}[^/?#@:]+|[^/?#@:]*:{_REFERENCE_ENDS}[^/?#@]+)@)"
    + _NO_FIELD
)
#: Deepest nesting of addresses in parameters of addresses that is examined.
MAX_DEPTH = 6

_AUTHORITY = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//")
_HOST_PORT = re.compile(r"(?:\[[^\]]*\]|[^:]*)(?::\d*)?")
#: Schemes whose user info is the name of a container, which is not a secret.
_CONTAINERS = ("abfs:", "abfss:", "wasb:", "wasbs:", "az:", "adl:")
#: A possible address within a text: with a scheme, or relative with a query.
_IN_TEXT = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//\S+|[^\s?]*\?\S+=\S*")
_TAIL = re.compile(r"[)\]}>'\"`,.;:!]+$")
_REFERENCE_AT_END = re.compile(REFERENCE.pattern + "$")
_MATRIX = re.compile(r";([^=;/]+)=([^;/]*)")
_PLAIN = re.compile(r"[^a-z0-9]")

#: Parameter names that always hold a secret, in lower case without punctuation.
_SECRET = {
    "token", "tok", "auth", "authorization", "proxyauthorization", "bearer", "jwt", "pwd",
    "passwd", "sas", "apikey", "hdnts", "hdnea", "jsessionid", "phpsessid", "sslpassword", "cookie",
    "setcookie",
}  # fmt: skip
_SECRET_ENDS = (
    "token", "password", "passwd", "passphrase", "secret", "signature", "apikey", "accesskey",
    "accesskeyid", "secretkey", "privatekey", "sharedkey", "accountkey", "subscriptionkey",
    "credential", "credentials", "authkey", "authstring", "accesscode",
)  # fmt: skip
#: Beginnings of names of paging tokens, which are not secrets.
_PAGING = ("page", "next", "prev", "previous", "continuation", "sync", "cursor", "start", "resume")
#: Parameter names that hold a secret only if the value looks random.
_PERHAPS = {"sig", "code", "hmac", "session", "sid", "ticket"}
_EXPIRY = {"expires", "expiry", "exp", "expiration", "expiresin", "validuntil"}
_SAS = {
    "se", "sig", "sp", "sr", "st", "sv", "si", "ss", "srt", "sip", "spr", "ske", "skt", "sks",
    "skv", "skoid", "sktid", "saoid", "suoid", "scid", "sdd", "ses", "rscc", "rscd", "rsce",
    "rscl", "rsct",
}  # fmt: skip
_CLOUD_SIGNED = {
    "signature", "expires", "policy", "key-pair-id", "awsaccesskeyid", "googleaccessid",
    "ossaccesskeyid", "accesskeyid", "keyname", "urlprefix", "hash-algorithm", "security-token",
}  # fmt: skip
_VENDOR = re.compile(r"(x-(?:amz|goog|oss|obs|cos|tos)-|q-|temp_url_)(.*)")
_FILE = re.compile(
    r"\.(tiff?|jp2|json|geojson|png|jpe?g|vrt|xml|nc|zarr|hdf|h5|zip|gz|txt|img|parquet|safe)$",
    re.IGNORECASE,
)
_KNOWN_SECRET = re.compile(r"(eyJ[\w-]+\.[\w-]+\.[\w-]*|(AKIA|ASIA)[0-9A-Z]{16})")
_LOOSE = re.compile(r"([A-Za-z][\w.-]*)=(?!=)((?:\$\{\w+\}|[^\s&;'\",)\]}])+)")
_HEADER = re.compile(
    r"((?:proxy-)?authorization|cookie|x-api-key|x-amz-security-token)(['\"]?\s*[:=]\s*['\"]?)"
    r"((?:basic|bearer|token|digest)\s+)?([^\s&'\",)\]}]+)",
    re.IGNORECASE,
)


def without_secrets(address: str) -> str:
    """Remove credentials from an address, or from every address in a text.

    The function removes user info, signatures of Amazon, Azure, Google and others with all their
    parameters, tokens, keys and passwords. All other characters stay unchanged.
    """
    return _rewrite(address, None, [])


def mask(text: str) -> str:
    """Replace the credentials in a message by ``***``; references ``${NAME}`` stay."""
    masked = _rewrite(text, MASK, [])
    masked = _HEADER.sub(rf"\1\2\3{MASK}", masked)
    return _LOOSE.sub(_mask_loose, masked)


def printable(text: str, keep: str = "\n\t") -> str:
    """Escape the control characters of an untrusted text, which a terminal would obey.

    Args:
        text: Text for a log or a terminal.
        keep: Control characters that stay.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def secrets_in(address: str) -> list[str]:
    """Name the parts of an address that hold a secret; a reference ``${NAME}`` is not a secret."""
    secrets: list[str] = []
    _rewrite(address, MASK, secrets)
    return secrets


def without_secrets_in(value: Any) -> Any:
    """Remove credentials from all texts in JSON, and members whose name means a secret."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, list):
        return [without_secrets_in(inner) for inner in value]
    if isinstance(value, dict):
        return {
            without_secrets(str(name)): without_secrets_in(inner)
            for name, inner in value.items()
            if not (isinstance(inner, str) and inner and _is_secret_name(str(name)))
        }
    return value


def resolve(text: str, encode: Callable[[str], str] = str) -> str:
    """Replace each reference ``${NAME}`` by the value of the environment variable NAME.

    Args:
        text: Text with or without references.
        encode: Function that is applied to each value.

    Raises:
        KeyError: A variable is not set; its name is the argument.
    """
    return REFERENCE.sub(lambda match: encode(os.environ[match[1]]), text)


def _rewrite(text: str, mark: str | None, secrets: list[str]) -> str:
    """Remove or mask the credentials in a text.

    Args:
        text: An address, or a text with addresses.
        mark: Text in place of a credential; None to remove it.
        secrets: List to which the names of the secret parts are added.
    """
    if not any(sign in text for sign in "?@#;"):
        return text
    if not any(sign.isspace() for sign in text):
        return _rewrite_address(text, mark, secrets, 0)

    def rewrite_match(match: re.Match[str]) -> str:
        tail = _TAIL.search(match[0])
        end = tail.start() if tail else len(match[0])
        reference = _REFERENCE_AT_END.search(match[0][: end + 1])
        end += 1 if reference else 0
        return _rewrite_address(match[0][:end], mark, secrets, 0) + match[0][end:]

    return _IN_TEXT.sub(rewrite_match, text)


def _rewrite_address(address: str, mark: str | None, secrets: list[str], depth: int) -> str:
    """Remove or mask the credentials of one address at a depth of nesting."""
    if depth > MAX_DEPTH:
        return mark or ""
    begin, user, rest = split_user_info(address)
    if user and not _may_stay(begin, user, mark):
        secrets.append("password" if ":" in user else "user info")
        user = f"{mark}@" if mark else ""
    path, hash_, fragment = rest.partition("#")
    path, question, query = path.partition("?")
    path = _rewrite_path(path, mark, secrets, depth)
    kept = _rewrite_pairs(query, mark, secrets, depth)
    question = question if kept or not query else ""
    kept_fragment = _rewrite_pairs(fragment, mark, secrets, depth)
    hash_ = hash_ if kept_fragment or not fragment else ""
    return f"{begin}{user}{path}{question}{kept}{hash_}{kept_fragment}"


def split_user_info(address: str) -> tuple[str, str, str]:
    """Split an address into scheme with ``//``, user info with its ``@``, and the rest.

    Passwords are sometimes written with a raw ``/``, ``?`` or ``#``. The text before that character
    is then not a host and port, and the user info ends at the last ``@``.
    """
    start = _AUTHORITY.match(address)
    if start is None:
        return "", "", address
    rest = address[start.end() :]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        cut = authority.rindex("@") + 1
    elif "@" in rest and not _HOST_PORT.fullmatch(authority):
        cut = rest.rindex("@") + 1
    else:
        cut = 0
    return start[0], rest[:cut], rest[cut:]


def _may_stay(begin: str, user: str, mark: str | None) -> bool:
    """Return whether user info is not a secret: a container's name, or only references."""
    name, colon, password = user[:-1].partition(":")
    if begin.lower().startswith(_CONTAINERS) and not colon:
        return True
    secret = password if colon else name
    return mark is not None and (secret == MASK or not REFERENCE.sub("", secret))


def _rewrite_path(path: str, mark: str | None, secrets: list[str], depth: int) -> str:
    """Rewrite a path: session ids (``;jsessionid=``), and an address as in ``/vsicurl/https://…``."""

    def matrix(match: re.Match[str]) -> str:
        if not _is_secret(_decoded(match[1]), unquote(match[2]), mark):
            return match[0]
        secrets.append(match[1])
        return f";{match[1]}={mark}" if mark else ""

    path = _MATRIX.sub(matrix, path)
    inner = re.search(r"[A-Za-z][A-Za-z0-9+.-]*://", path)
    if inner is None or "@" not in path:
        return path
    start = inner.start()
    return path[:start] + _rewrite_address(path[start:], mark, secrets, depth + 1)


def _rewrite_pairs(text: str, mark: str | None, secrets: list[str], depth: int) -> str:
    """Rewrite the parameters of a query, or of a fragment in the form of a query."""
    if not text:
        return text
    # An address as a parameter is often not encoded, so its own query begins with a second "?".
    pieces = re.split(r"([&;?])", text)
    fields = [field.partition("=") for field in pieces[::2]]
    names = [_decoded(name) for name, _, _ in fields]
    values = [unquote_plus(value) for _, _, value in fields]
    secret = _secret_fields(names, values, mark)
    kept = ""
    for number, (name, equals, value) in enumerate(fields):
        separator = pieces[2 * number - 1] if number else ""
        if secret[number]:
            secrets.append(name)
            if not mark:
                continue
            new = mark
        else:
            new = _rewrite_value(value, mark, secrets, depth)
        kept += (separator if kept else "") + name + equals + new
    return kept


def _rewrite_value(value: str, mark: str | None, secrets: list[str], depth: int) -> str:
    """Rewrite a parameter that may be an address, percent-encoded or not."""
    plain = unquote(value)
    if "://" not in plain and "?" not in plain and "%" not in plain:
        return value
    new = _rewrite_address(plain, mark, secrets, depth + 1)
    if new == plain:
        return value
    return new if plain == value else quote(new, safe="")


def _secret_fields(names: Sequence[str], values: Sequence[str], mark: str | None) -> list[bool]:
    """Return for each parameter of a query whether it is a secret or belongs to a signature."""
    present = {name for name, value in zip(names, values, strict=True) if value}
    signed: set[str] = set()
    if "sig" in present and present & {"se", "sv", "si", *_EXPIRY}:
        signed |= _SAS
    if present & {"signature", "key-pair-id", "awsaccesskeyid", "googleaccessid", "ossaccesskeyid"}:
        signed |= _CLOUD_SIGNED
    prefixes = set()
    for name in present:
        vendor = _VENDOR.fullmatch(name)
        if vendor and vendor[2] in ("signature", "credential", "security-token", "sig"):
            prefixes.add(vendor[1])
    secret = [
        bool(value)
        and not _is_reference(value, mark)
        and (name in signed or name.startswith(tuple(prefixes)) or _is_secret(name, value, mark))
        for name, value in zip(names, values, strict=True)
    ]
    if any(secret):  # the expiry of a signature differs from night to night
        secret = [
            is_secret or (bool(value) and _PLAIN.sub("", name) in _EXPIRY)
            for is_secret, name, value in zip(secret, names, values, strict=True)
        ]
    return secret


def _decoded(name: str) -> str:
    """Return a parameter's name in lower case, percent-decoded as often as it was encoded."""
    for _ in range(MAX_DEPTH):
        plain = unquote_plus(name)
        if plain == name:
            break
        name = plain
    return name.strip().lower()


def _is_secret(name: str, value: str, mark: str | None) -> bool:
    """Return whether a parameter is a secret by its name or its value.

    In a user's address and in a message (``mark`` is set), a name that often means a secret is
    enough. In an item's address the value decides as well, because the parameter may choose the
    file.
    """
    if not value or _is_reference(value, mark):
        return False
    plain = _PLAIN.sub("", name)
    if _is_secret_name(name) or _KNOWN_SECRET.fullmatch(value):
        return True
    if plain == "key":
        return mark is not None or not _is_locator(value)
    if plain == "pass":
        return mark is not None or not (
            value.isdecimal() or value.lower().startswith(("asc", "desc"))
        )
    return plain in _PERHAPS and (mark is not None or _is_random(value))


def _is_secret_name(name: str) -> bool:
    """Return whether a parameter, header or JSON member with this name is a secret."""
    plain = _PLAIN.sub("", name.lower())
    if plain.endswith("token") and plain.removesuffix("token").endswith(_PAGING):
        return False
    return plain in _SECRET or plain.endswith(_SECRET_ENDS)


def _is_reference(value: str, mark: str | None) -> bool:
    """Return whether a value consists of references only; stored addresses keep none."""
    return mark is not None and not REFERENCE.sub("", value)


def _is_locator(value: str) -> bool:
    """Return whether the value of ``key`` is the name of a file or a number, not a secret key."""
    path = "/" in value and not value.endswith("=")
    return path or bool(_FILE.search(value)) or (value.isdecimal() and len(value) < 12)


def _is_random(value: str) -> bool:
    """Return whether a value looks like a signature: long, letters and digits, no file name."""
    long = re.fullmatch(r"[A-Za-z0-9+/=_.~ -]{16,}", value)
    mixed = re.search(r"[0-9]", value) and re.search(r"[A-Za-z]", value)
    return bool(long and mixed and not _FILE.search(value))


def _mask_loose(match: re.Match[str]) -> str:
    """Mask ``name=value`` outside an address, as in a connection string."""
    if not _is_secret_name(match[1]) or _is_reference(match[2], MASK):
        return match[0]
    return f"{match[1]}={MASK}"
