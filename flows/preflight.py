"""Checks before the first stage, so that a run with a wrong setting does not start.

Each check is a function of the room that owns the setting. Networks are built only if the quick
checks pass. The checks fetch, train and publish nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from data_catalog.errors import GeofmError, UsageError
from data_catalog.hashing import digest_of
from data_catalog.manifest import software_versions
from flows.settings import Place
from flows.versions import check_name
from geofm.config.credentials import check_variables
from geofm.config.recipe import ComputeSettings, Recipe
from geofm.config.recipe_book import check_batch, check_budget, check_names
from geofm.embeddings.weights import check_named_file
from geofm.stages import get_stage

if TYPE_CHECKING:
    from geofm.embeddings.weights import Weights

#: Weights up to this size (bytes) are loaded and tried on a blank image. Of larger files only the
#: header is read.
TRIED_BYTES = 2 * 2**30
#: Seconds within which a Dask scheduler must accept a connection.
DASK_TIMEOUT_S = 3.0

#: The field of the recipe that a check is about, and the check.
Check = tuple[str, Callable[[], None]]
#: Runs that ``check_once`` has checked for the flow that starts next.
_passed: set[str] = set()


class CannotBegin(UsageError):
    """A setting makes the run fail later."""


class RunnerMissing(UsageError):
    """The task runner of the recipe is not installed, or its scheduler does not answer."""


def check_run(recipe: Recipe, place: Place, data_only: bool, is_local: bool = True) -> None:
    """Check everything that a run needs except its imagery.

    Args:
        recipe: settings of the run.
        place: store and catalogue of the run.
        data_only: the run ends with the dataset (``geofm refresh``).
        is_local: all stages run on this machine, so the device must be here.

    Raises:
        CannotBegin: lists each problem with its field and its remedy.
    """
    # These checks do not need torch, whose import takes seconds.
    quick: list[Check] = [
        ("pack.name", partial(check_name, place.catalogue, recipe.pack.name, "dataset")),
        ("search.stac", partial(check_variables, recipe.search.stac)),
        ("curate.budget", partial(check_budget, recipe)),
        ("compute.runner", partial(check_runner, recipe.compute)),
        ("curate.evaluation_sets", partial(_check_sets, recipe)),
        ("embed.encoder", partial(check_named_file, recipe.embed.encoder)),
    ]
    if not data_only:
        quick += [
            ("pretrain.name", partial(check_names, recipe)),
            ("pretrain.name", partial(check_name, place.catalogue, recipe.model_name, "model")),
            ("pretrain.batch", partial(check_batch, recipe)),
            ("evaluate.tasks", partial(_check_folders, recipe)),
            ("compute.trackers", partial(_check_trackers, recipe)),
        ]
        training = recipe.pretrain
        if training.alpha > 0:
            quick.append(("pretrain.teacher", partial(check_named_file, training.teacher)))
        if training.student_init == "pretrained":
            quick.append(("pretrain.student", partial(check_named_file, training.student)))
    _report(quick)
    if not data_only:
        _report([("evaluate.tasks", partial(_check_tasks, recipe))])
    heavy: list[Check] = [("embed.encoder", partial(_check_encoder, recipe, place))]
    if is_local:
        heavy.append(("compute.device", partial(_check_device, recipe)))
    if not data_only:
        heavy += [
            ("pretrain.name", partial(_check_title, recipe)),
            ("pretrain", partial(_check_training, recipe, place, is_local)),
        ]
    _report(heavy)


def check_once(
    recipe: Recipe, place: Place, data_only: bool, keep: bool = False, is_local: bool = True
) -> None:
    """Check a run, unless the command that starts it in this process has just checked it.

    Args:
        recipe: settings of the run.
        place: store and catalogue of the run.
        data_only: the run ends with the dataset.
        keep: record that the checks passed, for the flow that is called next.
        is_local: all stages run on this machine.
    """
    key = digest_of([recipe.model_dump(mode="json"), place.store.url, data_only])
    if key in _passed:
        _passed.discard(key)
        return
    check_run(recipe, place, data_only, is_local)
    if keep:
        _passed.add(key)


def _report(checks: Iterable[Check]) -> None:
    """Run checks, and raise one error with all problems."""
    problems = []
    for field, check in checks:
        try:
            check()
        except (GeofmError, OSError) as error:
            text = str(error)
            problems.append(text if field in text else f"{field}: {text}")
    if len(problems) == 1:
        raise CannotBegin(problems[0])
    if problems:
        lines = "\n  ".join(dict.fromkeys(problems))
        raise CannotBegin(
            f"the run would fail later, so it does not start. Change these settings:\n  {lines}"
        )


def check_runner(compute: ComputeSettings) -> None:
    """Check that the task runner is installed, and that its scheduler accepts connections.

    Raises:
        RunnerMissing: names the package to install or the scheduler to start.
    """
    if compute.runner != "dask":
        return
    # not imported: Prefect reads its settings when it is imported, and they come later
    if find_spec("prefect_dask") is None:
        raise RunnerMissing(
            "compute.runner is dask, which is not installed: pip install 'geofm[dask]'"
        )
    address = urlsplit(os.environ.get("GEOFM_DASK", ""))
    if address.scheme in ("tcp", "tls") and address.hostname and address.port:
        try:
            socket.create_connection((address.hostname, address.port), DASK_TIMEOUT_S).close()
        except OSError as error:
            raise RunnerMissing(
                f"compute.runner is dask, but the scheduler {address.hostname}:{address.port} "
                f"(GEOFM_DASK) does not answer ({error}); start it, or unset GEOFM_DASK"
            ) from error


def _check_sets(recipe: Recipe) -> None:
    from geofm.pool.registry import check_registry

    if recipe.curate.evaluation_sets:
        check_registry(recipe.curate.evaluation_sets)


def _check_trackers(recipe: Recipe) -> None:
    from geofm.pretraining.trackers import check_trackers

    check_trackers(recipe.compute.trackers)


def _check_folders(recipe: Recipe) -> None:
    from geofm.evaluation.tasks import open_task_folders

    open_task_folders(recipe.evaluate.tasks)


def _check_tasks(recipe: Recipe) -> None:
    from geofm.evaluation.check import check_tasks

    check_tasks(recipe.evaluate)


def _check_device(recipe: Recipe) -> None:
    from geofm.runtime.device import check_device

    check_device(recipe.compute.device)


def _check_title(recipe: Recipe) -> None:
    from geofm.embeddings.weight_inputs import check_model_title

    check_model_title(recipe.model_name)


def _check_encoder(recipe: Recipe, place: Place) -> None:
    from geofm.embeddings.embed import check_encoder

    weights = _weights("embed.encoder", recipe.embed.encoder, recipe, place)
    if _small(weights) and not _has_embedded(recipe, weights, place):
        check_encoder(recipe.embed, weights)


def _has_embedded(recipe: Recipe, weights: Weights, place: Place) -> bool:
    """Return whether an earlier run embedded chips with this encoder and these library versions."""
    settings = {**recipe.embed.model_dump(mode="json"), "encoder": weights.setting}
    versions = software_versions(get_stage("embed").software)
    return any(
        row.manifest["settings"] == settings and row.manifest["software"] == versions
        for row in place.catalogue.artifacts("embeddings")
    )


def _check_training(recipe: Recipe, place: Place, is_local: bool) -> None:
    from geofm.pretraining.check import check_training

    settings, teacher, student = recipe.pretrain, None, None
    if settings.alpha > 0:
        teacher = _weights("pretrain.teacher", settings.teacher, recipe, place)
    if settings.student_init == "pretrained":
        student = _weights("pretrain.student", settings.student, None, place)
        if student.origin == "random":  # weights of the hub that are not on this machine yet
            settings = settings.model_copy(update={"student_init": "random"})
            student = None
    for weights in (teacher, student):
        if weights is not None and not _small(weights):
            return
    compute = recipe.compute if is_local else recipe.compute.model_copy(update={"device": "cpu"})
    check_training(settings, recipe.cut.bands, compute.model_dump(), teacher, student)


def _small(weights: Weights) -> bool:
    return not weights.path or Path(weights.path).stat().st_size <= TRIED_BYTES


def _weights(field: str, name: str, recipe: Recipe | None, place: Place) -> Weights:
    """Return the weights that a field names; an untrained network if the hub's are not here yet."""
    from geofm.embeddings.weight_inputs import check_bands, find_weights_offline

    try:
        weights = find_weights_offline(name, place.catalogue.at(place.store))
    except GeofmError as error:
        text = str(error)
        raise UsageError(text if field in text else f"{field}: {text}") from error
    if recipe is not None:
        check_bands(weights, recipe.cut.bands, field)
    return weights
