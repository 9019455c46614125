"""One table a family: it has the names of the builders' table, and a YAML that names anything else is refused."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest

from exp.config import families
from exp.config.experiment import CONFIG_DIR, GROUPS, load_groups
from exp.config.strict_yaml import load_mapping
from exp.data.registry import DATASETS
from exp.models.decoders import DECODERS, PAPER_DECODERS
from exp.rules.registry import RULES
from exp.runtime.errors import InputError
from exp.training.losses import LOSSES

FAMILIES = [  # group of YAMLs, the key that names one of the family, its table, the builders' table
    ("predict", "rule", families.RULE_TABLE, RULES),
    ("loss", "loss", families.LOSS_TABLE, LOSSES),
    ("model", "decoder", families.DECODER_TABLE, sorted({*DECODERS, *PAPER_DECODERS, "cpt"})),
    ("data", "dataset", families.DATASET_TABLE, DATASETS),
]


@pytest.mark.parametrize(("group", "key", "table", "builders"), FAMILIES, ids=[family[1] for family in FAMILIES])
def test_a_table_has_the_builders_names_and_keys_that_a_yaml_can_have(
    group: str, key: str, table: dict, builders: Iterable[str]
):
    assert list(table) == list(builders)
    known = {field.name for field in dataclasses.fields(GROUPS[group])}
    assert {option for entry in table.values() for option in entry.keys} <= known
    assert not [name for name, entry in table.items() if len(set(entry.keys)) < len(entry.keys)]


def test_the_variants_of_a_decoder_are_those_that_can_be_built():
    variants = {name: entry.variants for name, entry in families.DECODER_TABLE.items()}
    assert {name for name, own in variants.items() if "library" in own} == DECODERS.keys()
    assert {name for name, own in variants.items() if "paper" in own} == {*PAPER_DECODERS, "cpt", "unet"}
    assert all(set(entry.pools) <= set(entry.variants) for entry in families.DECODER_TABLE.values())


def test_a_data_set_needs_the_facts_that_its_class_lacks():
    for name, cls in DATASETS.items():
        entry = families.DATASET_TABLE[name]
        assert {key for key in entry.keys if getattr(cls, key, None) is None} == set(entry.needs), name


@pytest.mark.parametrize(
    ("group", "shipped", "key", "name", "nearest"),
    [
        ("predict", "rankseg_rma", "rule", "rankseg_rmaa", "rankseg_rma"),
        ("loss", "tversky_ic_present_all", "loss", "tverski", "tversky"),
        ("model", "unet_resnet18d", "decoder", "unetplus", "unetplusplus"),
        ("data", "camvid", "dataset", "canvid", "camvid"),
    ],
)
def test_an_unknown_name_is_refused(tmp_path: Path, group: str, shipped: str, key: str, name: str, nearest: str):
    """With the file, the key, the nearest known name and the others."""
    values = load_mapping(CONFIG_DIR / group / f"{shipped}.yaml") | {key: name}
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(f"{k}: {v}" for k, v in values.items()))
    with pytest.raises(InputError) as error:
        load_groups({group: [str(path)]}, [])
    message = str(error.value)
    assert message.startswith(f"{path}: key '{key}': got '{name}', expected a known name; did you mean '{nearest}'?")
    assert all(other in message for other in next(table for g, _, table, _ in FAMILIES if g == group))
