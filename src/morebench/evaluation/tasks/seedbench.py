"""SEED-Bench: four options about an image or a video of several frames."""

from collections.abc import Sequence

from morebench.config.schema import Profile
from morebench.errors import ConfigError, DataError
from morebench.evaluation.tasks.benchmark import (
    LETTER_ANSWER,
    UNPARSED,
    Benchmark,
    Question,
    Record,
    Scored,
    by_part,
    lettered,
    mean,
    with_image_tokens,
)

_FRAMES = ("profile", "first", "middle", "all")


class SEEDBench(Benchmark):
    """`video_frames`: `first`, `middle`, `all`, or `profile`: first in the paper, all in lmms-eval 0.7.3."""

    fields = ("question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_type")

    def __init__(self, video_frames: str = "profile"):
        if video_frames not in _FRAMES:
            raise ConfigError(f"video_frames must be one of {', '.join(_FRAMES)}, found {video_frames!r}")
        self.video_frames = video_frames

    def question(self, record: Record, profile: Profile) -> Question:
        options = lettered([record[f"choice_{letter}"] for letter in "abcd"])
        text = f"{record['question']}\n{options}\n{LETTER_ANSWER}"
        # Every frame that was chosen gets its token; that the paper's harness has one is in the choice.
        return with_image_tokens(text, self._images(record, profile), Profile.lmms_eval_0_7_3)

    def _images(self, record: Record, profile: Profile) -> tuple[str, ...]:
        stored = record.get("image")
        if record["data_type"] != "video" or not isinstance(stored, Sequence) or isinstance(stored, str):
            return ("image",)
        if not stored:
            raise DataError("`image` holds no frame of the video")
        frames = tuple(f"image[{i}]" for i in range(len(stored)))
        chosen = self.video_frames
        if chosen == "profile":
            chosen = "first" if profile is Profile.paper else "all"
        if chosen == "all":
            return frames
        middle = 0 if chosen == "first" else len(frames) // 2
        return frames[middle : middle + 1]

    def target(self, record: Record) -> str:
        if record["data_type"] not in ("image", "video"):
            raise DataError(f"data_type must be image or video, found {record['data_type']!r}")
        if record["answer"] not in tuple("ABCD"):
            raise DataError(f"answer must be one of A, B, C, D, found {record['answer']!r}")
        return str(record["answer"])

    def score(self, prediction: str, record: Record, profile: Profile) -> Scored:
        parsed = prediction.strip()[:1]
        letter = parsed if profile is Profile.paper else parsed.upper()
        return Scored(
            float(letter == record["answer"]),
            parsed,
            flags=() if letter in tuple("ABCD") else (UNPARSED,),
            record={"data_type": record["data_type"], "question_type_id": record.get("question_type_id")},
        )

    def aggregate(self, items: Sequence[Scored], profile: Profile) -> dict[str, float]:
        """`seed_all` pools the questions; it is not the mean of the other two."""
        kinds = {
            kind: [i.score for i in items if i.record["data_type"] == kind] for kind in ("image", "video")
        }
        pooled = {f"seed_{kind}": mean(scores) for kind, scores in kinds.items() if scores}
        types = by_part("by_question_type", items, "question_type_id")
        return {
            "seed_all": mean(item.score for item in items),
            **pooled,
            **{name: mean(item.score for item in part) for name, part in types.items()},
        }
