"""The scripts of examples/, each on files in its library's own format, made here with random weights."""

import importlib
import json
import pickle
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from rankseg_rma import rankseg_levelset, rankseg_rma
from tests.conftest import write_png

SIZE = (61, 83)  # of no power of two


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3)).astype(np.uint8))
    write_png(tmp_path / "photo.png", np.asarray(coarse.resize(SIZE[::-1], Image.Resampling.BICUBIC)))
    return tmp_path / "photo.png"


@pytest.fixture
def run(monkeypatch):
    """A function: name, arguments -> nothing; examples/<name>.py, run in this process."""

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        importlib.import_module(f"examples.{name}").main()

    return run


def read_mask(path: Path) -> np.ndarray:
    with Image.open(path) as mask:
        return np.asarray(mask)


def sharpen(layer: nn.Module) -> None:
    """Random weights of a classifier -> such as tell classes apart, or every pixel would look the same."""
    with torch.no_grad():
        layer.weight.mul_(20)


def spread(model: nn.Module) -> None:
    """Statistics of the batch norms as a training leaves them; those of a new network let activations die out."""
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 128, 128))
    model.eval()


def test_a_network_of_smp(run, photo: Path, tmp_path: Path):
    """From a folder of save_pretrained: the labels are the rule's on the library's own logits, padding cut off."""
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = smp.Unet("mobilenet_v2", encoder_weights=None, classes=5).eval()
    sharpen(model.segmentation_head[0])
    model.save_pretrained(tmp_path / "network")
    run("smp_network", tmp_path / "network", photo, tmp_path / "mask.png")
    x = torch.from_numpy(read_mask(photo).copy()).permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        prob = model(F.pad(x, (0, 96 - SIZE[1], 0, 64 - SIZE[0])))[..., : SIZE[0], : SIZE[1]].softmax(1)
    mask = read_mask(tmp_path / "mask.png")
    assert (mask == rankseg_levelset(prob)[0].numpy()).mean() > 0.999
    assert len(np.unique(mask)) > 1
    with pytest.raises(FileExistsError):
        run("smp_network", tmp_path / "network", photo, tmp_path / "mask.png")


def test_a_network_of_torchvision(run, photo: Path, tmp_path: Path):
    """From a .pth file: resized to 520 pixels, and the logits back to the image's size."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    name = "lraspp_mobilenet_v3_large"
    model = get_model(name, weights=None, weights_backbone=None, num_classes=21).eval()
    spread(model)
    sharpen(model.classifier.high_classifier)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    run("torchvision_network", name, photo, tmp_path / "mask.png", tmp_path / "weights.pth")
    example = importlib.import_module("examples.torchvision_network")
    _, preprocess = example.load(name, tmp_path / "weights.pth")
    with torch.no_grad(), Image.open(photo) as image:
        logits = model(preprocess(image)[None])["out"]
    assert min(logits.shape[-2:]) == 520
    prob = F.interpolate(logits, SIZE, mode="bilinear", align_corners=False).softmax(1)
    mask = read_mask(tmp_path / "mask.png")
    assert (mask == rankseg_levelset(prob)[0].numpy()).mean() > 0.999
    assert len(np.unique(mask)) > 1


def test_a_network_of_torchvision_with_its_auxiliary_head(tmp_path: Path):
    from torchvision.models import get_model

    name = "deeplabv3_mobilenet_v3_large"
    model = get_model(name, weights=None, weights_backbone=None, num_classes=21, aux_loss=True)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded, _ = importlib.import_module("examples.torchvision_network").load(name, tmp_path / "weights.pth")
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.filterwarnings("ignore")  # transformers has some of its own
def test_the_post_processing_of_transformers(run, photo: Path, tmp_path: Path):
    """With argmax as the rule it is the library's own; from a folder of save_pretrained."""
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    config = transformers.SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=6)
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    sharpen(model.decode_head.classifier)
    processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 96})
    for part in (model, processor):
        part.save_pretrained(tmp_path / "network")
    with torch.no_grad(), Image.open(photo) as image:
        outputs = model(**processor(images=image, return_tensors="pt"))
    assert outputs.logits.shape[-2:] == (16, 24)
    example = importlib.import_module("examples.transformers_network")
    post_process = example.post_process_semantic_segmentation
    (own,) = processor.post_process_semantic_segmentation(outputs, [SIZE])
    (label,) = post_process(outputs, [SIZE], rule=lambda prob: prob.argmax(1))
    assert torch.equal(label, own)
    assert post_process(outputs)[0].shape == (16, 24)
    run("transformers_network", tmp_path / "network", photo, tmp_path / "mask.png")
    prob = F.interpolate(outputs.logits, SIZE, mode="bilinear", align_corners=False).softmax(1)
    mask = read_mask(tmp_path / "mask.png")
    assert (mask == rankseg_levelset(prob)[0].numpy()).mean() > 0.999
    assert len(np.unique(mask)) > 1
    (tmp_path / "network" / "model.safetensors").unlink()  # the hub has both kinds of files
    torch.save(model.state_dict(), tmp_path / "network" / "pytorch_model.bin")
    run("transformers_network", tmp_path / "network", photo, tmp_path / "again.png")
    assert (read_mask(tmp_path / "again.png") == mask).all()
    with pytest.raises(ValueError, match="expected outputs with logits"):
        post_process(transformers.modeling_outputs.BaseModelOutput(), [SIZE])


@pytest.mark.filterwarnings("ignore")  # MONAI has some of its own
def test_the_transforms_of_monai():
    """In place of AsDiscrete: the same shape, type and metadata, also of numpy arrays and in a Compose."""
    pytest.importorskip("monai", reason="needs the package monai")
    from monai.data import MetaTensor
    from monai.transforms import AsDiscrete, Compose

    from examples.monai_transform import RankSEG, RankSEGd

    torch.manual_seed(0)
    prob = F.interpolate(4 * torch.randn(1, 3, 3, 3, 3), (7, 9, 11), mode="trilinear").softmax(1)[0]
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0]))
    image = MetaTensor(prob, affine=affine, meta={"filename_or_obj": "case_1.nii.gz"})
    own, label = AsDiscrete(argmax=True)(image), RankSEG()(image)
    assert (label.shape, label.dtype, type(label)) == (own.shape, own.dtype, MetaTensor)
    assert torch.equal(label.affine, affine.double())
    assert label.meta["filename_or_obj"] == "case_1.nii.gz"
    assert torch.equal(label.as_tensor()[0].long(), rankseg_levelset(prob[None])[0])
    array = RankSEG("rankseg_rma", opt_metric="iou")(prob.numpy())
    assert isinstance(array, np.ndarray)
    assert (array[0] == rankseg_rma(prob[None], "iou")[0].numpy()).all()
    masks = RankSEG("rankseg_rma", allow_overlap=True)(prob)
    assert torch.equal(masks, rankseg_rma(prob[None], allow_overlap=True)[0].float())
    post = Compose([RankSEGd(keys=("pred", "second"), rule="rankseg_rma", allow_missing_keys=True)])
    data = {"pred": image, "label": label}
    found = post(data)
    assert torch.equal(found["pred"].as_tensor()[0].long(), rankseg_rma(prob[None])[0])
    assert found["label"] is label
    assert data["pred"] is image


class NnUNet:
    """A folder as `nnUNetv2_predict --save_probabilities` leaves it: what its export and its readers do, done here."""

    def __init__(self, folder: Path, reader: str, labels: dict, **dataset: object) -> None:
        self.folder, self.reader = folder, reader
        folder.mkdir()
        dataset = {"labels": labels, "file_ending": ".nii.gz", **dataset}
        (folder / "dataset.json").write_text(json.dumps(dataset))
        (folder / "plans.json").write_text(json.dumps({"image_reader_writer": reader}))

    def save(self, case: str, prob: np.ndarray, own: np.ndarray, affine: np.ndarray) -> nibabel.Nifti1Image:
        """(C, x, y, z) probabilities and (x, y, z) labels on the image's grid -> case.npz, .nii.gz and .pkl."""
        image = nibabel.Nifti1Image(own.astype(np.uint8), affine)
        nibabel.save(image, self.folder / f"{case}.nii.gz")
        channels = [nibabel.Nifti1Image(p.astype(np.float32), affine) for p in prob]
        if self.reader == "NibabelIOWithReorient":
            channels = [nibabel.as_closest_canonical(channel) for channel in channels]
        stored = np.stack([np.asarray(channel.dataobj).transpose(2, 1, 0) for channel in channels])
        np.savez_compressed(self.folder / f"{case}.npz", probabilities=stored)
        (self.folder / f"{case}.pkl").write_bytes(pickle.dumps(Opened(self.folder / "opened")))
        return image


class Opened:
    """A pickle that leaves a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


# Voxels of 0.7 x 0.9 x 3 mm; the axes lead to the left, to the front and up, and to the front, down and to the left.
LAS = np.array([[-0.7, 0, 0, 40], [0, 0.9, 0, -30], [0, 0, 3, 5], [0, 0, 0, 1]])
AIL = np.array([[0, 0, -3, 40], [0.7, 0, 0, -30], [0, -0.9, 0, 5], [0, 0, 0, 1]])


def volume_map(classes: int, *shape: int) -> np.ndarray:
    coarse = 4 * torch.randn(1, classes, 4, 4, 3, generator=torch.Generator().manual_seed(classes))
    return F.interpolate(coarse, shape, mode="trilinear").softmax(1)[0].numpy()


@pytest.mark.parametrize("affine", [LAS, AIL], ids=["LAS", "AIL"])
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("rule", [rankseg_rma, rankseg_levelset])
def test_a_folder_of_nnunet(run, tmp_path: Path, reader: str, affine: np.ndarray, rule):
    """The labels lie on the image's grid, whichever way nnU-Net read it, and no pickle is opened."""
    prob = volume_map(3, 11, 8, 5)
    folder = NnUNet(tmp_path / "predicted", reader, {"background": 0, "liver": 1, "tumour": 2, "ignore": 3})
    image = folder.save("case_1", prob, prob.argmax(0), affine)
    run("nnunet_folder", tmp_path / "predicted", tmp_path / "decided", "--rule", rule.__name__)
    written = nibabel.load(tmp_path / "decided" / "case_1.nii.gz")
    np.testing.assert_allclose(written.affine, image.affine, atol=1e-6)
    assert written.get_data_dtype() == np.uint8
    expected = rule(prob, in_batch=False)
    assert (np.asarray(written.dataobj) == expected).mean() > 0.99  # sums are in another order
    assert (expected != prob.argmax(0)).any()
    assert not (tmp_path / "predicted" / "opened").exists()
    with pytest.raises(SystemExit, match="got a file there already, expected none"):
        run("nnunet_folder", tmp_path / "predicted", tmp_path / "predicted")


def test_regions_of_nnunet(run, tmp_path: Path):
    """Overlapping regions are decided each by itself, and painted in nnU-Net's order."""
    prob = volume_map(4, 11, 8, 5)[:3].cumsum(0)[::-1]  # whole, core, enhancing: each within the one before
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
    folder = NnUNet(tmp_path / "predicted", "SimpleITKIO", labels, regions_class_order=[1, 2, 3])
    folder.save("case_1", prob, prob.argmax(0), LAS)
    run("nnunet_folder", tmp_path / "predicted", tmp_path / "decided", "--rule", "rankseg_rma", "--opt_metric", "iou")
    written = np.asarray(nibabel.load(tmp_path / "decided" / "case_1.nii.gz").dataobj)
    masks = rankseg_rma(np.ascontiguousarray(prob), "iou", allow_overlap=True, in_batch=False)
    expected = np.select([masks[2], masks[1], masks[0]], [3, 2, 1])
    assert (written == expected).mean() > 0.99
    assert set(np.unique(written)) == {0, 1, 2, 3}


def test_maps_of_nnunet_at_another_spacing(run, tmp_path: Path):
    """They are refused, or resampled as logits before anything is decided where they are said to be of whole images."""
    logits = torch.from_numpy(volume_map(3, 6, 4, 5)).log()
    fine = F.interpolate(logits[None], (12, 8, 5), mode="trilinear").softmax(1)
    folder = NnUNet(tmp_path / "predicted", "SimpleITKIO", {"background": 0, "liver": 1, "tumour": 2})
    folder.save("case_1", logits.exp().numpy(), np.zeros((12, 8, 5)), LAS)
    with pytest.raises(
        SystemExit, match=r"case_1.npz: got probabilities of shape \(3, 5, 4, 6\), expected \(5, 8, 12\)"
    ):
        run("nnunet_folder", tmp_path / "predicted", tmp_path / "decided")
    run("nnunet_folder", tmp_path / "predicted", tmp_path / "decided", "--resample")
    written = np.asarray(nibabel.load(tmp_path / "decided" / "case_1.nii.gz").dataobj)
    assert (written == rankseg_levelset(fine)[0].numpy()).mean() > 0.99


def test_what_nnunet_cropped_away_is_background(run, tmp_path: Path):
    """Its older versions leave zeros of all classes there."""
    prob = volume_map(3, 11, 8, 5)[::-1].copy()  # of which the last class is the largest
    prob[:, :4] = 0
    folder = NnUNet(tmp_path / "predicted", "SimpleITKIO", {"background": 0, "liver": 1, "tumour": 2})
    folder.save("case_1", prob, prob.argmax(0), LAS)
    run("nnunet_folder", tmp_path / "predicted", tmp_path / "decided", "--rule", "rankseg_rma")
    written = np.asarray(nibabel.load(tmp_path / "decided" / "case_1.nii.gz").dataobj)
    assert not written[:4].any()
    assert written[4:].any()
