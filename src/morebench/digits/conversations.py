"""Training records in the LLaVA format: captions for pretrain, multi-turn conversations for finetune."""

from typing import Any

import numpy as np

from morebench.digits.questions import (
    LETTERS,
    SHORT_ANSWER,
    Question,
    ask_attribute,
    draw_options,
    draw_presence,
    open_questions,
    with_options,
)
from morebench.digits.world import COLOURS, NUMBERS, Scene, draw_scene

DESCRIBE = ("Describe the image.", "What do you see?", "What is in the image?")
TEXT_ONLY_SHARE = 0.1
DESCRIBE_SHARE = 0.15  # conversations that open with a caption
OPTIONS_SHARE = 0.12  # of the questions that have four answers or more
IMAGE_LAST_SHARE = 0.2  # conversations with the image token after the first question
MAX_QUESTIONS = 4

Exchange = tuple[str, str]  # question, answer


def caption_record(record_id: str, image: str, scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
    exchange = (_pick(DESCRIBE, rng), scene.caption())
    return _record(record_id, image, [exchange], rng)


def conversation_record(record_id: str, image: str, scene: Scene, rng: np.random.Generator) -> dict[str, Any]:
    exchanges = []
    if rng.random() < DESCRIBE_SHARE:
        exchanges.append((_pick(DESCRIBE, rng), scene.caption()))
    exchanges += draw_exchanges(scene, int(rng.integers(2, MAX_QUESTIONS + 1)), rng)
    return _record(record_id, image, exchanges, rng)


def text_record(record_id: str, rng: np.random.Generator) -> dict[str, Any]:
    """No image: small facts, or questions about a scene that is told instead of shown."""
    if rng.integers(2):
        exchanges = [draw_fact(rng) for _ in range(int(rng.integers(2, MAX_QUESTIONS + 1)))]
    else:
        exchanges = told_exchanges(draw_scene(rng), int(rng.integers(1, MAX_QUESTIONS)), rng)
    return _record(record_id, None, exchanges, rng)


def told_exchanges(scene: Scene, count: int, rng: np.random.Generator) -> list[Exchange]:
    exchanges = draw_exchanges(scene, count, rng)
    order = tuple(rng.permutation(len(scene.things)).tolist())
    question, answer = exchanges[0]
    return [
        (f"The image shows {scene.caption(order)}.\n{question}", answer),
        *exchanges[1:],
    ]


def draw_exchanges(scene: Scene, count: int, rng: np.random.Generator) -> list[Exchange]:
    """Different questions. As in LLaVA's mix, the short-answer prompt stands at the first one only."""
    exchanges: list[Exchange] = []
    asked: set[str] = set()
    prompted = False
    while len(exchanges) < count:
        question = draw_question(scene, rng)
        if question.text in asked:
            continue
        asked.add(question.text)
        if len(question.choices) >= len(LETTERS) and rng.random() < OPTIONS_SHARE:
            correct = int(rng.integers(len(LETTERS)))
            options = draw_options(question, correct, rng)
            exchanges.append((with_options(question.text, options), LETTERS[correct]))
        else:
            exchanges.append((question.text + ("" if prompted else SHORT_ANSWER), question.answer))
            prompted = True
    return exchanges


def draw_fact(rng: np.random.Generator) -> Exchange:
    kind = int(rng.integers(3))
    if kind == 0:
        total = int(rng.integers(10))
        first = int(rng.integers(total + 1))
        return f"What is {NUMBERS[first]} plus {NUMBERS[total - first]}?", NUMBERS[total]
    if kind == 1:
        number = int(rng.integers(9))
        return f"What number comes after {NUMBERS[number]}?", NUMBERS[number + 1]
    word = _pick((*COLOURS, *NUMBERS), rng)
    noun = _pick(("colour", "number"), rng)
    return f"Is {word} a {noun}?", "yes" if (word in COLOURS) == (noun == "colour") else "no"


def draw_question(scene: Scene, rng: np.random.Generator) -> Question:
    draw = rng.random()
    if draw < 0.32:
        return draw_presence(scene, rng)
    if draw < 0.4:
        return ask_attribute(scene.things[int(rng.integers(len(scene.things)))], rng)
    questions = open_questions(scene)
    if draw < 0.46:
        return questions[0]
    return questions[int(rng.integers(1, len(questions)))]


def _record(
    record_id: str,
    image: str | None,
    exchanges: list[Exchange],
    rng: np.random.Generator,
) -> dict[str, Any]:
    messages = []
    for question, answer in exchanges:
        messages += [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer},
        ]
    if image is None:
        return {"id": record_id, "conversations": messages}
    first = messages[0]
    last = rng.random() < IMAGE_LAST_SHARE
    first["value"] = f"{first['value']}\n<image>" if last else f"<image>\n{first['value']}"
    return {"id": record_id, "image": image, "conversations": messages}


def _pick(values: tuple[str, ...], rng: np.random.Generator) -> str:
    return values[int(rng.integers(len(values)))]
