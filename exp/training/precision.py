"""Mixed precision in training: fp16's gradient scaler. exp/evaluation/inference.py has autocast."""

import torch


def build_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler:
    """The gradient scaler; only fp16 needs one (bf16 has the exponents of float32), for the others it is a no-op."""
    return torch.amp.GradScaler(device.type, enabled=amp == "fp16")
