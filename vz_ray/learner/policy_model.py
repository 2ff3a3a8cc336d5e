"""The policy: a HF Qwen-VL checkpoint that gives log-probs of sampled tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vz_ray.learner.attention import PACKED_ATTENTION, packed_attention
from vz_ray.learner.batch import MicroBatch
from vz_ray.learner.checkpoint_shapes import check_tensor_shapes
from vz_ray.learner.example import SpecialTokenIds
from vz_ray.learner.frame_cache import FeatureCache
from vz_ray.learner.logprobs import LogprobHead
from vz_ray.learner.packing import FlopCosts
from vz_ray.learner.vision_tower import optimize_vision_tower, vision_tables
from vz_ray.planning import ModelShape, text_flops, vision_flops
from vz_ray.utils.errors import UserError

SUPPORTED_MODEL_TYPES = ("qwen2_5_vl",)
"""HF model types whose positions, tower and weights are known to be read aright here."""


def check_hf_checkpoint(directory: str | Path) -> Path:
    """The directory, if it holds an HF checkpoint in safetensors.

    Raises:
        UserError: It is no directory, or lacks `config.json` or weights.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"model {str(directory)!r} is not a directory; give an HF checkpoint directory")
    if not (path / "config.json").is_file():
        raise UserError(f"model {str(path)!r} has no config.json; give an HF checkpoint directory")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"model {str(path)!r} has no *.safetensors weights; download or convert them first")
    return path


def load_pretrained(directory: str | Path, dtype: torch.dtype) -> Any:
    """Loads the HF model as it is; weights from safetensors only, no code from the checkpoint.

    Raises:
        UserError: See `check_checkpoint` and `check_shapes`, or it is a model of another family.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    path = check_hf_checkpoint(directory)
    kind = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
    if kind not in SUPPORTED_MODEL_TYPES:
        # Others load as well, but position their images otherwise or feed them to several layers.
        raise UserError(
            f"model {str(path)!r} is a {kind}; the learner knows {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    check_tensor_shapes(path)
    return AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation="sdpa",
    )


class PolicyModel(nn.Module):
    """Wraps a HF Qwen2.5-VL model; parameters keep their HF names under `hf.`.

    Args:
        hf: `Qwen2_5_VLForConditionalGeneration` or one of its kin.
        tokens: Ids that the model gives a meaning to.
        chunk: Sampled tokens whose logits exist at one time.

    Attributes:
        feature_cache: Features of frames seen before; None where the tower is trained.

    Raises:
        UserError: Layers of the model look at a window of the text only.
    """

    def __init__(self, hf: Any, tokens: SpecialTokenIds, *, chunk: int = 2048) -> None:
        super().__init__()
        self.tokens = tokens
        optimize_vision_tower(hf.model.visual)
        _pack(hf.model.language_model)
        self.feature_cache: FeatureCache | None = None
        hf.lm_head = LogprobHead(hf.lm_head, chunk)
        self.hf = hf
        banned = torch.zeros(hf.config.get_text_config().vocab_size, dtype=torch.bool)
        banned[list(tokens.vision)] = True
        self.register_buffer("banned", banned, persistent=False)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, *, chunk: int = 2048
    ) -> PolicyModel:
        """Loads a checkpoint directory; see `check_checkpoint` for its errors."""
        hf = load_pretrained(directory, dtype)
        return cls(hf, SpecialTokenIds.from_pretrained(directory), chunk=chunk)

    @property
    def spatial_merge_size(self) -> int:
        """Patches per side that make one visual token."""
        return int(self.hf.model.visual.spatial_merge_size)

    def forward(self, batch: MicroBatch, *, exclude_placeholders: bool = True) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the sampled tokens, both float32 `[B, S]`, 0 where the mask is 0.

        With `exclude_placeholders` they are those of the distribution that was sampled from:
        at each token's temperature, vision placeholders excluded.
        """
        hidden = self.hidden_states(batch).flatten(0, 1)
        real = batch.mask.bool()
        logprobs, entropy = self.hf.lm_head(
            hidden[batch.hidden_index[real]],
            batch.targets[real],
            batch.temperature[real],
            self.banned if exclude_placeholders else None,
        )
        blank = logprobs.new_zeros(batch.temperature.shape)
        if not batch.indices:
            # Nothing was sampled here, but every weight must still take part in the backward pass.
            blank = blank + 0.0 * hidden.sum() + logprobs.sum()
        return blank.masked_scatter(real, logprobs), blank.masked_scatter(real, entropy)

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """`[1, T, H]`, after the last norm."""
        embeddings = self.hf.get_input_embeddings()(batch.input_ids)
        features = self.image_features(batch).to(embeddings.dtype)
        if len(batch.image_slots):
            flat = embeddings.flatten(0, 1)
            if batch.cached_features is not None:
                features = torch.cat([features, batch.cached_features.to(features.dtype)])
            taken = features.index_select(0, batch.feature_index)
            embeddings = flat.index_copy(0, batch.image_slots, taken).view_as(embeddings)
        else:
            # Without this a rank without images would skip the tower, and ZeRO-3's collectives would hang.
            embeddings = embeddings + 0.0 * features.sum()
        text = self.hf.model.language_model
        output: Tensor = text(
            inputs_embeds=embeddings,
            # A mapping rather than None, from which the model would guess packing from the positions.
            attention_mask={"full_attention": None},
            position_ids=batch.position_ids,
            use_cache=False,
            layout=batch.layout,
        ).last_hidden_state
        return output

    def image_features(self, batch: MicroBatch) -> Tensor:
        """`[visual tokens, H]` of the frames to be seen, in order."""
        visual = self.hf.model.visual
        tables = vision_tables(batch.grids, visual, batch.pixel_values.device)
        grids = torch.from_numpy(batch.grids)
        # HF's checkpointing has the tower's input require a gradient, also where nothing in it is trained.
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in visual.parameters())
        with torch.set_grad_enabled(trained):
            pixels = batch.pixel_values.to(visual.dtype)
            output: Tensor = visual(pixels, grid_thw=grids, **tables).pooler_output
        if self.feature_cache is not None and batch.frame_keys:
            counts = batch.grids.prod(axis=1) // self.spatial_merge_size**2
            self.feature_cache.put(batch.frame_keys, output.split(counts.tolist()))
        return output


def _pack(text: Any) -> None:
    """Lets a HF text model attend as a micro-batch's layout says."""
    from transformers import AttentionInterface

    layers = set(getattr(text.config, "layer_types", None) or ("full_attention",))
    if layers != {"full_attention"}:
        raise UserError(
            f"this model has layers of {', '.join(sorted(layers))}; the learner packs sequences for "
            "full attention only: set use_sliding_window to false in its config.json if it was trained so"
        )
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    text.config._attn_implementation = PACKED_ATTENTION


def flop_costs(hf: Any) -> FlopCosts:
    """What a forward pass of this HF model costs, in floating-point operations."""
    shape = ModelShape.from_hf_config(hf.config)
    unit = shape.vision.merge_size**2
    return FlopCosts(
        token=text_flops(shape, tokens=1, pairs=0),
        pair=text_flops(shape, tokens=0, pairs=1),
        patch=vision_flops(shape, patches=unit, pairs=0) / unit,
    )
