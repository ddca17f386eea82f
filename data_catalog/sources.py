"""Source profiles: what is known about a catalogue's collections that their items do not say.

A profile names the licence, how an item's identity is told (which acquisition, which tile, which
processing), where each band and the cloud layer lie, and how its assets are reached. Profiles are
YAML files: the user's own first (``GEOFM_SOURCES``), then those in ``data_catalog/sources``, of
which the one called ``generic`` fits everything else. ``docs/sources.md`` explains each field.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from license_expression import get_spdx_licensing
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_catalog.errors import UsageError
from data_catalog.redaction import secrets_in

PROFILES = Path(__file__).parent / "sources"
#: Environment variable with files or folders of the user's own profiles.
USER_SOURCES = "GEOFM_SOURCES"
_LICENCE_REF = re.compile(r"^LicenseRef-[A-Za-z0-9.-]+$")


class BadSource(UsageError):
    """A file of source profiles that does not hold together, or a profile that is not there."""


class Profile(BaseModel):
    """Base of the parts of a profile: frozen, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Cloud(Profile):
    """The layer that marks clouds: classes of a map, or bits of a quality band.

    Attributes:
        asset: asset key of the layer.
        codes: ``classes`` when a pixel's value is its class, ``bits`` when each bit is a flag.
        cloud: classes or bit numbers that mean cloud (cirrus included).
        shadow: classes or bit numbers that mean cloud shadow.
    """

    asset: str
    codes: Literal["classes", "bits"] = "classes"
    cloud: tuple[int, ...]
    shadow: tuple[int, ...] = ()


class Identity(Profile):
    """How two items are recognised as the same acquisition of the same tile.

    Attributes:
        acquisition: properties that together name the acquisition; all must be there.
        strip: regular expression removed from the acquisition (what a reprocessing changes).
        tile: the first of these properties that is there names the tile.
        version: properties that hold the processing version, the first that is there counts.
        generated: the same for the time of processing.
        sequence: properties that differ between two receptions of one acquisition.
        product: property with the provider's own name of the product.
    """

    acquisition: tuple[str, ...] = ()
    strip: str = ""
    tile: tuple[str, ...] = ("grid:code",)
    version: tuple[str, ...] = ("processing:version", "version")
    generated: tuple[str, ...] = ("created",)
    sequence: tuple[str, ...] = ()
    product: str = ""

    @field_validator("strip")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


class BandPlace(Profile):
    """Where a band lies: the asset's key, and its position (from 1) in a file of several bands.

    The position counts only where the item itself does not describe the bands of the asset.
    """

    asset: str = Field(min_length=1)
    index: int = Field(1, ge=1, le=1000)


class BaselineOffset(Profile):
    """An offset that the provider does not state: from ``since`` on, ``counts`` is added.

    Used only where neither the asset nor the item says anything about an offset.
    """

    property: str
    since: str
    counts: int


class Source(Profile):
    """What is known about some collections of an API.

    Attributes:
        api: patterns (``*`` matches anything) of the API's address.
        collections: patterns of collection ids; earlier files and exact names win.
        licence: SPDX id or expression, or a ``LicenseRef-`` where SPDX has none.
        bands: where each band lies by common name: an asset key, or an asset key and an index.
        default_scale: reflectance per count where the asset states none.
        default_offset: reflectance of count 0 where neither scale nor offset is stated.
        default_nodata: value of pixels without data where neither file nor item states one.
        offset_applied: boolean property that says the stated offset is in the pixels already.
        sign: URL that signs ``{href}``; ``{api}`` stands for the API's address.
        sign_when: ``always``, or ``refused`` to sign only what answers 401 or 403.
        requester_pays: whether whoever reads the bucket pays for it (AWS credentials needed).
        credentials_for: buckets (``bucket`` or ``bucket/prefix``) for which the user's AWS
            credentials are used; all others are read without.
        endpoint: address of the S3 service of ``s3://`` assets, where it is not AWS.
        region: region of the bucket, where a client must be told.
    """

    name: str
    title: str
    provider: str
    api: tuple[str, ...] = ("*",)
    collections: tuple[str, ...] = ("*",)
    licence: str
    licence_url: str = ""
    attribution: str = ""
    bands: dict[str, BandPlace] = Field(default_factory=dict)
    cloud: Cloud | None = None
    identity: Identity = Identity()
    default_scale: float | None = Field(None, gt=0)
    default_offset: float = 0.0
    default_nodata: float | None = None
    offset_applied: str = ""
    baseline_offset: BaselineOffset | None = None
    sign: str = ""
    sign_when: Literal["always", "refused"] = "refused"
    requester_pays: bool = False
    credentials_for: tuple[str, ...] = ()
    endpoint: str = Field("", pattern=r"^(https?://.+)?$")
    region: str = ""
    notes: str = ""

    @field_validator("bands", mode="before")
    @classmethod
    def _short_form(cls, bands: Any) -> Any:
        """``red: B04`` is short for ``red: {asset: B04}``."""
        if not isinstance(bands, dict):
            return bands
        return {
            name: {"asset": place} if isinstance(place, str) else place
            for name, place in bands.items()
        }

    @field_validator("licence")
    @classmethod
    def _known_licence(cls, licence: str) -> str:
        if spdx_licence(licence) is None:
            raise ValueError(f"{licence!r} is neither an SPDX expression nor a LicenseRef- id")
        return licence

    def covers(self, api: str, collection: str) -> bool:
        """Whether the profile is meant for a collection of the API at ``api``."""
        address = api.rstrip("/")
        return any(fnmatchcase(address, pattern) for pattern in self.api) and (
            self.covers_collection(collection)
        )

    def covers_collection(self, collection: str) -> bool:
        """Whether the profile is meant for a collection with this id, whatever its API."""
        return any(fnmatchcase(collection, pattern) for pattern in self.collections)


def spdx_licence(text: Any) -> str | None:
    """The licence as SPDX writes it, or None when it is neither SPDX nor a ``LicenseRef-``.

    STAC's ``proprietary``, ``various`` and ``other`` are no licences and give None.
    """
    if not isinstance(text, str) or not text.strip() or len(text) > 200:
        return None
    licence = text.strip()
    if _LICENCE_REF.match(licence):
        return licence
    info = _licensing().validate(licence)
    return None if info.errors else str(info.normalized_expression)


@cache
def _licensing() -> Any:
    return get_spdx_licensing()


def load_sources() -> tuple[Source, ...]:
    """All profiles in the order in which they are asked: the user's, then geofm's own.

    The user's are what ``GEOFM_SOURCES`` names: YAML files or folders of them, several separated
    as in PATH, in that order. Among geofm's own ``generic`` is the last.

    Raises:
        BadSource: with file, field and remedy.
    """
    return _load(os.environ.get(USER_SOURCES, ""))


@cache
def _load(user: str) -> tuple[Source, ...]:
    own: list[Source] = []
    for place in filter(None, user.split(os.pathsep)):
        for path in _yaml_files(Path(place).expanduser()):
            own += read_sources(path)
    twice = [name for name, n in Counter(source.name for source in own).items() if n > 1]
    if twice:
        raise BadSource(
            f"{USER_SOURCES}: the profile {twice[0]!r} is there twice; give each a name of its own"
        )
    built_in: list[Source] = []
    for path in sorted(PROFILES.glob("*.yaml"), key=lambda p: (p.stem == "generic", p.stem)):
        built_in += read_sources(path)
    # a profile of the user's takes the place of geofm's own with the same name
    names = {source.name for source in own}
    return (*own, *(source for source in built_in if source.name not in names))


def _yaml_files(place: Path) -> list[Path]:
    """A file, or the YAML files of a folder by name."""
    if place.is_dir():
        found = sorted(p for p in place.iterdir() if p.suffix in (".yaml", ".yml"))
        if not found:
            raise BadSource(f"{USER_SOURCES}: no .yaml file in the folder {place}")
        return found
    return [place]


def read_sources(path: Path) -> list[Source]:
    """The profiles of one file, which holds one profile, or several under ``sources``.

    Raises:
        BadSource: with file, field and remedy.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadSource(
            f"there is no file {path}; see {USER_SOURCES} and docs/sources.md"
        ) from error
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise BadSource(f"{path} can't be read as YAML: {error}") from error
    several = isinstance(content, dict) and set(content) == {"sources"}
    found = content["sources"] if several else [content]
    if not isinstance(found, list) or not found:
        raise BadSource(f"{path}: `sources` must be a list of profiles; see docs/sources.md")
    profiles = []
    for number, one in enumerate(found):
        where = f"sources[{number}]." if several else ""
        if not isinstance(one, dict):
            raise BadSource(
                f"{path}: {where or 'the file '} is no profile; it needs name, title, provider, "
                "licence (docs/sources.md)"
            )
        try:
            source = Source.model_validate(one)
        except ValidationError as error:
            raise BadSource(f"{path}: {_explain(error, where)}; see docs/sources.md") from error
        for name in ("sign", "endpoint", "licence_url"):
            if secrets := secrets_in(getattr(source, name)):
                raise BadSource(
                    f"{path}: {where}{name} holds a secret ({', '.join(secrets)}), which every "
                    "dataset would keep; write ${NAME} in its place in `sign`, which stands for "
                    "the environment variable NAME, and give the S3 service its credentials by "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                )
        profiles.append(source)
    return profiles


def _explain(error: ValidationError, where: str) -> str:
    """One clause per field: which, what is wrong, what was given."""
    clauses = []
    for problem in error.errors():
        field = where + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(Source.model_fields) if len(problem["loc"]) == 1 else "docs"
            clauses.append(f"{field} is no field of a profile (known: {known})")
        elif problem["type"] == "missing":
            clauses.append(f"{field} is missing: give it")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            clauses.append(f"{field}: {message} (given: {problem['input']!r:.80})")
    return "; ".join(clauses)


def source_for(api_url: str, collection: str) -> Source:
    """The first profile that covers the collection; ``generic`` covers everything.

    Args:
        api_url: address of the STAC API, or ``planet``.
        collection: collection id.
    """
    return next(source for source in load_sources() if source.covers(api_url, collection))


def source_named(name: str) -> Source:
    """The profile with this name.

    Raises:
        BadSource: there is none, so that nothing is read by the rules of another one.
    """
    found = next((source for source in load_sources() if source.name == name), None)
    if found is None:
        raise BadSource(
            f"there is no source profile {name!r}; `geofm sources` lists those there are. If it is "
            f"one of your own, set {USER_SOURCES} as it was set for the search, for workers too"
        )
    return found


def count_sources(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows by source profile and licence, with the attribution that the profile asks for."""
    numbers = Counter((str(row["source"]), str(row["licence"])) for row in rows)
    return [
        {
            "source": name,
            "licence": licence,
            "rows": number,
            "attribution": source_named(name).attribution,
        }
        for (name, licence), number in sorted(numbers.items())
    ]
