"""The whole: vision encoder, projector and LLM on one packed batch, down to the loss."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from morebench.config.schema import Attention, LossKernel
from morebench.data.batch import Batch
from morebench.models.attention_gpu import attend_with
from morebench.models.features import encode, from_8bit
from morebench.models.loss import liger_loss_sum
from morebench.models.loss_cpu import one_pass_loss_sum
from morebench.models.normalise import Normalise
from morebench.models.projector import MLPProjector
from morebench.models.stored import Pieces
from morebench.models.vision import VisionEncoder

# Logits held at once: 1 GiB in fp32.
_LOGITS_PER_CHUNK = 2**28


class MLLM(nn.Module):
    """Every batch runs every trained module, whatever it holds.

    A batch may be text-only, without supervised tokens, or empty. Ranks that shard or reduce gradients wait
    for each other in every module, so a missing one would hang them: `forward` puts a stand-in of one token
    (one feature for the projector) with weight zero where there is nothing. The vision encoder gets none: it
    is frozen.

    `attention` and `loss_kernel` (never auto) say how it is computed; any choice computes the same.
    """

    attention = Attention.loop
    loss_kernel = LossKernel.torch

    def __init__(
        self,
        normalise: Normalise,
        vision: VisionEncoder,
        projector: MLPProjector,
        llm: PreTrainedModel,
        visual_scale: float = 1.0,
        unread: Pieces | None = None,
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self.vision = vision
        self.projector = projector
        self.llm = llm
        self.visual_scale = visual_scale
        self.unread = unread  # the LLM's values, while its parameters are on the meta device

    def train(self, mode: bool = True) -> "MLLM":
        super().train(mode)
        self.get_submodule("vision").eval()  # frozen
        return self

    def forward(self, batch: Batch) -> Tensor:
        """Loss summed over the batch's targets, fp32. The caller divides by `batch.num_supervised`."""
        empty = len(batch.input_ids) == 0
        # waits for the device, so before it has anything to do
        borders = [0, 1] if empty else batch.cu_seqlens.tolist()
        embeds_TD = self._embed_batch(batch, batch.input_ids.new_zeros(1) if empty else batch.input_ids)
        hidden_TD = self.llm.base_model(
            inputs_embeds=embeds_TD[None],
            position_ids=batch.position_ids.new_zeros(1, 1) if empty else batch.position_ids[None],
            use_cache=False,
            cu_seqlens=attend_with(self.attention, borders, embeds_TD.device),
        ).last_hidden_state[0]
        if len(batch.targets) == 0:
            return 0.0 * self._loss_sum(hidden_TD[:1], batch.targets.new_zeros(1))
        return self._loss_sum(hidden_TD[batch.target_positions], batch.targets)

    def encode_images(self, pixels_IHW3: Tensor) -> Tensor:
        """uint8 -> visual tokens `[I, V, D]`, ready for `embed`."""
        return self.project(encode(self.normalise, self.vision, pixels_IHW3))

    def project(self, features_IVC: Tensor) -> Tensor:
        """-> visual tokens `[I, V, D]`, ready for `embed`."""
        visual_IVD = self.projector(features_IVC.to(self._projector_dtype()))
        return visual_IVD * self.visual_scale

    def embed(self, input_ids_T: Tensor, visual_positions: Tensor, visual_IVD: Tensor) -> Tensor:
        """-> `[T, D]`: token embeddings with the visual tokens (of `encode_images`) in their places."""
        embeds_TD = self.llm.get_input_embeddings()(input_ids_T)
        visual_PD = visual_IVD.flatten(0, 1)
        if len(visual_positions) != len(visual_PD):
            raise ValueError(
                f"{len(visual_positions)} positions are reserved for visual tokens, but {len(visual_PD)} came"
            )
        return embeds_TD.index_copy(0, visual_positions, visual_PD.to(embeds_TD.dtype))

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """fp32 logits of final hidden states, soft-capped where the LLM does so."""
        head = self.llm.get_output_embeddings()
        # not as a module: ZeRO-3 wants the same modules in the same order in every micro-batch of every rank,
        # and the number of chunks differs
        logits_SZ = linear(hidden_SD, head.weight, getattr(head, "bias", None)).float()
        cap = self._final_softcap()
        return logits_SZ if cap is None else torch.tanh(logits_SZ / cap) * cap

    def _embed_batch(self, batch: Batch, input_ids_T: Tensor) -> Tensor:
        """-> `[T, D]`; the projector takes part, with weight zero where no image is."""
        visual_IVD = self._visual(batch)
        if visual_IVD is not None:
            return self.embed(input_ids_T, batch.visual_positions, visual_IVD)
        # before the embedding, as where there are images: ranks reduce gradients in the order they come
        feature_1C = torch.zeros(1, self.projector.vision_dim, device=input_ids_T.device)
        nothing = 0.0 * self.projector(feature_1C.to(self._projector_dtype())).sum()
        # into the LLM, not past it: backward gathers sharded blocks, frozen too, on every rank or on none
        return self.llm.get_input_embeddings()(input_ids_T) + nothing

    def _visual(self, batch: Batch) -> Tensor | None:
        if len(batch.pixel_values) > 0:
            return self.encode_images(batch.pixel_values)
        if len(batch.features) == 0:
            return None
        if batch.feature_scales.numel() > 0:
            return self.project(from_8bit(batch.features, batch.feature_scales))
        return self.project(batch.features)

    def _loss_sum(self, hidden_SD: Tensor, targets_S: Tensor) -> Tensor:
        head = self.llm.get_output_embeddings()
        if self.loss_kernel is LossKernel.liger:
            return liger_loss_sum(hidden_SD, targets_S, head, self._final_softcap())
        if self.loss_kernel is LossKernel.one_pass:
            return one_pass_loss_sum(hidden_SD, head, self._final_softcap(), targets_S)
        size = max(1, _LOGITS_PER_CHUNK // self.llm.config.vocab_size)
        pieces = list(zip(hidden_SD.split(size), targets_S.split(size), strict=True))
        if len(pieces) == 1:
            return self._chunk_loss(*pieces[0])
        # Logits of one chunk at a time, in backward too: they are cheaper to compute again than to keep.
        losses = [checkpoint(self._chunk_loss, *piece, use_reentrant=False) for piece in pieces]
        return torch.stack(losses).sum()

    def _chunk_loss(self, hidden_SD: Tensor, targets_S: Tensor) -> Tensor:
        return cross_entropy(self.logits(hidden_SD), targets_S, reduction="sum")

    def _final_softcap(self) -> float | None:
        return getattr(self.llm.config, "final_logit_softcapping", None)

    def _projector_dtype(self) -> torch.dtype:
        return next(self.projector.parameters()).dtype
