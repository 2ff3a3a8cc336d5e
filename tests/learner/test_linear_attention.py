"""Packed gated-delta-net layers against one forward pass per trajectory, forward and backward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.models.qwen3_5 import modeling_qwen3_5 as hf
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from tests.learner.rank_worker import small_config
from vz_ray.learner import gated_delta_rule
from vz_ray.learner.attention import PACKED_ATTENTION, PackedLayout, Segment, packed_attention
from vz_ray.learner.distributed import init_distributed
from vz_ray.learner.linear_attention import pack_linear_attention, packed_linear_attention
from vz_ray.learner.train_engine import TrainEngine

CPU = torch.device("cpu")
HIDDEN = 32
LAYOUTS = {
    "one token": [Segment(0, 1)],
    "shorter than the convolution": [Segment(0, 2), Segment(2, 5)],
    "packed": [Segment(0, 64), Segment(64, 65), Segment(65, 200)],
    "shared": [Segment(0, 70), Segment(70, 72, (0, 70)), Segment(72, 210, (0, 70)), Segment(210, 275, (0, 70))],
    "two trees": [
        Segment(0, 2), Segment(2, 3, (0, 2)), Segment(3, 70, (0, 2)),
        Segment(70, 75),
        Segment(75, 205), Segment(205, 206, (75, 205)), Segment(206, 300, (75, 205)),
    ],
}  # fmt: skip


def text_config(*layer_types: str) -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=len(layer_types),
        layer_types=list(layer_types),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
        },
    )  # fmt: skip


def randomize(module: Any) -> Any:
    """Set weights with which states grow and last for hundreds of tokens."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(
                torch.empty(p.shape).uniform_(0.003, 0.1).log()
                if name.endswith("A_log")
                else torch.randn(p.shape) / p.shape[-1] ** 0.5
            )
    return module


def make_layer(dtype: torch.dtype = torch.float32) -> Any:
    return randomize(hf.Qwen3_5GatedDeltaNet(text_config("linear_attention"), 0)).to(dtype)


def make_model(dtype: torch.dtype = torch.float32) -> Any:
    """Return a text model with packed layers of both kinds."""
    model = randomize(hf.Qwen3_5TextModel(text_config("linear_attention", "full_attention", "linear_attention"))).to(
        dtype
    )
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    model.config._attn_implementation = PACKED_ATTENTION
    pack_linear_attention(model)
    return model.train()


def run_model(model: Callable[..., Any], embeddings: Tensor, segments: Sequence[Segment]) -> Tensor:
    positions = [torch.arange(s.end - s.start) + s.prefix[1] - s.prefix[0] for s in segments]
    return model(
        inputs_embeds=embeddings,
        attention_mask={"full_attention": None, "linear_attention": None},
        position_ids=torch.cat(positions).expand(3, 1, -1),
        use_cache=False,
        layout=PackedLayout.from_segments(segments, CPU),
    ).last_hidden_state


def random_inputs(segments: Sequence[Segment], dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, segments[-1].end, HIDDEN, dtype=dtype, requires_grad=True)


def alone(function: Callable[[Tensor], Tensor], inputs: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Return each segment's outputs from a pass over its prefix and itself only."""
    outputs = []
    for s in segments:
        trajectory = torch.cat([inputs[:, slice(*s.prefix)], inputs[:, s.start : s.end]], 1)
        outputs.append(function(trajectory)[:, s.prefix[1] - s.prefix[0] :])
    return torch.cat(outputs, 1)


def gradients(output: Tensor, inputs: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a random combination of the outputs."""
    torch.manual_seed(2)
    weights = torch.randn(output.shape, dtype=output.dtype)
    tensors = {"inputs": inputs} | dict(module.named_parameters())
    found = torch.autograd.grad((output * weights).sum(), list(tensors.values()), allow_unused=True)
    return {name: grad for name, grad in zip(tensors, found, strict=True) if grad is not None}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare by the norm of each tensor."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        error = float((got[name] - tensor).detach().norm() / tensor.detach().norm().clamp(min=1e-6))
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads slow these tiny operations down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def whole_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the float32 rounding of HF's norms in float64 models."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self._norm(x) * (1 + self.weight)

    def gated_norm(self: Any, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * F.silu(gate)

    monkeypatch.setattr(hf.Qwen3_5RMSNorm, "forward", norm)
    monkeypatch.setattr(hf.Qwen3_5RMSNormGated, "forward", gated_norm)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layer_matches_transformers_per_trajectory(name: str) -> None:
    """Transformers computes in float32, in chunks that start at the trajectory's first token."""
    segments, layer = LAYOUTS[name], make_layer()
    inputs = random_inputs(segments)
    expected = alone(layer, inputs, segments)
    got = packed_linear_attention(layer, inputs, layout=PackedLayout.from_segments(segments, CPU))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert_close(gradients(got, inputs, layer), gradients(expected, inputs, layer), 1e-5)


def test_layer_matches_transformers_in_bfloat16() -> None:
    """Both round the same tensors to bfloat16; a value near a rounding boundary can differ by one unit."""
    segments, layer = LAYOUTS["two trees"], make_layer(torch.bfloat16)
    inputs = random_inputs(segments, torch.bfloat16)
    expected = alone(layer, inputs, segments)
    got = packed_linear_attention(layer, inputs, layout=PackedLayout.from_segments(segments, CPU))
    assert got.dtype == torch.bfloat16
    assert_close({"output": got}, {"output": expected}, 5e-3)
    assert_close(gradients(got, inputs, layer), gradients(expected, inputs, layer), 2e-2)


@pytest.mark.usefixtures("whole_precision")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_model_matches_one_sequence_per_trajectory(name: str, checkpointing: bool) -> None:
    """A forked prefix changes where chunks begin, which matters in the last bits of float64 only."""
    segments, model = LAYOUTS[name], make_model(torch.float64)
    inputs = random_inputs(segments, torch.float64)

    def run_alone(trajectory: Tensor) -> Tensor:
        return run_model(model, trajectory, [Segment(0, trajectory.shape[1])])

    expected = gradients(alone(run_alone, inputs, segments), inputs, model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(gradients(run_model(model, inputs, segments), inputs, model), expected, 1e-9)


@pytest.mark.parametrize(("changed", "dependent"), [(0, {0, 1, 2, 3}), (2, {2}), (4, {4}), (5, {5})])
def test_other_sequences_stay_bit_equal(changed: int, dependent: set[int]) -> None:
    segments = [*LAYOUTS["shared"], Segment(275, 300), Segment(300, 410)]
    model, inputs = make_model(), random_inputs(segments).detach()
    other = inputs.clone()
    other[:, segments[changed].start : segments[changed].end] += 1
    with torch.no_grad():
        before, after = run_model(model, inputs, segments), run_model(model, other, segments)
    different = {i for i, s in enumerate(segments) if not before[:, s.start : s.end].equal(after[:, s.start : s.end])}
    assert different == dependent


def test_gradients_do_not_leak_into_other_sequences() -> None:
    segments = [*LAYOUTS["shared"], Segment(275, 300), Segment(300, 410)]
    model, inputs = make_model(), random_inputs(segments)
    output = run_model(model, inputs, segments)
    for segment in segments:
        (gradient,) = torch.autograd.grad(output[:, segment.start : segment.end].sum(), inputs, retain_graph=True)
        reached = gradient[0].abs().sum(-1) > 0
        visible = torch.zeros(len(reached), dtype=torch.bool)
        visible[segment.start : segment.end] = True
        visible[slice(*segment.prefix)] = True
        assert reached.equal(visible)


def test_packing_keeps_weight_names() -> None:
    config = text_config("linear_attention", "full_attention", "linear_attention")
    assert make_model().state_dict().keys() == hf.Qwen3_5TextModel(config).state_dict().keys()


def test_prefix_that_is_no_segment_is_refused() -> None:
    segments = [Segment(0, 8), Segment(8, 12, (0, 5))]
    layout = PackedLayout.from_segments(segments, CPU)
    with pytest.raises(ValueError, match=r"prefix \(0, 5\) is not a segment"):
        packed_linear_attention(make_layer(), random_inputs(segments), layout=layout)


def test_sharded_weights_are_gathered() -> None:
    """Under ZeRO-3 weights exist only while their module computes, recomputation included."""
    segments, model = LAYOUTS["two trees"], make_model()
    inputs = random_inputs(segments)
    expected = gradients(run_model(model, inputs, segments), inputs, model)["inputs"]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    engine = TrainEngine(model, small_config("nowhere", 3), init_distributed(60.0))
    assert not model.layers[0].linear_attn.conv1d.weight.numel()
    before = run_model(engine, inputs, segments)
    torch.manual_seed(2)
    engine.backward((before * torch.randn(before.shape)).sum())
    torch.testing.assert_close(inputs.grad, expected, atol=1e-5, rtol=1e-5)
    assert engine.step()["grad_norm"] > 0
    with torch.no_grad():
        assert float((run_model(engine, inputs, segments) - before).abs().max()) > 1e-4


def reference_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The documented behaviour of flash-linear-attention, with the arguments that all its versions have."""
    assert scale is None
    assert use_qk_l2norm_in_kernel
    assert cu_seqlens is not None
    assert cu_seqlens.dtype == torch.int64
    assert q.shape[2] == k.shape[2] == v.shape[2]
    outputs, states = [], []
    for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
        out, state = hf.torch_chunk_gated_delta_rule(
            *(t[:, a:b] for t in (q, k, v, g, beta)),
            initial_state=None if initial_state is None else initial_state[i : i + 1],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        outputs.append(out)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states) if output_final_state else None


def without_initial_state(*args: Any, initial_state: Tensor | None, **options: Any) -> tuple[Tensor, Tensor | None]:
    return reference_kernel(*args, **options)


def with_wrong_gradient(q: Tensor, k: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    out, state = reference_kernel(q, k.detach(), *args, **options)
    return out + 0.0 * k.sum(), state


def without_sequences(*args: Any, cu_seqlens: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    raise TypeError("unexpected keyword argument 'cu_seqlens'")


@pytest.fixture
def install_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Install a function as flash-linear-attention's kernel."""

    def install(kernel: Callable[..., Any]) -> None:
        module = ModuleType("fla.ops.gated_delta_rule")
        module.chunk_gated_delta_rule = kernel  # type: ignore[attr-defined]
        for name in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(gated_delta_rule, "find_spec", lambda name: name)
        gated_delta_rule._kernel_agrees.cache_clear()

    return install


@pytest.mark.parametrize("name", LAYOUTS)
def test_kernel_is_called_per_level(
    name: str, install_kernel: Callable[[Callable[..., Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel path, run on the CPU with transformers' function in place of the kernel."""
    segments, layer = LAYOUTS[name], make_layer()
    inputs, layout = random_inputs(segments), PackedLayout.from_segments(LAYOUTS[name], CPU)
    expected = packed_linear_attention(layer, inputs, layout=layout)
    install_kernel(reference_kernel)
    monkeypatch.setattr(gated_delta_rule, "_portable", gated_delta_rule._kernel)
    got = packed_linear_attention(layer, inputs, layout=layout)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert_close(gradients(got, inputs, layer), gradients(expected, inputs, layer), 1e-5)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (reference_kernel, ""),
        (without_initial_state, "output differs by"),
        (with_wrong_gradient, "dK differs by"),
        (without_sequences, "TypeError"),
    ],
)
def test_kernel_with_other_results_is_rejected(
    kernel: Callable[..., Any],
    reason: str,
    install_kernel: Callable[[Callable[..., Any]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    install_kernel(kernel)
    with torch.no_grad():
        assert gated_delta_rule._kernel_agrees(CPU, torch.bfloat16, 16, 24) == (not reason)
    gated_delta_rule._kernel_agrees.cache_clear()
    assert ("Disabling the linear-attention kernel" in caplog.text) == bool(reason)
    assert reason in caplog.text
