"""An exported cell against ours, read back from disk: the same logits, ids, greedy answers, near pixels."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories_export import FinishedRun, finished_run
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from morebench.config.compose import compose_config, save_config
from morebench.config.schema import Precision, Resolution
from morebench.data.chat import Encoded
from morebench.data.images import load_image
from morebench.errors import ConfigError, RunError
from morebench.evaluation.generate import Answer, Generator, Request
from morebench.evaluation.items import StoredImage
from morebench.evaluation.model import load_model
from morebench.models.transformers_export import export, with_mean_row
from morebench.models.transformers_processor import nearest_backend
from morebench.models.vision_layouts import as_transformers

CELLS = [("llama", "siglip"), ("gemma2", "clip"), ("phi3", "dinov2")]
QUESTION = "<image>\nWhat is this?"
TEXTS = ["Hello?", "What is one and one and one?"]
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class Case:
    run: FinishedRun
    folder: Path
    ours: Any  # the model as evaluation loads it
    model: Any
    processor: Any
    image: Path

    def prompt(self, question: str) -> Encoded:
        num_visual_tokens = self.ours.mllm.vision.num_visual_tokens
        return self.ours.chat.encode_prompt(question, self.ours.tokenizer, num_visual_tokens)

    def visual(self, question: str) -> Tensor:
        """-> `[I, V, D]`"""
        return self.ours.encode(self.images(question))

    def images(self, question: str) -> tuple[StoredImage, ...]:
        return (StoredImage("", self.image.name, lambda: load_image(self.image)),) * question.count("<image>")

    def pixels(self) -> Tensor:
        """float32 [1, 3, S, S]: what our vision encoder gets."""
        pixels: Tensor = self.ours.mllm.normalise(
            torch.from_numpy(self.ours.processor(load_image(self.image))[None])
        )
        return pixels

    def expected_logits(self, question: str) -> Tensor:
        """-> `[T, Z]`, through the attention of training."""
        prompt, mllm = self.prompt(question), self.ours.mllm
        embeds_TD = mllm.embed(
            torch.from_numpy(prompt.input_ids).long(),
            torch.from_numpy(prompt.visual_mask).nonzero()[:, 0],
            self.visual(question),
        )
        output = mllm.llm.base_model(
            inputs_embeds=embeds_TD[None],
            position_ids=torch.arange(len(embeds_TD))[None],
            use_cache=False,
            cu_seqlens=[0, len(embeds_TD)],
        )
        return mllm.logits(output.last_hidden_state[0])

    def inputs(self, questions: list[str]) -> Any:
        texts = [
            self.processor.apply_chat_template([{"role": "user", "content": question}])
            for question in questions
        ]
        images = [load_image(self.image) for question in questions if "<image>" in question]
        return self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")

    def found_logits(self, questions: list[str]) -> list[Tensor]:
        """-> per question `[T, Z]`: soft-capped, without padding; from our pixels: theirs may be near."""
        inputs = self.inputs(questions)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = self.pixels()
        logits_BTZ = self.model(**inputs).logits
        cap = getattr(self.model.config.text_config, "final_logit_softcapping", None)
        if cap is not None:
            logits_BTZ = torch.tanh(logits_BTZ / cap) * cap
        return [row[mask.bool()] for row, mask in zip(logits_BTZ, inputs["attention_mask"], strict=True)]

    def common(self, logits_TZ: Tensor) -> Tensor:
        columns = torch.arange(self.ours.mllm.llm.config.vocab_size)
        return logits_TZ[:, columns[columns != self.model.config.image_token_id]]


@pytest.fixture(scope="module", params=CELLS, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("export")
    run = finished_run(root, *request.param)
    folder = root / "exported"
    export(run.folder, folder)
    pixels = np.random.default_rng(0).integers(0, 256, (21, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((100, 42)).save(root / "picture.png")
    return Case(
        run,
        folder,
        load_model(run.config, run.folder, torch.device("cpu")),
        LlavaForConditionalGeneration.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder, backend=nearest_backend(run.config.vision.image)),
        root / "picture.png",
    )


@torch.no_grad()
@pytest.mark.parametrize("questions", [[QUESTION], TEXTS, [QUESTION, *TEXTS]], ids=["image", "text", "mixed"])
def test_logits_equal_ours(case: Case, questions: list[str]) -> None:
    for question, found in zip(questions, case.found_logits(questions), strict=True):
        expected = case.expected_logits(question)
        assert expected.std() > 0.1
        torch.testing.assert_close(case.common(found), case.common(expected), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_logits_depend_on_the_image(case: Case) -> None:
    inputs = case.inputs([QUESTION])
    before = case.model(**inputs).logits[0, -1]
    inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
    assert (case.model(**inputs).logits[0, -1] - before).abs().max() > 0.01


def ours_answers(case: Case, questions: list[str]) -> list[Answer]:
    requests = [
        Request(case.prompt(question), case.images(question), MAX_NEW_TOKENS) for question in questions
    ]
    return Generator(case.ours).answer(requests)


def theirs(case: Case, inputs: Any) -> list[str]:
    ids = case.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = case.processor.batch_decode(ids, skip_special_tokens=True)
    return texts


def test_the_greedy_answer_to_an_image_file_equals_ours(case: Case) -> None:
    (expected,) = ours_answers(case, [QUESTION])
    image = {"type": "image", "path": str(case.image)}
    content = [image, {"type": "text", "text": QUESTION.removeprefix("<image>\n")}]
    inputs = case.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert expected.near_ties == 0
    assert expected.text
    assert theirs(case, inputs) == [expected.text]


def test_greedy_answers_of_a_batch_equal_ours(case: Case) -> None:
    expected = ours_answers(case, [QUESTION, *TEXTS])
    assert sum(answer.near_ties for answer in expected) == 0
    assert len({answer.text for answer in expected}) > 1
    assert theirs(case, case.inputs([QUESTION, *TEXTS])) == [answer.text for answer in expected]


def test_ids_and_pixels_equal_ours(case: Case) -> None:
    inputs, prompt = case.inputs([QUESTION]), case.prompt(QUESTION)
    expected = torch.from_numpy(prompt.input_ids).long()
    expected[torch.from_numpy(prompt.visual_mask)] = case.model.config.image_token_id
    assert inputs["input_ids"][0].tolist() == expected.tolist()
    image = case.run.config.vision.image
    level = 1.01 / 255 / min(image.std) if nearest_backend(image) == "pil" else 1e-6
    torch.testing.assert_close(inputs["pixel_values"], case.pixels(), atol=level, rtol=0)


def test_what_is_read_again_is_what_was_written(case: Case) -> None:
    with safe_open(case.run.folder / "llm.safetensors", "pt") as file:
        written = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    found = case.model.state_dict()
    image_row = case.model.config.image_token_id
    for key, tensor in written.items():
        name = key if key.startswith("lm_head") else key.replace("model.", "model.language_model.", 1)
        again = found[name]
        if "embed_tokens" in key or "lm_head" in key:
            rows = torch.arange(len(tensor)) != image_row
            again, tensor = again[: len(tensor)][rows], tensor[rows]
        assert torch.equal(again, tensor), key
    first, _, last = case.ours.mllm.projector
    projector = case.model.model.multi_modal_projector
    assert torch.equal(projector.linear_1.weight, first.weight)
    assert torch.equal(projector.linear_2.weight, last.weight * case.ours.mllm.visual_scale)
    tower = as_transformers(case.ours.mllm.vision, case.run.config.vision.shape)
    again = case.model.model.vision_tower.state_dict()
    assert again.keys() == tower.state_dict().keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tower.state_dict().items())


def test_the_folder(case: Case) -> None:
    names = {path.name for path in case.folder.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "README.md",
        "tokenizer.json",
        "chat_template.jinja",
    } <= names
    assert {path.suffix for path in case.folder.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    assert len({path.stat().st_mode for path in case.folder.iterdir()}) == 1
    with safe_open(case.folder / "model.safetensors", "pt") as file:
        heads = [key for key in file.keys() if "lm_head" in key]  # noqa: SIM118
    tied = case.ours.mllm.llm.config.tie_word_embeddings
    assert len(heads) == (0 if tied else 1)
    embeddings = case.model.get_input_embeddings().weight
    assert (case.model.lm_head.weight is embeddings) == tied
    assert str(case.run.folder.parent.parent) not in "".join(
        path.read_text() for path in case.folder.iterdir() if path.suffix != ".safetensors"
    )


def test_the_vocabulary_grows_by_one_row_unless_a_row_is_free(case: Case) -> None:
    ours, image_token_id = case.ours.mllm.llm.config.vocab_size, case.model.config.image_token_id
    free = case.model.config.text_config.model_type == "gemma2"
    assert image_token_id == len(case.ours.tokenizer)
    assert (
        len(case.model.get_input_embeddings().weight) == len(case.model.lm_head.weight) == ours + (not free)
    )


def test_the_generation_config(case: Case) -> None:
    found = case.model.generation_config
    assert found.eos_token_id == case.ours.chat.end_token_ids(case.ours.tokenizer)
    assert (found.do_sample, found.pad_token_id) == (False, case.ours.tokenizer.pad_token_id)
    assert found.max_new_tokens is None  # no task in the suite


def test_gemma_keeps_its_attention_and_the_folder_says_what_it_loses(case: Case) -> None:
    text = case.model.config.text_config
    says = "`3 * tanh(logits / 3)`" in (case.folder / "README.md").read_text()
    assert says == (text.model_type == "gemma2")
    if text.model_type == "gemma2":
        assert text._attn_implementation == "eager"  # the others have no soft-cap
        assert (text.attn_logit_softcapping, text.sliding_window) == (2.0, 5)


@torch.no_grad()
def test_an_image_token_is_never_the_best(case: Case) -> None:
    for logits_TZ in case.found_logits([QUESTION, *TEXTS]):
        assert (logits_TZ.argmax(1) != case.model.config.image_token_id).all()


def test_the_mean_row_loses_where_zero_would_win() -> None:
    head_ZD, hidden_D = torch.randn(7, 4) - 2, torch.ones(4)
    assert (head_ZD @ hidden_D).max() < 0
    assert (with_mean_row(head_ZD, row=7, num_rows=8) @ hidden_D).argmax() != 7
    replaced_ZD = with_mean_row(head_ZD, row=3, num_rows=7)
    torch.testing.assert_close(replaced_ZD[3], head_ZD[[0, 1, 2, 4, 5, 6]].mean(0))
    assert torch.equal(replaced_ZD[[0, 1, 2, 4, 5, 6]], head_ZD[[0, 1, 2, 4, 5, 6]])
    assert len(with_mean_row(head_ZD, row=8, num_rows=9)) == 9


def test_bf16_is_what_was_scored(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "gemma2", "clip", Precision.bf16)
    export(run.folder, tmp_path / "out")
    model: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ours = load_model(run.config, run.folder, torch.device("cpu")).mllm
    assert torch.equal(
        model.model.language_model.layers[0].mlp.up_proj.weight, ours.llm.model.layers[0].mlp.up_proj.weight
    )
    with safe_open(run.folder / "projector.safetensors", "pt") as file:
        master = file.get_tensor("2.weight")
    # one rounding: the factor is applied to the fp32 master
    scaled = (master * ours.visual_scale).bfloat16()
    assert torch.equal(model.model.multi_modal_projector.linear_2.weight, scaled)


def test_all_that_llava_cannot_express_is_named_at_once(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "llama", "clip")
    vision = replace(run.config.vision, shape=run.config.vision.shape | {"prefix_tokens": 5})
    config = replace(
        run.config,
        vision=vision,
        resolution=Resolution(label="S2", scales=[1, 2, 3]),
        projector=replace(run.config.projector, depth=3),
    )
    save_config(config, run.folder / "config.yaml")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("")
    with pytest.raises(ConfigError) as caught:
        export(run.folder, out)
    message = str(caught.value)
    assert "[1, 2, 3]" in message
    assert "resolution=native" in message
    assert "has 2 layers, this one 3" in message
    assert "5 prefix tokens" in message
    assert "vision=dinov2" in message
    assert "not empty" in message
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "phi", "clip")
    with pytest.raises(ConfigError, match="PhiForCausalLM has a bias"):
        export(run.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named_at_once(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "llama", "clip")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/out cannot be written: Not a directory"):
        export(run.folder, tmp_path / "file" / "out")


def test_the_longest_answer_is_that_of_the_suite(tmp_path: Path) -> None:
    suite = compose_config(["suite=digits"]).config.suite
    run = finished_run(tmp_path, "llama", "clip", suite=suite)
    (tmp_path / "out").mkdir()  # empty: that will do
    export(run.folder, tmp_path / "out")
    longest = max(task.max_new_tokens["paper"] for task in suite.tasks.values())
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found["max_new_tokens"] == longest


def test_a_run_that_is_no_finished_finetune_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder"):
        export(tmp_path, tmp_path / "out")
    run = finished_run(tmp_path, "llama", "clip")
    (run.folder / "llm.safetensors").unlink()
    with pytest.raises(RunError, match=r"no llm\.safetensors"):
        export(run.folder, tmp_path / "out")
    (run.folder / "manifest.json").write_text(json.dumps({"step": "pretrain"}))
    with pytest.raises(RunError, match="is the pretrain step"):
        export(run.folder, tmp_path / "out")
    (run.folder / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        export(run.folder, tmp_path / "out")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(tmp_path, "llama", "clip")
    before = sorted(tmp_path.iterdir())

    def fail(*arguments: Any) -> None:
        raise OSError("disk")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk"):
        export(run.folder, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
