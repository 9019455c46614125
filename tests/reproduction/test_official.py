"""The authors' settings, one by one, against the resolved config of every training of every table."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from exp.data.prepare.facts import VOLUMES
from exp.data.registry import DATASETS
from exp.reproduction.plans import ALL, MEDICAL, NATURAL, RULES, table_jobs

OFFICIAL = yaml.safe_load(Path(__file__).with_name("official_settings.yaml").read_text())
SOURCES = {"code", "paper", "readme"}
BY_RULE = ("rules", "images", "networks")
DATA = [*NATURAL, *MEDICAL]


def official(data: str) -> Iterator[tuple[str, Any]]:
    """The settings of a data set's trainings, "group.key" and value."""
    for part in ("all", "natural" if data in NATURAL else "medical", data):
        for source in OFFICIAL[part].values():
            yield from source.items()


@pytest.mark.parametrize("data", DATA)
def test_every_plan_has_the_official_settings(data: str):
    jobs = [job for job in table_jobs(ALL) if job.data == data]
    assert jobs
    settings = dict(official(data))
    assert len(settings) >= 30
    for job in jobs:
        config = job.config.to_dict()
        for name, value in (settings | OFFICIAL["networks"].get(job.model, {})).items():
            group, _, key = name.partition(".")
            default = {"padding": "corner"}.get(key)  # left out of a result that never asked for it
            assert config[group].get(key, default) == value, (job.name, name)


def test_every_plan_has_its_rules_and_ours_beside():
    seen = set()
    for job in table_jobs(ALL):
        rules = {rule["name"]: rule for rule in job.config.to_dict()["predict"]}
        assert {"argmax", "rankseg_rma_paper", "rankseg_rma"} <= rules.keys()
        for name, options in OFFICIAL["rules"].items():
            if name in rules:
                seen.add(name)
                assert {key: rules[name][key] for key in options} == options, name
    assert seen == OFFICIAL["rules"].keys() == set(RULES.values()) - {"argmax"}


def test_the_list_names_its_sources_and_every_data_set():
    parts = [part for part in OFFICIAL if part not in BY_RULE]
    assert parts == ["all", "natural", "medical", *DATA]
    assert all(OFFICIAL[part].keys() <= SOURCES for part in parts)


def test_data_sets_have_the_official_numbers():
    splits = {"pascal_voc": "trainaug", "cityscapes": "train", "ade20k": "training"}
    for data, (train, val) in ((name, OFFICIAL["images"][name]) for name in NATURAL):
        totals = DATASETS[data].totals
        assert totals[splits[data]] == train
        assert totals["validation" if data == "ade20k" else "val"] == val
    for data in MEDICAL:
        assert list(VOLUMES[data].fold_slices) == OFFICIAL["images"][data][0]
