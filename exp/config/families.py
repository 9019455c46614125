"""What a YAML can name, one table a family: each name, and the keys of the YAML that it takes.

The code behind the names: exp/rules/registry.py, exp/training/losses.py, exp/models/decoders.py,
exp/data/sets/ and exp/evaluation/metrics.py.
docs/contributing.md leads through adding one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The keys that a name cannot do without, and those that it may have. Any other key of its family is refused."""

    needs: tuple[str, ...] = ()
    may_have: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return self.needs + self.may_have


@dataclass(frozen=True, kw_only=True)
class RuleEntry(Entry):
    """two_classes: decides on background and foreground alone."""

    two_classes: bool = False


@dataclass(frozen=True, kw_only=True)
class DecoderEntry(Entry):
    """A decoder: how many widths decoder_channels has, and the output strides that it takes of an encoder.

    variants: whose there are, the library's or the paper's. pools: those of them that normalise over the batch what
    they have pooled to one pixel, so that they cannot train on one image.
    """

    num_widths: int = 1
    strides: tuple[int, ...] = (32,)
    variants: tuple[str, ...] = ("library",)
    pools: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataSetEntry(Entry):
    """code: the module in exp/data/sets/ and its class."""

    code: str


OVERLAP = ("ce_weight", "dataset_weight", "image_weight", "class_weight", "smooth")
BOTH = ("library", "paper")
OF_VOLUMES = ("fold", "window")
NOISE = ("label_noise", "label_spread")

RULE_TABLE = {  # configs/predict, key `rule`
    "argmax": RuleEntry(),
    "threshold": RuleEntry(needs=("threshold",), two_classes=True),
    "rankseg_rma": RuleEntry(
        needs=("opt_metric", "pruning_prob", "unassigned", "to_nonoverlap_method", "contested"),
        may_have=("sees_padding",),
    ),
    "rankseg_rma_pooled": RuleEntry(needs=("opt_metric", "pruning_prob", "scope")),
    "rankseg_rma_fixed": RuleEntry(may_have=("thresholds",)),  # by --set; the rule's builder asks for it
    "rankseg_levelset": RuleEntry(needs=("opt_metric", "pruning_prob")),
    "rankseg_dep": RuleEntry(needs=("opt_metric", "theta", "pruning_prob", "unassigned", "contested", "assignment")),
    "rankseg_dep_levels": RuleEntry(needs=("opt_metric", "pruning_prob")),
    "rankseg_package": RuleEntry(needs=("opt_metric", "pruning_prob", "solver"), two_classes=True),
    "rankseg_exact": RuleEntry(needs=("opt_metric",), two_classes=True),
}
LOSS_TABLE = {  # configs/loss, key `loss`
    "ce": Entry(),
    "focal": Entry(needs=("gamma",)),
    "jaccard": Entry(needs=OVERLAP, may_have=("both_classes",)),
    "dice": Entry(needs=OVERLAP, may_have=("both_classes",)),
    "tversky": Entry(needs=(*OVERLAP, "alpha", "beta"), may_have=("both_classes",)),
}
DECODER_TABLE = {  # configs/model, key `decoder`
    "cpt": DecoderEntry(variants=("paper",), pools=("paper",)),
    "deeplabv3": DecoderEntry(needs=("atrous_rates",), strides=(8, 16), variants=BOTH, pools=BOTH),
    "deeplabv3plus": DecoderEntry(
        needs=("atrous_rates", "low_level_channels"), strides=(8, 16), variants=BOTH, pools=BOTH
    ),
    "dpt": DecoderEntry(strides=(8, 16, 32)),  # that of the ViT's patches
    "fpn": DecoderEntry(),
    "linknet": DecoderEntry(num_widths=0),
    "manet": DecoderEntry(num_widths=5),
    "pan": DecoderEntry(strides=(16, 32), pools=("library",)),
    "pspnet": DecoderEntry(strides=(8, 16, 32), variants=BOTH, pools=("paper",)),
    "segformer": DecoderEntry(variants=BOTH),
    "unet": DecoderEntry(num_widths=5, variants=BOTH),
    "unetplusplus": DecoderEntry(num_widths=5),
    "upernet": DecoderEntry(variants=BOTH, pools=BOTH),
}
DATASET_TABLE = {  # configs/data, key `dataset`
    "ade20k": DataSetEntry(code="ade20k.ADE20K"),
    "camvid": DataSetEntry(code="camvid.CamVid"),
    "cityscapes": DataSetEntry(code="cityscapes.Cityscapes"),
    "coco_stuff": DataSetEntry(code="coco_stuff.COCOStuff"),
    "dark_zurich": DataSetEntry(code="cityscapes.DarkZurich"),
    "deepglobe_building": DataSetEntry(code="deepglobe.DeepGlobeBuilding", needs=("fold",)),
    "deepglobe_land": DataSetEntry(code="deepglobe.DeepGlobeLand", needs=("fold",)),
    "deepglobe_road": DataSetEntry(code="deepglobe.DeepGlobeRoad", needs=("fold",)),
    "folder": DataSetEntry(
        code="folder.Folder", needs=("images", "labels", "classes", "palette"), may_have=("label_map", "channels")
    ),
    "hippocampus": DataSetEntry(code="slices.Hippocampus", needs=OF_VOLUMES),
    "kits": DataSetEntry(code="slices.KiTS", needs=OF_VOLUMES),
    "lits": DataSetEntry(code="slices.LiTS", needs=OF_VOLUMES),
    "mapillary_vistas": DataSetEntry(code="mapillary_vistas.MapillaryVistas"),
    "nighttime_driving": DataSetEntry(code="cityscapes.NighttimeDriving"),
    "pascal_context": DataSetEntry(code="pascal_context.PascalContext"),
    "pascal_voc": DataSetEntry(code="pascal_voc.PascalVOC"),
    "shapes": DataSetEntry(code="shapes.Shapes"),
    "shapes_binary": DataSetEntry(code="shapes.ShapesBinary"),
    "shapes_noisy": DataSetEntry(code="shapes.ShapesNoisy", needs=NOISE),
    "shapes_noisy_binary": DataSetEntry(code="shapes.ShapesNoisyBinary", needs=NOISE),
}
METRIC_TABLE = {  # configs/test, key `metrics`: further metrics, and what their scores are called
    "boundary_iou": "BIoU",
}
