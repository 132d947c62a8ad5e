"""Rows of the ten benchmarks: true columns and types, questions of a few made-up words."""

import io
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from datasets import Features, Image, List, Value
from PIL import Image as Pictures

from morebench.evaluation.tasks.mmmu import DOMAINS

Row = dict[str, Any]

TEXT = Value("string")
MME_QUESTIONS = {"existence": 60, "count": 60, "position": 60, "color": 60, "posters": 294, "celebrity": 340}
MME_QUESTIONS |= {"scene": 400, "landmark": 400, "artwork": 400, "OCR": 40, "commonsense_reasoning": 140}
MME_QUESTIONS |= {"numerical_calculation": 40, "text_translation": 40, "code_reasoning": 40}
MMBENCH_QUESTIONS = {2: 100, 3: 127, 4: 937}  # by number of options: 1,164 in 4,329 rows
MMBENCH_ROTATION = 1_000_000
SEED_QUESTIONS = {"image": 14_233, "video": 3_757}
SEED_FRAMES = 8
MMMU_SUBJECTS = sorted(name for names in DOMAINS.values() for name in names.split())
MMMU_OPEN = 17  # one question in so many: 53 of 900
WORDS = [
    "red",
    "left",
    "bench",
    "dog",
    "two",
    "cat",
    "umbrella",
    "street",
    "blue",
    "right",
    "table",
    "man's",
    "12:30",
    "T-shirt",
    "café",
    "water",
]
CHINESE = ["红色", "左边", "长椅", "狗", "两个", "猫", "雨伞", "街道", "蓝色", "右边", "桌子"]
LETTERS = "ABCDE"


def rows_of(name: str, scale: float) -> Iterator[Row]:
    """The rows of a benchmark at `scale` of its true counts, with at least one of every kind."""
    return _MAKERS[name][1](random.Random(f"rows of {name}"), scale)


def features_of(name: str) -> Features:
    return Features(_MAKERS[name][0])


def scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale))


@lru_cache(maxsize=4096)
def picture(name: str, kind: str = "JPEG") -> Row:
    """As the hub stores one. Some are not RGB, as in the originals."""
    draw = random.Random(name)
    mode = draw.choice(["RGB"] * 8 + (["L"] if kind == "JPEG" else ["L", "RGBA", "P"]))
    tiny = Pictures.frombytes("RGB", (2, 2), draw.randbytes(12)).convert(mode)
    buffer = io.BytesIO()
    tiny.resize((draw.randint(8, 24), draw.randint(8, 24)), Pictures.Resampling.NEAREST).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": f"{name.replace(' ', '_')}.{kind.lower()}"}


def sentence(draw: random.Random, words: list[str] = WORDS) -> str:
    text = " ".join(draw.choices(words, k=draw.randint(3, 9)))
    return f"{text[0].upper()}{text[1:]}?"


def options(draw: random.Random, count: int, words: list[str] = WORDS) -> list[str]:
    return draw.sample(words, count)


GQA: Row = {name: TEXT for name in ("id", "imageId", "question")}
GQA |= {"isBalanced": Value("bool"), "groups": {"global": TEXT, "local": TEXT}, "entailed": TEXT}
GQA |= {"equivalent": TEXT, "types": {name: TEXT for name in ("structural", "semantic", "detailed")}}
GQA |= {
    "annotations": [{"key": TEXT, "value": TEXT}],
    "semanticStr": TEXT,
    "answer": TEXT,
    "fullAnswer": TEXT,
}


def _gqa(draw: random.Random, scale: float) -> Iterator[Row]:
    images = scaled(398, scale)
    for number in range(scaled(12_578, scale)):
        answer = draw.choice(["yes", "no", "left", "right", "dog", "t-shirt"])
        yield {
            "id": f"20{number:07}",
            "imageId": f"n{draw.randrange(images)}" if number >= images else f"n{number}",
            "question": sentence(draw),
            "isBalanced": True,
            "groups": {"global": None, "local": "06-dog"},
            "entailed": "[]",
            "equivalent": f"[20{number:07}]",
            "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
            "annotations": [{"key": "2", "value": "dog"}],
            "semanticStr": "select: dog",
            "answer": answer,
            "fullAnswer": f"It is {answer}.",
        }


def _gqa_images(draw: random.Random, scale: float) -> Iterator[Row]:
    names = [f"n{number}" for number in range(scaled(398, scale))]
    draw.shuffle(names)
    for name in names:
        yield {"id": name, "image": picture(f"gqa {name}")}


SCIENCEQA: Row = {"image": Image(), "question": TEXT, "choices": List(TEXT), "answer": Value("int8")}
SCIENCEQA |= {name: TEXT for name in ("hint", "task", "grade", "subject", "topic", "category", "skill")}
SCIENCEQA |= {"lecture": TEXT, "solution": TEXT}


def _scienceqa(draw: random.Random, scale: float) -> Iterator[Row]:
    for number in range(scaled(2_017, scale)):
        choices = options(draw, draw.randint(2, 5))
        yield {
            "image": picture(f"scienceqa {number}", "PNG"),
            "question": sentence(draw),
            "choices": choices,
            "answer": draw.randrange(len(choices)),
            "hint": sentence(draw) if number % 2 else "",
            "task": "closed choice",
            "grade": f"grade{number % 12 + 1}",
            "subject": draw.choice(["natural science", "social science", "language science"]),
            "topic": "physics",
            "category": "Materials",
            "skill": "Compare properties of objects",
            "lecture": sentence(draw) * 20,
            "solution": sentence(draw),
        }


TEXTVQA: Row = {"image_id": TEXT, "question_id": Value("int32"), "question": TEXT}
TEXTVQA |= {"question_tokens": List(TEXT), "image": Image(), "image_width": Value("int32")}
TEXTVQA |= {"image_height": Value("int32"), "flickr_original_url": TEXT, "flickr_300k_url": TEXT}
TEXTVQA |= {"answers": List(TEXT), "image_classes": List(TEXT), "set_name": TEXT, "ocr_tokens": List(TEXT)}


def _textvqa(draw: random.Random, scale: float) -> Iterator[Row]:
    images = scaled(3_166, scale)
    for number in range(scaled(5_000, scale)):
        question, image = sentence(draw), number % images
        favourite = draw.choice(WORDS)
        agreeing = draw.choice([4, 6, 8, 10])
        yield {
            "image_id": f"{image:016x}",
            "question_id": 34_602 + number,
            "question": question,
            "question_tokens": question.lower().rstrip("?").split(),
            "image": picture(f"textvqa {image}"),
            "image_width": 1024,
            "image_height": 768,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": [favourite] * agreeing + draw.choices(WORDS, k=10 - agreeing),
            "image_classes": ["Billboard"],
            "set_name": "val",
            "ocr_tokens": draw.sample(WORDS, draw.randint(0, 12)),
        }


AI2D: Row = {"question": TEXT, "options": List(TEXT), "answer": TEXT, "image": Image()}


def _ai2d(draw: random.Random, scale: float) -> Iterator[Row]:
    images = scaled(1_000, scale)  # questions of a diagram lie together
    count = scaled(3_088, scale)
    for number in range(count):
        yield {
            "question": sentence(draw),
            "options": options(draw, 4),
            "answer": str(draw.randrange(4)),
            "image": picture(f"ai2d {number * images // count}", "PNG"),
        }


POPE: Row = {name: TEXT for name in ("id", "question_id", "question", "answer", "image_source")}
POPE |= {"image": Image(), "category": TEXT}


def _pope(draw: random.Random, scale: float) -> Iterator[Row]:
    """Three objects of an image are there, in every category; three others of each category are not."""
    images = scaled(500, scale)
    objects = [draw.sample(WORDS, 12) for _ in range(images)]
    number = 0
    for group, category in enumerate(("adversarial", "popular", "random")):
        for place in range(6 * images):
            image, half = divmod(place, 6)
            pair, is_absent = divmod(half, 2)
            yield {
                "id": str(number),
                "question_id": str(place + 1),
                "question": f"Is there a {objects[image][pair + (3 + 3 * group) * is_absent]} in the image?",
                "answer": "no" if is_absent else "yes",
                "image_source": f"COCO_val2014_{image:012}",
                "image": picture(f"pope {image}"),
                "category": category,
            }
            number += 1


MME: Row = {"question_id": TEXT, "image": Image(), "question": TEXT, "answer": TEXT, "category": TEXT}


def _mme(draw: random.Random, scale: float) -> Iterator[Row]:
    for category, count in MME_QUESTIONS.items():
        for number in range(scaled(count // 2, scale)):
            for answer in ("Yes", "No"):
                yield {
                    "question_id": f"{category}/{number:04}.png",
                    "image": picture(f"mme {category} {number}", "PNG"),
                    "question": f"{sentence(draw)} Please answer yes or no.",
                    "answer": answer,
                    "category": category,
                }


MMBENCH: Row = {"index": Value("int64")}
MMBENCH |= {name: TEXT for name in ("question", "hint", "answer", "A", "B", "C", "D", "category")}
MMBENCH |= {"image": Image()} | {name: TEXT for name in ("source", "L2-category", "comment", "split")}


def _mmbench(words: list[str]) -> Callable[[random.Random, float], Iterator[Row]]:
    def rows(draw: random.Random, scale: float) -> Iterator[Row]:
        """Missing texts are the word `nan`. All first rotations come first, as in the original."""
        sizes = [size for size, count in MMBENCH_QUESTIONS.items() for _ in range(scaled(count, scale))]
        random.Random("mmbench").shuffle(sizes)  # alike in both languages
        questions = []
        for number, size in enumerate(sizes):
            question = {
                "question": sentence(draw, words),
                "hint": sentence(draw, words) if number % 3 == 0 else "nan",
            }
            questions.append((number, options(draw, size, words), draw.randrange(size), question))
        for rotation in range(4):
            for number, texts, right, question in questions:
                size = len(texts)
                if rotation >= size:
                    continue
                turned = texts[rotation:] + texts[:rotation]
                yield {
                    "index": number + rotation * MMBENCH_ROTATION,
                    **question,
                    "answer": LETTERS[(right - rotation) % size],
                    **dict(zip("ABCD", turned + ["nan"] * (4 - size), strict=True)),
                    "category": f"category_{number % 20}",
                    "image": picture(f"mmbench {number}"),
                    "source": "a source",
                    "L2-category": f"l2_category_{number % 6}",
                    "comment": "nan",
                    "split": "dev",
                }

    return rows


SEED: Row = {name: TEXT for name in ("answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_id")}
SEED |= {"data_type": TEXT, "question": TEXT, "question_id": TEXT, "question_type_id": Value("int16")}
SEED |= {"image": List(Image()), "segment": List(Value("int64"))}


def _seedbench(draw: random.Random, scale: float) -> Iterator[Row]:
    number = 0
    for kind, count in SEED_QUESTIONS.items():
        for place in range(scaled(count, scale)):
            frames = 1 if kind == "image" else SEED_FRAMES
            texts = options(draw, 4)
            yield {
                "answer": draw.choice("ABCD"),
                **{f"choice_{letter}": text for letter, text in zip("abcd", texts, strict=True)},
                "data_id": f"{kind}_{place}",
                "data_type": kind,
                "question": sentence(draw),
                "question_id": str(101_669 + number),
                "question_type_id": place % 9 + 1 if kind == "image" else place % 3 + 10,
                "image": [picture(f"seed {kind} {place} {frame}") for frame in range(frames)],
                "segment": [] if kind == "image" else [0, 5],
            }
            number += 1


MMMU: Row = {name: TEXT for name in ("id", "question", "options", "explanation")}
MMMU |= {f"image_{number}": Image() for number in range(1, 8)}
MMMU |= {name: TEXT for name in ("img_type", "answer", "topic_difficulty", "question_type", "subfield")}


def _mmmu(draw: random.Random, scale: float) -> Iterator[Row]:
    """Marks before, inside and behind the text, in options, twice for one image, and not for every image."""
    number = 0
    for subject in MMMU_SUBJECTS:
        for place in range(1, scaled(30, scale) + 1):
            is_open = number % MMMU_OPEN == 0
            texts = [] if is_open else options(draw, draw.randint(2, 5))
            images, question = 1, f"<image 1> {sentence(draw)}"
            if number % 10 == 1:
                images, question = 2, f"{sentence(draw)} <image 1> and <image 2>, then <image 1> again."
            elif number % 10 == 2 and texts:
                images, question = len(texts), sentence(draw)
                texts = [f"<image {option + 1}>" for option in range(len(texts))]
            elif number % 10 == 3:
                images = 3
            name = f"validation_{subject}_{place}"
            yield {
                "id": name,
                "question": question,
                "options": repr(texts),
                "explanation": "",
                **{
                    f"image_{i}": picture(f"mmmu {name} {i}", "PNG") if i <= images else None
                    for i in range(1, 8)
                },
                "img_type": "['Diagrams']",
                "answer": draw.choice(["8.4", "1/64", "-120", "Transformation"])
                if is_open
                else LETTERS[draw.randrange(len(texts))],
                "topic_difficulty": "Medium",
                "question_type": "open" if is_open else "multiple-choice",
                "subfield": "A subfield",
            }
            number += 1


_MAKERS: dict[str, tuple[Row, Callable[[random.Random, float], Iterator[Row]]]] = {
    "gqa": (GQA, _gqa),
    "gqa_images": ({"id": TEXT, "image": Image()}, _gqa_images),
    "scienceqa": (SCIENCEQA, _scienceqa),
    "textvqa": (TEXTVQA, _textvqa),
    "ai2d": (AI2D, _ai2d),
    "pope": (POPE, _pope),
    "mme": (MME, _mme),
    "mmbench_cn": (MMBENCH, _mmbench(CHINESE)),
    "mmbench_en": (MMBENCH, _mmbench(WORDS)),
    "seedbench": (SEED, _seedbench),
    "mmmu": (MMMU, _mmmu),
}
