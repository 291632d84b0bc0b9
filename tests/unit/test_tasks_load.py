"""Labelled images from outside: what is read, in which order, and what is refused."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modicum.errors import InvalidInput, UsageError
from modicum.tasks import check, load, same_classes

RNG = np.random.default_rng(0)


def encoded(value: int = 0, side: int = 6, form: str = "PNG", mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (side + 2, side), value if mode != "RGB" else (value, 0, 9)).save(out, form)
    return out.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zipped(path: Path, files: dict[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


FILES = {f"{c}/{k}.png": encoded(10 * k) for c in ("dog", "cat") for k in range(3)}


def refused(match: str, source: object, **options: object) -> str:
    """The whole error text; loading or checking must refuse."""
    with pytest.raises(InvalidInput, match=match) as caught:
        check(load(source, **options))
    return caught.value.render()


# ---- folders and zips ------------------------------------------------------------------------


def test_a_folder_is_read_in_sorted_order(tmp_path):
    d = load(write(tmp_path, FILES))
    assert d.classes == ("cat", "dog")
    assert d.names == ("cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png")
    assert d.labels.tolist() == [0, 0, 0, 1, 1, 1] and d.labels.dtype == np.int64
    assert d.counts.tolist() == [3, 3]
    assert d.image(2).shape == (6, 8, 3) and d.image(2).dtype == np.uint8
    assert d.image(2)[0, 0].tolist() == [20, 0, 9]


def test_a_zip_is_the_same_dataset_as_its_folder(tmp_path):
    folder = load(write(tmp_path / "set", FILES))
    flat = load(zipped(tmp_path / "flat.zip", FILES))
    rooted = load(zipped(tmp_path / "rooted.zip", {f"pets/{n}": b for n, b in FILES.items()}))
    for other in (flat, rooted, load(write(tmp_path / "above" / "pets", FILES).parent)):
        assert other.names == folder.names and other.classes == folder.classes
        assert all((other.image(i) == folder.image(i)).all() for i in range(len(folder)))


def test_deeper_folders_belong_to_the_class_and_hidden_files_to_nobody(tmp_path):
    more = {"cat/old/7.JPG": encoded(form="JPEG"), "cat/.DS_Store": b"", "__MACOSX/cat/0.png": b"?"}
    d = load(zipped(tmp_path / "x.zip", FILES | more | {"README.txt": b"about"}))
    assert d.classes == ("cat", "dog") and "cat/old/7.JPG" in d.names and len(d) == 7
    check(d)


def test_a_class_can_be_a_path_of_folders_and_a_group_part_of_the_path(tmp_path):
    files = {f"set/{a}/c{c}/{k:02}.png": encoded() for a in "xy" for c in "12" for k in range(2)}
    d = load(write(tmp_path, files), class_level=2, group=r"(\d+)\.png$")
    assert d.classes == ("x/c1", "x/c2", "y/c1", "y/c2")
    assert d.group == ("00", "01") * 4
    assert load(tmp_path, class_level=2, group=r"^[^/]+").group == ("x",) * 4 + ("y",) * 4


def test_every_format_is_read(tmp_path):
    forms = {"bmp": "BMP", "gif": "GIF", "jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "ppm": "PPM"}
    files = {f"a/{s}.{s}": encoded(form=f) for s, f in forms.items()}
    files |= {"b/x.webp": encoded(form="WEBP"), "b/grey.pgm": encoded(7, form="PPM", mode="L")}
    d = load(write(tmp_path, files))
    check(d)
    assert len(d) == 8 and d.image(6).shape == (6, 8, 1)


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGBA", 3)]
)
def test_grey_has_one_channel_and_everything_else_three(tmp_path, mode, channels):
    Path(tmp_path / "a").mkdir()
    Image.new(mode, (5, 4)).save(tmp_path / "a" / "x.png")
    assert load(tmp_path).image(0).shape == (4, 5, channels)


def test_a_photo_is_turned_upright(tmp_path):
    note = Image.Exif()
    note[0x0112] = 6
    Path(tmp_path / "a").mkdir()
    Image.new("RGB", (8, 4)).save(tmp_path / "a" / "x.jpg", exif=note)
    assert load(tmp_path).image(0).shape == (8, 4, 3)


def test_large_images_can_be_shrunk_when_they_are_read(tmp_path):
    files = {"a/big.jpg": encoded(200, 298, "JPEG"), "a/small.png": encoded(side=10)}
    d = load(write(tmp_path, files), shrink=50)
    assert d.image(0).shape == (50, 50, 3) and d.image(1).shape == (10, 12, 3)


def test_images_are_kept_as_room_allows_and_nobody_writes_to_them(tmp_path):
    write(tmp_path, FILES)
    kept, not_kept = load(tmp_path), load(tmp_path, keep_bytes=0)
    assert kept.image(0) is kept.subset([0]).image(0)
    assert not_kept.image(0) is not not_kept.image(0)
    with pytest.raises(ValueError, match="read-only"):
        kept.image(0)[0] = 1


def test_a_dataset_goes_to_another_process(tmp_path):
    d = load(zipped(tmp_path / "x.zip", FILES))
    d.image(0)
    assert (pickle.loads(pickle.dumps(d)).image(5) == d.image(5)).all()


# ---- what is refused -------------------------------------------------------------------------


def test_a_missing_path_is_named(tmp_path):
    assert "paths count from" in refused("nothing/here' does not exist", tmp_path / "nothing/here")


def test_a_folder_without_images_is_refused(tmp_path):
    refused("has no images", tmp_path)
    refused("has no images", write(tmp_path, {"a/x.tiff": b""}))


def test_an_empty_class_is_named(tmp_path):
    (write(tmp_path / "d", FILES) / "fish").mkdir()
    refused("class folder .*fish has no images", tmp_path / "d")
    refused("class folder .*fish has no", zipped(tmp_path / "x.zip", {**FILES, "fish/": b""}))
    rooted = {f"r/{n}": b for n, b in FILES.items()} | {"r/": b"", "r/cat/": b"", "r/fish/": b""}
    refused("class folder .*r/fish has no images", zipped(tmp_path / "r.zip", rooted))


def test_an_image_outside_the_class_folders_is_named(tmp_path):
    text = refused("stray.png lies in no class folder", write(tmp_path, FILES | {"stray.png": b""}))
    assert "class_level" in text
    refused("cat/0.png lies in no class folder", write(tmp_path / "x", FILES), class_level=2)


def test_other_files_among_the_images_are_refused_unless_ignored(tmp_path):
    write(tmp_path, FILES | {"cat/labels.csv": b"1"})
    assert "ignore=('*.csv',)" in refused("cat/labels.csv lies among the images", tmp_path)
    assert len(load(tmp_path, ignore=("*.csv",))) == 6
    assert len(load(tmp_path, ignore=("cat/*",)).classes) == 1


def test_the_parts_of_a_dataset_are_not_taken_for_its_classes(tmp_path):
    files = {f"{part}/{n}": b for part in ("train", "test") for n, b in FILES.items()}
    assert str(tmp_path / "test") in refused(
        "classes of .* would be test, train", write(tmp_path, files)
    )


BROKEN = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello, I am text", "begins with b'hello, I'"),
    "cut off": (encoded(side=40)[:-60], "cannot be read as an image"),
    "jpeg cut off": (encoded(side=40, form="JPEG")[:-100], "Truncated"),
    "flipped": (encoded()[:40] + b"\xff\xff" + encoded()[42:], "cannot be read as an image"),
    "16 bit": (encoded(mode="I;16"), "more than 8 bits"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_named(tmp_path, kind):
    data, why = BROKEN[kind]
    text = refused("cat/bad.png", write(tmp_path, FILES | {"cat/bad.png": data}))
    assert why in text


def test_all_broken_images_are_listed_at_once(tmp_path):
    bad = {f"cat/bad{k:02}.png": b"?" for k in range(15)}
    text = refused("15 of 21 images cannot be used", write(tmp_path, FILES | bad))
    assert "bad00.png" in text and "bad09.png" in text and "and 5 more" in text


def test_the_check_tells_its_progress(tmp_path):
    seen: list[tuple[int, int]] = []
    check(load(write(tmp_path, FILES)), lambda done, of: seen.append((done, of)))
    assert seen == [(k, 6) for k in range(1, 7)]


def bomb() -> bytes:
    """A PNG of 30000 x 30000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_an_image_of_too_many_pixels_is_refused(tmp_path):
    refused("a/x.png has too many pixels", write(tmp_path, {"a/x.png": bomb()}))
    limit = Image.MAX_IMAGE_PIXELS
    assert limit is not None and 2 * limit < 30000**2


def test_a_warning_of_pillow_about_pixels_is_a_refusal_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    refused("a/x.png has too many pixels", write(tmp_path, {"a/x.png": encoded()}))


def test_a_file_that_unpacks_to_far_more_is_refused_unread(tmp_path):
    path = zipped(tmp_path / "x.zip", {"a/x.png": bytes(80 << 20)}, compression=8)
    refused("decompression bomb", path)


@pytest.mark.parametrize(
    "name", ["../a/x.png", "/a/x.png", "a/../../x.png", "C:/a/x.png", "a\\x.png"]
)
def test_a_zip_with_names_that_point_elsewhere_is_refused(tmp_path, name):
    refused("has an entry with the name", zipped(tmp_path / "x.zip", {"a/0.png": b"", name: b""}))


def test_a_broken_zip_is_named(tmp_path):
    path = zipped(tmp_path / "x.zip", FILES)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cut off" in refused("x.zip is neither a folder, a zip nor", path)
    at = whole.index(b"IDAT") + 6
    path.write_bytes(whole[:at] + b"\x00\x01\x02" + whole[at + 3 :])
    refused("dog/0.png cannot be unpacked", path)


def test_a_zip_that_goes_away_is_an_error_of_the_image(tmp_path):
    d = load(zipped(tmp_path / "x.zip", FILES))
    (tmp_path / "x.zip").unlink()
    with pytest.raises(InvalidInput, match=r"cat/0.png cannot be unpacked"):
        d.image(0)


def test_an_unreadable_or_special_file_is_named(tmp_path):
    write(tmp_path, FILES)
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    refused(r"gone.png cannot be read", tmp_path)
    (tmp_path / "cat" / "gone.png").unlink()
    (tmp_path / "cat" / "folder.png").mkdir()
    check(load(tmp_path))


def test_a_loop_of_links_ends(tmp_path):
    (write(tmp_path, FILES) / "cat" / "again").symlink_to(tmp_path)
    refused("is reached twice", tmp_path)


def test_a_group_must_match_every_path(tmp_path):
    write(tmp_path, FILES)
    refused("does not match 'cat/0.png'", tmp_path, group="x(.)")
    with pytest.raises(UsageError, match="not a regular expression"):
        load(tmp_path, group="(")


def test_arguments_out_of_range_are_refused(tmp_path):
    for options in ({"class_level": 0}, {"shrink": 0}, {"keep_bytes": -1}):
        with pytest.raises(UsageError, match="out of range"):
            load(write(tmp_path, FILES), **options)


# ---- classes that must agree -------------------------------------------------------------------


def test_a_test_set_with_other_classes_is_refused(tmp_path):
    train = load(write(tmp_path / "train", FILES))
    same_classes(train, load(write(tmp_path / "same", FILES)))
    files = {n.replace("dog", "dogs"): b for n, b in FILES.items()}
    test = load(write(tmp_path / "test", files))
    with pytest.raises(InvalidInput) as caught:
        same_classes(train, test)
    assert "only in the training set: 'dog'" in str(caught.value)
    assert "only in the test set: 'dogs'" in str(caught.value)
    refused(
        "classes of the given classes and of .* differ", tmp_path / "test", classes=train.classes
    )


def test_classes_in_another_order_are_refused():
    x, y = np.zeros((2, 4, 4), np.uint8), np.arange(2)
    train, test = load((x, y), classes=("a", "b")), load((x, y), classes=("b", "a"))
    with pytest.raises(InvalidInput, match=r"another order: label 0 is 'a' in the training set"):
        same_classes(train, test)
    with pytest.raises(InvalidInput, match="the test set has no image of class 'b'"):
        same_classes(train, train.subset([0]))


# ---- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "image"),
    [((4, 5, 6), (5, 6, 1)), ((4, 5, 6, 3), (5, 6, 3)), ((4, 3, 5, 6), (5, 6, 3))],
)
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float64"])
def test_an_npz_holds_images_of_any_layout(tmp_path, shape, image, dtype):
    x = RNG.integers(0, 255, shape).astype(dtype)
    np.savez(tmp_path / "d.npz", x=x, y=[0, 1, 1, 0])
    d = load(tmp_path / "d.npz")
    check(d)
    assert d.image(0).shape == image and d.classes == ("0", "1") and d.names[3] == "3"
    assert d.image(0).dtype == (np.float32 if dtype == "float64" else np.uint8)
    moved = np.moveaxis(x[1], 0, -1) if shape[1] == 3 else x[1].reshape(image)
    assert (d.image(1) == moved).all()


def test_names_and_groups_come_along_in_an_npz(tmp_path):
    np.savez(
        tmp_path / "d.npz",
        x=np.zeros((2, 4, 4)),
        y=[0, 1],
        classes=["up", "down"],
        group=["a", "b"],
    )
    d = load(tmp_path / "d.npz")
    assert d.classes == ("up", "down") and d.group == ("a", "b")


def test_numbered_classes_are_sorted_as_text():
    d = load((np.zeros((11, 4, 4), np.uint8), np.arange(11)))
    assert d.classes[:2] == ("00", "01") and list(d.classes) == sorted(d.classes)


X = np.zeros((4, 5, 5), np.uint8)
WRONG = {
    "labels are no whole numbers": (X, [0.0, 1.0, 0.5, 1.0], "whole numbers"),
    "one-hot": (X, np.eye(4, dtype=int), r"argmax"),
    "negative": (X, [0, 1, -1, 1], "label 2 is -1"),
    "another length": (X, [0, 1, 1], "4 images but 3 labels"),
    "a gap": (X, [0, 1, 3, 1], "no image has label 2"),
    "a huge label": (X, [0, 1, 10**9, 1], "largest label is 1000000000"),
    "text": (X, ["a", "b", "a", "b"], "whole numbers"),
    "no images": (X[:0], [], "x of the arrays has shape"),
    "vectors": (np.zeros((4, 5)), [0, 1, 0, 1], "has shape"),
    "which axis": (np.zeros((4, 3, 5, 3)), [0, 1, 0, 1], "which axis"),
    "no channel axis": (np.zeros((4, 5, 5, 5)), [0, 1, 0, 1], "which axis"),
    "nan": (np.where(np.arange(4) == 2, np.nan, 0)[:, None, None] + X, [0, 1, 0, 1], "image 2 of"),
    "beyond float32": (X + 1e300, [0, 1, 0, 1], "image 0 of the arrays has values that are not"),
    "too large": (X.astype(int) + 300, [0, 1, 0, 1], "whole numbers from 300 to 300"),
    "complex": (X.astype(complex), [0, 1, 0, 1], "type complex128"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_arrays_that_are_no_labelled_images_are_refused(tmp_path, kind):
    x, y, match = WRONG[kind]
    with pytest.raises(InvalidInput) as caught:
        load((x, y))
    assert match in caught.value.render()
    np.savez(tmp_path / "d.npz", x=x, y=y)
    assert match.replace("the arrays", str(tmp_path / "d.npz")) in refused(".", tmp_path / "d.npz")


def test_a_label_beyond_the_named_classes_is_refused():
    text = refused("labels must be whole numbers below 2", (X, [0, 1, 2, 1]), classes=("a", "b"))
    assert "label 2 is 2" in text
    refused("two classes have the name", (X, [0, 1, 0, 1]), classes=("a", "a"))


def test_files_that_are_no_npz_are_refused(tmp_path):
    path = tmp_path / "d.npz"
    path.write_bytes(b"not a zip")
    refused("is not an .npz that can be read", path)
    np.savez(path, x=X)
    assert "it has x" in refused("has no array y", path)
    np.savez(path, x=np.array([object()] * 4), y=[0, 1, 0, 1])
    refused("is not an .npz that can be read", path)
    np.savez(path, x=X, y=[0, 1, 0, 1], classes=[[0.5]])
    refused("classes of .* has shape", path)


def test_an_array_that_claims_more_than_it_has_is_refused(tmp_path):
    header = io.BytesIO()
    claim = {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 5, 5)}
    np.lib.format.write_array_header_1_0(header, claim)
    labels = io.BytesIO()
    np.save(labels, np.arange(2))
    path = zipped(tmp_path / "d.npz", {"x.npy": header.getvalue(), "y.npy": labels.getvalue()})
    refused("x.npy of .* claims", path)


# ---- the type ------------------------------------------------------------------------------------


def test_a_subset_keeps_classes_and_takes_a_mask_or_positions():
    d = load((np.arange(4 * 25, dtype=np.uint8).reshape(4, 5, 5), [0, 1, 0, 1]))
    part = d.subset([3, 0])
    assert part.labels.tolist() == [1, 0] and part.names == ("3", "0") and part.classes == d.classes
    assert (part.image(0) == d.image(3)).all()
    assert d.subset(d.labels == 0).names == ("0", "2")
    assert len(d.subset([])) == 0
    for wrong in ([4], [-1], [0.5], [[0]], [True]):
        with pytest.raises(InvalidInput, match="positions"):
            d.subset(wrong)
    with pytest.raises(InvalidInput, match="has no images"):
        check(d.subset([]))


def test_labels_and_images_cannot_be_written_to():
    y = np.array([0, 1, 0, 1])
    d = load((X, y))
    y[0] = 1
    assert d.labels[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        d.labels[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        d.image(0)[:] = 1


# ---- real data -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.needs_shared("data/omniglot_small1.zip")
def test_omniglot_has_a_class_per_character_and_a_group_per_drawer(shared):
    d = load(shared("data/omniglot_small1.zip"), class_level=2, group=r"_(\d+)\.png$")
    assert len(d) == 20 * len(d.classes) and d.classes[0] == "Balinese/character01"
    assert sorted(set(d.group)) == [f"{k:02}" for k in range(1, 21)]
    assert d.image(0).shape == (105, 105, 1)
    assert len(load(shared("data/omniglot_small1.zip")).classes) < 10


@pytest.mark.slow
@pytest.mark.needs_shared("data/cifar10_train.zip", "data/cifar10_test.zip")
def test_cifar_is_read_whole(shared):
    train, test = load(shared("data/cifar10_train.zip")), load(shared("data/cifar10_test.zip"))
    same_classes(train, test)
    assert train.counts.tolist() == [600] * 10 and test.counts.tolist() == [100] * 10
    assert train.classes[0] == "airplane"
    check(test)


@pytest.mark.slow
@pytest.mark.needs_shared("data/traffic_signs.zip")
def test_traffic_signs_are_read_whole(shared):
    d = load(shared("data/traffic_signs.zip"))
    check(d)
    assert d.counts.tolist() == [60] * 43 and d.image(0).shape == (64, 64, 3)
