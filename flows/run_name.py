"""The name of a flow run in the Prefect UI: what it does, unless a user has typed a name."""

from __future__ import annotations

import re

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from geofm.config.recipe import Recipe


def name_of(recipe: Recipe, *more: str, training: bool) -> str:
    """Describe a run in a few words, such as ``demo · 4 epochs · α=0 · 352 chips``."""
    words = [recipe.name]
    if training:
        epochs = recipe.pretrain.epochs
        words += [f"{epochs} epoch{'s' * (epochs != 1)}", f"α={recipe.pretrain.alpha:g}"]
    return " · ".join([*words, *more])


def rename_run(name: str, before: str = "") -> None:
    """Rename the flow run of the caller, unless a user has typed its name.

    A run without a name gets an adjective and an animal from Prefect's server or UI, which do not
    tell that nobody typed it.

    Args:
        name: The new name.
        before: An earlier name that this function has given.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    with get_client(sync_client=True) as client:
        current = client.read_flow_run(context.flow_run.id).name
        if current == before or is_generated(current):
            client.update_flow_run(context.flow_run.id, name=name)


#: Names that nobody has typed: amber-otter by the server, Amber-Otter by the UI, and
#: omega23-algedi-void by the earlier UI, which begins with a Greek letter.
_GENERATED = re.compile(
    r"[a-z]+-[a-z]+|[A-Z][a-z]+-[A-Z][a-z]+|(alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota"
    r"|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|upsilon|phi|chi|psi|omega)\d+-[a-z]+-[a-z]+"
)


def is_generated(name: str) -> bool:
    """Tell whether the server or the UI has made up a name."""
    return _GENERATED.fullmatch(name) is not None
