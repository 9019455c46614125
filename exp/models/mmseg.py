"""Checkpoints of mmsegmentation's model zoo -> the same network built here, without its package.

The decoders of exp/models/paper_decoders.py are its heads but for two places: DeepLabV3+ has an ordinary 1x1
convolution in its pyramid, not a separable one, and SegFormer concatenates its levels from fine to coarse.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exp.config.model import ModelConfig
from exp.config.strict_yaml import closest
from exp.files.tensors import load_tensor_file
from exp.models.decoders import build_parts
from exp.models.paper_decoders import ConvNormReLU, UPerNet
from exp.models.segmentor import Segmentor, encoder_name
from exp.runtime.errors import InputError

EXPECTED = "a checkpoint of mmsegmentation"
COUNTER = "num_batches_tracked"
RESNETS = {"r50": "resnet50c", "r101": "resnet101c"}  # ResNetV1c: a deep stem, no pooling before shortcuts
MITS = {f"mit-b{i}": f"mit_b{i}" for i in range(6)}
ATROUS = {"atrous_rates": (12, 24, 36), "low_level_channels": 48}
# <head>_<backbone>, as its configs name networks -> keys of a model YAML.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{f"pspnet_{k}-d8": {"decoder": "pspnet", "encoder": v, "output_stride": 8} for k, v in RESNETS.items()},
    **{
        f"deeplabv3plus_{k}-d8": {"decoder": "deeplabv3plus", "encoder": v, "output_stride": 8, **ATROUS}
        for k, v in RESNETS.items()
    },
    **{f"upernet_{k}": {"decoder": "upernet", "encoder": v} for k, v in RESNETS.items()},
    **{
        f"segformer_{k}": {"decoder": "segformer", "encoder": v, "decoder_channels": 256, "aux_channels": None}
        for k, v in MITS.items()
    },
}
# Its names -> ours, each the first that fits; what stands behind is left. {-N}: N minus the number that was found.
RENAMED = (
    (r"backbone\.stem\.7\.", "encoder.model.bn1."),
    (r"backbone\.stem\.(\d)\.", r"encoder.model.conv1.\1."),
    (r"backbone\.(layer\d\.)", r"encoder.model.\1"),
    (r"decode_head\.conv_seg\.", "head.1."),
    (r"auxiliary_head\.convs\.0\.", "aux_head."),
    (r"auxiliary_head\.conv_seg\.", "aux_head.4."),
)
RENAMED_HEADS = {
    "pspnet": (
        (r"decode_head\.psp_modules\.(\d)\.1\.", r"decoder.pyramid.branches.\1.1."),
        (r"decode_head\.bottleneck\.", "decoder.pyramid.fuse."),
    ),
    "deeplabv3plus": (
        (r"decode_head\.image_pool\.1\.", "decoder.aspp.branches.0.1."),
        (r"decode_head\.aspp_modules\.0\.", "decoder.aspp.branches.1."),
        (r"decode_head\.aspp_modules\.1\.", "decoder.aspp.branches.2."),
        (r"decode_head\.aspp_modules\.2\.", "decoder.aspp.branches.3."),
        (r"decode_head\.aspp_modules\.3\.", "decoder.aspp.branches.4."),
        (r"decode_head\.bottleneck\.", "decoder.aspp.fuse."),
        (r"decode_head\.c1_bottleneck\.", "decoder.low."),
        (r"decode_head\.sep_bottleneck\.", "decoder.fuse."),
    ),
    "upernet": (
        (r"decode_head\.psp_modules\.(\d)\.1\.", r"decoder.pyramid.branches.\1.1."),
        (r"decode_head\.bottleneck\.", "decoder.pyramid.fuse."),
        (r"decode_head\.lateral_convs\.0\.", "decoder.lateral.2."),  # ours: from coarse to fine
        (r"decode_head\.lateral_convs\.1\.", "decoder.lateral.1."),
        (r"decode_head\.lateral_convs\.2\.", "decoder.lateral.0."),
        (r"decode_head\.fpn_convs\.0\.", "decoder.smooth.2."),
        (r"decode_head\.fpn_convs\.1\.", "decoder.smooth.1."),
        (r"decode_head\.fpn_convs\.2\.", "decoder.smooth.0."),
        (r"decode_head\.fpn_bottleneck\.", "decoder.fuse."),
    ),
    "segformer": (
        (r"decode_head\.convs\.", "decoder.levels."),
        (r"decode_head\.fusion_conv\.", "decoder.fuse."),
    ),
}
RENAMED_INSIDE = (  # of its ConvModule and DepthwiseSeparableConvModule
    ("depthwise_conv.", "0."),
    ("pointwise_conv.", "1."),
    ("conv.", "0."),
    ("bn.", "1."),
)
RENAMED_MIT = (
    ("0.projection.", "patch_embed{stage}.proj."),
    ("0.norm.", "patch_embed{stage}.norm."),
    ("2.", "norm{stage}."),
)
RENAMED_MIT_BLOCK = (
    ("attn.attn.out_proj.", "attn.proj."),
    ("attn.attn.in_proj_", "attn.qkv."),  # cut in two after that
    ("ffn.layers.0.", "mlp.fc1."),
    ("ffn.layers.1.", "mlp.dwconv.dwconv."),
    ("ffn.layers.4.", "mlp.fc2."),
)


def load_mmseg(path: Path, architecture: str) -> tuple[nn.Module, list[str] | None]:
    """A .pth of the zoo -> its network, (B, 3, H, W) images -> (B, N, H, W) logits, and its classes where it has them.

    InputError unless every tensor of the file has its place in the network, and the network none besides.
    """
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"key 'architecture': got {architecture}, expected a network of mmsegmentation that is built here"
            f"{closest(architecture, ARCHITECTURES)}"
        )
    content = load_tensor_file(path, EXPECTED)
    given = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(given, dict) or not all(isinstance(value, Tensor) for value in given.values()):
        raise InputError(f"{path}: got no tensors by name, expected {EXPECTED}")
    keys = {"decoder_channels": 512, "variant": "paper", "pretrained": False, **ARCHITECTURES[architecture]}
    if not any(name.startswith("auxiliary_head.") for name in given):
        keys["aux_channels"] = None
    config = ModelConfig(name=architecture, **keys)
    weights = rename(given, config.decoder)
    if "head.1.weight" not in weights:
        raise InputError(f"{path}: got no tensor 'decode_head.conv_seg.weight', expected {EXPECTED}")
    network = _build(config, len(weights["head.1.weight"]))
    own = network.state_dict()
    missing = [name for name in own if name not in weights and not name.endswith(COUNTER)]
    surplus = [name for name in weights if name not in own]
    if missing or surplus:
        got = f"'{surplus[0]}', which it does not have" if surplus else f"no '{missing[0]}'"
        raise InputError(f"{path}: got {got} (named as here), expected the tensors of a {architecture}")
    for name, value in weights.items():
        if value.shape != own[name].shape:
            got, expected = tuple(value.shape), tuple(own[name].shape)
            raise InputError(f"{path}: got shape {got} for '{name}', expected {expected}, of a {architecture}")
    network.load_state_dict(weights, strict=False)
    return network, _class_names(content.get("meta"))


def _class_names(meta: Any) -> list[str] | None:
    """What stands beside the tensors -> the classes: `CLASSES`, or since mmsegmentation 1 `dataset_meta.classes`."""
    meta = meta if isinstance(meta, dict) else {}
    newer = meta.get("dataset_meta")
    classes = newer.get("classes") if isinstance(newer, dict) else meta.get("CLASSES")
    return [*map(str, classes)] if isinstance(classes, (list, tuple)) else None


def _build(config: ModelConfig, num_classes: int) -> Segmentor:
    """The network, with those of its parts that differ from the paper's."""
    parts = build_parts(config, encoder_name(config.encoder), False, 3, num_classes)
    if config.decoder == "upernet":
        parts = parts._replace(decoder=UPerNet(parts.encoder.out_channels, config.decoder_channels, finest=2))
    network = Segmentor(parts, config, num_classes)
    network.multiple = 1  # sizes that are no multiple of the stride are not padded
    if config.decoder == "deeplabv3plus":
        network.decoder.aspp.branches[1] = ConvNormReLU(parts.encoder.out_channels[-1], config.decoder_channels)
    if config.decoder == "segformer":
        for module in network.encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
    return network


def rename(given: dict[str, Tensor], decoder: str) -> dict[str, Tensor]:
    """Tensors under mmsegmentation's names -> the same under ours, in our layout; unknown names stay."""
    renamed: dict[str, Tensor] = {}
    for name, value in given.items():
        if (block := re.match(r"backbone\.layers\.(\d)\.", name)) and decoder == "segformer":
            renamed |= _rename_mit(name[block.end() :], int(block[1]) + 1, value)
            continue
        table = (*RENAMED, *RENAMED_HEADS[decoder])
        for pattern, replacement in table:
            if found := re.match(pattern, name):
                rest = name[found.end() :]
                if not name.startswith("backbone."):
                    rest = _rename_inside(rest)
                name = found.expand(replacement) + rest
                break
        renamed[name] = value
    if decoder == "segformer" and (weight := renamed.get("decoder.fuse.0.weight")) is not None:
        renamed["decoder.fuse.0.weight"] = torch.cat(weight.chunk(4, dim=1)[::-1], dim=1)
    return renamed


def _rename_inside(name: str) -> str:
    """conv.weight -> 0.weight, 3.depthwise_conv.bn.bias -> 3.0.1.bias; others stay."""
    for before, after in RENAMED_INSIDE:
        name = re.sub(rf"(^|(?<=\.)){re.escape(before)}", after, name)
    return name


def _rename_mit(name: str, stage: int, value: Tensor) -> dict[str, Tensor]:
    """What stands behind backbone.layers.<stage - 1>. -> tensors of segmentation_models_pytorch's MiT."""
    for before, after in RENAMED_MIT:
        if name.startswith(before):
            return {f"encoder.{after.format(stage=stage)}{name.removeprefix(before)}": value}
    _, number, rest = name.split(".", 2)
    for before, after in RENAMED_MIT_BLOCK:
        rest = rest.replace(before, after)
    place = f"encoder.block{stage}.{number}."
    if rest.startswith("attn.qkv."):
        kind, width = rest.removeprefix("attn.qkv."), len(value) // 3
        return {f"{place}attn.q.{kind}": value[:width], f"{place}attn.kv.{kind}": value[width:]}
    if rest.startswith(("mlp.fc1.weight", "mlp.fc2.weight")):  # its linear layers are 1x1 convolutions
        value = value.flatten(1)
    return {place + rest: value}
