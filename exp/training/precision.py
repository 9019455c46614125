"""What CUDA does with float32. For autocast see inference.py, for fp16's gradient scaler step.py."""

import torch


def set_up_cuda(tf32: str, cudnn_benchmark: bool, device: torch.device) -> None:
    """Where float32 products on CUDA may take TF32 ('off', 'conv'olutions, 'all'), and whether cuDNN tunes itself."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = tf32 != "off"
        torch.set_float32_matmul_precision("high" if tf32 == "all" else "highest")
        torch.backends.cudnn.benchmark = cudnn_benchmark
