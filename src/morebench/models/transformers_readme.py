"""README.md of an exported folder: what it is, how to load it, where it differs from morebench."""

from typing import Any

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from morebench.config.schema import AspectRatio, Config
from morebench.models.transformers_processor import nearest_backend

_TEMPLATE = """\
# {title}

`LlavaForConditionalGeneration`, written by morebench from the run `{run_id}`.

| part | |
|---|---|
| LLM | {llm} ({llm_source}) |
| vision encoder | {vision} ({vision_source}), {num_blocks} blocks, features of the last |
| images | {image_size} pixels, {num_visual_tokens} visual tokens, {padding} |
| pretrain data | {pretrain_data} |
| finetune data | {finetune_data} |
| weights | {dtype} |

```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("FOLDER", dtype="auto")
processor = AutoProcessor.from_pretrained("FOLDER", backend="{backend}")
image = Image.open("picture.jpg").convert("RGB")
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```

- {pixels} The image has to be opened as above; it must be RGB. Opening a `"path"` turns it as its EXIF
  orientation says, which training did not.
- The chat template is the layout of training, system text included, and always ends ready for the answer.
  Control tokens spelt out in a message are read as such unless you pass `sanitize_control_tokens=True`.
- `<image>` is a token more than the LLM was trained with. Its logit is the mean of the others, never the
  largest.
{history}{softcap}"""
_PIXELS = {
    "torchvision": """\
Pixels are those of training, to fp32 rounding, with `backend="torchvision"` on the CPU. With `backend="pil"`
  they are up to 2 grey levels of 255 off (under Pillow 13 more, in tall images that are not padded).""",
    "pil": """\
Pixels are within 1 grey level of 255 of those of training with `backend="pil"`. With `backend="torchvision"`
  they are the same, to fp32 rounding, on CPUs with AVX2 and on ARM; on others more are 1 level off.""",
}
_HISTORY = """\
- Earlier answers of a conversation get other token ids than in training, where an answer was tokenized apart
  from the text before it: this tokenizer joins the two. The prompt of a first answer has the ids of training.
"""
_SOFTCAP = """\
- The LLM soft-caps its final logits: `{cap:g} * tanh(logits / {cap:g})`. LlavaForConditionalGeneration leaves
  that out. Greedy answers are the same; for sampling and for losses apply it to `model(...).logits` yourself.
"""


def readme(
    config: Config,
    run_id: str,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    exact_history: bool,
) -> str:
    vision: Any = model.config.vision_config
    cap = getattr(model.config.text_config, "final_logit_softcapping", None)
    backend = nearest_backend(config.vision.image)
    pads = config.stage.evaluate.image_aspect_ratio is AspectRatio.pad
    return _TEMPLATE.format(
        title=f"{config.llm.label} + {config.vision.label}",
        run_id=run_id,
        llm=config.llm.label,
        llm_source=config.llm.weights.hub_id or "local",
        vision=config.vision.label,
        vision_source=config.vision.weights.hub_id or "local",
        num_blocks=vision.num_hidden_layers,
        image_size=processor.image_processor.crop_size["height"],
        num_visual_tokens=model.config.image_seq_length,
        padding="padded to a square with the mean colour" if pads else "not padded",
        pretrain_data=config.pretrain_data.label,
        finetune_data=config.finetune_data.label,
        dtype=str(model.dtype).removeprefix("torch."),
        backend=backend,
        pixels=_PIXELS[backend],
        history="" if exact_history else _HISTORY,
        softcap="" if cap is None else _SOFTCAP.format(cap=cap),
    )
