"""A finished finetune run as a model of lmms-eval."""

from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from morebench.errors import ConfigError
from morebench.lmms.answering import Asked, AskedRun
from morebench.lmms.docs import told


class Morebench(lmms):
    """--model_args run=ID and, as for `python -m morebench.evaluate run=ID`, overrides.

    With several processes (accelerate, torchrun) lmms-eval deals the questions, and each has a whole model.
    """

    is_simple = True  # the text as it is: our chat formats and image tokens, not lmms-eval's messages

    def __init__(
        self,
        run: str | int | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        with told():
            if max_batch_size is not None:
                raise ConfigError(
                    "--max_batch_size is for --batch_size auto; name a number with --batch_size."
                )
            self._run = AskedRun(None if run is None else str(run), device, batch_size, overrides)

    @property
    def device(self) -> torch.device:
        return self._run.device

    def clean(self) -> None:
        """lmms-eval is through with the model, and may need its memory for a judge."""
        del self._run
        super().clean()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        with told():
            pairs = self._run.answer([Asked(*request.args) for request in requests], self.task_dict)
        return [
            GenerationResult(answer.text, TokenCounts(len(request.prompt.input_ids), answer.num_tokens))
            for request, answer in pairs
        ]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("morebench answers by generation; no task of its suites needs likelihoods.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("morebench answers single questions; python -m morebench.chat is for more.")
