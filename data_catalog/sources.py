"""Source profiles: facts about the collections of a STAC catalogue that their items do not state.

A profile has the licence, the properties that identify an acquisition, a tile and a processing
version, the assets of the bands and of the cloud layer, and the access to the assets. Profiles are
YAML files. The user's profiles (``GEOFM_SOURCES``) come first, then those in
``data_catalog/sources``; the last one, ``generic``, covers every collection.
``docs/sources.md`` explains each field.
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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_catalog.errors import UsageError
from data_catalog.provenance.licences import spdx_expression
from data_catalog.redaction import secrets_in

PROFILES = Path(__file__).parent / "sources"
#: Environment variable with files or folders of the user's own profiles.
USER_SOURCES = "GEOFM_SOURCES"


class BadSource(UsageError):
    """A file of source profiles is not valid, or a profile does not exist."""


class Profile(BaseModel):
    """Base of the parts of a profile: frozen, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Cloud(Profile):
    """The layer that marks clouds: a class map, or a quality band with bit flags.

    Attributes:
        asset: Asset key of the layer.
        codes: ``classes`` if a pixel's value is its class, ``bits`` if each bit is a flag.
        cloud: Classes or bit numbers of cloud (cirrus included).
        shadow: Classes or bit numbers of cloud shadow.
    """

    asset: str
    codes: Literal["classes", "bits"] = "classes"
    cloud: tuple[int, ...]
    shadow: tuple[int, ...] = ()


class Identity(Profile):
    """The properties by which two items are the same acquisition of the same tile.

    Attributes:
        acquisition: Properties that together identify the acquisition; an item must have all.
        strip: Regular expression that is removed from the acquisition (the part that a
            reprocessing changes).
        tile: Properties with the tile; the first that an item has is used.
        version: Properties with the processing version; the first that an item has is used.
        generated: Properties with the time of processing; the first that an item has is used.
        sequence: Properties that differ between two receptions of one acquisition.
        product: Property with the provider's name of the product.
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
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern


class BandPlace(Profile):
    """The asset of a band, and the band's position (from 1) in a file of several bands.

    The position is used only if the item does not describe the bands of the asset.
    """

    asset: str = Field(min_length=1)
    index: int = Field(1, ge=1, le=1000)


class BaselineOffset(Profile):
    """An offset in counts that the provider does not state, for items from ``since`` on.

    It is used only if neither the asset nor the item states an offset.
    """

    property: str
    since: str
    counts: int


class Source(Profile):
    """The profile of some collections of a STAC API.

    Attributes:
        api: Patterns (``*`` matches anything) of the API's address.
        collections: Patterns of collection ids. The first profile that covers a collection is used.
        licence: SPDX id or expression, or a ``LicenseRef-`` id if SPDX has none.
        bands: Asset of each band by common name: an asset key, or an asset key and an index.
        default_scale: Reflectance per count if the asset states none.
        default_offset: Reflectance of count 0 if neither scale nor offset is stated.
        default_nodata: Value of pixels without data if neither file nor item states one.
        offset_applied: Boolean property that is true if the pixels include the stated offset.
        sign: URL that signs ``{href}``; ``{api}`` is replaced by the API's address.
        sign_when: ``always``, or ``refused`` to sign only addresses that answer 401 or 403.
        requester_pays: Whether the reader pays for access to the bucket (needs AWS credentials).
        credentials_for: Buckets (``bucket`` or ``bucket/prefix``) for which the user's AWS
            credentials are used; all others are read without.
        endpoint: Address of the S3 service of ``s3://`` assets, if it is not AWS.
        region: Region of the bucket, if a client needs it.
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
        """Read ``red: B04`` as ``red: {asset: B04}``."""
        if not isinstance(bands, dict):
            return bands
        return {
            name: {"asset": band} if isinstance(band, str) else band for name, band in bands.items()
        }

    @field_validator("licence")
    @classmethod
    def _known_licence(cls, licence: str) -> str:
        if spdx_expression(licence) is None:
            raise ValueError(f"{licence!r} is neither an SPDX expression nor a LicenseRef- id")
        return licence

    def covers(self, api: str, collection: str) -> bool:
        """Return whether the profile covers a collection of the API at ``api``."""
        address = api.rstrip("/")
        return any(fnmatchcase(address, pattern) for pattern in self.api) and (
            self.covers_collection(collection)
        )

    def covers_collection(self, collection: str) -> bool:
        """Return whether the profile covers collections with this id, on any API."""
        return any(fnmatchcase(collection, pattern) for pattern in self.collections)


def load_sources() -> tuple[Source, ...]:
    """Load all profiles in the order in which they are tried: the user's, then geofm's own.

    The user's profiles are the YAML files or folders in ``GEOFM_SOURCES``, separated as in PATH.
    ``generic`` is the last of geofm's own.

    Raises:
        BadSource: A profile is not valid; the message names file and field.
    """
    return _load(os.environ.get(USER_SOURCES, ""))


@cache
def _load(user: str) -> tuple[Source, ...]:
    own: list[Source] = []
    for name in filter(None, user.split(os.pathsep)):
        for path in _yaml_files(Path(name).expanduser()):
            own += read_sources(path)
    twice = [name for name, n in Counter(source.name for source in own).items() if n > 1]
    if twice:
        raise BadSource(
            f"{USER_SOURCES}: two profiles are named {twice[0]!r}; give each a name of its own"
        )
    built_in: list[Source] = []
    for path in sorted(PROFILES.glob("*.yaml"), key=lambda p: (p.stem == "generic", p.stem)):
        built_in += read_sources(path)
    # A profile of the user replaces geofm's own profile of the same name.
    names = {source.name for source in own}
    return (*own, *(source for source in built_in if source.name not in names))


def _yaml_files(path: Path) -> list[Path]:
    """Return the YAML files of a folder, sorted by name; or the path itself if it is a file."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
        if not files:
            raise BadSource(f"{USER_SOURCES}: the folder {path} has no .yaml file")
        return files
    return [path]


def read_sources(path: Path) -> list[Source]:
    """Read the profiles of a file: one profile, or several under ``sources``.

    Raises:
        BadSource: A profile is not valid; the message names file and field.
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
    entries = content["sources"] if several else [content]
    if not isinstance(entries, list) or not entries:
        raise BadSource(f"{path}: `sources` must be a list of profiles; see docs/sources.md")
    profiles = []
    for number, entry in enumerate(entries):
        where = f"sources[{number}]." if several else ""
        if not isinstance(entry, dict):
            raise BadSource(
                f"{path}: {where or 'the file '} is not a profile; it needs name, title, provider, "
                "licence (docs/sources.md)"
            )
        try:
            source = Source.model_validate(entry)
        except ValidationError as error:
            raise BadSource(f"{path}: {_explain(error, where)}; see docs/sources.md") from error
        for name in ("sign", "endpoint", "licence_url"):
            if secrets := secrets_in(getattr(source, name)):
                raise BadSource(
                    f"{path}: {where}{name} holds a secret ({', '.join(secrets)}), which every "
                    "dataset would contain; in `sign`, write ${NAME} in its place, which is "
                    "replaced by the environment variable NAME; for an S3 service, set "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                )
        profiles.append(source)
    return profiles


def _explain(error: ValidationError, where: str) -> str:
    """Describe the errors of a profile: field, problem and value of each."""
    clauses = []
    for problem in error.errors():
        field = where + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(Source.model_fields) if len(problem["loc"]) == 1 else "docs"
            clauses.append(f"{field} is not a field of a profile (known: {known})")
        elif problem["type"] == "missing":
            clauses.append(f"{field} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            clauses.append(f"{field}: {message} (given: {problem['input']!r:.80})")
    return "; ".join(clauses)


def source_for(api_url: str, collection: str) -> Source:
    """Return the first profile that covers a collection; ``generic`` covers every collection.

    Args:
        api_url: Address of the STAC API, or ``planet``.
        collection: Collection id.
    """
    return next(source for source in load_sources() if source.covers(api_url, collection))


def source_named(name: str) -> Source:
    """Return the profile with this name.

    Raises:
        BadSource: There is no such profile.
    """
    source = next((source for source in load_sources() if source.name == name), None)
    if source is None:
        raise BadSource(
            f"there is no source profile {name!r}; `geofm sources` lists the known ones. If it is "
            f"a profile of your own, set {USER_SOURCES} as it was set for the search, on workers "
            "too"
        )
    return source


def count_sources(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Count rows by source profile and licence; each entry has the profile's attribution."""
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
