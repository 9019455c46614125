"""The paper's comparison, and what goes beyond it, with small networks on CamVid and hippocampus, for two CPU cores."""

from collections.abc import Iterator
from dataclasses import replace

from exp.reproduction.job import DATASET_RULE, Job, Reevaluation

SEEDS = range(5)
ITERS = 100
SHORTER = (25, 50)  # iterations of trainings of their own, with a schedule of that length
NOISE_LEVELS = (0.0, 0.2, 0.4)
SCOPES = ("argmax", "rankseg_rma", "rankseg_rma_iou", DATASET_RULE, "rankseg_rma_dataset_iou")
CAMVID = Job(
    "deeplabv3plus_mobilenetv2_100",
    "camvid",
    "600_iters",
    "adamw_lr6e-4",
    SCOPES,
    overrides=(
        f"schedule.train_iters={ITERS}",
        "schedule.log_iters=5",
        "schedule.num_workers=1",
        "model.variant=library",  # with which the figures of docs/results.md were measured
        "test.crop_size=[360,480]",  # whole images: windows of the training crop take 1.8 times the pixels
        "model.output_stride=16",
    ),
)
HIPPOCAMPUS = Job(
    "unet_resnet18d",
    "hippocampus",
    "600_iters",
    "adamw_lr6e-4",
    ("argmax", "rankseg_rma", "rankseg_rma_iou", "rankseg_rma_case", DATASET_RULE),
    test="test_dice",
    fold=0,
    overrides=(
        "model.variant=library",
        "model.pretrained=false",
        "model.decoder_channels=[128,64,32,16,16]",
        "schedule.train_iters=400",
        "schedule.batch_size=16",
        "schedule.num_workers=1",
    ),
)
NOISY = Job(
    "unet_mobilenetv3_small_100",
    "shapes_noisy_binary",
    "quickstart",
    "adamw_lr6e-4",
    ("argmax", "rankseg_rma", DATASET_RULE),
    test="test_dice",
    overrides=("schedule.train_iters=150", "data.val_samples=100"),
)


def laptop_jobs() -> Iterator[Job]:
    """Two networks on CamVid, one of them with five seeds, a U-Net on hippocampus, and the evidence beyond the paper.

    That is: every seed again under a fitted temperature, thresholds of the training images, the same network trained
    for shorter, and shapes with more and less noise in the labels, under the network's probabilities and under those
    from which the labels were drawn. A training comes before its further evaluations.
    """
    for seed in SEEDS:
        job = replace(CAMVID, seed=seed)
        yield job
        yield from tempered(job)
    yield from fixed(CAMVID)
    half = f"schedule.train_iters={ITERS // 2}"  # a step takes twice as long as DeepLabV3+'s
    yield replace(CAMVID, model="upernet_mobilenetv2_100", overrides=(half, *CAMVID.overrides[1:-1]))
    yield HIPPOCAMPUS
    for iters in SHORTER:
        yield replace(CAMVID, overrides=(f"schedule.train_iters={iters}", *CAMVID.overrides[1:]))
    for level in NOISE_LEVELS:
        job = replace(NOISY, overrides=(*NOISY.overrides, f"data.label_noise={level}"))
        yield job
        yield replace(job, rules=(*NOISY.rules, "rankseg_exact"), reevaluation=Reevaluation("true", true=True))


def tempered(job: Job) -> tuple[Job, Job]:
    """A training -> the fit of a temperature on its training images, and its rules under that."""
    fit = Reevaluation("temperature", ("data.val_samples=20",), fit=True)
    return (
        replace(job, rules=("argmax",), reevaluation=fit),
        replace(job, reevaluation=Reevaluation("temperature", ("test.temperature=fitted",))),
    )


def fixed(job: Job) -> tuple[Job, Job]:
    """A training -> the thresholds of some of its training images, and the images to evaluate under these."""
    split = f"data.val_split={job.config.data.train_split}"
    return (
        replace(job, rules=(DATASET_RULE,), reevaluation=Reevaluation("thresholds", (split, "data.val_samples=100"))),
        replace(
            job, rules=("argmax", "rankseg_rma_fixed"), reevaluation=Reevaluation("fixed", thresholds="thresholds")
        ),
    )
