"""Mixed precision: autocast around the forward pass, fp16's gradient scaler, and what CUDA does with float32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """'off', 'bf16' or 'fp16' -> the context in which a forward pass runs."""
    return nullcontext() if DTYPES[amp] is None else torch.autocast(device.type, DTYPES[amp])


def build_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """The gradient scaler; only fp16 needs one (bf16 has the exponents of float32), for the others it is a no-op."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def set_up_cuda(tf32: str, cudnn_benchmark: bool, device: torch.device) -> None:
    """Where float32 products on CUDA may take TF32 ('off', 'conv'olutions, 'all'), and whether cuDNN tunes itself."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = tf32 != "off"
        torch.set_float32_matmul_precision("high" if tf32 == "all" else "highest")
        torch.backends.cudnn.benchmark = cudnn_benchmark


class Autocast(nn.Module):
    """A network whose forward pass runs in mixed precision: (B, channels, H, W) -> (B, C, H, W) logits of that type."""

    def __init__(self, model: nn.Module, amp: str, device: torch.device) -> None:
        super().__init__()
        self.model, self.amp, self.device = model, amp, device

    def forward(self, image: Tensor) -> Tensor:
        with autocast(self.amp, self.device):
            return self.model(image)
