"""A GQA-shaped load: some images, 32 questions about each, answers of a few tokens; all of it random.

The tiny shape has Phi-4-mini's proportions where time goes: its head and its encoder cost the same share of
an image's prefill (19 %, and 14 % with SigLIP2 or 10 % with CLIP), as many visual tokens, and texts as long.
Attention costs more: 10 to 12 % of a prefill's other products, where Phi-4-mini has 2 %. Scores grow with the
width, the other products with its square. Sharing saves none of it for a question's tokens, so the ratios are
rather too low.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from morebench.config.compose import compose_config, load_chat_format, load_shape
from morebench.config.schema import Config, Precision
from morebench.data.chat import ChatFormat, Encoded
from morebench.data.image_processor import ImageProcessor
from morebench.evaluation.generate import Request
from morebench.evaluation.items import StoredImage
from morebench.evaluation.model import LoadedModel
from morebench.models.parts import build_mllm

QUESTIONS = 32  # about an image; GQA's testdev has 12,578 about 398
MAX_NEW_TOKENS = 16  # GQA's
_BEFORE = 10  # tokens in front of the image: Phi-4's system text and the start of a turn
_AROUND = 15  # after it, beside the question: GQA's instruction, line ends, the start of the answer
_CONTROL = ["<|endoftext|>", "<|system|>", "<|end|>", "<|user|>", "<|assistant|>"]
# The end token's row of the head is so much longer than others that an answer ends after a few tokens.
_END_ROW = 16.0


@dataclass(frozen=True)
class Shape:
    """`grids`: by number of visual tokens, the overrides that choose its encoder."""

    overrides: list[str]
    llm: dict[str, Any] | None  # None: the choice's own
    grids: dict[int, tuple[str, dict[str, Any] | None]]
    photo: tuple[int, int]  # pixels of a stored image


def _vision(grid: int, patch: int, width: int, blocks: int, prefix_tokens: int) -> dict[str, Any]:
    shape: dict[str, Any] = {"image_size": grid * patch, "patch_size": patch, "width": width}
    shape |= {"blocks": blocks + 1, "heads": 4, "mlp_dim": 4 * width, "norm_eps": 1e-5}
    activation = "quick_gelu" if prefix_tokens else "gelu_tanh"
    return shape | {"prefix_tokens": prefix_tokens, "activation": activation}


def _phi(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    shape: dict[str, Any] = {"model_type": "phi3", "hidden_size": width, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 192}
    shape |= {"intermediate_size": width * 8 // 3, "vocab_size": vocabulary, "max_position_embeddings": 4096}
    shape |= {"original_max_position_embeddings": 4096, "pad_token_id": 0, "tie_word_embeddings": False}
    return shape | {"initializer_range": 0.1}  # answers depend on image and question, not on the last token


SHAPES = {
    "tiny": Shape(
        ["llm=phi_tiny"],
        _phi(576, 3, 3500),
        {
            576: ("vision=clip_tiny", _vision(24, 14, 160, 2, 1)),
            729: ("vision=siglip_tiny", _vision(27, 14, 144, 3, 0)),
        },
        (640, 480),
    ),
    "phi4": Shape(
        ["llm=phi4"], None, {576: ("vision=clip", None), 729: ("vision=siglip2", None)}, (640, 480)
    ),
    "test": Shape(  # whether it runs
        ["llm=phi_tiny"],
        _phi(192, 2, 320),
        {
            16: ("vision=clip_tiny", _vision(4, 7, 32, 1, 1)),
            25: ("vision=siglip_tiny", _vision(5, 7, 32, 1, 0)),
        },
        (40, 30),
    ),
}


def make_config(shape: Shape, grid: int, on_cpu: bool) -> Config:
    choice, vision_shape = shape.grids[grid]
    trainer = "trainer=cpu" if on_cpu else "trainer=auto"
    config = compose_config([*shape.overrides, choice, trainer, "recipe=llava"]).config
    if shape.llm is not None:
        config = replace(config, llm=replace(config.llm, shape=shape.llm))
    if vision_shape is not None:
        size = vision_shape["image_size"]
        image = replace(config.vision.image, resize_to=size)
        config = replace(config, vision=replace(config.vision, shape=vision_shape, image=image))
    return config


def make_model(config: Config, precision: Precision, device: torch.device) -> LoadedModel:
    torch.manual_seed(0)
    with torch.device(device):  # a GPU draws billions of weights in a second
        mllm = build_mllm(config, {}, precision).eval()
    tokenizer = _tokenizer(load_shape(config.llm.shape)["vocab_size"])
    chat = ChatFormat.from_dict(load_chat_format(config.llm.chat_format))
    head = mllm.llm.get_output_embeddings().weight
    with torch.no_grad():
        head[chat.end_token_ids(tokenizer)[0]] *= _END_ROW
    processor = ImageProcessor(
        config.vision.image, mllm.vision.image_size, config.stage.evaluate.image_aspect_ratio
    )
    batch_size = config.trainer.evaluate_batch_size
    return LoadedModel(mllm.to(device), tokenizer, chat, processor, batch_size, config.llm)


def make_requests(shape: Shape, model: LoadedModel, num_images: int) -> list[Request]:
    """Questions of four to twenty tokens, ten on average, as GQA's."""
    draw, visual = np.random.default_rng(0), model.mllm.vision.num_visual_tokens
    size = len(model.tokenizer)
    before = draw.integers(len(_CONTROL), size, _BEFORE)
    around = draw.integers(len(_CONTROL), size, _AROUND)
    requests = []
    for number in range(num_images):
        width, height = shape.photo
        photo = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = StoredImage(f"photo {number}", f"{number}.jpg", partial(photo.copy))
        for _ in range(QUESTIONS):
            length = int(np.clip(draw.lognormal(np.log(9.5), 0.35), 4, 20))
            question = draw.integers(len(_CONTROL), size, length)
            requests.append(Request(_prompt(before, visual, around, question), (image,), MAX_NEW_TOKENS))
    return requests


def _prompt(before: np.ndarray, visual: int, around: np.ndarray, question: np.ndarray) -> Encoded:
    # The question last: with random weights an answer depends most on what it follows.
    ids = np.concatenate([before, np.zeros(visual, np.int64), around, question]).astype(np.int32)
    mask = np.zeros(len(ids), np.bool_)
    mask[len(before) : len(before) + visual] = True
    return Encoded(ids, np.zeros(len(ids), np.bool_), mask, False)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word for every id."""
    words = [*_CONTROL, *(f"w{number}" for number in range(len(_CONTROL), vocabulary))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, _CONTROL[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=_CONTROL[0], additional_special_tokens=_CONTROL[1:]
    )
