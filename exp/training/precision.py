"""Precision on the device: fp16's gradient scaler, and what CUDA does with float32. For autocast see inference.py."""

import torch


def build_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """The gradient scaler; only fp16 needs one (bf16 has the exponents of float32), for the others it is a no-op."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")


def set_up_cuda(tf32: str, cudnn_benchmark: bool, device: torch.device) -> None:
    """Where float32 products on CUDA may take TF32 ('off', 'conv'olutions, 'all'), and whether cuDNN tunes itself."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = tf32 != "off"
        torch.set_float32_matmul_precision("high" if tf32 == "all" else "highest")
        torch.backends.cudnn.benchmark = cudnn_benchmark
