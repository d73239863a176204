"""Files of labelled images: idx, CIFAR-10's binary, folders, .npz, and where the known data sets are found.

Every file of a known data set is checked against the sha256 of its unpacked content before it is used, and a
download is whole on disk or not at all. Nothing is unpickled.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import math
import os
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels, in memory on one device; a model that needs no labels takes `images` alone."""

    images: Tensor
    """(N, C, H, W) uint8."""
    labels: Tensor
    """(N,) int64, indices into the data set's classes."""

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be (N, C, H, W) uint8, got {tuple(self.images.shape)} {self.images.dtype}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be ({len(self.images)},) int64, one an image, "
                f"got {tuple(self.labels.shape)} {self.labels.dtype}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: str | torch.device) -> "Split":
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> "Split":
        """A copy of the images at `index`, (M,) int64 on any device."""
        index = index.to(self.images.device)
        # On the CPU ten times as fast as indexing, which copies pixel by pixel.
        return Split(self.images.index_select(0, index), self.labels.index_select(0, index))


def resize(images: Tensor, size: int) -> Tensor:
    """(N, C, H, W) uint8 -> (N, C, size, size) uint8: the square in the middle, bilinear and antialiased."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, :, top : top + side, left : left + side]
    if side != size and len(images):
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return images.contiguous()


class Parts(NamedTuple):
    """What a reader finds: splits that the data set does not have are None."""

    train: Split
    validation: Split | None
    test: Split | None
    classes: tuple[str, ...]
    high: int = 255


def read_digits() -> Parts:
    """Scikit-learn's 1,797 digits of 8x8."""
    from sklearn.datasets import load_digits  # takes a second

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    return Parts(Split(images, labels), None, None, DIGITS, high=16)


def read_folder(path: Path, size: int | None = None) -> Parts:
    """Images in one folder a class, which may lie in train/, test/ and val/ (or validation/).

    Classes are sorted by name. Files are found at any depth below a class; those whose name begins with a
    dot or does not end in one of `IMAGE_SUFFIXES` are passed over. Images have one channel where all are
    grey, and else are RGB; transparency is dropped, and a camera's orientation tag is followed. They must
    have one size, or `size` (pixels) brings them to one, see `resize`.

    Raises ValueError for a class without images, a file that is no whole image, one of more than 8 bits a
    channel, images of several sizes, and folders beside train/ that mean nothing here.
    """
    roots = {"train": path}
    if any(_folders_in(path / "train")):
        roots = {folder.name: folder for folder in _folders_in(path)}
        if unknown := sorted(roots.keys() - {"train", "test", "val", "validation"}):
            raise ValueError(f"{path} has {unknown[0]!r} beside train; it takes test and val or validation")
        if {"val", "validation"} <= roots.keys():
            raise ValueError(f"{path} has both val and validation; it takes one")
    for root in roots.values():
        if not _folders_in(root):
            raise ValueError(f"{root} has no folders of images, one a class")
    classes = tuple(folder.name for folder in _folders_in(roots["train"]))
    images: list[Tensor] = []
    labels: list[int] = []
    ends: dict[str, int] = {}
    for part, root in roots.items():
        for folder in _folders_in(root):
            if folder.name not in classes:
                raise ValueError(f"{folder} is a class that {roots['train']} has not")
            files = [
                file
                for file in sorted(folder.rglob("*"))
                if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
            ]
            if not files:
                raise ValueError(f"{folder} has no images")
            for file in files:
                image = _read_image(file)
                if size is not None:
                    image = resize(image[None], size)[0]
                if images and image.shape[1:] != images[0].shape[1:]:
                    raise ValueError(
                        f"{file} has {image.shape[1]} rows and {image.shape[2]} columns of pixels, others "
                        f"{images[0].shape[1]} and {images[0].shape[2]}; give a size to bring all to"
                    )
                images.append(image)
            labels += [classes.index(folder.name)] * len(files)
        ends[part] = len(labels)
    channels = max(len(image) for image in images)
    stacked, index = torch.stack([image.expand(channels, -1, -1) for image in images]), torch.tensor(labels)
    splits: dict[str, Split] = {}
    for part, start, end in zip(ends, [0, *ends.values()], ends.values()):
        splits[part] = Split(stacked[start:end], index[start:end])
    return Parts(splits["train"], splits.get("val", splits.get("validation")), splits.get("test"), classes)


IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def _folders_in(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def _read_image(file: Path) -> Tensor:
    """(1 or 3, H, W) uint8."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            image.load()
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise ValueError(f"{file} is no whole image: {error}") from error
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"{file} has more than 8 bits a channel (mode {image.mode})")
    array = np.array(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    tensor = torch.from_numpy(array)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


NPZ_NAMES = {
    "train": (("images", "x", "train_images", "x_train"), ("labels", "y", "train_labels", "y_train")),
    "validation": (("val_images", "x_val"), ("val_labels", "y_val")),
    "test": (("test_images", "x_test"), ("test_labels", "y_test")),
}
"""What the arrays of an .npz file may be called."""


def read_npz(path: Path) -> Parts:
    """Arrays of images and labels, under the names of `NPZ_NAMES`; only the training images are needed.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) uint8 with 1 to 4 channels and 0 to 255 as their range,
    or 0 to a number under the name `high`;
    labels (N,) or (N, 1) integers from 0, each class at least once among the training images.

    Raises ValueError for a file that is none, for arrays of another kind, and for names given twice.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # a damaged file can make a reader raise anything
        raise ValueError(f"{path} is no whole .npz file of plain arrays: {error}") from error
    splits: dict[str, Split] = {}
    for part, names in NPZ_NAMES.items():
        found = [[name for name in group if name in arrays] for group in names]
        if any(len(group) > 1 for group in found):
            twice = next(group for group in found if len(group) > 1)
            raise ValueError(f"{path} has {' and '.join(twice)}; it takes one of them")
        if not all(found):
            if part == "train" or any(found):
                wanted = " or ".join(names[found.index([])])
                raise ValueError(f"{path} has no {wanted}; it has {', '.join(arrays) or 'nothing'}")
            continue
        (images,), (labels,) = found
        splits[part] = _pair(
            _npz_images(arrays[images], f"{path}: {images}"),
            _npz_labels(arrays[labels], f"{path}: {labels}"),
            f"{path}: {images} and {labels}",
        )
    present = splits["train"].labels.unique()
    count = len(present)
    if present[-1] != count - 1:
        raise ValueError(
            f"{path} has {count} labels, from {present[0]} to {present[-1]}; it takes 0 to {count - 1}"
        )
    for part, split in splits.items():
        if split.images.shape[1:] != splits["train"].images.shape[1:]:
            shapes = [tuple(splits[key].images.shape[1:]) for key in (part, "train")]
            raise ValueError(f"{path} has {part} images of shape {shapes[0]}, training images of {shapes[1]}")
        _check_labels(split.labels, count, f"{path}: {part} labels")
    names_of_classes = tuple(map(str, range(count)))
    high = _npz_high(arrays, splits, path)
    return Parts(splits["train"], splits.get("validation"), splits.get("test"), names_of_classes, high)


def _npz_high(arrays: dict[str, np.ndarray], splits: dict[str, Split], path: Path) -> int:
    """The largest value that pixels may have."""
    high = arrays.get("high", np.array(255))
    if high.ndim or high.dtype.kind not in "iu" or not 1 <= high <= 255:
        raise ValueError(f"{path}: high is {high}; it takes a whole number from 1 to 255")
    for part, split in splits.items():
        if split.images.max() > int(high):
            raise ValueError(f"{path} has {part} images with values to {split.images.max()}, high is {high}")
    return int(high)


def _npz_images(array: np.ndarray, where: str) -> Tensor:
    if array.ndim == 3:
        array = array[:, None]
    if array.dtype != np.uint8 or array.ndim != 4 or 0 in array.shape:
        raise ValueError(
            f"{where} is {array.shape} {array.dtype}; it takes (N, H, W), (N, H, W, C) or (N, C, H, W) uint8"
        )
    first, last = array.shape[1] <= 4, array.shape[3] <= 4
    if first == last:
        kind = "both" if first else "neither"
        raise ValueError(f"{where} is {array.shape}: {kind} of axes 1 and 3 can be its channels (1 to 4)")
    return torch.from_numpy(np.ascontiguousarray(array if first else array.transpose(0, 3, 1, 2)))


def _npz_labels(array: np.ndarray, where: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.shape not in ((array.size,), (array.size, 1)):
        raise ValueError(f"{where} is {array.shape} {array.dtype}; it takes (N,) or (N, 1) integers")
    if array.size and int(array.min()) < 0:
        raise ValueError(f"{where} has {int(array.min())}; it takes integers from 0")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def _pair(images: Tensor, labels: Tensor, where: str) -> Split:
    if len(images) != len(labels):
        raise ValueError(f"{where}: {len(images):,} images and {len(labels):,} labels")
    return Split(images, labels)


def _check_labels(labels: Tensor, classes: int, where: str) -> None:
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        wrong = int(labels.max()) if labels.max() >= classes else int(labels.min())
        raise ValueError(f"{where} has label {wrong}; its classes are 0 to {classes - 1}")


def parse_idx(data: bytes, ndim: int, where: str) -> Tensor:
    """The content of an idx file of `ndim` axes of unsigned bytes, as a uint8 tensor.

    Raises ValueError, in which `where` names the file, unless the header is right and the content as long as
    it says.
    """
    magic = bytes((0, 0, 8, ndim))
    if data[:4] != magic:
        raise ValueError(
            f"{where} begins with {data[:4].hex()!r}; such an idx file begins with {magic.hex()!r}"
        )
    header = 4 + 4 * ndim
    if len(data) < header:
        raise ValueError(f"{where} ends within its header")
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    if len(data) - header != math.prod(shape):
        raise ValueError(f"{where} has {len(data) - header:,} bytes for {' x '.join(map(str, shape))}")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())


def parse_idx_pair(content: dict[str, bytes], images: str, labels: str, classes: int) -> Split:
    """Two idx files, given by name with their content, as a split. Raises ValueError that names them."""
    pixels = parse_idx(content[images], 3, images).unsqueeze(1)
    split = _pair(pixels, parse_idx(content[labels], 1, labels).long(), f"{images} and {labels}")
    _check_labels(split.labels, classes, labels)
    return split


def parse_cifar(data: bytes, where: str) -> Split:
    """The content of a file of CIFAR-10's binary version: a label and 3x32x32 pixels for each image.

    Raises ValueError, in which `where` names the file, unless it is whole and its labels are 0 to 9.
    """
    record = 1 + 3 * 32 * 32
    if not data or len(data) % record:
        raise ValueError(f"{where} has {len(data):,} bytes, which is no number of images of {record:,} bytes")
    table = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(-1, record).copy())
    labels = table[:, 0].long()
    _check_labels(labels, 10, where)
    return Split(table[:, 1:].reshape(-1, 3, 32, 32).contiguous(), labels)


# Known data sets and their files


class Source(NamedTuple):
    """Where a known data set comes from."""

    mirrors: tuple[str, ...]
    """Addresses of folders that have the packed files."""
    files: dict[str, str]
    """sha256 of each file, unpacked."""
    classes: tuple[str, ...]
    archive: str | None = None
    """The .tar.gz file that has all files; None where each is a .gz file of its own."""

    @property
    def packed(self) -> dict[str, dict[str, str]]:
        """Files as published, and the sha256 of what each holds."""
        if self.archive is not None:
            return {self.archive: self.files}
        return {f"{file}.gz": {file: sha256} for file, sha256 in self.files.items()}


DIGITS = tuple("0123456789")
SOURCES = {
    "mnist": Source(
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        {
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        DIGITS,
    ),
    "fashion-mnist": Source(
        (
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        {
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    "cifar10": Source(
        ("https://www.cs.toronto.edu/~kriz/",),
        {
            f"cifar-10-batches-bin/{file}.bin": sha256
            for file, sha256 in {
                "data_batch_1": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
                "data_batch_2": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
                "data_batch_3": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
                "data_batch_4": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
                "data_batch_5": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
                "test_batch": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
            }.items()
        },
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        archive="cifar-10-binary.tar.gz",
    ),
}
"""The data sets that are made of files."""

DEBIAN = Path("/usr/share/datasets")


def read_known(name: str, data_dir: str | Path | None, download: bool) -> Parts:
    content = _find(name, data_dir, download)
    classes = SOURCES[name].classes
    if SOURCES[name].archive is not None:
        *batches, test = (parse_cifar(data, file) for file, data in content.items())
        images = torch.cat([batch.images for batch in batches])
        return Parts(Split(images, torch.cat([batch.labels for batch in batches])), None, test, classes)
    files = list(content)
    train, test = (parse_idx_pair(content, files[i], files[i + 1], len(classes)) for i in (0, 2))
    return Parts(train, None, test, classes)


def _find(name: str, data_dir: str | Path | None, download: bool) -> dict[str, bytes]:
    """The content of a data set's files by name, checked."""
    folders = _data_folders(data_dir)
    places = [place for folder in folders for place in (folder / name, folder)]
    content: dict[str, bytes] = {}
    for packed, sums in SOURCES[name].packed.items():
        found = next(filter(None, (_look(place, packed, sums) for place in places)), None)
        if found is None:
            reason = "downloads are off"
            if download:
                found, reason = _download(SOURCES[name].mirrors, folders[-1] / name, packed, sums)
        if found is None:
            raise FileNotFoundError(
                f"no {packed} for {name} in {', '.join(map(str, folders))}, and {reason}; put "
                f"{', '.join(SOURCES[name].packed)} into a folder and give it as data_dir or FOVEAL_DATA"
            )
        content |= found
    return content


def _data_folders(data_dir: str | Path | None) -> list[Path]:
    """Where files are looked for, in this order; downloads go to the last one."""
    folders = []
    argument, given = ("data_dir", data_dir) if data_dir else ("FOVEAL_DATA", os.environ.get("FOVEAL_DATA"))
    if given:
        folders.append(Path(given).expanduser())
        if not folders[0].is_dir():
            raise ValueError(f"{argument} must be a folder, got {str(given)!r}")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [*folders, DEBIAN, Path(cache) / "foveal"]


def _look(place: Path, packed: str, sums: dict[str, str]) -> dict[str, bytes] | None:
    """What `packed` holds, if it lies in a folder, unpacked or not."""
    if all((place / file).is_file() for file in sums):
        content = {file: (place / file).read_bytes() for file in sums}
        for file, sha256 in sums.items():
            _check_sum(content[file], sha256, str(place / file))
        return content
    if (place / packed).is_file():
        return _unpack((place / packed).read_bytes(), packed, sums, str(place / packed))
    return None


def _unpack(data: bytes, packed: str, sums: dict[str, str], where: str) -> dict[str, bytes]:
    """The files in a .gz or .tar.gz file by name, in memory and checked; other members are left alone."""
    try:
        if packed.endswith(".tar.gz"):
            content = {}
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
                for member in archive:
                    if member.name in sums and member.isfile():
                        file = archive.extractfile(member)
                        assert file is not None
                        content[member.name] = file.read()
        else:
            content = dict.fromkeys(sums, gzip.decompress(data))
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    for name, sha256 in sums.items():
        if name not in content:
            raise ValueError(f"{where} has no {name}")
        _check_sum(content[name], sha256, where if len(sums) == 1 else f"{where}: {name}")
    return {name: content[name] for name in sums}


def _check_sum(data: bytes, sha256: str, where: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(f"{where} is not the published file: unpacked it has sha256 {found}, not {sha256}")


def _download(
    mirrors: Sequence[str], folder: Path, packed: str, sums: dict[str, str]
) -> tuple[dict[str, bytes] | None, str]:
    """Fetch a file into a folder, whole and checked or not at all: its content, or None and the reason."""
    target = folder / packed
    partial = folder / f"{packed}.{os.getpid()}.partial"
    reasons = []
    for mirror in mirrors:
        try:
            _fetch(mirror + packed, partial)
            content = _unpack(partial.read_bytes(), packed, sums, mirror + packed)
            partial.replace(target)
            return content, ""
        except (OSError, http.client.HTTPException) as error:
            reasons.append(f"{mirror + packed} could not be fetched ({error})")
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    return None, ", ".join(reasons)


def _fetch(url: str, path: Path) -> None:
    """Write what `url` gives to a file, flushed to the disk, with a progress bar if there is a terminal."""
    from rich.console import Console
    from rich.progress import Progress  # takes a while, and most runs download nothing

    hidden = not sys.stderr.isatty()
    with contextlib.ExitStack() as stack:
        response = stack.enter_context(urllib.request.urlopen(url, timeout=30))
        path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(path.open("wb"))
        progress = stack.enter_context(Progress(console=Console(stderr=True), disable=hidden))
        length = response.length  # None where the server does not say
        task = progress.add_task(path.name.split(".")[0], total=length)
        while block := response.read(1 << 16):
            file.write(block)
            progress.advance(task, len(block))
        if length is not None and file.tell() != length:
            raise ConnectionError(f"it ended after {file.tell():,} of {length:,} bytes")
        file.flush()
        os.fsync(file.fileno())
