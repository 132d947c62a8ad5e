"""Evaluate one finished cell: generate once per item and control, score apart."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morebench.config.compose import ROOT
from morebench.config.schema import Config, Precision
from morebench.errors import Interrupted
from morebench.evaluation.asking import Answered, Asked, Job, ask
from morebench.evaluation.chunks import groups_of, plan_chunks
from morebench.evaluation.devices import devices_for, opened
from morebench.evaluation.outcome import score, write_results
from morebench.evaluation.predictions import Line, PredictionsFile
from morebench.evaluation.sheets import open_sheets
from morebench.evaluation.spent import Spent
from morebench.progress import Progress
from morebench.training.fence import Fence, unfenced
from morebench.training.files import read_manifest, update_manifest
from morebench.training.provenance import provenance
from morebench.training.signals import StopRequest

_POSITIONS = "cache_positions"
_FLIP_SEED = 0
_NUM_EXAMPLES = 5


def evaluate(config: Config, folder: Path, parent: Path, fence: Fence = unfenced) -> None:
    """Answer and score every task of the suite, and again under every control.

    `parent` is the finetune run. Leaves predictions/, scores/ and results.json in `folder`. Raises
    ConfigError, DataError and WeightsError before anything is written, Interrupted at the chunk after a
    signal, what `devices.answers` raises, and what `fence` does. After all of them the next call goes on from
    the answers there are.
    """
    recipe = config.stage.evaluate
    devices = devices_for(config.trainer)
    asked = ask(config, open_sheets(config))
    files = [
        PredictionsFile(folder / "predictions" / sheet.file, hashes)
        for sheet, hashes in zip(asked.sheets, asked.by_sheet(), strict=True)
    ]
    # `status` reads the first. Positions are measured once, for the chunks depend on them.
    facts = {"questions": {sheet.file: len(sheet.task.items) for sheet in asked.sheets}}
    facts |= {
        key: value for key, value in read_manifest(folder).items() if key in (_POSITIONS, "halved_chunks")
    }
    spent = Spent(folder, sum(device != "cpu" for device in devices), facts)
    flips = _generate(config, parent, devices, asked, files, spent, fence)
    fence()
    lines = [file.finish() for file in files]
    scores = score(asked.sheets, lines, recipe.profile, folder, fence, spent.speeds())
    fence()
    spent.save(now=True)
    update_manifest(folder, {"profile": recipe.profile.name, **provenance(ROOT)})
    content = {"profile": recipe.profile.name, **scores, "flips": flips, "asked": _shared(asked)}
    write_results(folder, {**content, "devices": len(devices), "seconds": spent.seconds})


def _generate(
    config: Config,
    parent: Path,
    devices: Sequence[str],
    asked: Asked,
    files: Sequence[PredictionsFile],
    spent: Spent,
    fence: Fence,
) -> dict[str, Any] | None:
    """Answer what `files` lack; returns how many answers of the flip sample a batch had changed."""
    again = _flip_sample(config, asked)
    alone: dict[int, str] = {}
    total = len(asked.requests)

    def num_done() -> int:
        return total - sum(file.num_missing for file in files)

    if num_done() == total and not again:
        return None
    with StopRequest() as stop, opened(config, parent, devices, asked) as here:
        positions = spent.facts.setdefault(_POSITIONS, here.cache_positions)
        # The chunks of an uninterrupted run, whatever is done already: so a resume computes the same bits.
        chunks = plan_chunks(asked.requests, config.trainer.evaluate_batch_size, positions)
        todo = [chunk for chunk in chunks if any(_is_missing(asked, files, i) for i in chunk)]
        jobs = [*(Job(chunk) for chunk in todo), *(Job([i], share=False) for i in again)]
        with Progress("answers", total, num_done()) as progress:
            for number, answered in here.answers(jobs, stop):
                fence()
                spent.facts["halved_chunks"] = spent.facts.get("halved_chunks", 0) + answered.halved
                if number < len(todo):
                    _save(asked, files, todo[number], answered, spent)
                    progress.update(num_done())
                else:
                    alone[again[number - len(todo)]] = answered.answers[0]["text"]
        if stop.signal_name is not None and (num_done() < total or len(alone) < len(again)):
            spent.save(now=True)
            raise Interrupted(
                f"{stop.signal_name}: stopped with {num_done():,} of {total:,} answers saved; the next start "
                "goes on from there."
            )
    return _flips(asked, files, alone) if again else None


def _is_missing(asked: Asked, files: Sequence[PredictionsFile], request: int) -> bool:
    sheet, at = asked.places[request]
    return asked.sheets[sheet].task.items[at].index not in files[sheet].lines


def _save(
    asked: Asked, files: Sequence[PredictionsFile], chunk: Sequence[int], answered: Answered, spent: Spent
) -> None:
    """Append what is missing: a chunk of which a killed start saved a part was answered whole again."""
    new: dict[int, list[Line]] = defaultdict(list)
    for request, answer in zip(chunk, answered.answers, strict=True):
        if _is_missing(asked, files, request):
            sheet, at = asked.places[request]
            new[sheet].append(asked.sheets[sheet].line(at, asked.hashes[request], answer))
    for sheet, lines in new.items():
        files[sheet].append(lines)
    for sheet, count in Counter(asked.places[request][0] for request in chunk).items():
        spent.count(asked.sheets[sheet].file, count, answered.seconds * count / len(chunk))
    spent.save()


def _flip_sample(config: Config, asked: Asked) -> list[int]:
    """Requests to answer again alone. In fp32 an answer is the same in every batch, near ties aside."""
    if config.stage.evaluate.precision is not Precision.bf16:
        return []
    own = [i for i, (sheet, _) in enumerate(asked.places) if asked.sheets[sheet].control is None]
    return sorted(random.Random(_FLIP_SEED).sample(own, min(len(own), config.trainer.flip_sample)))


def _flips(asked: Asked, files: Sequence[PredictionsFile], alone: dict[int, str]) -> dict[str, Any]:
    examples = []
    for request, text in alone.items():
        sheet, at = asked.places[request]
        item = asked.sheets[sheet].task.items[at]
        prediction = files[sheet].lines[item.index]["prediction"]
        if prediction != text:
            task = asked.sheets[sheet].task.name
            examples.append({"task": task, "id": item.id, "prediction": prediction, "alone": text})
    return {"n": len(alone), "flips": len(examples), "examples": examples[:_NUM_EXAMPLES]}


def _shared(asked: Asked) -> dict[str, int]:
    """How much of the work is done once for several questions: `prefixes` are what they begin with."""
    images = {image.key for request in asked.requests for image in request.images}
    prefixes = sum(group.prefix_length > 0 for group in groups_of(asked.requests))
    return {"questions": len(asked.requests), "images": len(images), "prefixes": prefixes}
