"""What a run was expected to cost, in its manifest, for `report` to hold against what it did cost."""

from pathlib import Path

from morebench.config.schema import Config, Step
from morebench.matrix import ledger
from morebench.matrix.estimate import Estimator


def write_prediction(folder: Path, config: Config, step: Step, llm: str) -> None:
    """Into manifest.json, once, on the machine that the run starts on. llm: the choice."""
    manifest = ledger.read_json(folder / "manifest.json")
    if "predicted" in manifest:
        return
    estimator = Estimator(is_planned=False)
    found = estimator.estimate(llm, config, step)
    gpu = estimator.machine(config).gpu
    manifest["predicted"] = {
        "gpu": None if gpu is None else gpu.label,
        "num_gpus": found.num_gpus,
        "flops": found.flops,
        "seconds": found.seconds,
        "memory_gib": None if found.memory is None else found.memory / 2**30,
        "assumed": list(estimator.notes),
    }
    ledger.write_json(folder / "manifest.json", manifest)
