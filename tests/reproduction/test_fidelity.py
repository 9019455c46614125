"""docs/fidelity.md names nothing that is not there, lists every erratum, and states what the YAMLs say."""

import dataclasses
import itertools
import re
import shlex

import pytest
import yaml

from exp.config.cli import parse_args, requested_yamls
from exp.config.experiment import CONFIG_DIR, GROUPS, load_experiment
from exp.data.loader import count_iterations
from exp.runtime.errors import InputError
from tests.config.test_config import compose
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "fidelity.md").read_text()
TABLES = yaml.safe_load((ROOT / "exp" / "reproduction" / "tables.yaml").read_text())
YAMLS = {path.stem for path in CONFIG_DIR.glob("*/*.yaml")}
SPANS = sorted(set(re.findall(r"`([^`]+)`", PAGE)))
SETTING = re.compile(rf"({'|'.join(GROUPS)})\.(\w+)(?:=(.+))?")
OTHER = {"prob", "weight_prob", "timing.json", "mIoUI", "mIoUIQ", "mIoUCQ", "mDiceC", "0.7 * n"}
OTHER |= {"mAccD", "mIoU3D", "mDice3D", "mAcc3D", "ECE3D", "SCED_paper", "SCEI_paper"}
OTHER |= {"rankseg_remap_parallel_iou"}  # of the paper's code, said not to be here
BASES = ("segformer_mit_b2", "deeplabv3plus_resnet50d")  # between them they read every model key on the page
KEYS = ("rows", "data", "rules", "columns")


def flags(text: str) -> list[str]:
    """A span that starts with a flag -> words of a command; a flag that needs a value and stands alone gets one."""
    values = {"--loss_yaml": "ce", "--set": "data.flip_prob=0", "--predict_yaml": "argmax", "--seed": "1"}
    values |= {"--optim_yaml": "sgd_lr1e-2"}
    return [text, values[text]] if text in values else shlex.split(text)


def takes(override: str) -> bool:
    """Whether a setting builds on one of the shipped networks, and a data set of images or of volumes."""
    for model, data in itertools.product(BASES, ("shapes", "lits")):
        try:
            compose(override, model=model, data=data, predict=["rankseg_rma_paper"])
        except InputError:
            continue
        return True
    return False


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table rows below a heading, without the table's head."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


@pytest.mark.parametrize("span", SPANS)
def test_what_the_page_names_is_there(span: str):
    setting = SETTING.fullmatch(span)
    if setting and setting[2] != "yaml":
        group, key, value = setting.groups()
        assert key in {field.name for field in dataclasses.fields(GROUPS[group])}
        assert value is None or takes(span)
    elif span.startswith("--"):
        args = parse_args(flags(span))
        load_experiment(requested_yamls(args), args.overrides, args.seed)
    elif span.startswith("torchrun "):
        assert span == "torchrun --nproc_per_node=4"
    elif "/" in span:
        assert (ROOT / span.split()[0]).exists()
    else:
        table = TABLES.get(span, {})
        in_tables = "rows" in table or any(span in t.get("rows", ()) for t in TABLES.values() if isinstance(t, dict))
        assert span in YAMLS or span in OTHER or in_tables


def test_every_link_resolves():
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / "docs" / name).resolve()
        assert path.is_file(), link
        heads = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, link


def test_every_erratum_has_its_row():
    """In the file's order: the row names the same cells, and every figure of the erratum's text."""
    rows = rows_of("Misprints in the published tables")
    assert len(rows) == len(TABLES["errata"])
    for row, erratum in zip(rows, TABLES["errata"], strict=True):
        cells = erratum["cells"]
        named = re.findall(r"`([^`]+)`", row[0])
        assert named == [cells["table"], *(name for key in KEYS for name in cells.get(key, ()))]
        figures = re.findall(r"\d+\.\d+", erratum["text"])
        assert all(figure in " ".join(row) for figure in figures), erratum["text"]


def test_pairs_of_iou_and_dice_are_possible_and_swapped_ones_are_not():
    checked = 0
    for table in ("table1", "table2"):
        columns = TABLES[table]["columns"]
        pairs = [(columns.index(iou), columns.index(iou.replace("IoU", "Dice"))) for iou in columns if "IoU" in iou]
        for by_data in TABLES[table]["rows"].values():
            for values in (v for by_rule in by_data.values() for v in by_rule.values()):
                for iou, dice in ((values[i] / 100, values[d] / 100) for i, d in pairs):
                    assert iou < dice <= 2 * iou / (1 + iou) + 1e-4
                    checked += 1
    assert checked == 8 * 3 * 2 * 2 + 4 * 2 * 3


def test_what_the_page_says_of_the_published_figures():
    """One row of Table 1 stands twice and no other two share two columns; one of its pairs falls, two of Table 4's."""
    by_network = TABLES["table1"]["rows"]
    rows = [tuple(v) for by_data in by_network.values() for by_rule in by_data.values() for v in by_rule.values()]
    shared = [sum(a == b for a, b in zip(x, y)) for i, x in enumerate(rows) for y in rows[:i]]
    assert sorted(shared)[-2:] == [1, 4]
    falls = [
        (network, data, column)
        for network, by_data in by_network.items()
        for data, values in by_data.items()
        for column, a, b in zip(TABLES["table1"]["columns"], values["argmax"], values["rankseg_rma"])
        if b < a
    ]
    assert falls == [("segformer_mit_b2", "pascal_voc", "mDiceC")]
    classes = {name: row["pascal_voc"] for name, row in TABLES["table4"]["rows"].items()}
    assert [name for name, v in classes.items() if v["rankseg_rma"] < v["argmax"]] == ["bird", "sheep"]
    upernet = by_network["upernet_convnext_base.fb_in22k_ft_in1k_384"]["pascal_voc"]
    for rule, mean, background in (("argmax", 78.75, 94.9), ("rankseg_rma", 79.59, 94.8)):
        total = sum(v[rule][0] for v in classes.values())
        assert round(total / 20 + 1e-9, 2) == mean
        assert round(21 * upernet[rule][1] - total, 1) == background


def test_crops_and_windows_are_those_of_the_yamls():
    text = " ".join(" ".join(row) for row in rows_of("Data"))
    labels = {"pascal_voc": "VOC", "ade20k": "ADE20K", "cityscapes": "Cityscapes", "lits": "LiTS", "kits": "KiTS"}
    for name, label in labels.items():
        data = compose(data=name).data
        assert re.search(rf"{data.crop_size[0]}x{data.crop_size[1]} \([^)]*{label}", text), name
        if data.window:
            assert "{:.0f} to {:.0f}".format(*data.window) in text
            assert data.test_crop == (384, 384)


@pytest.mark.parametrize(
    ("schedule", "text", "share"),
    [
        ("40k_iters", "of 8 images (VOC, Cityscapes)", ["schedule.batch_size=2"]),
        ("80k_iters", "of 8 (ADE20K)", ["schedule.batch_size=2"]),
        ("60_epochs", "of 8 (LiTS, KiTS)", ["schedule.batch_size=2", "schedule.train_epochs=15"]),
    ],
)
def test_schedules_and_the_share_of_one_process_in_four(schedule: str, text: str, share: list[str]):
    """A quarter of the batch in as many steps (5,864 images fill whole batches)."""
    assert f"`{schedule}` {text}" in PAGE
    assert all(f"`{override}`" in PAGE for override in share)
    whole, quarter = compose(schedule=schedule).schedule, compose(*share, schedule=schedule).schedule
    assert f"of {whole.batch_size} " in text
    assert quarter.batch_size * 4 == whole.batch_size
    assert count_iterations(quarter, 5864) == count_iterations(whole, 5864)
