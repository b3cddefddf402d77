"""Images in the layout of ImageNet (ILSVRC 2012)."""

from __future__ import annotations

from pathlib import Path

from backdoorbench_moe.data.base import Dataset, ImageSet
from backdoorbench_moe.data.decoded import read_split, with_digest
from backdoorbench_moe.data.images import Form, check_image_size
from backdoorbench_moe.data.listing import LeftOut
from backdoorbench_moe.data.roots import data_root, missing
from backdoorbench_moe.data.synsets import list_classes, list_synsets, name_synsets
from backdoorbench_moe.errors import ConfigError, DataError

# Files with class names, from Kaggle, Caffe and Tiny ImageNet.
NAMES = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")


class ImageNet(Dataset):
    """Images in the layout of ImageNet: `train/n01440764/*` and `val/n01440764/*`, with a folder for each synset.

    The test images are those of `val`, which must also be in class folders; its classes must be among those of `train`.
    Classes are numbered in the alphabetical order of the synsets, as in torchvision. Their names are read from
    `LOC_synset_mapping.txt`, `synset_words.txt` or `words.txt` next to the two folders. Without such a file, or for
    synsets that it lacks, the synset is the name. Subsets of the classes, such as ImageNet-100, are accepted.

    Decoded images are cached on disk, see `data.decoded`: 200,000 images of 224x224 need 30 GB. Some images of ImageNet
    are CMYK or have an alpha channel; Pillow converts them to RGB, as in torchvision.

    Args:
        root: The folder that contains `train` and `val`. By default the environment variable BBMOE_DATA, or
            ~/.cache/backdoorbench_moe if that is not set.
        image_size: Side of the square images in pixels, 1 to 8192.
        resize: Size to which the shorter side of an image is resized (bilinear, antialiased) before the center crop,
            from `image_size` to 8192; `image_size` if None. Many models are evaluated with resize 256 and size 224.
        train_images: Number of training images to keep, from 1; all if None. See `Dataset`.
        test_images: Number of test images to keep, from 1; all if None. See `Dataset`.

    Raises:
        ConfigError: A value is out of range.

    Source:
        Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 115 (2015).
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        image_size: int = 224,
        resize: int | None = None,
        train_images: int | None = None,
        test_images: int | None = None,
    ) -> None:
        super().__init__(train_images=train_images, test_images=test_images)
        self.root, self.image_size, self.resize = root, check_image_size(image_size), resize
        if resize is not None and not image_size <= resize <= 8192:
            raise ConfigError.expected("dataset: resize", f"image_size ({image_size}) to 8192 pixels", resize)

    @classmethod
    def write_tiny(cls, folder: Path) -> dict[str, object]:
        """Write a small data set for the conformance tests; see `Dataset.write_tiny`."""
        from backdoorbench_moe.data.tiny_files import write_imagenet

        write_imagenet(folder)
        return {"root": str(folder), "image_size": 32}

    def source(self) -> Path | None:
        """Return the folder that is read; None if it does not have both splits."""
        root = data_root(self.root)
        return root if (root / "train").is_dir() and (root / "val").is_dir() else None

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, by number, without reading images."""
        root = self._root()
        return name_synsets(list_synsets(root / "train"), [root / name for name in NAMES])

    def read(self) -> ImageSet:
        """List the files and decode those that are kept.

        Raises:
            DataError: Folders are missing or have unexpected names, a class has no images, or a file is damaged. The
                message names the file or folder.
        """
        root, left_out = self._root(), LeftOut()
        synsets, tested = list_synsets(root / "train"), list_synsets(root / "val")
        if unknown := sorted(set(tested) - set(synsets)):
            raise DataError(
                f"{root / 'val' / unknown[0]}: expected the classes of train, which has no such folder"
            )
        train = list_classes(root / "train", synsets, root, left_out)
        # Some classes may have no test images.
        numbers = [synsets.index(synset) for synset in tested]
        test = [(path, numbers[place]) for path, place in list_classes(root / "val", tested, root, left_out)]
        left_out.warn(f"imagenet: {root}")
        form = Form(self.image_size, crop=True, resize=self.resize, convert=True)
        return with_digest(
            ImageSet(
                "imagenet",
                read_split(train, form, self.train_images, "train_images"),
                read_split(test, form, self.test_images, "test_images"),
                name_synsets(synsets, [root / name for name in NAMES]),
            )
        )

    def _root(self) -> Path:
        root = data_root(self.root)
        if self.source() is None:
            raise missing("imagenet", root, "train and val", "")
        return root
