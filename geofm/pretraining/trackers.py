"""Live logs of training steps: TensorBoard, Weights & Biases, or both.

They receive the values that ``metrics.parquet`` will hold. No result of a run depends on them.
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

#: Folder of logs if the environment variable GEOFM_LOGS is not set.
LOGS = "geofm-logs"

#: A function that logs the metrics of a step.
LogStep = Callable[[int, Mapping[str, float]], None]


class TrackerMissing(UsageError):
    """The package of a tracker is not installed."""


@contextmanager
def open_trackers(
    names: Sequence[str], run: str, settings: Mapping[str, Any], first_step: int = 0
) -> Iterator[LogStep]:
    """Open trackers; yields a function that logs the metrics of a step to all of them.

    Args:
        names: Names of trackers: ``tensorboard``, ``wandb``.
        run: Name of the run.
        settings: Settings of the run, logged once.
        first_step: Step at which the run starts or resumes. Entries of later steps, from before an
            interruption, are replaced.

    Raises:
        TrackerMissing: A package is not installed; the message names it.
    """
    openers = {"tensorboard": _open_tensorboard, "wandb": _open_wandb}
    with ExitStack() as stack:
        loggers = [stack.enter_context(openers[name](run, settings, first_step)) for name in names]

        def log_step(step: int, metrics: Mapping[str, float]) -> None:
            for logger in loggers:
                logger(step, metrics)

        yield log_step


def check_trackers(names: Sequence[str]) -> None:
    """Check that the trackers are installed and can log; nothing is sent.

    Raises:
        TrackerMissing: A package is not installed.
        UsageError: The folder of logs cannot be written, or wandb has no key to log in with.
    """
    for name in names:
        try:
            import_module(name)  # both packages have the name of their tracker
        except ImportError as error:
            raise _missing(name) from error
    if names and not os.access(_existing_parent(Path(os.environ.get("GEOFM_LOGS", LOGS))), os.W_OK):
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


def _existing_parent(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def _logged_in() -> bool:
    """Whether ``wandb login`` has stored a key for its service on this machine."""
    try:
        credentials = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    service = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return credentials.authenticators(urlsplit(service).hostname or "") is not None


def logs_folder() -> Path:
    """Create and return the folder of logs: ``GEOFM_LOGS``, or one in the working directory."""
    folder = Path(os.environ.get("GEOFM_LOGS", LOGS))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _missing(name: str) -> TrackerMissing:
    return TrackerMissing(
        f"compute.trackers names {name}, which is not installed: pip install 'geofm[track]'"
    )


@contextmanager
def _open_tensorboard(run: str, settings: Mapping[str, Any], first_step: int) -> Iterator[LogStep]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    writer = SummaryWriter(str(logs_folder() / run), flush_secs=10, purge_step=first_step or None)
    lines = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
    writer.add_text("settings", f"| | |\n|---|---|\n{lines}")

    def log_step(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    try:
        yield log_step
    finally:
        writer.close()


@contextmanager
def _open_wandb(run: str, settings: Mapping[str, Any], first_step: int) -> Iterator[LogStep]:
    try:
        import wandb
    except ImportError as error:
        raise _missing("wandb") from error
    # Without an account nothing is sent; `wandb sync` can upload the folder later.
    mode: Any = os.environ.get("WANDB_MODE") or (
        "online" if os.environ.get("WANDB_API_KEY") else "offline"
    )
    # Only the service can resume a run. Offline, each session is a run of its own.
    resume: Any = {"id": run, "resume": "allow"} if mode == "online" else {}
    with wandb.init(
        project="geofm",
        name=run,
        **resume,
        config=dict(settings),
        dir=str(logs_folder()),
        mode=mode,
        settings=wandb.Settings(console="off", silent=True),
    ) as wandb_run:

        def log_step(step: int, metrics: Mapping[str, float]) -> None:
            wandb_run.log(dict(metrics), step=step)

        yield log_step
