"""What a run will cost, said before it starts: from shapes, token lengths and a GPU type. No torch."""

from dataclasses import dataclass, replace

from morebench.config.schema import Config, Features, Part, Precision, Step, TrainingData, TrainRecipe
from morebench.data.checked import Manifest, Status, data_state
from morebench.matrix.answering import answering, answering_memory, assumption, unpriced
from morebench.matrix.fit import fit, proposal
from morebench.matrix.lengths import Reading, reading
from morebench.matrix.machine import Machine, gpus_here, machine_of
from morebench.matrix.plan import Plan
from morebench.models.flops import Sizes, llm_shape, sizes, total_flops

_CHECKPOINT_BYTES, _PART_BYTES = 12, 4  # a trained weight: fp32, with AdamW's two moments; alone
_CHECKPOINTS = 3  # the last two are kept until the next is whole
_ANSWER_BYTES = 600  # lines of an item in predictions/ and scores/


@dataclass(frozen=True)
class Estimate:
    """None is what cannot be known."""

    num_gpus: int
    flops: float | None = None  # useful ones, of the whole run
    # of optimizer steps or answers: not of starting, checking data, loading weights
    seconds: float | None = None
    memory: float | None = None  # bytes on one rank
    recomputed: float = 0.0  # share of the LLM's blocks that are computed twice, for memory's sake
    kept: float | None = None  # bytes on disk when the run is done
    peak: float | None = None  # bytes on disk while it runs
    remedy: str = ""  # for memory that no GPU has

    @property
    def gpu_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.num_gpus / 3600


class Estimator:
    """Estimates of many runs; runs that differ in seed, or in nothing that costs, are priced once."""

    def __init__(self, here: tuple[str, ...] | None = None, is_planned: bool = True) -> None:
        """here: names of this machine's GPUs; is_planned: whether the runs may happen on another machine."""
        self.notes: dict[str, None] = {}  # an ordered set: what was assumed
        self._here = gpus_here() if here is None else here
        self._is_planned = is_planned
        self._known: dict[tuple[object, ...], Estimate] = {}
        self._manifests: dict[tuple[str, ...], Manifest | None] = {}
        self._priced: list[Config] = []

    def estimate(self, llm: str, config: Config, step: Step) -> Estimate:
        """llm: the choice. Raises ConfigError for a GPU type that has no file."""
        parts = (config.llm, config.vision, config.resolution, config.projector, config.stage, config.trainer)
        data = config.pretrain_data if step is Step.pretrain else config.finetune_data
        # cells that were assembled share their parts: the same object is the same content
        key = (step, llm, config.features, *map(id, (*parts, data, config.suite)))
        if key not in self._known:
            self._priced.append(config)  # alive, so that no other object gets an id of the key
            self._known[key] = self._price(llm, config, step)
        return self._known[key]

    def machine(self, config: Config) -> Machine:
        return machine_of(config.trainer, self._here, self._is_planned)

    def _price(self, llm: str, config: Config, step: Step) -> Estimate:
        machine = self.machine(config)
        self.notes.update(dict.fromkeys(machine.notes))
        if step is Step.evaluate:
            return self._price_answers(config, machine)
        recipe = config.stage.pretrain if step is Step.pretrain else config.stage.finetune
        data = config.pretrain_data if step is Step.pretrain else config.finetune_data
        read = reading(llm, config, step, self._manifest(config, step))
        weights = _trained_weights(config, recipe)
        kept, peak = _PART_BYTES * weights, _CHECKPOINTS * _CHECKPOINT_BYTES * weights
        if read is None:
            self.notes[f"{data.label}: lengths are not known before `data check llm={llm}` counts them"] = (
                None
            )
            return Estimate(machine.num_gpus, kept=kept, peak=peak)
        if not read.is_counted:
            self.notes[_assumption(data)] = None
        return replace(_cost(config, recipe, read, machine), kept=kept, peak=peak)

    def _price_answers(self, config: Config, machine: Machine) -> Estimate:
        disk = _answers(config)
        work = answering(config)
        if work is None:
            names = ", ".join(unpriced(config))
            self.notes[f"{names}: nothing is assumed of its questions, so evaluation has no price"] = None
            return Estimate(machine.num_gpus, kept=disk, peak=disk)
        self.notes[assumption(config, work)] = None
        found = Estimate(machine.num_gpus, work.flops, kept=disk, peak=disk)
        if machine.gpu is None or config.stage.evaluate.precision is not Precision.bf16:
            return found
        speed = machine.gpu.bf16_tflops * 1e12 * machine.gpu.reached_answering
        memory = answering_memory(config, machine.gpu.memory_gib * 2**30)
        return replace(found, seconds=work.flops / (machine.num_gpus * speed), memory=memory)

    def _manifest(self, config: Config, step: Step) -> Manifest | None:
        data = config.pretrain_data if step is Step.pretrain else config.finetune_data
        key = (data.folder, data.records, str(data.also_quarantine), str(data.allowed_links))
        if key not in self._manifests:
            state = data_state(data, config.paths)
            self._manifests[key] = state.manifest if state.status is Status.checked else None
        return self._manifests[key]


def estimates(plan: Plan, estimator: Estimator) -> dict[str, Estimate]:
    """By run id."""
    return {
        run_id: estimator.estimate(run.cell.choices["llm"], run.cell.config, run.step)
        for run_id, run in plan.runs.items()
    }


def _cost(config: Config, recipe: TrainRecipe, read: Reading, machine: Machine) -> Estimate:
    model = sizes(config)
    if config.features is not Features.computed:
        model = replace(model, vision_image=0)
    useful = total_flops(
        model, read.tokens, read.squared_lengths, read.images, read.supervised, recipe.trainable
    )
    # neither a GPU's peak nor the bytes that a step keeps are those of fp32
    if machine.gpu is None or recipe.precision is not Precision.bf16:
        return Estimate(machine.num_gpus, useful)
    found = fit(config, recipe, read, machine)
    done = useful + found.recomputed * _forward(model, read)
    seconds = done / (machine.num_gpus * machine.gpu.bf16_tflops * 1e12 * machine.gpu.reached)
    remedy = "" if found.fits else proposal(config, recipe, read, machine)
    return Estimate(machine.num_gpus, useful, seconds, found.memory, found.recomputed, remedy=remedy)


def _forward(model: Sizes, read: Reading) -> float:
    """FLOPs of the LLM's blocks, once."""
    attention = 2 * model.attention_width * model.llm_layers * read.squared_lengths
    return 2 * model.llm_body * read.tokens + attention


def _trained_weights(config: Config, recipe: TrainRecipe) -> int:
    model, shape = sizes(config), llm_shape(config)
    embeddings = (1 if shape["tie_word_embeddings"] else 2) * model.llm_width * model.vocab_size
    weights = {Part.projector: sum(model.projector), Part.llm: model.llm_body + embeddings}
    return sum(weights.get(part, 0) for part in recipe.trainable)


def _answers(config: Config) -> int | None:
    """Bytes of predictions and scores."""
    rows = [task.data.num_rows for task in config.suite.tasks.values()]
    if any(number is None for number in rows):
        return None
    return sum(number or 0 for number in rows) * _ANSWER_BYTES * (1 + len(config.stage.evaluate.controls))


def _assumption(data: TrainingData) -> str:
    kinds = [
        f"{kind.samples:,} samples of {kind.text_tokens:,} text tokens ({kind.supervised:,} supervised) and "
        f"{'no image' if kind.images == 0 else 'an image' if kind.images == 1 else f'{kind.images} images'}"
        for kind in data.assumed_lengths
    ]
    return f"{data.label}: {'; '.join(kinds)}"
