"""The types of the whole config tree. Values and defaults live in conf/, never here.

A field marked `unidentified()` may change without changing a model: it is left out of run ids.
Everything else in `llm`, `vision`, `resolution`, the data choices, `projector` and the stage recipes
is part of a cell's identity (see `morebench.matrix.cell`).
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


def unidentified() -> Any:
    """A field that names, prints or places something; it cannot change a number."""
    return field(metadata={"identity": False})


def spelt(pattern: str, wanted: str) -> Any:
    """A text that must match the whole pattern."""
    return field(metadata={"spelt": (pattern, wanted)})


def bounded(low: float, high: float | None = None) -> Any:
    """A number that must lie in [low, high]; None is not checked."""
    return field(metadata={"bounds": (low, high)})


class Part(Enum):
    vision = "vision"
    projector = "projector"
    llm = "llm"


class Step(Enum):
    pretrain = "pretrain"
    finetune = "finetune"
    evaluate = "evaluate"


class Resize(Enum):
    """How an image reaches the encoder's input size."""

    shortest_edge = "shortest_edge"  # keep the aspect ratio, then crop the centre
    squash = "squash"  # both sides to the size, whatever the aspect ratio


class Interpolation(Enum):
    bilinear = "bilinear"
    bicubic = "bicubic"


class AspectRatio(Enum):
    """What happens before `Resize`: nothing, or padding to a square with the mean colour."""

    square = "square"
    pad = "pad"


class Order(Enum):
    uniform = "uniform"  # one permutation
    modality = "modality"  # the study's grouping: a global batch is all-image or all-text


class VisualScale(Enum):
    """Factor on projected visual tokens before they enter the LLM."""

    one = "one"
    sqrt_hidden = "sqrt_hidden"  # Gemma scales its token embeddings by sqrt(hidden size)


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # autocast; trained parameters keep fp32 master copies


class Strategy(Enum):
    """How the ranks of a run share the model."""

    auto = "auto"  # ddp for several devices
    ddp = "ddp"
    fsdp2 = "fsdp2"
    zero2 = "zero2"  # DeepSpeed
    zero3 = "zero3"


class Attention(Enum):
    """How packed attention is computed; see morebench.models.attention."""

    auto = "auto"  # measured on a GPU
    loop = "loop"  # over samples
    flex = "flex"
    varlen = "varlen"


class LossKernel(Enum):
    auto = "auto"  # one_pass on a CPU in fp32; measured on a GPU
    one_pass = "one_pass"
    torch = "torch"
    liger = "liger"


class UncheckedData(Enum):
    """What a train step does about data that `morebench.data check` has not seen as it is now."""

    refuse = "refuse"
    check = "check"  # first, and then go on


class Features(Enum):
    """Where the vision features of train steps come from (morebench.training.features)."""

    computed = "computed"  # by the vision encoder, in every step
    cached = "cached"  # from files, as the encoder gave them
    cached_8bit = "cached_8bit"  # from files of half the size, rounded: another run id


class Profile(Enum):
    """Which scorers and prompts: the paper's harness, or lmms-eval 0.7.3."""

    paper = "paper"
    lmms_eval_0_7_3 = "lmms_eval_0_7_3"


@dataclass(kw_only=True)
class Weights:
    """Where a part's starting weights come from: a local folder, the hub, or a builder in this repository."""

    folder: str | None = unidentified()  # goes before the hub; its content is hashed, its place is not
    hub_id: str | None
    revision: str | None
    build: dict[str, Any] | None  # recipe: `_target_` is called with `folder`; its values are the identity


@dataclass(kw_only=True)
class LLM:
    label: str = unidentified()
    size_group: str = unidentified()  # heading under which a table lists the row
    weights: Weights
    shape: Any  # file below conf/shapes, or its content: the fields of config.json that fix every width
    chat_format: Any  # file stem below conf/chat_formats, or its content
    pad_token: str
    visual_scale: VisualScale


@dataclass(kw_only=True)
class ImageProcessing:
    resize: Resize
    resize_to: int = bounded(1)  # pixels: shortest edge, or both sides when squashing
    interpolation: Interpolation
    mean: list[float]  # per channel, of values in [0, 1]
    std: list[float]


@dataclass(kw_only=True)
class Vision:
    label: str = unidentified()
    weights: Weights
    shape: Any  # file below conf/shapes, or its content
    feature_layer: int  # hidden state that becomes the features: -1 after the last block, -2 before it, ...
    encoder: dict[str, Any]  # recipe of a class in morebench.models.vision
    image: ImageProcessing


@dataclass(kw_only=True)
class Resolution:
    label: str = unidentified()
    scales: list[int]  # multiples of the encoder's native size; [1] is the encoder alone


@dataclass(kw_only=True)
class AssumedLength:
    """A kind of samples, for estimates made before anything has counted tokens."""

    samples: int = bounded(1)
    images: int = bounded(0)  # in each
    text_tokens: int = bounded(1)  # of each
    supervised: int = bounded(1)  # tokens of each


@dataclass(kw_only=True)
class TrainingData:
    label: str = unidentified()
    folder: str = unidentified()  # below paths.data; the content is hashed, its place is not
    records: str = unidentified()  # JSON list in `folder`
    images: str = unidentified()  # folder in `folder` that the records' image paths are relative to
    allowed_links: list[str] = unidentified()  # absolute: where links in `images` may lead to outside it
    also_quarantine: list[str] = unidentified()  # kinds of findings that are otherwise counted and kept
    num_samples: int | None  # records, as published; another count is an error
    assumed_lengths: list[AssumedLength] = (
        unidentified()
    )  # `plan` prices by them until `data check` has counted
    build: dict[str, Any] | None  # recipe that makes the files when they are missing


@dataclass(kw_only=True)
class Projector:
    depth: int = bounded(1)  # linear layers with GELU between; 2 is LLaVA-1.5's mlp2x_gelu


@dataclass(kw_only=True)
class Optimizer:
    """torch.optim.AdamW."""

    lr: float = bounded(0)
    weight_decay: float = bounded(0)
    betas: list[float]
    eps: float = bounded(0)


@dataclass(kw_only=True)
class TrainRecipe:
    trainable: list[Part]
    chat_format: Any  # file stem below conf/chat_formats, or its content; null: the LLM's own
    image_aspect_ratio: AspectRatio
    max_length: int = bounded(1)  # tokens, visual ones included
    global_batch_size: int = bounded(1)  # samples per optimizer step, whatever the number of devices
    epochs: int = bounded(1)
    max_steps: int | None = bounded(1)  # stop early; the learning-rate schedule then ends there too
    warmup_ratio: float = bounded(0, 1)  # share of the optimizer steps
    optimizer: Optimizer
    gradient_clip_val: float | None = bounded(0)
    max_skipped_steps: int = bounded(0)  # optimizer steps with NaN or inf that may be left out
    validation_samples: int = bounded(0)  # kept out of training, chosen by hash
    order: Order
    precision: Precision


@dataclass(kw_only=True)
class EvaluateRecipe:
    profile: Profile
    image_aspect_ratio: AspectRatio
    precision: Precision
    controls: list[str]  # [blind, shuffled]: the same questions about the image's mean colour, another image


@dataclass(kw_only=True)
class Stage:
    steps: list[Step] = unidentified()  # which to run; missing parents run first
    pretrain: TrainRecipe
    finetune: TrainRecipe
    evaluate: EvaluateRecipe


@dataclass(kw_only=True)
class TaskData:
    """Where a task's records come from: the hub (or a local mirror of it), or a JSON list."""

    hub_id: str | None
    also_at: str | None = unidentified()  # hub id of a second copy, looked for when the first is not there
    config: str | None
    image_config: str | None  # rows with the images, where the records have none but the id of one
    image_field: str | None  # of a record: the `id` of its row in image_config
    split: str | None
    revision: str | None
    folder: str = unidentified()  # below paths.data: a local mirror, or the records below
    records: str | None = unidentified()  # JSON list in `folder`; null: the rows of the hub data set
    images: str | None = unidentified()
    allowed_links: list[str] = unidentified()  # absolute: where links in `images` may lead to outside it
    num_rows: int | None
    build: dict[str, Any] | None


@dataclass(kw_only=True)
class AssumedQuestions:
    """What a task's questions are like, for estimates: only answers tell."""

    images: int = bounded(1)  # different ones, in the whole task
    text_tokens: int = bounded(1)  # of a prompt, chat format included
    answer_tokens: int = bounded(1)  # of an answer, with the token that ends it


@dataclass(kw_only=True)
class Task:
    label: str = unidentified()
    data: TaskData
    code: dict[str, Any]  # recipe of a class in morebench.evaluation.tasks
    max_new_tokens: dict[str, int]  # by profile
    assumed: AssumedQuestions | None = unidentified()  # `plan` prices by it; null: not at all


@dataclass(kw_only=True)
class Column:
    """One printed number: `factor` x `metric` of `task`."""

    label: str
    task: str
    metric: str
    factor: float
    digits: int  # decimals printed


@dataclass(kw_only=True)
class Suite:
    label: str = unidentified()
    tasks: dict[str, Task]
    columns: list[Column] = unidentified()


@dataclass(kw_only=True)
class Trainer:
    """The machine. Nothing here may change a result."""

    accelerator: str = spelt("auto|cpu|gpu|cuda|mps", "cpu, gpu or auto")
    devices: str = spelt("auto|[1-9][0-9]*", "1 or more, or auto")
    num_nodes: int = bounded(1)
    strategy: Strategy
    num_workers: int = bounded(0)  # data-loading processes per rank
    threads: int | None = bounded(1)  # CPU threads per rank; null: all cores shared by the parallel steps
    micro_batch_tokens: int | None = bounded(1)  # tokens one device takes at once; null: as memory allows
    recompute: float | None = bounded(0, 1)  # share of the LLM's blocks, in finetune; null: as memory demands
    attention: Attention
    loss_kernel: LossKernel
    compile: bool | None  # the LLM's blocks, by torch.compile; null: where it is faster
    checkpoint_every_n_steps: int = bounded(1)
    checkpoint_every_n_minutes: float = bounded(0)  # whichever of the two comes first
    hang_timeout_minutes: float = bounded(0)  # without a micro-batch; then the run ends, resumable; 0: never
    gpu: str | None  # file stem below conf/gpus that `plan` estimates for; null: the one of this machine
    usd_per_gpu_hour: float | None = bounded(0)  # what `plan` multiplies GPU-hours by; null: no price
    evaluate_batch_size: int = bounded(1)  # questions that are answered at once on one device
    evaluate_cache_gib: float | None = bounded(0)  # for images that questions share; null: as memory allows
    flip_sample: int = bounded(0)  # items answered once more alone, to count the answers that a batch changes


@dataclass(kw_only=True)
class Tracking:
    uri: str | None  # null: nothing is mirrored to MLflow
    experiment: str


@dataclass(kw_only=True)
class Paths:
    root: str
    data: str
    weights: str  # local copies of hub repositories, <weights>/<hub_id>/
    cache: str
    runs: str
    reports: str
    checks: str  # what `morebench.data check` found: <checks>/<folder>/<records>/


@dataclass(kw_only=True)
class Config:
    llm: LLM
    vision: Vision
    resolution: Resolution
    pretrain_data: TrainingData
    finetune_data: TrainingData
    stage: Stage
    suite: Suite
    projector: Projector
    trainer: Trainer
    tracking: Tracking
    paths: Paths
    seed: int = bounded(0, 2**32 - 1)
    unchecked_data: UncheckedData
    max_quarantined: float = bounded(0, 1)  # share of a data set's records; above it no cell is trained
    features: Features
    download: bool  # records that are not on this machine may be fetched from the hub
    parent: str | None  # run id or folder to start from instead of this cell's own previous step
    experiments: str | None  # files in experiments/ (-m experiments=a,b); in a cell, the one it comes from


AXES = ("llm", "vision", "resolution", "pretrain_data")
