"""The MSE-Adapter in PyTorch: the reference that every other backend is held against.

Source: arXiv 2502.12478, section 3; published-model spec, section 1. Parameter names are the
published ones without `Model.`, so a published checkpoint loads with `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mse_export.adapter_shapes import FUSION_WIDTH, AdapterDims, infer_dims

__all__ = ["Adapter", "adapter_from_state", "init_random"]

State = Mapping[str, Tensor]


class Encoder(nn.Module):
    """LSTM over one modality, then a linear map of the last valid hidden state."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(width, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, FUSION_WIDTH)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """frames f32 [B,T,d] padded at the end, lengths int [B] in 0..T -> [B,256].

        Length 0 gives h = 0, that is the linear bias. The padded tail may hold anything: it is
        blanked, because 0 * NaN would still poison the gradient.
        """
        steps = max(int(lengths.max()), 1)
        frames = frames[:, :steps]
        index = torch.arange(frames.shape[1], device=frames.device)
        valid = index[None, :] < lengths[:, None]
        outputs, _ = self.rnn(frames.masked_fill(~valid[..., None], 0.0))
        last = (lengths - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, outputs.shape[2])
        hidden = outputs.gather(1, last)[:, 0]
        hidden = hidden * (lengths > 0)[:, None].to(hidden.dtype)
        encoded: Tensor = self.linear(hidden)
        return encoded


class TextGuidedMixer(nn.Module):
    """TGM: the pooled text gates both encoders elementwise (spec, section 1.3)."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.text_mlp = nn.Linear(n_embd, FUSION_WIDTH)

    def knowledge(self, text: Tensor, lengths: Tensor) -> Tensor:
        """Mean over the first `lengths` embedding rows of text [B,Tt,D] -> [B,256]."""
        index = torch.arange(text.shape[1], device=text.device)
        padding = index[None, :] >= lengths[:, None]
        total = text.masked_fill(padding[..., None], 0.0).sum(dim=1)
        pooled = total / lengths.clamp(min=1)[:, None].to(total.dtype)
        mapped: Tensor = self.text_mlp(pooled)
        return mapped


class Integrating(nn.Module):
    """A (1, 3) convolution across the three experts: three weights and one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.Integrating_layer = nn.Sequential(nn.Conv2d(1, 1, kernel_size=(1, 3)))

    def forward(self, scales: Tensor) -> Tensor:
        """scales [B,256,3] -> [B,256]."""
        mixed: Tensor = self.Integrating_layer(scales[:, None])
        return mixed[:, 0, :, 0]


class MultiScaleFusion(nn.Module):
    """MSF: three bottleneck experts, mixed, projected to D, then to P scalar-affine copies."""

    def __init__(self, dims: AdapterDims) -> None:
        super().__init__()
        for i, width in enumerate(dims.scale_widths, start=1):
            expert = nn.Sequential(
                nn.Linear(FUSION_WIDTH, width), nn.GELU(), nn.Linear(width, FUSION_WIDTH)
            )
            self.add_module(f"scale{i}", expert)
        self.integrating = Integrating()
        self.multi_scale_projector = nn.Linear(FUSION_WIDTH, dims.n_embd)
        self.projector = nn.Linear(1, dims.n_pseudo)

    def forward(self, z: Tensor, trace: dict[str, Tensor]) -> Tensor:
        """z [B,256] -> pseudo [B,P,D]; intermediates go into `trace`."""
        scales = [self.get_submodule(f"scale{i}")(z) for i in (1, 2, 3)]
        mixed = self.integrating(torch.stack(scales, dim=-1))
        wide = self.multi_scale_projector(mixed)
        pseudo: Tensor = self.projector(wide[..., None]).transpose(1, 2)
        trace.update(zip(("scale1", "scale2", "scale3"), scales, strict=True))
        trace.update(integrating=mixed, multi_scale=wide, pseudo=pseudo)
        return pseudo


class Adapter(nn.Module):
    """Audio frames, face frames and text embedding rows -> P pseudo tokens of width D."""

    def __init__(self, dims: AdapterDims) -> None:
        super().__init__()
        self.dims = dims
        self.audio_LSTM = Encoder(dims.audio_dim, dims.audio_hidden)
        self.video_LSTM = Encoder(dims.video_dim, dims.video_hidden)
        self.text_guide_mixer = TextGuidedMixer(dims.n_embd)
        self.mutli_scale_fusion = MultiScaleFusion(dims)

    def forward(
        self,
        audio: Tensor,
        audio_len: Tensor,
        video: Tensor,
        video_len: Tensor,
        text: Tensor,
        text_len: Tensor,
    ) -> Tensor:
        """The same six inputs as the ONNX graph -> pseudo f32 [B,P,D]; see `trace`."""
        return self.trace(audio, audio_len, video, video_len, text, text_len)["pseudo"]

    def trace(
        self,
        audio: Tensor,
        audio_len: Tensor,
        video: Tensor,
        video_len: Tensor,
        text: Tensor,
        text_len: Tensor,
    ) -> dict[str, Tensor]:
        """Every intermediate by the golden sets' names.

        audio f32 [B,Ta,da], video f32 [B,Tv,dv], text f32 [B,Tt,D]; lengths int [B], 0 allowed.
        Returns audio_h, video_h, text_knowledge, tgm, scale1-3, integrating [B,256],
        multi_scale [B,D], pseudo [B,P,D].
        """
        trace: dict[str, Tensor] = {
            "audio_h": self.audio_LSTM(audio, audio_len),
            "video_h": self.video_LSTM(video, video_len),
            "text_knowledge": self.text_guide_mixer.knowledge(text, text_len),
        }
        gate = trace["text_knowledge"]
        trace["tgm"] = gate * trace["audio_h"] + gate * trace["video_h"]
        self.mutli_scale_fusion(trace["tgm"], trace)
        return trace


def adapter_from_state(state: State) -> Adapter:
    """Adapter in eval mode from a state dict with names without `Model.` (any float dtype).

    Raises BundleError naming the first missing or misshapen parameter.
    """
    dims = infer_dims({name: tuple(value.shape) for name, value in state.items()})
    adapter = Adapter(dims)
    wanted = adapter.state_dict()
    adapter.load_state_dict({name: state[name].to(torch.float32) for name in wanted})
    return adapter.eval()


def init_random(dims: AdapterDims, seed: int) -> Adapter:
    """An untrained adapter for benchmarks: PyTorch's default initialisation under `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Adapter(dims).eval()
