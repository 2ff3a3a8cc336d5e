"""The policy: an HF model that returns log-probs of sampled tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vz_ray.families import ModelShape, family_of, load_hf_config
from vz_ray.learner.attention import PACKED_ATTENTION, packed_attention
from vz_ray.learner.batch import MicroBatch
from vz_ray.learner.checkpoint_shapes import check_tensor_shapes
from vz_ray.learner.distributed import RankInfo, all_reduce_max
from vz_ray.learner.example import SpecialTokenIds
from vz_ray.learner.linear_attention import pack_linear_attention
from vz_ray.learner.logprobs import LogprobHead
from vz_ray.learner.packing import FlopCosts
from vz_ray.learner.sequence_parallel import sum_over_shards
from vz_ray.learner.tiled_mlp import tile_mlps
from vz_ray.learner.vision_tower import compute_features_in_slices, optimize_vision_tower
from vz_ray.planning import text_flops, vision_flops
from vz_ray.utils.errors import UserError


def check_hf_checkpoint(directory: str | Path) -> Path:
    """Return the directory if it holds an HF checkpoint in safetensors.

    Raises:
        UserError: It is not a directory, or `config.json` or the weights are missing.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UserError(f"model {str(directory)!r} is not a directory. Pass an HF checkpoint directory.")
    if not (path / "config.json").is_file():
        raise UserError(f"model {str(path)!r} has no config.json. Pass an HF checkpoint directory.")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"model {str(path)!r} has no *.safetensors weights. Download or convert them first.")
    return path


def load_pretrained(directory: str | Path, dtype: torch.dtype) -> Any:
    """Load an unmodified HF model; weights from safetensors only, no code from the checkpoint.

    Raises:
        UserError: The model family or its variant is not supported; see also `check_hf_checkpoint`,
            `check_tensor_shapes`.
    """
    from transformers import AutoModelForImageTextToText

    path = check_hf_checkpoint(directory)
    load_hf_config(path)
    check_tensor_shapes(path)
    return AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation="sdpa",
    )


class PolicyModel(nn.Module):
    """Wrapper of an HF model of a supported family; parameters keep their HF names under `hf.`.

    Args:
        hf: A model like `Qwen2_5_VLForConditionalGeneration`.
        tokens: Special token ids.
        chunk: Number of sampled tokens whose logits exist at a time.
        vision_slice_patches: Maximum number of patches of one pass of the vision tower; 0: no maximum.
        mlp_tile_tokens: Maximum number of tokens whose MLP intermediates exist at a time; 0: no maximum.
        lockstep_ranks: Ranks that make the same number of passes, as ZeRO-3 requires.

    Attributes:
        shape: Shape of the model.

    Raises:
        UserError: The family or its variant is not supported.
    """

    def __init__(
        self,
        hf: Any,
        tokens: SpecialTokenIds,
        *,
        chunk: int = 2048,
        vision_slice_patches: int = 0,
        mlp_tile_tokens: int = 0,
        lockstep_ranks: RankInfo | None = None,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self._vision_slice_patches, self._lockstep_ranks = vision_slice_patches, lockstep_ranks
        family = family_of(hf.config.model_type)
        family.check_config(hf.config)
        self.shape = family.read_shape(hf.config)
        optimize_vision_tower(hf.model.visual)
        _enable_packing(hf.model.language_model)
        if self.shape.text.linear:
            pack_linear_attention(hf.model.language_model)
        if mlp_tile_tokens:
            tile_mlps(hf.model.language_model, mlp_tile_tokens)
        hf.lm_head = LogprobHead(hf.lm_head, chunk)
        self.hf = hf
        banned = torch.zeros(hf.config.get_text_config().vocab_size, dtype=torch.bool)
        banned[list(tokens.vision)] = True
        self.register_buffer("banned", banned, persistent=False)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype = torch.float32, **options: Any) -> PolicyModel:
        """Load a checkpoint directory; see `load_pretrained` for errors and the class for `options`."""
        hf = load_pretrained(directory, dtype)
        return cls(hf, SpecialTokenIds.from_pretrained(directory), **options)

    def forward(self, batch: MicroBatch, *, exclude_placeholders: bool = True) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies of the sampled tokens, float32 `[B, S]`; 0 where the mask is 0.

        Args:
            exclude_placeholders: Give vision placeholders probability 0, as the engine does in sampling.
        """
        hidden = self.hidden_states(batch).flatten(0, 1)
        logprobs, entropy = self.hf.lm_head(
            hidden[batch.hidden_index[batch.own]],
            batch.targets[batch.own],
            batch.temperature[batch.own],
            self.banned if exclude_placeholders else None,
        )
        zeros = logprobs.new_zeros(batch.temperature.shape)
        if not batch.indices or batch.layout.shard is not None:
            # A rank without sampled tokens must still involve every weight in the backward pass.
            zeros = zeros + 0.0 * hidden.sum() + 0.0 * logprobs.sum()
        outputs = zeros.masked_scatter(batch.own, logprobs), zeros.masked_scatter(batch.own, entropy)
        if (shard := batch.layout.shard) is None:
            return outputs
        logprobs, entropy = sum_over_shards(torch.stack(outputs), shard)
        return logprobs, entropy

    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """Return the hidden states after the last norm, `[1, T, H]`."""
        embeddings = self.hf.get_input_embeddings()(batch.input_ids)
        features = self.image_features(batch).to(embeddings.dtype)
        deepstack: dict[str, Any] = {}
        if len(batch.image_slots):
            if batch.cached_features is not None:
                features = torch.cat([features, batch.cached_features.to(features.dtype)])
            merged, *levels = features.index_select(0, batch.feature_index).split(embeddings.shape[-1], dim=-1)
            embeddings = embeddings.flatten(0, 1).index_copy(0, batch.image_slots, merged).view_as(embeddings)
            if levels:
                is_image = torch.zeros_like(batch.input_ids, dtype=torch.bool)
                is_image[0, batch.image_slots] = True
                deepstack = {"visual_pos_masks": is_image, "deepstack_visual_embeds": levels}
        else:
            # A rank without images must run the tower too; otherwise ZeRO-3's collectives hang.
            embeddings = embeddings + 0.0 * features.sum()
        text = self.hf.model.language_model
        return text(
            inputs_embeds=embeddings,
            # With None the model would derive packing from the positions.
            attention_mask={"full_attention": None, "linear_attention": None},
            position_ids=batch.position_ids,
            use_cache=False,
            layout=batch.layout,
            **deepstack,
        ).last_hidden_state

    def image_features(self, batch: MicroBatch) -> Tensor:
        """Return the features of the uncached frames in order, `[visual tokens, levels * H]`.

        The merger's features come first; the others are those of deepstack.
        """
        visual = self.hf.model.visual
        # HF's gradient checkpointing makes the tower's input require a gradient even if the tower is frozen.
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in visual.parameters())
        with torch.set_grad_enabled(trained):
            features = compute_features_in_slices(
                visual, batch.pixel_values, batch.grids, self.shape, self._vision_slice_patches, self._common_count
            )
        if entries := batch.computed_features:
            for entry, rows in zip(entries, features.split([entry.num_tokens for entry in entries]), strict=True):
                entry.set(rows)
        return features

    def _common_count(self, count: int) -> int:
        """Return the maximum of a count over the ranks in lockstep."""
        if self._lockstep_ranks is None or not self._vision_slice_patches:
            return count
        return int(all_reduce_max(count, self._lockstep_ranks))


def _enable_packing(text: Any) -> None:
    """Replace the attention of an HF text model by packed attention."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    text.config._attn_implementation = PACKED_ATTENTION


def flop_costs(shape: ModelShape) -> FlopCosts:
    """Return the cost coefficients of a forward pass of this model."""
    patches_per_token = shape.vision.merge_size**2
    return FlopCosts(
        token=text_flops(shape, tokens=1, pairs=0),
        pair=text_flops(shape, tokens=0, pairs=1),
        patch=vision_flops(shape, patches=patches_per_token, pairs=0) / patches_per_token,
    )
