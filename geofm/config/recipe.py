"""The recipe: one pydantic model for the YAML file, the command line and the Prefect form.

Each section belongs to one stage and holds exactly the settings of that stage. A changed field
therefore changes the cache keys of its stage and of the stages after it, and of no other. The
section ``compute`` sets where and how fast a run happens; only its seed reaches a manifest.

The sections follow in the order of the pipeline; `Recipe`, at the end, puts them together.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data_catalog.redaction import NO_SECRET

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

#: Name of a recipe, a dataset or a model.
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
BBox = tuple[float, float, float, float]


class RecipeSection(BaseModel):
    """Base of all sections: unknown fields are errors; values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class SearchSettings(RecipeSection):
    """Stage search: the catalogue, the query, and limits that protect a refresh."""

    stac: str = Field(
        "planet",
        title="STAC catalogue",
        description="A STAC API (http or https), a static catalogue's catalog.json or "
        "collection.json or a stac-geoparquet file (http, https, s3 or a local path), or `planet` "
        "for the embedded procedural Earth. It must not contain a password or token: write ${NAME} "
        "in its place, and set the environment variable NAME.",
        json_schema_extra={"pattern": NO_SECRET},
    )
    collections: list[str] = Field(
        [],
        description="Collections to search; a warning names those that the catalogue lacks. "
        "Empty: all collections of the catalogue.",
    )
    bbox: BBox | None = Field(
        None, description="West, south, east, north in degrees (EPSG:4326). Empty: everywhere."
    )
    area: dict[str, Any] | None = Field(
        None,
        title="Area",
        description="GeoJSON polygon, multipolygon or features in degrees, or the path of a file "
        "with one, which is read at once. Instead of a bbox.",
    )
    places: list[str] = Field(
        [],
        max_length=1000,
        description="Circles as lon/lat/radius_km, e.g. 2.35/48.85/10. Instead of a bbox.",
    )
    datetime: str | None = Field(
        None, description="RFC 3339 time or interval, e.g. 2024-01-01/2024-12-31."
    )
    max_items: int = Field(
        10_000, ge=1, le=10_000_000, description="The run fails if more items match."
    )
    max_matched: int = Field(
        10_000,
        ge=1,
        description="A query that matches this many items or more is split by collection, time "
        "and area, because servers page only to a limited depth (Earth Search: 10,000).",
    )
    check_counts: bool = Field(
        True,
        description="Compare each listing with the number of matches that the API states; an "
        "incomplete listing is repeated, then the run fails. Off: for APIs with wrong counts.",
    )
    max_withdrawn: float = Field(
        0.5,
        ge=0,
        le=1,
        description="The run fails if a larger share of the last search's items is gone, because "
        "the catalogue is then probably incomplete.",
    )
    watermark: bool = Field(
        True,
        description="A refresh lists only items updated since the last one, if counts prove that "
        "this is enough. Off: it lists everything, for catalogues with unreliable `updated` times.",
    )
    max_cloud_percent: float = Field(
        100.0, ge=0, le=100, description="Drop scenes whose eo:cloud_cover exceeds this (percent)."
    )
    allow_hosts: list[str] = Field(
        [],
        description="Hosts that assets may be read from. Empty: any public host, "
        "and the STAC API's own host.",
    )
    credentials_for: list[str] = Field(
        [],
        description="Buckets (bucket or bucket/prefix) that your AWS credentials may be used for, "
        "in addition to those of the source profile. Others are read without credentials.",
    )

    @field_validator("credentials_for")
    @classmethod
    def _check_buckets(cls, buckets: list[str]) -> list[str]:
        for text in buckets:
            if not re.fullmatch(r"(s3://)?[A-Za-z0-9*][A-Za-z0-9.*_-]{0,62}(/[^?#]*)?", text):
                raise ValueError("give bucket or bucket/prefix, e.g. usgs-landsat")
        return [text.removeprefix("s3://").rstrip("/") for text in buckets]

    @field_validator("bbox")
    @classmethod
    def _check_bbox(cls, box: BBox | None) -> BBox | None:
        if box is not None:
            west, south, east, north = box
            if not (-180 <= west <= 180 and -180 <= east <= 180 and -90 <= south < north <= 90):
                raise ValueError("give W,S,E,N in degrees with S < N, e.g. 2.2,48.8,2.5,48.9")
        return box

    # The functions of config.area are imported on use: they need shapely and pyproj.

    @field_validator("area", mode="before")
    @classmethod
    def _read_area(cls, value: Any) -> Any:
        from geofm.config.area import read_area

        return read_area(value)

    @field_validator("places")
    @classmethod
    def _check_places(cls, places: list[str]) -> list[str]:
        from geofm.config.area import parse_circle

        for text in places:
            parse_circle(text)
        return places

    @model_validator(mode="after")
    def _check_one_area(self) -> SearchSettings:
        given = [n for n in ("bbox", "area", "places") if getattr(self, n) not in (None, [])]
        if len(given) > 1:
            names = " and ".join(f"search.{name}" for name in given)
            raise ValueError(f"{names} are both given; keep one and empty the other ({given[0]}=)")
        return self

    @field_validator("stac")
    @classmethod
    def _check_stac(cls, address: str) -> str:
        from geofm.config.credentials import check_address

        check_address(address)
        address = address.rstrip("/")
        if address == "planet" or re.match(r"(https?|s3)://.", address):
            return address
        path = address.removeprefix("file://")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", path) or not re.search(r"/|\.\w+$", path):
            raise ValueError(
                "give the http(s) address of a STAC API, the http(s), s3 or local address of a "
                "catalog.json, collection.json or stac-geoparquet file, or `planet`"
            )
        return _absolute(path)

    def geometry(self) -> BaseGeometry | None:
        """Return the area of the search (EPSG:4326); None for everywhere."""
        from geofm.config.area import search_area

        return search_area(self.bbox, self.area, self.places)


class CutSettings(RecipeSection):
    """Stage cut: from scenes to candidate chips."""

    size_px: int = Field(128, ge=16, le=2048, description="Chip edge in pixels.")
    gsd_m: float | None = Field(
        None,
        gt=0,
        le=10_000,
        description="Ground sample distance in metres. Empty: the finest of the chosen bands.",
    )
    anchor: Literal["ground", "scene"] = Field(
        "ground",
        description="Origin of the grid of cells. ground: the CRS origin, so that all scenes share "
        "cells. scene: each scene's corner, which wastes no rim and reads fewer blocks.",
    )
    bands: list[str] = Field(
        ["red", "green", "blue"],
        min_length=1,
        max_length=16,
        description="Band common names, in the order they are stored.",
    )
    resampling: Literal["nearest", "bilinear", "average", "cubic"] = Field(
        "bilinear", description="Used only for a band whose resolution differs from gsd_m."
    )
    max_overlap: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Drop a chip if chips of another scene of the same collection and day already "
        "cover this share of it.",
    )
    min_footprint: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Drop a chip if less than this share of it lies in the scene's footprint.",
    )
    max_nodata_percent: float = Field(
        100.0,
        ge=0,
        le=100,
        description="Drop scenes whose metadata state more pixels without data (percent).",
    )
    max_dates: int | None = Field(
        None, ge=1, description="Most dates of one ground cell in a season."
    )
    season: Literal["month", "quarter", "year", "all"] = Field(
        "quarter", description="Length of a season; quarters begin with December."
    )
    max_per_stratum: int | None = Field(
        None, ge=1, description="Most chips per square of stratum_deg and season."
    )
    stratum_deg: float = Field(
        1.0, ge=0.01, le=90, description="Edge of a stratum's square in degrees."
    )
    max_chips: int | None = Field(
        None, ge=1, description="Budget: most chips, spread evenly over the strata."
    )
    max_gib: float | None = Field(
        None, gt=0, description="Budget: approximate limit of the download in GiB."
    )
    whole_max_mib: float = Field(
        64.0,
        ge=0,
        le=4096,
        description="Assets up to this size (MiB) are read whole and hashed; of larger assets only "
        "the needed windows are read.",
    )
    retries: int = Field(5, ge=0, le=20, description="Retries of a request after a passing fault.")
    timeout_s: float = Field(30.0, gt=0, le=600, description="Network timeout in seconds.")
    requests_per_s: float | None = Field(
        None,
        gt=0,
        le=10_000,
        description="Most requests per second to one host, for each worker process. Empty: no "
        "limit.",
    )
    max_failed: float = Field(
        0.5, ge=0, le=1, description="The run fails if a larger share of the items is quarantined."
    )


class EmbedSettings(RecipeSection):
    """Stage embed: the encoder whose vectors are compared for duplicates and diversity."""

    encoder: str = Field(
        "efficientnet-lite0",
        description="`efficientnet-lite0` (ImageNet weights from a package, works offline), any "
        "timm model with pretrained weights, NAME@FILE.safetensors for local weights of one, or a "
        "geofm model by NAME, NAME@VERSION or digest.",
    )
    size_px: int = Field(128, ge=32, le=1024, description="Chips are resized to this for encoding.")
    batch: int = Field(64, ge=1, le=4096, description="Chips per forward pass.")


class CalibrateSettings(RecipeSection):
    """Stage calibrate: the similarity threshold of duplicates, from pairs known by metadata."""

    min_precision: float = Field(
        0.99,
        gt=0,
        lt=1,
        description="Least share of true duplicates among the pairs above the threshold.",
    )
    sample: int = Field(
        256, ge=1, le=100_000, description="Chips of each collection that are rendered again."
    )
    most_pairs: int = Field(
        4000, ge=10, le=1_000_000, description="Most known pairs of each kind and collection."
    )
    least_pairs: int = Field(
        100,
        ge=1,
        description="The default is used if fewer duplicate or fewer different pairs are known.",
    )
    default: float = Field(0.95, gt=0, le=1, description="Threshold if too few pairs are known.")


class CurateSettings(RecipeSection):
    """Stages pool to curate: gates, near-duplicates, decontamination and the budget."""

    min_valid: float = Field(0.95, ge=0, le=1, description="Least share of valid pixels.")
    max_cloud: float = Field(0.3, ge=0, le=1, description="Largest share of cloudy pixels.")
    max_saturated: float = Field(0.2, ge=0, le=1, description="Largest share of saturated pixels.")
    threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Cosine similarity of centred embeddings from which two chips are duplicates. "
        "Empty: calibrated for each collection (see the section calibrate).",
    )
    pixel_duplicates: bool = Field(
        True,
        description="Also drop chips that show the same view as another chip: shifted, turned, "
        "hazier, brighter, or another cut of the same picture.",
    )
    evaluation_sets: str = Field(
        "",
        description="Registry of evaluation sets that no kept chip may show: a YAML file, or a "
        "folder with NAME.geojson and folders of images. Empty: none.",
    )
    evaluation_buffer_m: float = Field(
        1000.0, ge=0, le=1e6, description="Metres around their footprints that stay clear."
    )
    evaluation_similarity: float = Field(
        0.97,
        gt=0,
        le=1,
        description="A chip is dropped if its cosine similarity to one of their images reaches "
        "this, even if its pixels differ.",
    )
    budget: float | None = Field(
        None,
        gt=0,
        description="Chips to keep: up to 1.0 a share of the chips left after the gates and "
        "duplicates, above that a number of chips. Empty: all of them.",
    )
    method: Literal[
        "facility-location",
        "k-centre",
        "balanced-kmeans",
        "density",
        "entropy",
        "per-tile",
        "random",
    ] = Field(
        "facility-location",
        description="How the budget is filled. The other methods are for comparison: for example, "
        "k-centre prefers outliers and entropy prefers noise.",
    )
    rarity: float = Field(
        1.0,
        ge=0,
        le=4,
        description="Weight of rare chips in facility location: each chip counts by its distance "
        "to the 16th nearest chip, to this power. 0: all chips count the same.",
    )
    strata: list[Literal["collection", "region", "season", "cluster"]] = Field(
        ["collection", "region"],
        description="What the budget is divided by, coarsest first; the last ones are ignored "
        "while there are more strata than chips to keep. A region is a 100 km square.",
    )
    stratum_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the budget that is guaranteed to strata, at least one chip each; the "
        "rest goes to the best chips of any stratum.",
    )
    equal_strata: bool = Field(
        False, description="Divide that share equally among strata instead of by their size."
    )

    @field_validator("evaluation_sets")
    @classmethod
    def _absolute_path(cls, path: str) -> str:
        return _absolute(path) if path else ""


class PackSettings(RecipeSection):
    """Stage pack: WebDataset shards and the name of the dataset."""

    shard_mib: float = Field(64.0, gt=0, le=4096, description="Target size of a shard in MiB.")
    name: str = Field(
        "corpus",
        pattern=NAME_PATTERN,
        description="Name under which the dataset version is published (name@date).",
    )
    holdout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the ground cells held out in shards of their own, which training "
        "does not read and which share no ground with the others.",
    )


#: Settings of pretraining that set its name and how it is carried out. They change the result only
#: in its last bits, and are no part of a training run's identity.
EXECUTION = (
    "name",
    "checkpoint_steps",
    "spike_steps",
    "microbatch",
    "activation_checkpointing",
    "compile",
)


class PretrainSettings(RecipeSection):
    """Stage pretrain: the GFM objective (Mendieta et al. 2023, section 4) and its optimisation."""

    name: str = Field(
        "",
        pattern=r"^([a-z0-9][a-z0-9._-]{0,63})?$",
        description="Name under which the model is published (name@date); not that of a timm "
        "model. Empty: the recipe's name and `-model`.",
    )
    student: str = Field(
        "swin_base_patch4_window7_224",
        description="timm backbone to pretrain: Swin, ViT, Hiera, or any that gives feature maps. "
        "With student_init pretrained also NAME@FILE.safetensors, or a geofm model by NAME, "
        "NAME@VERSION or digest.",
    )
    student_args: dict[str, int | float | str | list[int]] = Field(
        {}, description="Extra arguments of the timm model, e.g. embed_dim, depths, window_size."
    )
    student_init: Literal["random", "pretrained"] = Field(
        "random", description="The paper starts from random weights (section 5.2)."
    )
    teacher: str = Field(
        "swin_base_patch4_window7_224.ms_in22k",
        description="Frozen teacher: any timm model, `efficientnet-lite0` (offline), "
        "NAME@FILE.safetensors, or a geofm model by NAME, NAME@VERSION or digest. It sees "
        "red, green and blue; without them the first three bands, or one band three times.",
    )
    teacher_size_px: int = Field(224, ge=32, le=1024, description="Teacher's input edge (pixels).")
    teacher_stage: int | None = Field(
        None,
        ge=1,
        le=4,
        description="Stage of the teacher whose feature is distilled; empty: distill_stage.",
    )
    statistics: Literal["dataset", "imagenet"] = Field(
        "dataset",
        description="Mean and deviation that normalise the student's input and target: "
        "the dataset's own per band, or ImageNet's (red, green and blue only; the paper).",
    )
    teacher_features: Literal["live", "once"] = Field(
        "live",
        description="live: the teacher sees every crop. once: it sees every whole chip once, or "
        "never if curation embedded the chips with the same network.",
    )
    size_px: int = Field(192, ge=32, le=1024, description="Student's input edge (pixels).")
    masking: Literal["replace", "drop"] = Field(
        "replace",
        description="replace: a learned token replaces each masked patch (SimMIM, the paper). "
        "drop: the student does not see masked patches (ViT, Hiera), at less than half the cost.",
    )
    mask_patch_px: int = Field(32, ge=4, le=256, description="Edge of a masked patch (pixels).")
    mask_ratio: float = Field(0.6, gt=0, lt=1, description="Share of patches masked.")
    decoder_width: int = Field(
        256, ge=32, le=2048, multiple_of=32, description="Channels of the decoder (masking: drop)."
    )
    decoder_depth: int = Field(2, ge=1, le=16, description="Blocks of the decoder (masking: drop).")
    alpha: float = Field(
        1.0, ge=0, le=100, description="Weight of distillation; 0 is plain masked modelling."
    )
    alpha_end: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Weight of distillation at the last step, reached along half a cosine; empty: "
        "the weight is constant.",
    )
    mim_weight: float = Field(
        1.0, ge=0, le=100, description="Weight of reconstruction; 0 is distillation only."
    )
    distill_stage: int = Field(
        3, ge=1, le=4, description="Student stage that is distilled, its merging included."
    )
    distill_pool: Literal["mean", "max"] = Field(
        "mean", description="How a stage becomes one feature; the paper takes the mean."
    )
    distill_norm: bool = Field(
        False, description="Normalise both features (layer norm without weights) before pooling."
    )
    projector: Literal["linear", "mlp"] = Field(
        "linear", description="From the student's feature to the teacher's; the paper's is linear."
    )
    epochs: int = Field(100, ge=1, le=10_000, description="Passes over the dataset.")
    warmup_epochs: float = Field(
        10.0, ge=0, description="Epochs of linear warm-up; at most all of them."
    )
    batch: int = Field(128, ge=1, le=65_536, description="Global batch size (images).")
    microbatch: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Images that a process computes at a time, with accumulated gradients; empty: "
        "its whole share of the batch.",
    )
    base_lr: float = Field(2e-4, gt=0, description="Learning rate per 512 images of batch.")
    min_lr: float = Field(1e-5, ge=0, description="Final learning rate per 512 images of batch.")
    weight_decay: float = Field(0.05, ge=0, description="AdamW decay, not on 1-D parameters.")
    clip: float = Field(5.0, gt=0, description="Gradient norm limit.")
    crop_scale: tuple[float, float] = Field((0.67, 1.0), description="Random crop area, shares.")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per step of a running mean of the weights, which becomes the model; "
        "0: the weights themselves.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Arithmetic of the student (mixed; its weights stay fp32)."
    )
    teacher_precision: Literal["fp32", "bf16"] | None = Field(
        None, description="Arithmetic and weights of the teacher; empty: as precision."
    )
    compile: bool = Field(
        False,
        description="Compile student and teacher (torch.compile): takes minutes, then steps are "
        "faster.",
    )
    activation_checkpointing: bool = Field(
        False, description="Keep few activations and compute the rest twice: half the memory."
    )
    checkpoint_steps: int = Field(50, ge=1, description="Steps between checkpoints.")
    spike_steps: int = Field(
        100,
        ge=0,
        description="Stop if the loss stays far above its former level for this many steps; 0: "
        "never.",
    )

    def microbatch_size(self, processes: int) -> int:
        """Return the number of images that each of the processes computes at a time."""
        share = self.batch // processes
        return min(self.microbatch or share, share)

    @model_validator(mode="after")
    def _check_together(self) -> PretrainSettings:
        if self.alpha == 0 and self.mim_weight == 0:
            raise ValueError("alpha and mim_weight are both 0: nothing to learn; set one above 0")
        if self.size_px % self.mask_patch_px:
            raise ValueError(
                f"size_px {self.size_px} is no multiple of mask_patch_px {self.mask_patch_px}"
            )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale: give two shares of the area, e.g. 0.67,1")
        if self.alpha == 0 and self.alpha_end:
            raise ValueError("alpha is 0, so alpha_end has nothing to change; set alpha above 0")
        patches = (self.size_px // self.mask_patch_px) ** 2
        if math.ceil(round(patches * self.mask_ratio, 9)) >= patches:
            raise ValueError(f"mask_ratio {self.mask_ratio} hides all {patches} patches; lower it")
        return self


class EvaluateSettings(RecipeSection):
    """Stage evaluate: downstream tasks with frozen features."""

    tasks: list[str] = Field(
        ["planet"],
        description="`planet` (land cover of the embedded Earth) or folders with one sub-folder "
        "of images per class.",
    )
    knn: int = Field(5, ge=1, le=200, description="Neighbours of the kNN protocol.")
    resamples: int = Field(1000, ge=100, le=100_000, description="Bootstrap resamples (95 %).")
    test_share: float = Field(0.3, gt=0, lt=1, description="Share of images held out for testing.")
    max_images: int = Field(5000, ge=20, description="Images used per task, balanced by class.")
    batch: int = Field(64, ge=1, le=4096, description="Images per forward pass.")


class ReportSettings(RecipeSection):
    """Stage report: the HTML page of the run."""

    montage: int = Field(48, ge=4, le=400, description="Chips in a montage.")
    clusters: int = Field(8, ge=1, le=100, description="Duplicate clusters shown.")


class ComputeSettings(RecipeSection):
    """Where a run happens. Only ``seed`` influences results."""

    runner: Literal["threads", "processes", "dask"] = Field(
        "threads", description="What runs the parts of a stage in parallel."
    )
    workers: int = Field(2, ge=1, le=1024, description="Parts computed at the same time.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where models run.")
    processes: int = Field(
        0, ge=0, le=1024, description="Processes that train together; 0: one per GPU, else one."
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="ddp: each training process holds the whole model. fsdp: each holds a shard "
        "(FSDP2).",
    )
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        [], description="Services that receive the log of training steps, live."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of all random numbers.")


class Recipe(RecipeSection):
    """All settings of a run: a name, a description, and one section per stage."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] = Field(
        "custom", description="Name of the recipe."
    )
    description: str = Field("", description="Purpose of the recipe, in a sentence.")
    search: SearchSettings = Field(default_factory=SearchSettings)
    cut: CutSettings = Field(default_factory=CutSettings)
    embed: EmbedSettings = Field(default_factory=EmbedSettings)
    calibrate: CalibrateSettings = Field(default_factory=CalibrateSettings)
    curate: CurateSettings = Field(default_factory=CurateSettings)
    pack: PackSettings = Field(default_factory=PackSettings)
    pretrain: PretrainSettings = Field(default_factory=PretrainSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    report: ReportSettings = Field(default_factory=ReportSettings)
    compute: ComputeSettings = Field(default_factory=ComputeSettings)

    @property
    def model_name(self) -> str:
        """The name under which the model is published."""
        return self.pretrain.name or f"{self.name}-model"


def _absolute(path: str) -> str:
    """Make a path absolute, so that workers in other folders find the same file."""
    return str(Path(path).absolute())
