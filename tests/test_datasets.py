"""Data sets: how they are split, batched, read, found and downloaded, and what is refused."""

import gzip
import hashlib
import io
import itertools
import os
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from foveal.vision import readers
from foveal.vision.datasets import Dataset, batches, fits, folds, load_dataset, stratified_order
from foveal.vision.readers import SOURCES, Source, Split, parse_cifar, parse_idx, parse_idx_pair, resize

DATA = Path(os.environ.get("FOVEAL_DATA") or "/nonexistent")
"""Where the person has the real files, read before the fixture below hides it."""


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data folders but those that a test makes, and no proxy before its server."""
    monkeypatch.delenv("FOVEAL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(readers, "DEBIAN", tmp_path / "debian")


def numbered(path: Path, labels: Any, **more: Any) -> Path:
    """An .npz file whose n-th image, 5x5, says n in its first two pixels."""
    labels = np.asarray(labels)
    images = np.zeros((len(labels), 5, 5), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(len(labels)), 256)
    np.savez(path, images=images, labels=labels, **more)
    return path


def numbers(split: Split) -> list[int]:
    return (split.images[:, 0, 0, 0].int() * 256 + split.images[:, 0, 0, 1]).tolist()


def shares_are_kept(part: torch.Tensor, whole: torch.Tensor, within: float = 1) -> bool:
    """Whether each class has its share to within some images, one for each cut that was made."""
    expected = torch.bincount(whole) * len(part) / len(whole)
    return bool(((torch.bincount(part, minlength=len(expected)) - expected).abs() <= within).all())


BALANCED = np.tile(np.arange(7), 60)[:411]
"""Seven classes of 58 or 59 images."""


class TestSplits:
    def test_splits_are_disjoint_and_cover_everything(self, tmp_path):
        data = load_dataset(numbered(tmp_path / "a.npz", BALANCED), seed=3)
        parts = [numbers(split) for split in (data.train, data.validation, data.test)]
        assert [len(part) for part in parts] == [411 - 83 - 32, 32, 83]  # a fifth rounded up, a tenth down
        assert sorted(itertools.chain(*parts)) == list(range(411))
        assert all(part == sorted(part) for part in parts), "in the file's order"
        for split, cuts in ((data.train, 2), (data.validation, 2), (data.test, 1)):
            assert split.labels.tolist() == BALANCED[numbers(split)].tolist()
            assert shares_are_kept(split.labels, torch.from_numpy(BALANCED), cuts)

    def test_seed_chooses_validation_and_never_test(self, tmp_path):
        path = numbered(tmp_path / "a.npz", BALANCED)
        one, again, other = (load_dataset(path, seed=seed) for seed in (1, 1, 2))
        assert numbers(one.validation) == numbers(again.validation) != numbers(other.validation)
        assert numbers(one.train) == numbers(again.train) != numbers(other.train)
        assert numbers(one.test) == numbers(again.test) == numbers(other.test)

    @pytest.mark.parametrize(
        ("validation", "count"), [(0, 0), (0.0, 0), (1, 1), (50, 50), (0.25, 82), (327, 327)]
    )
    def test_validation_is_a_share_or_a_count(self, tmp_path, validation, count):
        data = load_dataset(numbered(tmp_path / "a.npz", BALANCED), validation=validation)
        assert (len(data.validation), len(data.train)) == (count, 328 - count)

    def test_default_validation_is_at_most_5000(self, tmp_path):
        test = {"x_test": np.zeros((2, 5, 5), np.uint8), "y_test": np.zeros(2, int)}
        data = load_dataset(numbered(tmp_path / "a.npz", np.arange(60_000) % 10, **test))
        assert (len(data.validation), len(data.train), len(data.test)) == (5_000, 55_000, 2)
        assert torch.bincount(data.validation.labels).tolist() == [500] * 10

    def test_smaller_training_sets_are_nested_and_leave_validation_alone(self, tmp_path):
        path = numbered(tmp_path / "a.npz", BALANCED)
        full, large, small = (load_dataset(path, seed=4, train_size=size) for size in (None, 70, 21))
        assert numbers(full.validation) == numbers(large.validation) == numbers(small.validation)
        assert set(numbers(small.train)) < set(numbers(large.train)) < set(numbers(full.train))
        assert torch.bincount(small.train.labels).tolist() == [3] * 7
        assert numbers(small.test) == numbers(full.test)

    def test_smaller_test_sets_are_nested_and_independent_of_the_seed(self, tmp_path):
        path = numbered(tmp_path / "a.npz", BALANCED)
        full, large, small, other = (
            load_dataset(path, test_size=size, seed=seed)
            for size, seed in ((None, 0), (35, 0), (14, 0), (14, 9))
        )
        assert set(numbers(small.test)) < set(numbers(large.test)) < set(numbers(full.test))
        assert numbers(small.test) == numbers(other.test)
        assert torch.bincount(small.test.labels).tolist() == [2] * 7
        assert numbers(small.train) == numbers(full.train)

    def test_every_beginning_of_the_order_has_each_class_in_its_share(self):
        labels = torch.from_numpy(BALANCED)
        order = stratified_order(labels, seed=0)
        assert sorted(order.tolist()) == list(range(411))
        assert all(shares_are_kept(labels[order[:count]], labels) for count in range(1, 412))
        assert order.tolist() != stratified_order(labels, seed=1).tolist()

    def test_a_class_of_one_image_is_trained_on(self, tmp_path):
        labels = [0] * 90 + [1] * 9 + [2]
        for seed in range(5):
            data = load_dataset(numbered(tmp_path / "a.npz", labels), seed=seed)
            assert torch.bincount(data.train.labels, minlength=3)[2] == 1
            assert torch.bincount(data.test.labels, minlength=3).tolist() == [18, 2, 0]

    def test_the_order_is_the_same_on_every_machine(self):
        """By hand: PCG64(3) ranks the images 0 4 9 7 1 5 6 3 8 2. Class 0 is 0 4 9 6 8 2, with turns at 1/12,
        3/12 and so on, and class 1 is 7 1 5 3, with turns at 1/8, 3/8 and so on."""
        labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 0])
        assert stratified_order(labels, seed=3).tolist() == [0, 7, 4, 1, 9, 6, 5, 8, 3, 2]

    def test_folds_hold_every_image_out_once(self):
        labels = torch.from_numpy(np.repeat([0, 1, 2, 3], [40, 13, 5, 1]))
        pairs = folds(labels, 4, seed=1)
        assert sorted(torch.cat([held for _, held in pairs]).tolist()) == list(range(59))
        for train, held in pairs:
            assert sorted(train.tolist() + held.tolist()) == list(range(59))
        counts = torch.stack([torch.bincount(labels[held], minlength=4) for _, held in pairs])
        assert (counts.amax(0) - counts.amin(0)).tolist() == [0, 1, 1, 1]
        assert sorted(len(held) for _, held in pairs) == [14, 15, 15, 15]
        again, other = folds(labels, 4, seed=1), folds(labels, 4, seed=2)
        assert all(torch.equal(a, b) for one, two in zip(pairs, again) for a, b in zip(one, two))
        assert not torch.equal(pairs[0][1], other[0][1])

    @pytest.mark.parametrize(
        ("k", "seed", "message"), [(1, 0, "k must be 2 to 9"), (10, 0, "k"), (2, -1, "seed")]
    )
    def test_bad_folds_are_refused(self, k, seed, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            folds(torch.zeros(9, dtype=torch.int64), k, seed)


class TestDigits:
    def test_pixels_space_and_splits(self):
        from sklearn.datasets import load_digits

        data = load_dataset("digits", seed=1)
        assert (len(data.train), len(data.validation), len(data.test)) == (1294, 143, 360)
        assert (data.name, data.high, data.classes) == ("digits", 16, tuple("0123456789"))
        assert (data.space.shape, data.space.dtype, data.space.high.max()) == ((1, 8, 8), np.uint8, 16)
        splits = (data.train, data.validation, data.test)
        images, labels = load_digits(return_X_y=True)
        ours = torch.cat([torch.cat([s.images.flatten(1), s.labels[:, None]], dim=1) for s in splits])
        theirs = np.column_stack([images, labels]).astype(int).tolist()
        assert sorted(ours.tolist()) == sorted(theirs)
        assert all(shares_are_kept(split.labels, torch.from_numpy(labels), 2) for split in splits)

    def test_the_splits_are_these_for_ever(self):
        digest = "e7e76140d20fd3fb5e4891e1c9030f085dd5a208afcdd972c66d5a9e1ca1e8fc"
        assert load_dataset("digits").digest == digest

    def test_digest_tells_pixels_labels_and_splits(self):
        data = load_dataset("digits", train_size=100)
        assert load_dataset("digits", train_size=100).digest == data.digest
        assert load_dataset("digits", train_size=100, seed=1).digest != data.digest
        digests = {data.digest}
        for field in ("images", "labels"):
            copy = load_dataset("digits", train_size=100)
            getattr(copy.test, field).view(-1)[7] ^= 1
            digests.add(copy.digest)
        assert len(digests) == 3
        assert len(data.digest) == 64

    def test_moves_every_split(self):
        moved = load_dataset("digits").to("meta")
        for split in (moved.train, moved.validation, moved.test):
            assert split.images.device.type == split.labels.device.type == "meta"
        assert isinstance(moved, Dataset)


def toy(count: int = 10) -> Split:
    images = torch.arange(count * 4, dtype=torch.uint8).view(count, 1, 2, 2)
    return Split(images, torch.arange(count))


class TestBatches:
    def test_in_order_without_a_generator(self):
        seen = list(batches(toy(), 4))
        assert [len(images) for images, _ in seen] == [4, 4, 2]
        assert torch.equal(torch.cat([images for images, _ in seen]), toy().images)
        assert torch.equal(torch.cat([labels for _, labels in seen]), toy().labels)

    def test_a_generator_shuffles_anew_each_epoch(self):
        def epoch(generator: torch.Generator) -> list[int]:
            order = []
            for images, labels in batches(toy(100), 8, generator):
                assert torch.equal(images, toy(100).images[labels]), "images keep their labels"
                order += labels.tolist()
            return order

        one, two = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        first, second = epoch(one), epoch(one)
        assert sorted(first) == sorted(second) == list(range(100))
        assert len({tuple(first), tuple(second), tuple(range(100))}) == 3
        assert [epoch(two), epoch(two)] == [first, second]

    @pytest.mark.parametrize(("size", "lengths"), [(4, [4, 4]), (5, [5, 5]), (11, [])])
    def test_drop_last(self, size, lengths):
        assert [len(images) for images, _ in batches(toy(), size, drop_last=True)] == lengths

    def test_augments_with_the_same_generator(self):
        generator = torch.Generator().manual_seed(0)

        def augment(images: torch.Tensor, given: torch.Generator) -> torch.Tensor:
            assert given is generator
            return images + 100

        ((images, labels),) = batches(toy(), 10, generator, augment)
        assert torch.equal(images, toy().images[labels] + 100)

    def test_bad_arguments_are_refused_at_the_call(self):
        with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
            batches(toy(), 0)
        with pytest.raises(ValueError, match="augment needs a generator"):
            batches(toy(), 2, augment=lambda images, generator: images)

    def test_fits_in_half_of_the_free_memory(self, monkeypatch):
        nbytes = 10 * 4 + 10 * 8
        for free, expected in ((2 * nbytes, True), (2 * nbytes - 1, False)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
            assert fits(toy(), "cuda") is expected
        assert fits(toy(), "cpu")


class TestSplit:
    def test_take(self):
        taken = toy().take(torch.tensor([7, 0, 7]))
        assert taken.labels.tolist() == [7, 0, 7]
        assert torch.equal(taken.images, toy().images[[7, 0, 7]])
        taken.images.zero_()
        assert toy().images[7].any()
        assert len(taken) == 3

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (
                torch.zeros(2, 1, 3, 3),
                torch.zeros(2, dtype=torch.int64),
                r"images must be .* uint8, got .*float32",
            ),
            (
                torch.zeros(2, 3, 3, dtype=torch.uint8),
                torch.zeros(2, dtype=torch.int64),
                r"images .*got \(2, 3, 3\)",
            ),
            (
                torch.zeros(2, 1, 3, 3, dtype=torch.uint8),
                torch.zeros(3, dtype=torch.int64),
                r"labels must be \(2,\)",
            ),
            (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2), "labels must be .*got .*float32"),
        ],
    )
    def test_other_tensors_are_refused(self, images, labels, message):
        with pytest.raises(ValueError, match=message):
            Split(images, labels)


# Files of known data sets


def idx(array: Any) -> bytes:
    array = np.asarray(array, np.uint8)
    return (
        bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
    )


RNG = np.random.default_rng(0)
CONTENT = {
    "train-images-idx3-ubyte": idx(RNG.integers(0, 256, (50, 6, 4))),
    "train-labels-idx1-ubyte": idx(np.arange(50) % 10),
    "t10k-images-idx3-ubyte": idx(RNG.integers(0, 256, (20, 6, 4))),
    "t10k-labels-idx1-ubyte": idx(np.arange(20) % 10),
}
PACKED = {f"{name}.gz": gzip.compress(data) for name, data in CONTENT.items()}
RECORDS = {
    f"cifar-10-batches-bin/{name}.bin": b"".join(
        bytes([(i + n) % 10]) + RNG.integers(0, 256, 3072, np.uint8).tobytes() for n in range(4)
    )
    for i, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"])
}


def tar(members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as archive:
        for name, target in (links or {}).items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """mnist, fashion-mnist and cifar10 are the small files above, from mirrors that do not exist."""
    digits = {name: sha256(data) for name, data in CONTENT.items()}
    mirrors = ("http://127.0.0.1:9/",)
    monkeypatch.setitem(SOURCES, "mnist", Source(mirrors, digits, SOURCES["mnist"].classes))
    sums = {name: sha256(data) for name, data in RECORDS.items()}
    cifar = SOURCES["cifar10"]._replace(mirrors=mirrors, files=sums)
    monkeypatch.setitem(SOURCES, "cifar10", cifar)


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def files_under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def is_small_mnist(data: Dataset) -> bool:
    expected = np.frombuffer(CONTENT["t10k-images-idx3-ubyte"], np.uint8)[16:].reshape(20, 1, 6, 4)
    assert (len(data.train), len(data.validation), data.high) == (45, 5, 255)
    assert data.test.labels.tolist() == [*range(10), *range(10)]
    return np.array_equal(data.test.images.numpy(), expected)


class TestFormats:
    def test_idx(self):
        array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
        parsed = parse_idx(idx(array), 3, "f")
        assert parsed.dtype == torch.uint8
        assert np.array_equal(parsed.numpy(), array)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "begins with ''; such an idx file begins with '00000803'"),
            (idx(np.zeros(3)), "begins with '00000801'"),
            (bytes((0, 0, 13, 3)) + idx(np.zeros((2, 2, 2)))[4:], "begins with '00000d03'"),
            (idx(np.zeros((2, 2, 2)))[:10], "ends within its header"),
            (idx(np.zeros((2, 2, 2)))[:-1], "has 7 bytes for 2 x 2 x 2"),
            (idx(np.zeros((2, 2, 2))) + b"x", "has 9 bytes for 2 x 2 x 2"),
        ],
    )
    def test_bad_idx_is_refused_by_name(self, data, message):
        with pytest.raises(ValueError, match=f"^some-file {message}"):
            parse_idx(data, 3, "some-file")

    def test_pairs_of_idx_files_must_match(self):
        images = idx(np.zeros((3, 2, 2)))
        assert parse_idx_pair({"i": images, "l": idx([0, 9, 1])}, "i", "l", 10).labels.tolist() == [0, 9, 1]
        with pytest.raises(ValueError, match="i and l: 3 images and 2 labels"):
            parse_idx_pair({"i": images, "l": idx([0, 1])}, "i", "l", 10)
        with pytest.raises(ValueError, match="l has label 10; its classes are 0 to 9"):
            parse_idx_pair({"i": images, "l": idx([0, 10, 1])}, "i", "l", 10)

    def test_cifar(self):
        pixels = RNG.integers(0, 256, (2, 3, 32, 32), np.uint8)
        split = parse_cifar(b"\x07" + pixels[0].tobytes() + b"\x02" + pixels[1].tobytes(), "f")
        assert split.labels.tolist() == [7, 2]
        assert np.array_equal(split.images.numpy(), pixels)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "has 0 bytes"),
            (bytes(3072), "has 3,072 bytes, which is no number of images of 3,073 bytes"),
            (bytes(3074), "has 3,074 bytes"),
            (b"\x0a" + bytes(3072), "has label 10; its classes are 0 to 9"),
        ],
    )
    def test_bad_cifar_is_refused_by_name(self, data, message):
        with pytest.raises(ValueError, match=f"^some-file {message}"):
            parse_cifar(data, "some-file")


@pytest.mark.usefixtures("small")
class TestFinding:
    @pytest.mark.parametrize("files", [CONTENT, PACKED], ids=["unpacked", "packed"])
    @pytest.mark.parametrize("below", ["", "mnist"])
    @pytest.mark.parametrize("how", ["data_dir", "FOVEAL_DATA", "debian", "cache/foveal"])
    def test_in_every_place(self, tmp_path, monkeypatch, how, below, files):
        put(tmp_path / how / below, files)
        if how == "FOVEAL_DATA":
            monkeypatch.setenv("FOVEAL_DATA", str(tmp_path / how))
        given = tmp_path / how if how == "data_dir" else None
        assert is_small_mnist(load_dataset("mnist", given, download=False))

    def test_in_the_home_folder_without_xdg(self, tmp_path, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        put(tmp_path / ".cache" / "foveal" / "mnist", PACKED)
        assert is_small_mnist(load_dataset("mnist", download=False))

    def test_files_may_lie_in_several_places(self, tmp_path):
        names = list(PACKED)
        put(tmp_path / "given", {names[0]: PACKED[names[0]]})
        put(tmp_path / "debian" / "mnist", {name: PACKED[name] for name in names[1:]})
        assert is_small_mnist(load_dataset("mnist", tmp_path / "given", download=False))

    def test_the_argument_comes_before_the_environment(self, tmp_path, monkeypatch):
        put(tmp_path / "environment", dict.fromkeys(PACKED, b"wrong"))
        monkeypatch.setenv("FOVEAL_DATA", str(tmp_path / "environment"))
        assert is_small_mnist(load_dataset("mnist", put(tmp_path / "given", PACKED)))

    def test_another_file_is_refused_by_name_and_kept(self, tmp_path):
        name = "train-labels-idx1-ubyte"
        wrong = idx(np.zeros(50))
        for files, file in (({name: wrong}, name), ({f"{name}.gz": gzip.compress(wrong)}, f"{name}.gz")):
            folder = put(tmp_path / file, PACKED | files)
            with pytest.raises(ValueError, match=f"{file} is not the published file") as error:
                load_dataset("mnist", folder)
            assert str(folder / file) in str(error.value)
            assert sha256(wrong) in str(error.value)
            assert sha256(CONTENT[name]) in str(error.value)
            assert (folder / file).read_bytes() == files[file]

    @pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"<html>", lambda data: b""])
    def test_a_damaged_file_is_refused_by_name(self, tmp_path, damage):
        name = "t10k-images-idx3-ubyte.gz"
        folder = put(tmp_path / "given", PACKED | {name: damage(PACKED[name])})
        with pytest.raises(ValueError, match=rf"given/{name} is (damaged|not the published file)"):
            load_dataset("mnist", folder)

    def test_nowhere_says_where_and_what(self, tmp_path):
        (tmp_path / "given").mkdir()
        with pytest.raises(FileNotFoundError) as error:
            load_dataset("mnist", tmp_path / "given", download=False)
        message = str(error.value)
        for part in ("given", "debian", "cache/foveal", "downloads are off", "FOVEAL_DATA", *PACKED):
            assert part in message
        assert "\n" not in message
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("how", ["data_dir", "FOVEAL_DATA"])
    def test_a_folder_that_is_none_is_refused(self, tmp_path, monkeypatch, how):
        nowhere = str(tmp_path / "nowhere")
        if how == "FOVEAL_DATA":
            monkeypatch.setenv("FOVEAL_DATA", nowhere)
        with pytest.raises(ValueError, match=f"{how} must be a folder, got '.*nowhere'"):
            load_dataset("mnist", nowhere if how == "data_dir" else None)

    @pytest.mark.parametrize(
        "files", [RECORDS, {"cifar-10-binary.tar.gz": tar(RECORDS)}], ids=["unpacked", "tar"]
    )
    def test_cifar(self, tmp_path, files):
        data = load_dataset("cifar10", put(tmp_path / "given", files), validation=0)
        assert (data.space.shape, len(data.train), len(data.test), data.classes[3]) == (
            (3, 32, 32),
            20,
            4,
            "cat",
        )
        assert data.train.labels.tolist() == [(i + n) % 10 for i in range(5) for n in range(4)]
        whole = np.frombuffer(b"".join(RECORDS.values()), np.uint8).reshape(24, 3073)[:, 1:]
        images = torch.cat([data.train.images, data.test.images]).flatten(1)
        assert np.array_equal(images.numpy(), whole)

    def test_a_tar_file_is_not_unpacked_onto_the_disk(self, tmp_path):
        first = next(iter(RECORDS))
        evil = {"../escaped": b"x", "/tmp/foveal-escaped": b"x", "cifar-10-batches-bin/more": b"x"}
        folder = put(tmp_path / "given", {"cifar-10-binary.tar.gz": tar(evil | RECORDS)})
        assert len(load_dataset("cifar10", folder).test) == 4
        assert files_under(tmp_path) == ["given/cifar-10-binary.tar.gz"]
        assert not Path("/tmp/foveal-escaped").exists()
        others = {name: data for name, data in RECORDS.items() if name != first}
        put(folder, {"cifar-10-binary.tar.gz": tar(others, links={first: "/etc/passwd"})})
        with pytest.raises(ValueError, match=f"cifar-10-binary.tar.gz has no {first}"):
            load_dataset("cifar10", folder)
        put(folder, {"cifar-10-binary.tar.gz": tar(RECORDS | {first: bytes(3073)})})
        with pytest.raises(ValueError, match=f"cifar-10-binary.tar.gz: {first} is not the published file"):
            load_dataset("cifar10", folder)
        put(folder, {"cifar-10-binary.tar.gz": tar(RECORDS)[:-5000]})
        with pytest.raises(ValueError, match="cifar-10-binary.tar.gz is damaged"):
            load_dataset("cifar10", folder)


class Server:
    """Gives `files` by path; those in `cut` end early; `requests` are the paths that were asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.requests.append(self.path)
                data = server.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if self.path in server.cut else data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(small: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    server.files = {f"/{name}": data for name, data in PACKED.items()}
    monkeypatch.setitem(SOURCES, "mnist", SOURCES["mnist"]._replace(mirrors=(server.url,)))
    yield server
    server.http.shutdown()
    server.http.server_close()


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


class TestDownload:
    def test_into_the_cache_once(self, server, tmp_path, capsys):
        assert is_small_mnist(load_dataset("mnist"))
        assert files_under(tmp_path) == sorted(f"cache/foveal/mnist/{name}" for name in PACKED)
        for name, data in PACKED.items():
            assert (tmp_path / "cache/foveal/mnist" / name).read_bytes() == data
        assert server.requests == [f"/{name}" for name in PACKED]
        assert is_small_mnist(load_dataset("mnist"))
        assert len(server.requests) == 4
        assert capsys.readouterr() == ("", ""), "no bar without a terminal"

    def test_only_what_is_missing(self, server, tmp_path):
        first, *others = PACKED
        put(tmp_path / "cache/foveal/mnist", {name: PACKED[name] for name in others})
        load_dataset("mnist")
        assert server.requests == [f"/{first}"]

    def test_shows_a_bar_on_a_terminal(self, server, monkeypatch):
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setenv("TERM", "xterm")
        load_dataset("mnist")
        assert "t10k-images-idx3-ubyte" in screen.getvalue()
        assert "100%" in screen.getvalue()

    def test_another_file_is_refused_and_leaves_nothing(self, server, tmp_path):
        first = next(iter(PACKED))
        wrong = idx(np.zeros((50, 6, 4)))
        server.files[f"/{first}"] = gzip.compress(wrong)
        with pytest.raises(ValueError, match=f"{server.url}{first} is not the published file") as error:
            load_dataset("mnist")
        assert sha256(wrong) in str(error.value)
        assert sha256(CONTENT["train-images-idx3-ubyte"]) in str(error.value)
        assert files_under(tmp_path) == []

    def test_a_page_in_its_place_is_refused_and_leaves_nothing(self, server, tmp_path):
        server.files[f"/{next(iter(PACKED))}"] = b"<html>log in first</html>"
        with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz is damaged: Not a gzipped file"):
            load_dataset("mnist")
        assert files_under(tmp_path) == []

    def test_an_interrupted_one_leaves_nothing(self, server, tmp_path):
        name = list(PACKED)[1]
        server.cut = {f"/{name}"}
        size = len(PACKED[name])
        with pytest.raises(FileNotFoundError, match=f"it ended after {size // 2} of {size} bytes"):
            load_dataset("mnist")
        assert files_under(tmp_path) == ["cache/foveal/mnist/train-images-idx3-ubyte.gz"]
        server.cut = set()
        assert is_small_mnist(load_dataset("mnist"))

    def test_ctrl_c_leaves_nothing(self, server, tmp_path, monkeypatch):
        def stop(descriptor: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            load_dataset("mnist")
        assert files_under(tmp_path) == []

    def test_the_next_mirror_where_one_fails(self, server, monkeypatch):
        mirrors = ("http://127.0.0.1:9/", f"{server.url}missing/", server.url)
        monkeypatch.setitem(SOURCES, "mnist", SOURCES["mnist"]._replace(mirrors=mirrors))
        assert is_small_mnist(load_dataset("mnist"))

    def test_no_network_is_one_line(self, small, tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            load_dataset("mnist")
        assert "http://127.0.0.1:9/train-images-idx3-ubyte.gz could not be fetched (" in str(error.value)
        assert "refused" in str(error.value)
        assert "FOVEAL_DATA" in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "cache").exists()

    def test_a_cache_that_cannot_be_written(self, server, tmp_path):
        (tmp_path / "cache").write_text("a file where the folder should be")
        with pytest.raises(FileNotFoundError, match="could not be fetched.*Not a directory.*cache/foveal"):
            load_dataset("mnist")

    def test_a_read_only_cache(self, server, tmp_path):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o500)
        if os.access(tmp_path / "cache", os.W_OK):
            pytest.skip("this user may write into read-only folders")
        with pytest.raises(FileNotFoundError, match="could not be fetched.*Permission denied"):
            load_dataset("mnist")

    def test_a_read_only_data_folder_is_enough(self, small, tmp_path):
        folder = put(tmp_path / "given", PACKED)
        for path in (*folder.iterdir(), folder):
            path.chmod(0o500 if path.is_dir() else 0o400)
        assert is_small_mnist(load_dataset("mnist", folder))
        assert not (tmp_path / "cache").exists()

    def test_a_tar_file(self, server, monkeypatch, tmp_path):
        server.files["/cifar-10-binary.tar.gz"] = tar(RECORDS)
        monkeypatch.setitem(SOURCES, "cifar10", SOURCES["cifar10"]._replace(mirrors=(server.url,)))
        assert len(load_dataset("cifar10").test) == 4
        assert files_under(tmp_path) == ["cache/foveal/cifar10/cifar-10-binary.tar.gz"]
        assert len(load_dataset("cifar10", download=False).test) == 4


# Folders of images


def picture(path: Path, shape: tuple[int, ...] = (6, 8, 3), seed: int = 0, **options: Any) -> np.ndarray:
    """Write noise as an image and return it."""
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return array


class TestFolder:
    def test_a_folder_a_class(self, tmp_path):
        expected = {
            (label, name): picture(tmp_path / label / name, seed=seed)
            for seed, (label, name) in enumerate(
                [("cat", "b.png"), ("cat", "a.PNG"), ("dog", "deep/c.bmp"), ("ant", "d.tiff")]
            )
        }
        (tmp_path / "cat" / ".b.png").write_bytes(b"what a Mac leaves behind")
        (tmp_path / "cat" / "notes.txt").write_text("no image")
        (tmp_path / ".git").mkdir()
        data = load_dataset(tmp_path, validation=0, test_size=1)
        assert data.classes == ("ant", "cat", "dog")
        assert data.space.shape == (3, 6, 8)
        parts = readers.read_folder(tmp_path)
        assert parts.train.labels.tolist() == [0, 1, 1, 2]
        for image, key in zip(parts.train.images, [("ant", "d.tiff"), ("cat", "a.PNG"), ("cat", "b.png")]):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected[key])

    def test_train_test_and_validation(self, tmp_path):
        for seed, part in enumerate(["train", "test", "val"]):
            for label in "ab":
                for number in range(seed + 1):
                    picture(tmp_path / part / label / f"{number}.png", seed=10 * seed + number)
        data = load_dataset(tmp_path)
        assert (len(data.train), len(data.test), len(data.validation)) == (2, 4, 6)
        assert data.validation.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert np.array_equal(data.test.images[3].permute(1, 2, 0), picture(tmp_path / "x.png", seed=11))
        (tmp_path / "val").rename(tmp_path / "validation")
        (tmp_path / "x.png").unlink()
        assert load_dataset(tmp_path).digest == data.digest
        with pytest.raises(ValueError, match="validation must be None for .*, which has its own, got 0.1"):
            load_dataset(tmp_path, validation=0.1)

    def test_a_class_may_be_called_train(self, tmp_path):
        for label in ("train", "bus"):
            for number in range(3):
                picture(tmp_path / label / f"{number}.png")
        assert load_dataset(tmp_path).classes == ("bus", "train")

    def test_grey_stays_grey_until_one_is_not(self, tmp_path):
        grey = picture(tmp_path / "a" / "0.png", (6, 8))
        Image.fromarray(grey > 127).save(tmp_path / "a" / "1.png")
        Image.fromarray(np.dstack([grey, grey // 2])).save(tmp_path / "a" / "2.png")
        parts = readers.read_folder(tmp_path)
        assert np.array_equal(parts.train.images, [[grey], [(grey > 127) * np.uint8(255)], [grey]])
        colour = picture(tmp_path / "a" / "3.png", (6, 8, 4))
        parts = readers.read_folder(tmp_path)
        assert np.array_equal(parts.train.images[0], [grey] * 3)
        assert np.array_equal(parts.train.images[3].permute(1, 2, 0), colour[:, :, :3])

    def test_orientation_of_a_camera_is_followed(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn
        array = picture(tmp_path / "a" / "0.png", (6, 8), exif=exif)
        assert np.array_equal(readers.read_folder(tmp_path).train.images[0, 0], np.rot90(array, -1))

    def test_size_crops_and_resizes_like_pillow(self, tmp_path):
        smooth = np.add.outer(np.arange(30) * 3, np.arange(47) * 2).astype(np.uint8)
        (tmp_path / "a").mkdir()
        Image.fromarray(smooth).save(tmp_path / "a" / "0.png")
        picture(tmp_path / "a" / "1.png", (5, 5))
        ours = readers.read_folder(tmp_path, size=12).train.images
        theirs = Image.fromarray(smooth[:, 8:38]).resize((12, 12), Image.Resampling.BILINEAR)
        assert ours.shape == (2, 1, 12, 12)
        assert np.abs(ours[0, 0].numpy().astype(int) - np.asarray(theirs)).max() <= 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda root: (root / "c").mkdir(), "/c has no images"),
            (lambda root: (root / "b/x.png").write_bytes(b"no image"), "/b/x.png is no whole image"),
            (lambda root: os.truncate(root / "b/0.png", 150), "/b/0.png is no whole image"),
            (
                lambda root: picture(root / "b/x.png", (5, 8, 3)),
                "/b/x.png has 5 rows and 8 columns .* 6 and 8; give a size",
            ),
            (
                lambda root: Image.fromarray(np.zeros((6, 8), np.uint16)).save(root / "b/x.png"),
                r"/b/x.png has more than 8 bits a channel \(mode I;16\)",
            ),
            (
                lambda root: picture(root / "train/a/0.png"),
                "has 'a' beside train; it takes test and val or validation",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, change, message):
        for label in "ab":
            picture(tmp_path / label / "0.png")
        change(tmp_path)
        with pytest.raises(ValueError, match=message) as error:
            load_dataset(tmp_path)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([], " has no folders of images, one a class"),
            (["train/a/0.png", "test/b/0.png"], "/test/b is a class that .*/train has not"),
            (["train/a/0.png", "val/a/0.png", "validation/a/0.png"], " has both val and validation"),
            (["train/a/0.png", "test/0.png"], "/test has no folders of images"),
            (["a/0.png"], " has a single image"),
        ],
    )
    def test_layouts_that_are_none(self, tmp_path, images, message):
        for name in images:
            picture(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            load_dataset(tmp_path)


class TestNpz:
    IMAGES = RNG.integers(0, 256, (30, 5, 6, 3), np.uint8)
    LABELS = np.arange(30) % 3

    def save(self, path: Path, **arrays: Any) -> Path:
        np.savez(path / "data.npz", **arrays)
        return path / "data.npz"

    @pytest.mark.parametrize(
        "names",
        [
            ("images", "labels", "test_images", "test_labels"),
            ("x", "y", "x_test", "y_test"),
            ("x_train", "y_train", "x_test", "y_test"),
            ("train_images", "train_labels", "test_images", "test_labels"),
        ],
    )
    def test_names(self, tmp_path, names):
        arrays = (self.IMAGES, self.LABELS[:, None], self.IMAGES[:4], self.LABELS[:4])
        data = load_dataset(self.save(tmp_path, **dict(zip(names, arrays))), validation=0)
        assert (data.classes, data.high, data.space.shape) == (("0", "1", "2"), 255, (3, 5, 6))
        assert np.array_equal(data.train.images, self.IMAGES.transpose(0, 3, 1, 2))
        assert data.train.labels.tolist() == self.LABELS.tolist()
        assert data.test.labels.tolist() == [0, 1, 2, 0]
        sized = load_dataset(tmp_path / "data.npz", size=4)
        assert torch.equal(sized.test.images, resize(data.test.images, 4))

    def test_a_validation_split_of_its_own(self, tmp_path):
        more = {"val_images": self.IMAGES[:6], "val_labels": self.LABELS[:6]}
        path = self.save(tmp_path, images=self.IMAGES, labels=self.LABELS, **more)
        data = load_dataset(path)
        assert (len(data.train), len(data.validation), len(data.test)) == (24, 6, 6)
        assert torch.equal(load_dataset(path, size=4).validation.images, resize(data.validation.images, 4))

    def test_layouts_of_images(self, tmp_path):
        planes = self.IMAGES.transpose(0, 3, 1, 2)
        for array, expected in ((self.IMAGES, planes), (planes, planes), (planes[:, 0], planes[:, :1])):
            parts = readers.read_npz(self.save(tmp_path, images=array, labels=self.LABELS))
            assert np.array_equal(parts.train.images, expected)

    def test_size(self, tmp_path):
        data = load_dataset(self.save(tmp_path, images=self.IMAGES, labels=self.LABELS), size=10)
        assert data.space.shape == (3, 10, 10)
        assert len(data.train) + len(data.validation) + len(data.test) == 30
        resized = resize(readers.read_npz(tmp_path / "data.npz").train.images, 10)
        assert all((resized == image).flatten(1).all(1).any() for image in data.test.images)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"labels": LABELS}, "has no images or x or train_images or x_train; it has labels"),
            ({"images": IMAGES}, "has no labels or y or"),
            ({}, "has no images .*; it has nothing"),
            ({"images": IMAGES, "x": IMAGES, "labels": LABELS}, "has images and x; it takes one of them"),
            ({"images": IMAGES, "labels": LABELS, "x_test": IMAGES}, "has no test_labels or y_test"),
            ({"images": IMAGES.astype(float), "labels": LABELS}, "images is .* float64; it takes"),
            ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"images is \(0, 5, 6, 3\)"),
            ({"images": IMAGES[0, 0], "labels": LABELS}, r"images is \(6, 3\)"),
            ({"images": IMAGES[:, :3], "labels": LABELS}, "both of axes 1 and 3 can be its channels"),
            ({"images": np.zeros((30, 5, 6, 5), np.uint8), "labels": LABELS}, "neither of axes 1 and 3"),
            ({"images": IMAGES, "labels": LABELS[:-1]}, "images and labels: 30 images and 29 labels"),
            ({"images": IMAGES, "labels": LABELS / 2}, "labels is .* float64; it takes .* integers"),
            ({"images": IMAGES, "labels": LABELS - 1}, "labels has -1; it takes integers from 0"),
            ({"images": IMAGES, "labels": LABELS + 1}, "has 3 labels, from 1 to 3; it takes 0 to 2"),
            (
                {"images": IMAGES, "labels": LABELS, "x_test": IMAGES[:1], "y_test": LABELS[:1] + 3},
                "test labels has label 3; its classes are 0 to 2",
            ),
            (
                {"images": IMAGES, "labels": LABELS, "x_test": IMAGES[:1, :, :, :1], "y_test": LABELS[:1]},
                r"has test images of shape \(1, 5, 6\), training images of \(3, 5, 6\)",
            ),
            (
                {"images": np.array([{}] * 30), "labels": LABELS},
                "no whole .npz file of plain arrays: .*allow_pickle",
            ),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, arrays, message):
        path = self.save(tmp_path, **arrays)
        with pytest.raises(ValueError, match=f"^{path}.*{message}") as error:
            load_dataset(path)
        assert "\n" not in str(error.value)

    def test_files_that_are_none(self, tmp_path):
        path = self.save(tmp_path, images=self.IMAGES, labels=self.LABELS)
        whole = path.read_bytes()
        file = io.BytesIO()
        np.save(file, self.IMAGES)
        for data in (
            b"",
            b"text",
            whole[:-30],
            whole[:500],
            whole.replace(b"\x93NUMPY", b"\x93NUMBY"),
            file.getvalue(),
        ):
            path.write_bytes(data)
            with pytest.raises(ValueError, match="data.npz is no whole .npz file"):
                load_dataset(path)


class TestArguments:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("mnits", "unknown data set 'mnits'; nearest: mnist "),
            (
                "/no/such/folder",
                "unknown data set '/no/such/folder'; nearest: digits, mnist, fashion-mnist, cifar10",
            ),
            ("/no/such.npz", "unknown data set '/no/such.npz'"),
        ],
    )
    def test_unknown_names(self, name, message):
        with pytest.raises(ValueError, match=message):
            load_dataset(name)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"seed": -1}, "seed must be 0 or more, got -1"),
            ({"validation": 1.0}, r"validation must be a share in \[0, 1\) or a count .* got 1.0"),
            ({"validation": -0.1}, "validation must be"),
            ({"validation": -1}, "validation must be"),
            ({"validation": float("nan")}, "validation must be"),
            ({"validation": 1437}, "validation must leave one of 1,437 training images or more, got 1437"),
            ({"size": 0}, "size must be 1 or more, got 0"),
            ({"train_size": 0}, "train_size must be 1 or more"),
            ({"train_size": 1295}, "train_size must be at most 1,294, which is all there are, got 1295"),
            ({"test_size": 361}, "test_size must be at most 360"),
        ],
    )
    def test_out_of_range(self, arguments, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            load_dataset("digits", **arguments)

    def test_refused_before_anything_is_fetched(self, server):
        with pytest.raises(ValueError, match="seed must"):
            load_dataset("mnist", seed=-1)
        assert server.requests == []

    def test_size_keeps_the_range_of_digits(self):
        small, large = load_dataset("digits"), load_dataset("digits", size=28)
        assert large.space.shape == (1, 28, 28)
        assert large.test.images.max() == small.test.images.max() == 16
        assert torch.equal(large.test.labels, small.test.labels)
        means = [data.test.images.float().mean() for data in (small, large)]
        assert abs(means[0] - means[1]) < 0.1


def test_resize_crops_the_middle_and_keeps_what_fits():
    images = torch.arange(4 * 7, dtype=torch.uint8).view(1, 1, 4, 7)
    assert torch.equal(resize(images, 4), images[:, :, :, 1:5])
    assert torch.equal(resize(images.transpose(2, 3), 4), images.transpose(2, 3)[:, :, 1:5])
    assert resize(torch.full((2, 3, 9, 9), 200, dtype=torch.uint8), 5).unique().tolist() == [200]
    halves = resize(torch.tensor([[0, 100], [0, 100]], dtype=torch.uint8).repeat(1, 1, 2, 2), 1)
    assert halves.item() == 50


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [("mnist", [5, 0, 4, 1, 9], [7, 2, 1, 0, 4]), ("fashion-mnist", [9, 0, 0, 3, 0], [9, 2, 1, 1, 6])],
)
def test_the_real_files(name, train, test):
    if not ((DATA / name).is_dir() or (DATA / "train-images-idx3-ubyte.gz").is_file()):
        pytest.skip(f"no {name} in FOVEAL_DATA")
    data = load_dataset(name, DATA, validation=0, download=False)
    assert (len(data.train), len(data.test), data.space.shape) == (60_000, 10_000, (1, 28, 28))
    assert data.train.labels[:5].tolist() == train
    assert data.test.labels[:5].tolist() == test
    assert data.train.images.max() == 255
    assert torch.bincount(data.test.labels).sum() == 10_000
    if name == "mnist":
        assert data.train.images.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
    else:
        assert torch.bincount(data.train.labels).tolist() == [6_000] * 10
        assert data.classes[data.train.labels[0]] == "Ankle boot"
