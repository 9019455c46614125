import json
from pathlib import Path

import pytest
import torch

from exp.data.sets.shapes import Shapes
from exp.evaluation.inference import Inference
from exp.evaluation.temperature import (
    Pixels,
    describe_fit,
    draw_pixels,
    fit,
    load_temperature,
    negative_log_likelihood,
    split_half,
    spread,
)
from exp.runtime.distributed import Dist
from exp.runtime.errors import InputError
from tests.conftest import TINY, TINY_RUN


def pixels(true_temperature: float, views: int = 1, number: int = 20000) -> Pixels:
    """Labels drawn from softmax(logits / true_temperature)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(number, views, 4, generator=generator) * 3
    prob = (logits / true_temperature).softmax(-1).mean(1)
    return Pixels(logits, torch.multinomial(prob, 1, generator=generator)[:, 0])


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("true_temperature", [0.5, 1.0, 2.7])
def test_the_temperature_that_drew_the_labels_is_found(true_temperature: float, views: int):
    assert fit(pixels(true_temperature, views)) == pytest.approx(true_temperature, rel=0.03)


def test_the_fit_is_the_minimum_of_the_likelihood():
    drawn = pixels(1.8, 2, 500)
    found = fit(drawn)
    values = [negative_log_likelihood(drawn, found * factor).item() for factor in (0.999, 1.0, 1.001)]
    assert values[1] == min(values)
    prob = (drawn.logits / found).softmax(-1).mean(1)
    expected = -prob.double().gather(1, drawn.label[:, None]).log().mean().item()
    assert values[1] == pytest.approx(expected, rel=1e-6)


def test_calibration_improves_on_other_pixels():
    content = describe_fit(fit(pixels(2.5)), pixels(2.5), pixels(2.5, number=5000))
    assert content["held_out"]["before"]["ECED"] > 10
    assert content["held_out"]["after"]["ECED"] < 2
    for when in ("before", "after"):  # the diagram is of the same pixels as the error beside it
        bins = content["held_out"][when]["top_label"]
        gaps = [n * abs(c - a) for n, c, a in zip(*bins.values()) if n]
        assert 100 * sum(gaps) / sum(bins["pixels"]) == pytest.approx(content["held_out"][when]["ECED"])
    assert content["held_out"]["after"]["NLL"] < content["held_out"]["before"]["NLL"]


def test_an_extreme_fit_is_refused():
    logits = torch.tensor([[1.0, 0.0]]).repeat(50, 1)[:, None]
    with pytest.raises(InputError, match="are all pixels right"):
        fit(Pixels(logits, torch.zeros(50, dtype=torch.int64)))


def test_pixels_are_the_logits_of_inference_whatever_the_processes(monkeypatch):
    monkeypatch.setattr("exp.evaluation.temperature.PIXELS", 40)
    dataset = Shapes(None, "val", max_samples=5)
    inference = Inference((64, 64), (43, 43), 4, flip=True, temperature=None)
    network = torch.nn.Conv2d(3, 6, 3, padding=1)
    parts: list[dict] = []

    class Recording(Dist):
        stop = False

        def stop_if_asked(self, what: str) -> None: ...

        def gather(self, item: dict) -> list[dict]:
            parts.append(item)
            return parts

    def normalize(image: torch.Tensor) -> torch.Tensor:
        return image / 255

    drawn = draw_pixels(network, dataset, range(5), inference, normalize, 7, Recording(0, 1, torch.device("cpu")))
    assert drawn.logits.shape == (200, 2, 6)
    assert (drawn.label != 255).all()
    parts.clear()
    with pytest.raises(KeyError):  # the first of two processes has images 0, 2, 4
        draw_pixels(network, dataset, range(5), inference, normalize, 7, Recording(0, 2, torch.device("cpu")))
    again = draw_pixels(network, dataset, range(5), inference, normalize, 7, Recording(1, 2, torch.device("cpu")))
    assert torch.equal(again.logits, drawn.logits)
    assert torch.equal(again.label, drawn.label)
    item = dataset[0]
    with torch.inference_mode():
        view = next(iter(inference.logits(network, normalize(item.image[None]))))[0].flatten(1).t()
    assert all((view == row).all(1).any() for row in drawn.logits[:40, 0])


def test_halves_are_apart_and_spread_is_even():
    first, second = split_half(Shapes(None, "val", max_samples=9))
    assert (first, second) == ([0, 2, 4, 6, 8], [1, 3, 5, 7])
    assert len(spread(range(1000))) == 200
    assert spread(range(1000))[:3] == [0, 5, 10]
    with pytest.raises(InputError, match="expected 2 or more"):
        split_half(Shapes(None, "val", max_samples=1))


def test_other_weights_and_other_files_are_refused(tmp_path: Path):
    path = tmp_path / "temperature.json"
    with pytest.raises(InputError, match="no such file, expected that of these weights"):
        load_temperature(path, "a")
    path.write_text(json.dumps({"temperature": 1.5, "weights_checksum": "a"}))
    assert load_temperature(path, "a") == 1.5
    with pytest.raises(InputError, match="temperature of other weights"):
        load_temperature(path, "b")
    for text in ("{", "[]", '{"temperature": "1.5", "weights_checksum": "a"}'):
        path.write_text(text)
        with pytest.raises(InputError, match=r"got another file|cannot be read"):
            load_temperature(path, "a")


def test_a_run_fits_stores_and_uses_its_temperature(program, tmp_path: Path):
    longer = [*TINY, "schedule.train_iters=30"]  # or no temperature would be the best
    flags = [*longer, "--output_dir", tmp_path, "--predict_yaml", "argmax"]
    fitted = [*longer, "test.temperature=fitted", "--output_dir", tmp_path, "--predict_yaml", "argmax"]
    assert "for --test-only" in program(*fitted)[2]
    assert program(*flags)[0] == 0
    results = tmp_path / TINY_RUN / "results"
    plain = json.loads((results / "calibration.json").read_text())
    status, _, err = program(*fitted, "--test-only")
    assert status == 2
    assert "temperature.json: no such file" in err
    for part in ("val-part", "train"):
        status, printed, err = program(*fitted, "--test-only", "--fit_temperature", part)
        assert status == 0, err
        assert f"fitted on {part}; ECED of other images" in printed
        stored = json.loads((results / "temperature.json").read_text())
        assert stored["part"] == part
        used = json.loads((results / "argmax.json").read_text())["config"]["test"]["temperature"]
        assert used == stored["temperature"] != 1
        assert json.loads((results / "calibration.json").read_text())["metrics"] != plain["metrics"]
