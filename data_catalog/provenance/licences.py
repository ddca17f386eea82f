"""Licences: every rule by which geofm judges a licence.

spdx_expression     the SPDX form of a text; None if it names no licence
item_licence        the licence of a STAC item: its own, its collection's, or the profile's
source_licences     the licences of the imagery in an artifact, from its manifest
licence_union       every licence in a lineage, with the collection or weights that bring it
joint_expression    one SPDX expression for material under several licences
card_licence        the licence fields of a Hugging Face card
stated_licence      the licence of published weights, or the words for "none stated"
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_catalog.artifact import Artifact
    from data_catalog.catalogue import Catalogue

#: Roles of weights whose training data went into a model. An encoder only decides which chips are
#: selected.
LEARNED_FROM = ("teacher", "student")
NOT_STATED = "not stated"
#: Licences with a name of their own on the Hugging Face hub, by SPDX id.
HUB_NAMES = {
    name: name.lower()
    for name in (
        "Apache-2.0", "MIT", "CC0-1.0", "CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0",
        "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0",
        "CC-BY-ND-4.0", "CC-BY-NC-ND-3.0", "CC-BY-NC-ND-4.0", "CC-BY-NC-SA-2.0", "CC-BY-NC-SA-3.0",
        "CC-BY-NC-SA-4.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0",
    )
} | {"ODbL-1.0": "odbl", "ODC-By-1.0": "odc-by", "PDDL-1.0": "pddl"}  # fmt: skip
#: Longest text (characters) that can be a licence.
MAX_LENGTH = 200
_LICENCE_REF = re.compile(r"^LicenseRef-[A-Za-z0-9.-]+$")


def spdx_expression(text: Any) -> str | None:
    """Return a licence as SPDX writes it; None if it is neither SPDX nor a ``LicenseRef-`` id.

    STAC's ``proprietary``, ``various`` and ``other`` name no licence and give None.
    """
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_LENGTH:
        return None
    licence = text.strip()
    if _LICENCE_REF.match(licence):
        return licence
    info = _spdx_licensing().validate(licence)
    return None if info.errors else str(info.normalized_expression)


@cache
def _spdx_licensing() -> Any:
    # Reading the list of all licences takes a while, and most commands judge none.
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


def item_licence(item_text: Any, collection_text: Any, profile_licence: str) -> str:
    """Return the licence of a STAC item as an SPDX expression.

    Args:
        item_text: The property ``license`` of the item.
        collection_text: The field ``license`` of its collection, used if the item's names none.
        profile_licence: Licence of the source profile, used if the collection's names none.
    """
    stated = (spdx_expression(text) for text in (item_text, collection_text))
    return next(filter(None, stated), profile_licence)


def source_licences(facts: Mapping[str, Any]) -> list[str]:
    """List the licences of the imagery in a dataset or model, sorted.

    Args:
        facts: Facts of the manifest; ``sources`` is a list of sources with their licences.
    """
    return sorted({str(source["licence"]) for source in facts["sources"]})


def licence_union(catalogue: Catalogue, artifact: Artifact) -> list[dict[str, Any]]:
    """List every licence in the lineage of a dataset, or of an artifact made from one.

    Returns:
        A row for each licence and collection of each dataset, including datasets of models that
        were used as encoder, teacher or student; and a row for the published weights of each
        teacher and initial student. ``dataset`` (digest) or ``weights`` (network) is filled in.
    """
    # Imported here, so that source profiles do not load the database's libraries.
    from data_catalog.provenance.lineage import ancestor, ancestry, walk_lineage, weights_read

    rows: list[dict[str, Any]] = []
    own = ancestor(catalogue, artifact, "dataset")
    nodes = list(walk_lineage(ancestry(catalogue, artifact)))
    datasets = [node.artifact for node in nodes if node.kind == "dataset"]
    for dataset in sorted(datasets, key=lambda dataset: dataset.digest != own.digest):
        samples = dataset.table("samples.parquet", ["licence", "collection", "item_id"])
        groups = samples.groupby(["licence", "collection"], sort=True, dropna=False)
        for (licence, collection), group in groups:
            rows.append(
                {
                    "licence": str(licence),
                    "collection": str(collection),
                    "samples": len(group),
                    "items": int(group["item_id"].nunique()),
                    "dataset": dataset.digest,
                    "weights": "",
                }
            )
    listed = set()
    for node in nodes:
        for weights in weights_read(node.artifact):
            if weights["role"] not in LEARNED_FROM or weights["model"]:
                continue
            licence, network = stated_licence(weights["licence"]), weights["network"]
            if (licence, network) not in listed:
                listed.add((licence, network))
                rows.append(
                    {
                        "licence": licence,
                        "collection": "",
                        "samples": 0,
                        "items": 0,
                        "dataset": "",
                        "weights": network,
                    }
                )
    return rows


def stated_licence(licence: str) -> str:
    """Return the licence of published weights, or ``not stated`` if they state none."""
    return licence or NOT_STATED


def joint_expression(licences: Sequence[str]) -> str:
    """Return one SPDX expression for material under several licences: all of them apply."""
    return " AND ".join(licences)


def card_licence(licences: Sequence[str]) -> dict[str, str]:
    """Return the licence fields of a Hugging Face card for material under these licences.

    The hub knows one name per card, and only some licences; for all others it wants ``other`` and
    a free text.
    """
    if not licences:
        return {"license": "unknown"}
    if len(licences) == 1 and licences[0] in HUB_NAMES:
        return {"license": HUB_NAMES[licences[0]]}
    return {"license": "other", "license_name": joint_expression(licences)}
