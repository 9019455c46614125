# The framework with its commands, on a CUDA runtime image. Not built yet: no Docker was at hand.
#   docker build -t rankseg-rma .
#   docker run --rm --gpus all --shm-size=8g -v DATA:/data -v OUTPUT:/output rankseg-rma \
#     rankseg-train --data_dir /data --output_dir /output --data_yaml camvid
# PyTorch's wheel has its own CUDA libraries; the image has what the rule's kernels are compiled with (a C compiler, Python.h).
FROM nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04

RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        gcc git libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/rankseg/bin:$PATH PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/rankseg

WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in requirements.txt README.md LICENSE rankseg_rma.py ./
COPY exp exp
COPY configs configs
COPY scripts scripts
RUN pip install --no-cache-dir ".[framework]"

WORKDIR /output
CMD ["rankseg-train", "--help"]
