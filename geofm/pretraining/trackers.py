"""Training steps for whoever watches live: TensorBoard, Weights & Biases, or both.

They are told what ``metrics.parquet`` will hold; nothing that a run yields depends on them.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_catalog.errors import UsageError

#: Where logs go when GEOFM_LOGS does not say.
LOGS = "geofm-logs"

Log = Callable[[int, Mapping[str, float]], None]


class TrackerMissing(UsageError):
    """The package of a tracker is not installed."""


@contextmanager
def tracking(
    names: Sequence[str], run: str, settings: Mapping[str, Any], first: int = 0
) -> Iterator[Log]:
    """A function that logs the numbers of a step to every tracker named.

    Args:
        names: ``tensorboard``, ``wandb``.
        run: name of the run.
        settings: of the run, logged once.
        first: step at which it goes on; what a tracker has of later ones is replaced.

    Raises:
        TrackerMissing: says what to install.
    """
    openers = {"tensorboard": _tensorboard, "wandb": _wandb}
    with ExitStack() as stack:
        logs = [stack.enter_context(openers[name](run, settings, first)) for name in names]

        def log(step: int, values: Mapping[str, float]) -> None:
            for one in logs:
                one(step, values)

        yield log


def check_trackers(names: Sequence[str]) -> None:
    """Check that every tracker is installed and can log; nothing is sent.

    Raises:
        TrackerMissing: a package is not installed.
        UsageError: the folder of logs cannot be written, or wandb has no key to log in with.
    """
    for name in names:
        try:
            import_module(name)  # both packages are called as their tracker
        except ImportError as error:
            raise _missing(name) from error
    if names and not os.access(_writable_parent(Path(os.environ.get("GEOFM_LOGS", LOGS))), os.W_OK):
        raise UsageError(
            f"compute.trackers: the folder of logs {os.environ.get('GEOFM_LOGS', LOGS)} cannot be "
            "written; set GEOFM_LOGS to another folder"
        )
    online = os.environ.get("WANDB_MODE") == "online"
    if "wandb" in names and online and not os.environ.get("WANDB_API_KEY") and not _logged_in():
        raise UsageError(
            "compute.trackers names wandb and WANDB_MODE is online, but there is no key: set "
            "WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline"
        )


def _writable_parent(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )


def _logged_in() -> bool:
    """Whether ``wandb login`` has left a key for its service on this machine."""
    try:
        found = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    service = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return found.authenticators(urlsplit(service).hostname or "") is not None


def logs_folder() -> Path:
    """``GEOFM_LOGS``, or a folder beside where the command was started."""
    folder = Path(os.environ.get("GEOFM_LOGS", LOGS))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _missing(name: str) -> TrackerMissing:
    return TrackerMissing(
        f"compute.trackers names {name}, which is not installed: pip install 'geofm[track]'"
    )


@contextmanager
def _tensorboard(run: str, settings: Mapping[str, Any], first: int) -> Iterator[Log]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    writer = SummaryWriter(str(logs_folder() / run), flush_secs=10, purge_step=first or None)
    lines = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
    writer.add_text("settings", f"| | |\n|---|---|\n{lines}")

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(run: str, settings: Mapping[str, Any], first: int) -> Iterator[Log]:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    # without an account nothing is sent: `wandb sync` can do that later
    mode: Any = os.environ.get("WANDB_MODE") or (
        "online" if os.environ.get("WANDB_API_KEY") else "offline"
    )
    quiet = wandb.Settings(console="off", silent=True)
    folder = str(logs_folder())
    # only the service can go on with a run; offline each session is one
    again: Any = {"id": run, "resume": "allow"} if mode == "online" else {}
    with wandb.init(
        project="geofm",
        name=run,
        **again,
        config=dict(settings),
        dir=folder,
        mode=mode,
        settings=quiet,
    ) as told:

        def log(step: int, values: Mapping[str, float]) -> None:
            told.log(dict(values), step=step)

        yield log
