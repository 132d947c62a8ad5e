"""`LlavaProcessor` of a cell: its tokenizer, image processing and chat format."""

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from morebench.config.schema import AspectRatio, ImageProcessing, Interpolation, Resize
from morebench.data.chat import ChatFormat
from morebench.data.image_processor import RESAMPLING
from morebench.data.jinja_template import ChatTemplate
from morebench.data.records import IMAGE_TOKEN, Sample, Turn
from morebench.errors import ConfigError
from morebench.models.vision import PatchEncoder
from morebench.models.vision_layouts import select_strategy


def make_processor(
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerFast,
    processing: ImageProcessing,
    aspect_ratio: AspectRatio,
    encoder: PatchEncoder,
    patch_size: int,
) -> LlavaProcessor:
    """`tokenizer`: of `with_image_token`."""
    return LlavaProcessor(
        image_processor=image_processor(processing, aspect_ratio, encoder.image_size),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=select_strategy(encoder.num_prefix_tokens),
        num_additional_image_tokens=encoder.num_prefix_tokens,
        chat_template=template.jinja,
        image_token=IMAGE_TOKEN,
    )


def with_image_token(tokenizer: PreTrainedTokenizerFast, chat: ChatFormat) -> PreTrainedTokenizerFast:
    """A copy that knows `<image>` as one token and writes what it is given, no more and no less.

    It adds no BOS, because the chat template writes it.
    """
    if IMAGE_TOKEN in tokenizer.get_vocab():
        raise ConfigError(
            f"The LLM's tokenizer has a token {IMAGE_TOKEN!r} of its own. In training that text was no image "
            "token; LlavaForConditionalGeneration would take it for one."
        )
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"post_processor": None, "truncation": None, "padding": None}
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **{name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None},
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        model_max_length=tokenizer.model_max_length,
    )


def image_processor(
    processing: ImageProcessing, aspect_ratio: AspectRatio, image_size: int
) -> LlavaImageProcessorPil:
    size, square = processing.resize_to, {"height": image_size, "width": image_size}
    crops = processing.resize is Resize.shortest_edge
    return LlavaImageProcessorPil(
        do_convert_rgb=False,  # it would put white behind what is transparent; PIL's convert("RGB") does not
        do_pad=aspect_ratio is AspectRatio.pad,  # filled with `image_mean`, as ours
        size={"shortest_edge": size} if crops else {"height": size, "width": size},
        do_center_crop=crops,
        crop_size=square,  # without a crop too: LlavaProcessor reads the input size here
        resample=RESAMPLING[processing.interpolation],
        image_mean=list(processing.mean),
        image_std=list(processing.std),
    )


def nearest_backend(processing: ImageProcessing) -> str:
    """The back end of transformers that comes nearest to ours on every CPU.

    torchvision's resizes as ours does, but bilinear in floats on an x86 CPU without AVX2.
    """
    return "torchvision" if processing.interpolation is Interpolation.bicubic else "pil"


def messages(turns: list[Turn], with_answer: bool = True) -> list[dict[str, Any]]:
    """Turns as `apply_chat_template` takes them; the image tokens of a question stay text."""
    said = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for turn in turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]
    return said if with_answer else said[:-1]


def check_ids(
    processor: LlavaProcessor,
    chat: ChatFormat,
    tokenizer: PreTrainedTokenizerFast,
    num_visual_tokens: int,
    exact_history: bool,
) -> None:
    """Raise ConfigError if a prompt, or a conversation where it can be, has other ids than `chat` gives it.

    `tokenizer`: the LLM's own.
    """
    turns = [
        Turn(f"What is in this picture?\n{IMAGE_TOKEN}", "A red 7, top left."),
        Turn("And its colour?", "Red."),
    ]
    sample = Sample("check", ("image",), tuple(turns))
    prompt = processor.apply_chat_template(messages(turns[:1], with_answer=False))
    pairs = [(prompt, chat.encode_prompt(turns[0].question, tokenizer, num_visual_tokens))]
    if exact_history:
        conversation = processor.apply_chat_template(messages(turns))
        pairs.append((conversation, chat.encode(sample, tokenizer, num_visual_tokens, max_length=2**31)))
    for text, expected in pairs:
        ours = expected.input_ids.copy()
        ours[expected.visual_mask] = processor.image_token_id
        expanded = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * num_visual_tokens)
        found: list[int] = processor.tokenizer(expanded)["input_ids"]
        if found != ours.tolist():
            first = next(
                (i for i, pair in enumerate(zip(found, ours, strict=False)) if pair[0] != pair[1]), -1
            )
            raise ConfigError(
                f"Chat format {chat.label!r} cannot become a chat template for this tokenizer: {text!r} "
                f"gives {len(found)} ids, our segments {len(ours)}, and they differ from position {first} on."
            )
