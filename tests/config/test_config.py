import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from exp.config.cli import DEFAULT_YAMLS
from exp.config.experiment import (
    CONFIG_DIR,
    GROUPS,
    dump_config,
    find_yaml,
    load_experiment,
    load_groups,
    training_digest,
    with_number_keys,
)
from exp.config.strict_yaml import build_dataclass, load_mapping, parse_value
from exp.runtime.errors import InputError

SHIPPED = sorted((path.parent.name, path.stem) for path in CONFIG_DIR.glob("*/*.yaml"))


def compose(*overrides: str, seed: int = 0, **yamls: str | list[str]):
    names = {**DEFAULT_YAMLS, **yamls}
    return load_experiment({g: n if isinstance(n, list) else [n] for g, n in names.items()}, overrides, seed)


@pytest.mark.parametrize(("group", "name"), SHIPPED)
def test_every_shipped_yaml_builds_its_dataclass(group: str, name: str):
    config = compose(**{group: [name] if group == "predict" else name})
    built = config.predict[0] if group == "predict" else getattr(config, group)
    assert built.name == name


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_a_folder(group: str):
    assert list((CONFIG_DIR / group).glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-5", 6e-5),
        ("6.0e-5", 6e-5),
        ("-1E3", -1000.0),
        (".5", 0.5),
        ("5", 5),
        ("1.", 1.0),
        ("1e-5x", "1e-5x"),
        ("true", True),
        ("null", None),
        ("[64,64]", [64, 64]),
        ("'6e-5'", "6e-5"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("yes", "yes"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("-7", -7),
    ],
)
def test_values_are_read_as_yaml_1_2_reads_them(text: str, value: object):
    got = parse_value(text, "here")
    assert got == value
    assert type(got) is type(value)


def test_overrides_reach_the_config_and_are_typed():
    config = compose(
        "data.crop_size=[64,32]",
        "optim.lr=1e-3",
        "schedule.train_iters=7",
        "model.pretrained=/w.pt",
        "predict.pruning_prob=0.5",
        predict=["argmax", "rankseg_rma"],
        seed=3,
    )
    assert config.data.crop_size == (64, 32)
    assert config.optim.lr == 1e-3
    assert config.schedule.train_iters == 7
    assert config.model.pretrained == "/w.pt"
    assert [rule.pruning_prob for rule in config.predict] == [None, 0.5]
    assert config.seed == 3


def test_epochs_take_the_place_of_iterations():
    assert compose("schedule.train_epochs=3").schedule.train_iters is None
    with pytest.raises(InputError, match="one of the two"):
        compose("schedule.train_epochs=3", "schedule.train_iters=5")


def test_the_window_is_resolved():
    """Stride ceil(2/3 crop), the crop that of training unless the test YAML has its own."""
    config = compose("data.crop_size=[240,320]")
    assert (config.test.crop_size, config.test.stride) == ((240, 320), (160, 214))
    assert config.with_window((60, 30)).test.stride == (40, 20), "that of a checkpoint"
    config = compose("test.crop_size=[64,64]", "test.stride=[32,16]").with_window((240, 320))
    assert (config.test.crop_size, config.test.stride) == ((64, 64), (32, 16))


@pytest.mark.parametrize("name", ["images", "comparison", "older", "x.cases", "x.val.thresholds"])
def test_a_rule_named_as_another_file_of_the_results_is_refused(tmp_path: Path, name: str):
    (tmp_path / "rule.yaml").write_text(f"name: {name}\nrule: argmax\n")
    with pytest.raises(InputError, match=f"got a rule named '{name}', expected another name"):
        compose(predict=[str(tmp_path / "rule.yaml")])


def test_the_digest_is_that_of_the_same_config_in_json():
    """Numbers as keys are text in JSON, and sorted otherwise."""
    config = compose(data="folder").to_dict()
    config["data"]["label_map"] = {0: 0, 2: 1, 10: 1, 255: 255}
    text = json.dumps(config)
    assert '"10": 1' in text
    assert training_digest(json.loads(text)) == training_digest(config)
    assert with_number_keys(json.loads(text)) == config
    config["data"]["label_map"][10] = 0
    assert training_digest(json.loads(text)) != training_digest(config)


def test_a_stride_beyond_the_window_is_refused():
    with pytest.raises(InputError, match=r"test and data YAMLs: key 'stride': got \(500, 500\), expected at most"):
        compose("test.stride=[500,500]").with_window((96, 96))


def test_run_name_joins_what_was_trained():
    config = compose(
        model="upernet_convnext_base.fb_in22k_ft_in1k_384",
        data="pascal_voc",
        schedule="40k_iters",
        optim="adamw_lr6e-5",
    )
    assert config.run_name == "upernet_convnext_base.fb_in22k_ft_in1k_384.pascal_voc.ce.40k_iters.adamw_lr6e-5"


def test_resolved_config_is_yaml_that_loads_again():
    config = compose("data.crop_size=[64,32]")
    loaded = yaml.safe_load(dump_config(config))
    assert loaded == config.to_dict()
    assert loaded["data"]["crop_size"] == [64, 32]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.crop_sise=[64,64]", ["crop_sise", "did you mean 'crop_size'"]),
        ("dta.crop_size=[64,64]", ["unknown group 'dta'", "did you mean 'data'"]),
        ("data.crop_size=64", ["data.crop_size=64", "got 64 (int)", "[a whole number, a whole number]"]),
        ("data.crop_size=[64]", ["got [64] (list)"]),
        ("data.crop_size=[64,-1]", ["data.crop_size=[64,-1]", "(64, -1)", "above 0"]),
        ("data.label_noise=some", ["got 'some' (str)", "a number"]),
        ("data.label_noise=0.1", ["data.label_noise=0.1", "no such key with the dataset shapes"]),
        ("schedule.batch_size=1.5", ["got 1.5 (float)", "a whole number"]),
        ("schedule.batch_size=true", ["got True (bool)"]),
        ("optim.lr='6e-5'", ["optim.lr", "got '6e-5' (str)", "a number"]),
        ("optim.lr=.nan", ["nan"]),
        ("optim.lr=-1e-3", ["above 0"]),
        ("optim.momentum=0.9", ["momentum", "no such key with adamw"]),
        ("schedule.train_iters=null", ["one of the two"]),
        ("test.scales=[0.5,0.5]", ["scales", "(0.5, 0.5)", "each scale once"]),
        ("test.temperature=0", ["temperature", "above 0"]),
        ("test.temperature=fited", ["got 'fited' (str)", "a number or one of fitted"]),
        ("schedule.batch_size=010", ["got '010' (str)"]),
        ("model.decoder=fcn", ["model.decoder=fcn: key 'decoder': got 'fcn'", "deeplabv3plus"]),
        ("model.output_stride=16", ["32 with the decoder unet"]),
        ("model.decoder_channels=64", ["a list of 5 whole numbers"]),
        ("predict.opt_metric=f1", ["predict.opt_metric=f1", "dice, iou"]),
        ("predict.name=x", ["unknown key 'name'"]),
        ("model.name=x", ["unknown key 'name'"]),
        ("crop_size", ["expected group.key=value"]),
        ("data.crop_size=[64", ["--set data.crop_size=[64"]),
    ],
)
def test_bad_overrides_are_refused_by_name(override: str, parts: list[str]):
    with pytest.raises(InputError) as error:
        compose(override)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [("data.label_noise=1.1", "got 1.1, expected a value in [0, 1]"), ("data.label_spread=-1", "a value in [0, 32]")],
)
def test_noise_that_cannot_be_is_refused(override: str, expected: str):
    with pytest.raises(InputError) as error:
        compose(override, data="shapes_noisy")
    assert override in str(error.value)
    assert expected in str(error.value)


def test_an_override_that_no_rule_reads_is_refused():
    with pytest.raises(InputError, match="none of the rules asked for reads the key 'opt_metric'"):
        compose("predict.opt_metric=iou", predict=["argmax"])


@pytest.mark.parametrize("name", ["comparison", "calibration", "timing", "argmax.cases"])
def test_a_rule_whose_results_would_overwrite_others_is_refused(tmp_path: Path, name: str):
    path = tmp_path / f"{name}.yaml"
    path.write_text((CONFIG_DIR / "predict" / "argmax.yaml").read_text())
    with pytest.raises(InputError, match=f"got a rule named '{name}', expected another name"):
        compose(predict=[str(path)])


def test_the_same_rule_twice_is_refused():
    with pytest.raises(InputError, match="expected each rule once"):
        compose(predict=["argmax", "argmax"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("loss: ce\naux_wieght: 0.5", ["unknown key 'aux_wieght'", "did you mean 'aux_weight'"]),
        ("loss: ce\nloss: ce", ["key 'loss' stands twice"]),
        ("aux_weight: 0.5", ["missing key 'loss'"]),
        ("loss: ce\naux_weight: '0.5'", ["key 'aux_weight'", "got '0.5' (str)", "a number"]),
        ("loss: ce\naux_weight: 1.5", ["key 'aux_weight'", "got 1.5", "[0, 1)"]),
        ("loss: [", ["while parsing"]),
        ("- ce", ["got list, expected keys with values"]),
        ("", ["got NoneType"]),
        ("loss: !!python/object/apply:os.system ['true']", ["could not determine a constructor"]),
    ],
)
def test_bad_yaml_files_are_refused_with_path_and_key(tmp_path: Path, text: str, parts: list[str]):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        compose(loss=str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_yaml_by_path_is_used_and_names_the_run(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("loss: ce\naux_weight: 0.25\n")
    config = compose(loss=str(path))
    assert config.loss.aux_weight == 0.25
    assert ".mine." in config.run_name


def test_an_unknown_name_lists_the_choices_and_the_nearest():
    with pytest.raises(InputError, match=r"did you mean 'pascal_voc'\?; known: ade20k, camvid, cityscapes, "):
        find_yaml("data", "pascal_vok")
    with pytest.raises(InputError, match="no such file"):
        find_yaml("data", "nowhere/pascal_voc.yaml")


def test_all_keys_of_shipped_yamls_are_read():
    """No dead keys: building fails on an unknown one, and every field of the dataclasses is a documented key."""
    for group, name in SHIPPED:
        path = find_yaml(group, name)
        mapping = load_mapping(path)
        built = build_dataclass(GROUPS[group], {"name": name, **mapping}, path, {})
        assert mapping.keys() <= {f.name for f in dataclasses.fields(built)}


def test_the_digest_tells_what_is_trained_and_nothing_else():
    pretrained = "model.pretrained=true"
    base = training_digest(compose(pretrained).to_dict())
    assert re.fullmatch(r"[0-9a-f]{64}", base)
    free = ("model.pretrained=/w.pt", "schedule.num_workers=1", "schedule.cudnn_benchmark=true", "data.val_samples=3")
    for same in (*free, "schedule.tf32=conv", "test.flip=true"):
        assert training_digest(compose(pretrained, same).to_dict()) == base
    for other in ("model.pretrained=false", "optim.lr=1e-3", "data.crop_size=[32,32]", "schedule.batch_size=2"):
        assert training_digest(compose(pretrained, other).to_dict()) != base
    assert training_digest(compose(pretrained, seed=1).to_dict()) != base


@pytest.mark.parametrize("name", ["lits_fold0", "kits_fold4", "hippocampus_fold2"])
def test_a_fold_in_the_name_of_a_data_yaml(name: str):
    """The names of the paper's code; the run is the same as that of --set data.fold."""
    data, fold = name.split("_fold")
    config = compose(data=name)
    assert config == compose(f"data.fold={fold}", data=data)
    assert f".{name}." in config.run_name
    assert compose("data.fold=1", data=name).data.fold == 1
    for wrong in ("lits_fold5", "camvid_fold0", "nothing_fold0"):
        with pytest.raises(InputError, match=f"--data_yaml {wrong}: no such YAML"):
            compose(data=wrong)


def test_trainings_under_the_recipe_of_before_are_others():
    """Absent, optim.warmup and data.augmentation mean what they were; other keys that came later change nothing."""
    plain = compose().to_dict()
    older = {**plain, "optim": {k: v for k, v in plain["optim"].items() if k != "warmup"}}
    older["data"] = {k: v for k, v in plain["data"].items() if k != "augmentation"}
    before = compose("optim.warmup=from_start", "data.augmentation=corner").to_dict()
    assert training_digest(older) == training_digest(before) != training_digest(plain)
    assert "padding" not in plain["test"]
    assert all("sees_padding" not in rule for rule in plain["predict"])
    paper = compose("test.padding=centred", predict=["argmax", "rankseg_rma_paper"]).to_dict()
    assert paper["test"]["padding"] == "centred"
    assert [rule.get("sees_padding") for rule in paper["predict"]] == [None, True]


def test_configs_from_before_a_key_was_there_have_the_digest_of_its_default():
    plain = compose().to_dict()
    older = {**plain, "schedule": {k: v for k, v in plain["schedule"].items() if k not in ("tf32", "cudnn_benchmark")}}
    older["model"] = {key: value for key, value in plain["model"].items() if key != "variant"}
    assert training_digest(older) == training_digest(plain)
    paper = compose("model.variant=paper").to_dict()
    assert training_digest(older) != training_digest(paper)
    assert training_digest(compose("schedule.tf32=all").to_dict()) != training_digest(plain)


def test_a_rule_under_another_name_with_other_values():
    names = ["argmax", "rankseg_rma", "half=rankseg_rma:pruning_prob=0.5,opt_metric=iou"]
    _, plain, half = load_groups({"predict": names}, ["predict.unassigned=first"])["predict"]
    assert (plain.name, plain.pruning_prob, plain.opt_metric) == ("rankseg_rma", 0.1, "dice")
    assert half == replace(plain, name="half", pruning_prob=0.5, opt_metric="iou")
    assert half.unassigned == "first"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a=rankseg_rma:pruning=0.5", "got 'pruning=0.5', expected KEY=VALUE; did you mean 'pruning_prob'"),
        ("a=rankseg_rma:pruning_prob", "got 'pruning_prob', expected KEY=VALUE"),
        ("a=rankseg_rma:pruning_prob=2", "key 'pruning_prob': got 2"),
        ("a=rankseg_rm:pruning_prob=0.2", "did you mean 'rankseg_rma'"),
        ("argmax=rankseg_rma:pruning_prob=0.2", "expected each rule once"),
        ("comparison=rankseg_rma:pruning_prob=0.2", "got a rule named 'comparison', expected another name"),
    ],
)
def test_wrong_variants_of_a_rule(name: str, part: str):
    with pytest.raises(InputError) as caught:
        load_groups({"predict": ["argmax", name]}, [])
    assert part in str(caught.value)
