"""CPT: what a block computes, its memory (over two processes: tests/training/test_distributed.py), Swin's windows."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exp.models import Segmentor, build_model
from exp.models.cpt import CPT, Block
from exp.runtime.distributed import Dist
from tests.models.test_models import combined

WIDTH, CLASSES = 16, 5
CHANNELS = (3, 0, 8, 12, 16, 24)


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    mean, var = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, correction=0)
    return (x - mean) / (var + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def prototypes_of(block: Block, high: Tensor) -> Tensor:
    y = layer_norm(block.norm_high, high)
    scores = block.scores[1](block.scores[0](y)).flatten(2)
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    return torch.einsum("bln,bwn->blw", weights, block.values(y).flatten(2))


def block_by_words(block: Block, low: Tensor, high: Tensor) -> Tensor:
    """The block in evaluation mode, head by head and without attention's kernel."""
    prototypes = 0.8 * prototypes_of(block, high) + 0.2 * block.memory
    keys, values = block.keys_values(prototypes).split(WIDTH, dim=-1)
    queries = block.queries(layer_norm(block.norm_low, low)).flatten(2).transpose(1, 2)
    outs = []
    for q, k, v in zip(*(x.split(WIDTH // 4, dim=-1) for x in (queries, keys, values))):
        z = q @ k.transpose(1, 2) / (WIDTH // 4) ** 0.5
        outs.append((z.max(dim=-1, keepdim=True).values - z).softmax(dim=-1) @ v)
    attended = torch.cat(outs, dim=-1).transpose(1, 2).reshape(low.shape)
    h = block.project(attended) + low
    _, widen, depthwise, _, narrow = block.expand
    return narrow(F.gelu(depthwise(widen(layer_norm(block.expand[0], h))))) + h


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    made = Block(WIDTH, CLASSES)
    for norm in (made.norm_low, made.norm_high, made.expand[0]):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return made


@torch.inference_mode()
def test_a_block_word_for_word(block: Block):
    low, high = torch.randn(2, WIDTH, 12, 10), torch.randn(2, WIDTH, 6, 5)
    memory = block.memory.clone()
    torch.testing.assert_close(memory.norm(dim=-1), torch.ones(1, CLASSES))
    torch.testing.assert_close(block.eval()(low, high), block_by_words(block, low, high))
    assert torch.equal(block.memory, memory)


def test_the_memory_follows_the_prototypes_in_training(block: Block):
    """A step reads the memory from before, and leaves a fifth of the mean prototypes of its batch, of length 1."""
    low, high = torch.randn(2, WIDTH, 12, 10), torch.randn(2, WIDTH, 6, 5)
    with torch.no_grad():
        expected, before = block_by_words(block, low, high), block.memory.clone()
        mean = prototypes_of(block, high).mean(dim=0, keepdim=True)
    found = block.train()(low, high)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(block.memory, 0.8 * before + 0.2 * mean / mean.norm(dim=-1, keepdim=True))
    found.sum().backward()
    assert not block.memory.requires_grad


@torch.inference_mode()
def test_the_decoder_word_for_word():
    torch.manual_seed(0)
    decoder = CPT(CHANNELS, WIDTH, CLASSES).eval()
    features = [torch.randn(2, c, 48 // s, 64 // s) for c, s in zip(CHANNELS, (1, 2, 4, 8, 16, 32)) if c]
    lateral = [conv(x) for conv, x in zip(decoder.lateral, features[::-1])]
    state, maps = lateral[0], [lateral[0]]
    for block, smooth, low in zip(decoder.blocks, decoder.smooth, lateral[1:]):
        state = block_by_words(block, low, state)
        maps.append(F.conv2d(state, smooth.weight, smooth.bias, padding=1))
    maps = [F.interpolate(x, (12, 16), mode="bilinear", align_corners=False) for x in maps]
    conv, norm, _ = decoder.fuse
    fused = F.gelu(norm(F.conv2d(torch.cat(maps, dim=1), conv.weight, padding=1)))
    conv, norm, _ = decoder.pool[1]
    pooled = F.gelu(norm(F.conv2d(features[-1].mean(dim=(2, 3), keepdim=True), conv.weight)))
    expected = torch.cat([fused, pooled.expand(-1, -1, 12, 16)], dim=1)
    assert decoder.width == expected.shape[1] == WIDTH + 48
    features.insert(1, torch.empty(2, 0, 24, 32))
    torch.testing.assert_close(decoder(features), expected)


def small() -> Segmentor:
    torch.manual_seed(0)
    return build_model(combined("cpt", decoder_channels=WIDTH), CLASSES)


def test_first_weights():
    """The classifier is filled as the decoder's other convolutions; the loss reads one map."""
    model = small()
    classifier = model.head[-1].weight
    assert classifier.abs().max().item() == pytest.approx((6 / (WIDTH + 48)) ** 0.5, rel=0.02)
    outputs = model.train()(torch.randn(2, 3, 64, 64))
    assert len(outputs) == 1


@torch.inference_mode()
def test_swin_shifts_the_windows_of_all_its_stages():
    """As one that is made for the crop does, of which the paper's code has the features."""
    own = small().encoder.eval()
    made = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, img_size=(256, 256)).eval()
    made.load_state_dict(own.model.state_dict())
    image = torch.randn(1, 3, 256, 256)
    for found, expected in zip(own(image)[2:], made(image), strict=True):
        assert torch.equal(found, expected.permute(0, 3, 1, 2))


def train_a_share(dist: Dist) -> dict[str, Any]:
    """One forward and backward of the decoder on this process's share of four images: memories and gradients."""
    torch.manual_seed(0)
    decoder = CPT(CHANNELS, WIDTH, CLASSES).double().train()
    for layer in decoder.modules():
        if isinstance(layer, nn.BatchNorm2d):  # several processes have SyncBN, but not on the CPU
            layer.eval()
    memories = [block.memory for block in decoder.blocks]
    before = [memory.clone() for memory in memories]
    features = [torch.randn(4, c, 32 // s, 32 // s).double() for c, s in zip(CHANNELS, (1, 2, 4, 8, 16, 32))]
    model = dist.wrap(decoder)  # held until the gradients are averaged
    model([x.chunk(dist.world_size)[dist.rank] for x in features]).square().mean().backward()
    return {"before": before, "after": memories, "grads": {name: p.grad for name, p in decoder.named_parameters()}}
