"""The paper's tables: published figures, the trainings behind them, and running these."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from exp.config.experiment import training_digest
from exp.config.families import LOSS_TABLE, RULE_TABLE
from exp.data.prepare.facts import VOLUMES
from exp.data.registry import DATASETS
from exp.reproduction import dry_run, plans
from exp.reproduction.existing import DONE, INTERRUPTED, MISSING, TRAINED, WAITING, Existing
from exp.reproduction.job import Job, join_jobs
from exp.reproduction.laptop import fixed, tempered
from exp.reproduction.plans import Counterpart, find_counterpart, table_jobs
from exp.reproduction.published import load_errata, load_tables
from exp.reproduction.runner import laptop_data
from exp.runtime.errors import InputError
from tests.conftest import ROOT, TINY_SETTINGS
from tests.data.test_data_sets import write_slices
from tests.data.trees import write_ade20k, write_camvid, write_cityscapes, write_voc
from tests.program.test_slurm import start as start_job

SMALL = Job(
    "unet_mobilenetv3_small_100",
    "shapes",
    "quickstart",
    "adamw_lr6e-4",
    ("argmax",),
    overrides=TINY_SETTINGS,
)


@pytest.mark.parametrize(
    ("table", "number", "rules"),
    [
        ("readme_natural", 6, 3),
        ("readme_medical", 20, 3),
        ("table1", 24, 3),
        ("table2", 40, 4),
        ("table3", 5, None),
        ("table4", 1, 3),
        ("table5", 13, 3),
        ("table6", 3, 5),
        ("table7", 30, 3),
        ("all", 91, None),
        ("laptop", 12, None),
    ],
)
def test_each_table_has_its_trainings(table: str, number: int, rules: int | None):
    jobs = table_jobs(table)
    assert len(jobs) == number
    assert len({(job.name, job.reevaluation) for job in jobs}) == number
    trainings = [job for job in jobs if job.reevaluation is None]
    assert len({job.name for job in trainings}) == len(trainings) == len({job.digest for job in jobs})
    assert all(job.rules[0] == "argmax" for job in trainings)
    if rules:
        assert {len(job.rules) for job in jobs} == {rules}


def test_the_laptop_plan_has_every_kind():
    """All losses and rules, volumes in folds, several seeds, two classes and many, and every further evaluation."""
    jobs = table_jobs("laptop")
    assert {job.config.loss.loss for job in jobs} == set(LOSS_TABLE)
    assert {rule.rule for job in jobs for rule in job.config.predict} == set(RULE_TABLE)
    assert {rule.scope for job in jobs for rule in job.config.predict} == {None, "case", "dataset"}
    assert {job.fold for job in jobs if job.data == "hippocampus"} == {0, 1}
    assert {job.seed for job in jobs if job.data == "camvid"} == {0, 1}
    assert {job.data for job in jobs} == {"camvid", "hippocampus", "shapes", "shapes_noisy_binary"}
    again = {job.reevaluation.folder for job in jobs if job.reevaluation}
    assert again == {"temperature", "thresholds", "fixed", "true"}


def test_trainings_are_shared_between_tables():
    table1, all_jobs = table_jobs("table1"), table_jobs("all")
    digests = {job.digest for job in table1}
    for table in ("readme_natural", "table4", "table6"):
        assert {job.digest for job in table_jobs(table)} <= digests
    assert len({job.digest for job in all_jobs}) == len(all_jobs)
    upernet = next(c for c in all_jobs if c.model == plans.UPERNET and c.data == "pascal_voc" and c.seed == 0)
    assert {"argmax", "rankseg_rma_paper", "rankseg_rma_paper_prob", "rankseg_rma_paper_weight_prob"} < set(
        upernet.rules
    )


def test_every_published_figure_has_a_counterpart():
    for table in load_tables().values():
        for value in (v for v in table.values if v.value is not None):
            found = find_counterpart(value)
            assert found.rule in found.jobs[0].rules
            assert (found.joined == "one") == (len(found.jobs) == 1)


def test_table_1_trains_its_rows_with_the_decoders_of_the_paper():
    """All eight rows on three data sets, 24 cells of CPT among them; and it takes no network of before as theirs."""
    jobs = table_jobs("table1")
    rows = load_tables()["table1"].values
    assert {(job.model, job.data) for job in jobs} == {(value.row, value.data) for value in rows}
    assert sum(value.row == "cpt_swinlarge" for value in rows) == 24
    for job in jobs:
        assert job.config.model.variant == "paper"
        if job.config.model.decoder != "cpt":
            older = replace(job, overrides=(*job.overrides, "model.variant=library"))
            assert older.digest != job.digest
            config = older.config.to_dict()
            del config["model"]["variant"]  # as it was stored before there was a choice
            assert training_digest(config) == older.digest


def published(table: str, row: str, data: str, rule: str, column: str):
    (found,) = (
        f for f in load_tables()[table].values if (f.row, f.data, f.rule, f.column) == (row, data, rule, column)
    )
    return found


def test_some_counterparts_in_full():
    found = find_counterpart(published("table2", "unet_resnet50d", "kits", "rankseg_ba", "mDiceI"))
    assert (found.rule, found.score, found.joined) == ("rankseg_ba", "mDiceI", "mean")
    assert [job.fold for job in found.jobs] == [0, 1, 2, 3, 4]
    found = find_counterpart(published("table7", plans.UPERNET, "ade20k", "rankseg_rma", "mIoUI_std"))
    assert (found.rule, found.score, found.joined, len(found.jobs)) == ("rankseg_rma_paper", "mIoUI", "std", 10)
    found = find_counterpart(published("table4", "sheep", "pascal_voc", "argmax", "IoUC"))
    assert found == Counterpart(found.jobs, "argmax", "IoUC:sheep")


def test_scores_of_the_data_set_are_taken_within_cases_where_the_papers_code_does():
    """Of volumes: its mIoUD is this project's mIoU3D, and its Acc the foreground's."""
    value = published("table2", "unet_resnet50d", "kits", "argmax", "mDiceI")
    names = {"mIoUD": "mIoU3D", "mDiceD": "mDice3D", "mAccD": "mAcc3D", "Acc": "mAcc3D", "mIoUI": "mIoUI"}
    for name, own in names.items():
        assert find_counterpart(replace(value, column=name)).score == own
    natural = published("table1", plans.UPERNET, "ade20k", "argmax", "mIoUI")
    assert find_counterpart(replace(natural, column="mIoUD")).score == "mIoUD"


def test_errata_are_on_the_figures_they_concern():
    swapped = published("table2", "unet_resnet18d", "kits", "argmax", "mIoUI")
    assert [e.text[:23] for e in swapped.errata] == ["Print has the columns o"]
    assert len(published("table2", "unet_resnet50d", "kits", "rankseg_ba", "mIoUI").errata) == 2
    assert published("table1", "pspnet_resnet50d", "ade20k", "rankseg_rma", "mIoUI").errata == ()
    concerned = {e for table in load_tables().values() for f in table.values for e in map(id, f.errata)}
    assert len(load_errata()) == 9
    assert concerned


def test_jobs_do_not_collide():
    other = [SMALL, replace(SMALL, seed=1), replace(SMALL, overrides=(*SMALL.overrides, "optim.lr=1e-3"))]
    assert len({job.name for job in other}) == 3
    joined = join_jobs([SMALL, replace(SMALL, rules=("rankseg_rma", "argmax")), other[1]])
    assert [job.rules for job in joined] == [("argmax", "rankseg_rma"), ("argmax",)]


@pytest.fixture
def tiny_laptop(monkeypatch) -> list[Job]:
    """Two small trainings in place of laptop's, and one that cannot be."""
    jobs = [SMALL, replace(SMALL, seed=1), replace(SMALL, overrides=(*SMALL.overrides, "schedule.batch_size=99"))]
    monkeypatch.setattr(plans, "laptop_jobs", lambda: jobs)
    monkeypatch.setattr("scripts.reproduce.laptop_data", lambda data_dir, output: data_dir)
    return jobs


def test_what_is_missing_is_run_and_a_failure_stops_nothing(script, tmp_path: Path, tiny_laptop, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "out"
    flags = ["laptop", "--data_dir", tmp_path, "--output_dir", output, "--device", "cpu"]
    status, printed, _ = script("reproduce", *flags, "--dry_run")
    assert status == 0
    assert printed.count("to be trained (argmax)") == 3
    assert "data shapes: complete: 2000 train and 200 val images, made on the fly" in printed
    assert not output.exists()

    status, printed, err = script("reproduce", *flags)
    assert status == 2
    assert "3 trainings, 0 done before, 2 now, 1 failed" in printed
    assert "failed: status 2: error: schedule.batch_size: got 99" in printed
    assert "1 of 3 failed" in err
    existing = Existing(output)
    assert [existing.state(job).kind for job in tiny_laptop] == [DONE, DONE, MISSING]
    status, printed, _ = script("reproduce", *flags, "--dry_run")
    assert printed.count(": done") == 2
    assert "3 trainings, 2 of them done" in printed

    # Another rule is evaluated without training; results are recognised wherever they lie.
    checkpoint = next(output.glob("*/*/checkpoints/iter_0000003.pt"))
    before = checkpoint.read_bytes()
    tiny_laptop[:] = [replace(SMALL, rules=("argmax", "rankseg_rma"))]
    (output / tiny_laptop[0].name).rename(output / "moved")
    assert existing_state(output, tiny_laptop[0]) == TRAINED
    assert script("reproduce", *flags)[0] == 0
    assert existing_state(output, tiny_laptop[0]) == DONE
    assert [p.name for p in output.glob("*/*/checkpoints/iter_0000003.pt") if p.read_bytes() == before]
    assert len(list(output.glob("*/*/results/rankseg_rma.json"))) == 1

    # Nothing counts that was evaluated or trained otherwise, or not to its end.
    for change in ({"test": "test_dice"}, {"overrides": (*SMALL.overrides, "schedule.train_iters=4")}):
        assert existing_state(output, replace(SMALL, **change)) != DONE
    for result in output.glob("*/*/results/argmax.json"):
        content = json.loads(result.read_text())
        content["training"]["iteration"] = 2
        result.write_text(json.dumps(content))
    assert existing_state(output, SMALL) == TRAINED


def test_further_evaluations_follow_their_training(script, tmp_path: Path, monkeypatch):
    """A fitted temperature, the rules under it, and thresholds of the training images; each once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    longer = tuple(text.replace("train_iters=3", "train_iters=40") for text in SMALL.overrides)
    small = replace(SMALL, rules=("argmax", "rankseg_rma", "rankseg_rma_dataset"), overrides=longer)
    jobs = [small, *tempered(small), *fixed(small)]
    monkeypatch.setattr(plans, "laptop_jobs", lambda: jobs)
    monkeypatch.setattr("scripts.reproduce.laptop_data", lambda data_dir, output: data_dir)
    output = tmp_path / "out"
    flags = ["laptop", "--data_dir", tmp_path, "--output_dir", output, "--device", "cpu"]
    assert [Existing(output).state(job).kind for job in jobs] == [MISSING, *[WAITING] * 4]
    status, printed, _ = script("reproduce", *flags, "--launcher", "slurm")
    assert "1 trainings and 4 further evaluations, 1 to run" in printed
    assert "4 evaluations wait for their trainings" in printed

    monkeypatch.setattr(plans, "laptop_jobs", lambda: jobs[1:])
    status, printed, _ = script("reproduce", *flags, "--launcher", "slurm")
    assert status == 0
    assert "0 to run in an array" in printed
    assert not (output / "array.laptop.2").exists()
    monkeypatch.setattr(plans, "laptop_jobs", lambda: jobs)

    status, printed, err = script("reproduce", *flags)
    assert status == 0, printed + err
    assert [existing_state(output, job) for job in jobs] == [DONE] * 5
    assert "1 trainings and 4 further evaluations, 5 done before, 0 now, 0 failed" in script("reproduce", *flags)[1]
    fitted = json.loads(next(output.glob("*/temperature/*/results/temperature.json")).read_text())["temperature"]
    evaluated = json.loads(next(output.glob("*/temperature/*/results/rankseg_rma.json")).read_text())
    assert evaluated["config"]["test"]["temperature"] == fitted != 1.0
    thresholds = json.loads(next(output.glob("*/fixed/*/results/rankseg_rma_fixed.json")).read_text())
    path = Path(thresholds["config"]["predict"]["thresholds"])
    assert json.loads(path.read_text())["config"]["data"]["val_split"] == "train"
    plain = json.loads(next(output.glob("*/unet*/results/rankseg_rma.json")).read_text())
    assert plain["config"]["test"]["temperature"] == 1.0
    assert len(list(output.glob("**/checkpoints/last.safetensors"))) == 1  # trained once

    # A temperature that is not this one's leaves its results to be made again; so does a training that is gone.
    next(output.glob("*/temperature/*/results/temperature.json")).unlink()
    assert [existing_state(output, job) for job in jobs] == [DONE, TRAINED, TRAINED, DONE, DONE]


def existing_state(output: Path, job: Job) -> str:
    return Existing(output).state(job).kind


def test_an_interruption_is_passed_on_and_the_same_command_goes_on(tmp_path: Path):
    """SIGINT to the script, as from Ctrl-C."""
    code = (
        "import sys, dataclasses; sys.path[:0] = ['scripts', '.']\n"
        "from exp.reproduction import plans, runner\nfrom tests.reproduction import test_reproduce\nimport reproduce\n"
        "job = test_reproduce.SMALL\n"
        "job = dataclasses.replace(job, overrides=(*job.overrides, 'schedule.train_iters=60'))\n"
        "plans.laptop_jobs = lambda: [job]\nreproduce.laptop_data = lambda data_dir, output: data_dir\n"
        "sys.exit(reproduce.run_and_report(reproduce.main))"
    )
    flags = ["laptop", "--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--device", "cpu"]
    job = replace(SMALL, overrides=(*SMALL.overrides, "schedule.train_iters=60"))

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, flags)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    process = start()
    until = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*/*/log.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert f"interrupted by SIGINT: {job.name} has saved what it had; the same command resumes" in err
    assert existing_state(tmp_path / "out", job) == INTERRUPTED
    process = start()
    printed, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "interrupted" in printed
    assert existing_state(tmp_path / "out", job) == DONE


def test_a_dry_run_tells_what_the_data_folder_lacks(script, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    flags = ["table4", "table6", "--data_dir", data, "--output_dir", tmp_path / "out", "--dry_run"]
    status, printed, _ = script("reproduce", *flags)
    assert status == 0
    assert f"data pascal_voc: empty: {data}/VOCdevkit/VOC2012: no such folder" in printed
    assert "3 trainings, 0 of them done" in printed
    write_voc(data, {"trainaug": 6, "val": 3})
    assert "data pascal_voc: partial: 6 train and 3 val images; 9 of 12031 images" in script("reproduce", *flags)[1]
    next((data / "VOCdevkit" / "VOC2012" / "JPEGImages").iterdir()).unlink()
    assert "data pascal_voc: partial: " in script("reproduce", *flags)[1]
    assert "data cityscapes: empty: " in script("reproduce", *flags)[1]


SPLITS = {
    "pascal_voc": {"trainaug": 3, "val": 2},
    "cityscapes": {"train": 3, "val": 2},
    "ade20k": {"training": 3, "validation": 2},
    "camvid": {"train": 3, "val": 2},
}


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Path:
    """A few images of every data set, and a case in every fold."""
    folder = tmp_path_factory.mktemp("data")
    write_voc(folder, SPLITS["pascal_voc"])
    write_cityscapes(folder, SPLITS["cityscapes"], (40, 56))
    write_ade20k(folder, SPLITS["ade20k"])
    write_camvid(folder, SPLITS["camvid"])
    for name in ("lits", "kits", "hippocampus"):
        each = VOLUMES[name].cases_per_fold
        write_slices(folder, name, {f"case_{each * fold:03d}": 1 for fold in range(5)})
    return folder


@pytest.mark.parametrize(("share", "state"), [("all", "complete"), ("some", "partial"), ("none", "empty")])
@pytest.mark.parametrize("table", [*load_tables(), "all", "laptop"])
def test_a_dry_run_of_every_table_on_whole_partial_and_empty_data(
    script, tmp_path: Path, small_data: Path, monkeypatch, table: str, share: str, state: str
):
    """The totals are those of the small trees, or one image more."""
    more = 0 if share == "all" else 1
    for name, splits in SPLITS.items():
        first = next(iter(splits))
        monkeypatch.setattr(DATASETS[name], "totals", {**splits, first: splits[first] + more})
    for name in ("lits", "kits"):
        facts = replace(VOLUMES[name], fold_slices=(1, 1, 1, 1, 1 + more))
        monkeypatch.setitem(dry_run.VOLUMES, name, facts)
    monkeypatch.setitem(dry_run.VOLUMES, "hippocampus", replace(VOLUMES["hippocampus"], total_cases=5 + more))
    (tmp_path / "empty").mkdir()
    data = tmp_path / "empty" if share == "none" else small_data
    status, printed, _ = script("reproduce", table, "--data_dir", data, "--output_dir", tmp_path / "out", "--dry_run")
    assert status == 0
    jobs = table_jobs(table)
    names = [name for name in dict.fromkeys(job.data for job in jobs) if not name.startswith("shapes")]
    assert [
        line.split(": ")[:2] for line in printed.splitlines() if line.startswith("data ") and "shapes" not in line
    ] == [[f"data {name}", state] for name in names]
    commands = [line for line in printed.splitlines() if line.startswith("    ")]
    assert len(commands) == len(jobs)
    for job, command in zip(jobs, commands):
        flags = shlex.split(command)
        assert str(tmp_path / "out" / job.name) == flags[flags.index("--output_dir") + 1]
        name = "--true_of" if job.reevaluation and job.reevaluation.true else "--data_yaml"
        assert job.data == flags[flags.index(name) + 1]
    assert ", 0 of them done" in printed
    assert not (tmp_path / "out").exists()


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path):
    """As `| head` does."""
    command = [sys.executable, ROOT / "scripts" / "reproduce.py", "all", "--data_dir", tmp_path, "--output_dir"]
    process = subprocess.Popen(
        [*command, tmp_path / "out", "--dry_run"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read()
    assert process.wait(60) == 141
    assert err == b""


def test_wrong_flags_end_in_one_line(script, tmp_path: Path):
    base = ["--data_dir", tmp_path, "--output_dir", tmp_path / "out"]
    for flags, part in (
        (["table9", *base], "table9: unknown table"),
        (["table1", "--data_dir", tmp_path / "no", "--output_dir", tmp_path], "--data_dir: "),
        (["table1", *base, "--nproc_per_node", "0"], "--nproc_per_node: got 0"),
        (["laptop", *base, "--weights", "/no/file.pt"], "--weights: /no/file.pt: no such file"),
        (["laptop", *base, "--set", "schedule.train_iter=3"], "unknown key 'train_iter'"),
        (["laptop", *base], "camvid: no such folder"),
    ):
        status, _, err = script("reproduce", *flags)
        assert status == 2
        assert part in err
        assert err.count("\n") == 1


def test_job_arrays_run_one_job_a_task(script, tmp_path: Path, tiny_laptop):
    output = tmp_path / "out put"  # a name that a shell would split
    flags = ["laptop", "--data_dir", tmp_path, "--output_dir", output, "--device", "cpu", "--launcher", "slurm"]
    status, printed, err = script("reproduce", *flags)
    assert status == 0, err
    array = output / "array.laptop" / "array.sbatch"
    assert f"sbatch {array}" in printed
    subprocess.run(["bash", "-n", array], check=True)
    assert "#SBATCH --array=0-2" in array.read_text()
    lines = (array.parent / "jobs.txt").read_text().splitlines()
    assert [shlex.split(line)[shlex.split(line).index("--output_dir") + 1] for line in lines] == [
        str(output / job.name) for job in tiny_laptop
    ]
    folder = ROOT / "scripts" / "slurm"
    copy = tmp_path / "reproduce.sbatch"
    shutil.copy(array, copy)
    relative = os.path.relpath(copy, folder)
    process = start_job(relative, [], tmp_path, RANKSEG_PYTHON=sys.executable, SLURM_ARRAY_TASK_ID=1, SLURM_JOB_ID=4242)
    printed, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert [existing_state(output, job) for job in tiny_laptop] == [MISSING, DONE, MISSING]
    status, printed, _ = script("reproduce", *flags)
    assert status == 0
    assert f"sbatch {output / 'array.laptop.2' / 'array.sbatch'}" in printed
    assert len((output / "array.laptop.2" / "jobs.txt").read_text().splitlines()) == 2


def test_a_preparation_that_dies_without_a_word_is_told(tmp_path: Path, monkeypatch):
    """Killed for memory, say."""
    for name in ("camvid", "hippocampus/images", "hippocampus/labels"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for stderr, said in (("", "status -9, without a word"), ("warning\nerror: no room\n", "error: no room")):
        done = subprocess.CompletedProcess([], -9, "", stderr)
        monkeypatch.setattr(subprocess, "run", lambda *args, done=done, **options: done)
        with pytest.raises(InputError, match=f"hippocampus: not prepared: {said}$"):
            laptop_data(tmp_path / "data", tmp_path / "out")
