"""A folder that nnU-Net v2 wrote with --save_probabilities -> segmentations by a rule, as NIfTI on the images' grid.

    nnUNetv2_predict -i imagesTs -o predicted -d 4 -c 3d_fullres --save_probabilities
    python examples/nnunet_folder.py predicted decided --rule rankseg_levelset

Of every case nnU-Net leaves its segmentation (case.nii.gz), the probabilities (case.npz, `probabilities`, of axes
class, z, y, x) and its properties (case.pkl); dataset.json and plans.json lie beside them, or of a validation folder
two levels above. What is read here:

- the probabilities, without unpickling anything. nnU-Net resamples the logits to the image's spacing, takes the softmax
  and puts the cropped part back before it saves them, so the rule decides on the image's own grid.
- that grid, from nnU-Net's segmentation. The .pkl has it, too, but reading a pickle runs what is in it, so it stays
  closed.
- from plans.json, whether the reader turned the image (NibabelIOWithReorient), and from dataset.json the label of each
  class, or the regions and their order.

--resample is for maps of whole images at the network's spacing, from code of your own: they are resampled first, and
decided then. As nnU-Net does, it interpolates logits, of which the logarithms of probabilities differ by a number per
voxel that the softmax takes out again; linearly along all axes, where nnU-Net takes the nearest along a coarse one.

Needs numpy, nibabel and torch.
"""

import argparse
import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone; not needed after `pip install .`
from rankseg_rma import rankseg_levelset, rankseg_rma

RULES = {"rankseg_rma": rankseg_rma, "rankseg_levelset": rankseg_levelset}


def read_json(folder: Path, name: str) -> dict:
    """dataset.json or plans.json of a folder of predictions, or of <trainer>/fold_X/validation."""
    for place in (folder, folder.resolve().parents[1]):
        if (place / name).is_file():
            return json.loads((place / name).read_text())
    sys.exit(f"error: {folder / name}: no such file, nor two levels above; expected what nnU-Net v2 puts there")


def resample(prob: np.ndarray, shape: tuple[int, int, int], exclusive: bool) -> np.ndarray:
    """(C, z, y, x) probabilities -> (C, *shape), of logits that are interpolated linearly."""
    p = torch.from_numpy(prob).float().clamp(1e-7, 1 - 1e-7)
    logits = F.interpolate((p.log() if exclusive else p.logit())[None], shape, mode="trilinear")[0]
    return (logits.softmax(0) if exclusive else logits.sigmoid()).numpy()


def decide(prob: np.ndarray, dataset: dict, rule: str, **options) -> np.ndarray:
    """(C, *spatial) probabilities and dataset.json -> (*spatial) labels in its values."""
    values = {name: value for name, value in dataset["labels"].items() if name != "ignore"}
    labels = np.zeros(prob.shape[1:], np.uint16 if max(np.hstack(list(values.values()))) > 255 else np.uint8)
    if has_regions(dataset):
        masks = RULES[rule](prob, allow_overlap=True, in_batch=False, **options)
        for mask, value in zip(masks, dataset["regions_class_order"], strict=True):
            labels[mask] = value
        return labels
    prob[0, (prob == 0).all(0)] = 1  # outside of the crop older versions leave nothing but zeros
    of_class = np.sort(np.hstack(list(values.values()))).astype(labels.dtype)
    if len(of_class) != len(prob):
        sys.exit(f"error: got {len(prob)} classes, expected the {len(of_class)} labels of dataset.json")
    return of_class[RULES[rule](prob, in_batch=False, **options)]


def has_regions(dataset: dict) -> bool:
    return any(isinstance(value, list) and len(value) > 1 for value in dataset["labels"].values())


def write(labels: np.ndarray, like: nibabel.Nifti1Image, reoriented: bool, path: Path) -> None:
    """(z, y, x) labels -> NIfTI on the grid of `like`. reoriented: they are in RAS, to which the reader turned it."""
    labels = labels.transpose(2, 1, 0)
    if reoriented:
        turned = like.as_reoriented(io_orientation(like.affine))
        back = ornt_transform(axcodes2ornt("RAS"), io_orientation(like.affine))
        image = nibabel.Nifti1Image(labels, turned.affine).as_reoriented(back)
    else:
        image = nibabel.Nifti1Image(labels, like.affine)
    image.header.set_xyzt_units(*like.header.get_xyzt_units())
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what nnU-Net wrote")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--rule", choices=RULES, default="rankseg_levelset")
    parser.add_argument("--opt_metric", choices=("dice", "iou"), help="default: the rule's own")
    parser.add_argument("--resample", action="store_true", help="maps at the network's spacing, of whole images")
    args = parser.parse_args()
    dataset, plans = read_json(args.folder, "dataset.json"), read_json(args.folder, "plans.json")
    options = {"opt_metric": args.opt_metric} if args.opt_metric else {}
    cases = sorted(args.folder.glob("*.npz"))
    if not cases:
        sys.exit(f"error: {args.folder}: got no .npz file, expected those of --save_probabilities")
    for path in cases:
        own = path.with_name(path.stem + dataset["file_ending"])
        target = args.output_dir / own.name
        if target.exists():
            sys.exit(f"error: {target}: got a file there already, expected none")
        like = nibabel.load(own)
        reoriented = plans["image_reader_writer"] == "NibabelIOWithReorient"
        turned = like.as_reoriented(io_orientation(like.affine)) if reoriented else like
        with np.load(path, allow_pickle=False) as archive:
            prob = archive["probabilities"].astype(np.float32)
        shape = turned.shape[::-1]
        if prob.shape[1:] != shape and args.resample:
            prob = resample(prob, shape, not has_regions(dataset))
        if prob.shape[1:] != shape:
            sys.exit(
                f"error: {path}: got probabilities of shape {prob.shape}, expected {shape} voxels as {own} has "
                "(--resample is for maps of whole images at another spacing)"
            )
        write(decide(prob, dataset, args.rule, **options), like, reoriented, target)
        print(target)


if __name__ == "__main__":
    main()
