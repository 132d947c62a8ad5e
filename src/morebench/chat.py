"""Talk with one finished finetune run about an image, or with up to four side by side.

    python -m morebench.chat run=ID [image=PATH] [prompt="..."]
    python -m morebench.chat compare=[ID1,ID2,...] [image=PATH] [prompt="..."]
    python -m morebench.chat run=ID|compare=[...] [image=PATH] page=true [host=127.0.0.1] [port=7860]

On a terminal: the first question is prompt, or the study's "Describe this image." where an image is given;
then it asks for more. /help lists what else can be typed, an empty line or Ctrl-D ends, Ctrl-C stops an
answer. Off a terminal: the answer to prompt; without one, to every line of the input, as one conversation;
without any line, to "Describe this image.". Nothing but answers is written to stdout.

page=true: the same as a page for the browser, on this machine alone unless host says otherwise. It needs
gradio: .venv/bin/uv pip install -e '.[page]'.

Answers are greedy and end after max_new_tokens=512. ID is a run below paths.runs, or its folder. The run's
config says what the model is; free are paths, trainer (trainer=cpu) and stage.evaluate, e.g.
stage.evaluate.precision=fp32. prompt and image are taken as they are typed.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from morebench import entry
from morebench.chat_options import ChatOptions, read_options
from morebench.config.compose import compose_config, override_config
from morebench.config.schema import Config, Step
from morebench.errors import ConfigError, MorebenchError, join_problems
from morebench.evaluation.items import StoredImage, image_file
from morebench.matrix.parent import Parent, find_run
from morebench.models.weights import starting_weights

if TYPE_CHECKING:  # torch takes seconds to import
    from morebench.evaluation.panel import Member


def command(arguments: Sequence[str]) -> int:
    options = read_options(arguments)
    members, image = _found(options)

    from transformers.utils import logging

    from morebench.evaluation.panel import Panel, device_of

    logging.set_verbosity_error()  # its advice is about shapes that were compared when the run was made
    logging.disable_progress_bar()
    panel = Panel(members, device_of(members[0].config.trainer))
    if options.page:
        from morebench.chat_page import serve

        return serve(panel, image, options.max_new_tokens, options.host, options.port)
    from morebench import chat_terminal

    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        return chat_terminal.talk(panel, image, options.prompt, options.max_new_tokens)
    return chat_terminal.answer(panel, image, options.prompt, options.max_new_tokens)


def _found(options: ChatOptions) -> tuple[list["Member"], StoredImage | None]:
    """The runs, whose starting weights are here, and the image. Raises one ConfigError for all problems."""
    here = compose_config(options.of("paths", "trainer")).config
    found: list[tuple[Parent, Config]] = []
    image, problems = None, list[str]()
    for run in options.runs:
        try:
            parent = find_run(run, Path(here.paths.runs))
            if parent.step is not Step.finetune:
                raise ConfigError(f"{run} is a {parent.step.name} run. Only a finetune run can answer.")
            config = replace(parent.config, paths=here.paths, trainer=here.trainer)
            config = override_config(config, options.of("stage"))
            starting_weights(config)
            found.append((parent, config))
        except MorebenchError as error:
            problems.append(str(error))
    if options.image is not None:
        try:
            image = image_file(Path(options.image).expanduser())
        except MorebenchError as error:
            problems.append(f"image={error}")
    if problems:
        raise ConfigError(join_problems(problems))

    from morebench.evaluation.panel import Member

    labels = _labels(found)
    return [
        Member(label, config, parent.folder) for label, (parent, config) in zip(labels, found, strict=True)
    ], image


def _labels(found: Sequence[tuple[Parent, Config]]) -> list[str]:
    """LLM and vision encoder, and in what else the runs differ."""
    columns = [
        [config.llm.label for _, config in found],
        [config.vision.label for _, config in found],
        [config.resolution.label for _, config in found],
        [config.pretrain_data.label for _, config in found],
        [config.finetune_data.label for _, config in found],
        [f"seed {config.seed}" for _, config in found],
    ]
    shown = [column for at, column in enumerate(columns) if at < 2 or len(set(column)) > 1]
    labels = [", ".join(row) for row in zip(*shown, strict=True)]
    if len(set(labels)) < len(labels):
        return [f"{label}, {parent.run_id}" for label, (parent, _) in zip(labels, found, strict=True)]
    return labels


if __name__ == "__main__":
    entry.run(command, __doc__ or "")
