"""Every kind of training and evaluation in small, on CamVid, hippocampus and shapes: a smoke test for two CPU cores.

Nothing here is trained for long enough to say what a rule is worth.
"""

from collections.abc import Iterator
from dataclasses import replace

from exp.reproduction.job import DATASET_RULE, Job, Reevaluation

SEEDS, FOLDS = range(2), range(2)
FEW = "data.val_samples=12"  # images of a validation
SLICES = "data.val_samples=150"  # of some five volumes
SCOPES = ("argmax", "rankseg_rma", "rankseg_rma_iou", "rankseg_levelset", DATASET_RULE, "rankseg_rma_dataset_iou")
CAMVID = Job(
    "deeplabv3plus_mobilenetv2_100",
    "camvid",
    "600_iters",
    "adamw_lr6e-4",
    SCOPES,
    overrides=(
        "schedule.train_iters=20",
        "schedule.log_iters=5",
        "schedule.num_workers=1",
        "model.variant=library",  # with which the figures of docs/results.md were measured
        "test.crop_size=[360,480]",  # whole images: windows of the training crop take 1.8 times the pixels
        "model.output_stride=16",
    ),
)
UPERNET = replace(
    CAMVID,
    model="upernet_mobilenetv2_100",
    loss="focal",
    overrides=("schedule.train_iters=5", "schedule.num_workers=1", "test.crop_size=[360,480]"),
)
HIPPOCAMPUS = Job(
    "unet_resnet18d",
    "hippocampus",
    "600_iters",
    "adamw_lr6e-4",
    ("argmax", "rankseg_rma", "rankseg_rma_iou", "rankseg_levelset", "rankseg_rma_case", DATASET_RULE),
    test="test_dice",
    fold=0,
    overrides=(
        "model.variant=library",
        "model.pretrained=false",
        "model.decoder_channels=[128,64,32,16,16]",
        "schedule.train_iters=30",
        "schedule.batch_size=16",
        "schedule.num_workers=1",
    ),
)
SHAPES = Job(
    "unet_mobilenetv3_small_100",
    "shapes",
    "quickstart",
    "adamw_lr6e-4",
    ("argmax", "rankseg_rma", "rankseg_levelset", "rankseg_dep", "rankseg_dep_levels"),
    loss="jaccard_ic_present_all",
    overrides=("schedule.train_iters=30", FEW),
)
NOISY = replace(
    SHAPES,
    data="shapes_noisy_binary",
    rules=("argmax", "threshold", "rankseg_rma", "rankseg_levelset", "rankseg_ba", DATASET_RULE),
    loss="tversky_ic_present_all",
    test="test_dice",
)


def laptop_jobs() -> Iterator[Job]:
    """Networks of the paper on CamVid, volumes in two folds, and shapes of many classes and of two, by all losses.

    Of CamVid: two seeds, one of them again under a fitted temperature and under thresholds of training images. Of two
    classes: the network's probabilities, and those from which the labels were drawn. A training comes before its
    further evaluations.
    """
    camvid = in_small(CAMVID)
    for seed in SEEDS:
        yield replace(camvid, seed=seed)
    yield from tempered(camvid)
    yield from fixed(camvid)
    yield in_small(UPERNET)
    for fold in FOLDS:
        overrides = (*HIPPOCAMPUS.overrides, SLICES)
        yield replace(HIPPOCAMPUS, fold=fold, loss="dice_ic_present_foreground", overrides=overrides)
    yield SHAPES
    yield NOISY
    yield replace(NOISY, rules=(*NOISY.rules, "rankseg_exact"), reevaluation=Reevaluation("true", true=True))


def in_small(job: Job) -> Job:
    """A job on CamVid in half the batches and on few validation images."""
    return replace(job, overrides=(*job.overrides, FEW, "schedule.batch_size=4"))


def tempered(job: Job) -> tuple[Job, Job]:
    """A training -> the fit of a temperature on its training images, and its rules under that."""
    fit = Reevaluation("temperature", ("data.val_samples=10",), fit=True)
    return (
        replace(job, rules=("argmax",), reevaluation=fit),
        replace(job, reevaluation=Reevaluation("temperature", ("test.temperature=fitted",))),
    )


def fixed(job: Job) -> tuple[Job, Job]:
    """A training -> the thresholds of some of its training images, and the images to evaluate under these."""
    split = f"data.val_split={job.config.data.train_split}"
    return (
        replace(job, rules=(DATASET_RULE,), reevaluation=Reevaluation("thresholds", (split, FEW))),
        replace(
            job, rules=("argmax", "rankseg_rma_fixed"), reevaluation=Reevaluation("fixed", thresholds="thresholds")
        ),
    )
