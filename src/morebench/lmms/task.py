"""A task of our suites inside lmms-eval: our questions, data and scorers under its command line."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lmms_eval.api.task import ConfigurableTask
from PIL import Image

from morebench.config.schema import Profile
from morebench.lmms.docs import Doc, Docs, Metrics, open_suite_task, task_keys, told

_SPLIT = "test"


class SuiteTask(ConfigurableTask):
    """Of a YAML file with `task`, `suite`, `of_suite` (the task's name in it) and `profile`.

    The image tokens stand in the text already, so any model that knows `<image>` can be asked.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        with told():
            own = task_keys(config)
            self._open = open_suite_task(own["suite"], own["of_suite"], own["profile"])
            self._metrics = Metrics(self._open, Profile[own["profile"]])
        super().__init__(
            config={key: value for key, value in config.items() if key not in (*own, "class")}
            | {
                "output_type": "generate_until",
                "test_split": _SPLIT,
                "num_fewshot": 0,
                "generation_kwargs": {
                    "max_new_tokens": self._open.max_new_tokens,
                    "do_sample": False,
                    "temperature": 0,
                    "until": [],
                },
                "reasoning_tags": "none",  # what the profile wants removed, the scorers remove
                "metadata": own,
            }
        )

    def download(self, dataset_kwargs: Any = None) -> None:
        self.dataset = self.dataset_no_image = {_SPLIT: Docs(self._open.items)}

    def _prepare_metric_and_aggregation(self) -> None:
        self._metric_fn_list: dict[str, Any] = {}

    def doc_to_text(self, doc: Doc) -> str:
        return doc.item.question.text

    def doc_to_visual(self, doc: Doc) -> list[Image.Image]:
        with told():
            return [image.load() for image in doc.item.images]

    def doc_to_target(self, doc: Doc) -> str | list[str]:
        return self._open.benchmark.target(doc.item.record)

    def process_results(self, doc: Doc, results: Sequence[str], full_docs: Any = None) -> dict[str, Any]:
        # As generated: what is stripped of it is the scorer's business, and some score all items at once.
        row = {"at": doc.at, "prediction": results[0]}
        return dict.fromkeys(self._metrics.names, row)

    def aggregation(self) -> dict[str, Callable[[Sequence[Mapping[str, Any]]], float | None]]:
        return {name: partial(self._metric, name) for name in self._metrics.names}

    def higher_is_better(self) -> dict[str, bool]:
        return {}

    def _metric(self, name: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
        """None: with --limit, none of the answered questions belongs to it."""
        with told():
            return self._metrics.of([(row["at"], row["prediction"]) for row in rows]).get(name)
