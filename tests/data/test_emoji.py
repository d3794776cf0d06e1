"""The embedded emoji: what is in the set, how it is split, what is refused."""

import numpy as np
import pytest

from var_jax import BadInput
from var_jax.assets.build_emoji import build
from var_jax.data.augmentation import augment_items
from var_jax.data.sources import Emoji, open_source


@pytest.fixture(scope="module")
def emoji():
    return {split: Emoji(split) for split in ("train", "validation", "all")}


def test_counts(emoji):
    assert len(emoji["all"]) == len(set(emoji["all"].names)) == 1906
    assert len(emoji["all"].class_names) == 9
    assert len(set(emoji["all"].subgroups)) == 98


def test_item(emoji):
    item = emoji["train"][0]
    assert item["image"].shape == (32, 32, 3) and item["image"].dtype == np.uint8
    assert item["label"].shape == () and item["label"].dtype == np.int32


def test_images_match_their_names(emoji):
    source = emoji["all"]
    hearts = [source.images[source.names.index(n)].mean((0, 1)) for n in ("heart", "blue_heart")]
    assert hearts[0].argmax() == 0 and hearts[1].argmax() == 2
    japan = source.names.index("jp")  # nearly the last cell of the sheet
    assert source.class_names[source.labels[japan]] == "Flags"
    middle, corner = source.images[japan][16, 16], source.images[japan][0, 0]
    assert middle[0] > middle[1] + 80 and corner.min() > 240


def test_split_is_disjoint_complete_and_stratified(emoji):
    train, validation = set(emoji["train"].names), set(emoji["validation"].names)
    assert not train & validation
    assert train | validation == set(emoji["all"].names)
    held_out = np.bincount(emoji["validation"].labels, minlength=9)
    assert (held_out == np.ceil(np.bincount(emoji["all"].labels) / 10)).all()


def test_split_never_changes(emoji):
    assert emoji["validation"].names[:3] == ("smile", "grin", "sweat_smile")


def test_smaller_is_the_mean_of_larger(emoji):
    large = Emoji("all", size=64).images.astype(float)
    mean = large.reshape(-1, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(mean - emoji["all"].images).max() <= 1
    assert Emoji("validation", size=24)[0]["image"].shape == (24, 24, 3)


@pytest.mark.parametrize("size", [0, 31, 66])
def test_bad_size(size):
    with pytest.raises(BadInput, match=rf"image size is {size}; .* even sizes from 2 to 64\.$"):
        Emoji("train", size=size)


def test_bad_split():
    with pytest.raises(BadInput, match=r"split is 'test'; .* train, validation, all\.$"):
        Emoji("test")


def test_open_source():
    assert len(open_source("emoji", "validation", 16)) == 194
    with pytest.raises(BadInput, match=r"data source is 'emojis'; expected emoji, a folder, "):
        open_source("emojis", "train", 32)


def test_build_refuses_what_is_not_the_package(tmp_path):
    (tmp_path / "x.tgz").write_text("no tarball")
    with pytest.raises(BadInput, match=r"x\.tgz is damaged .* emoji-datasource-google@16\.0\.0\.$"):
        build(tmp_path / "x.tgz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_augment_moves_and_mirrors(emoji):
    image, rng = emoji["train"][0]["image"], np.random.default_rng(0)
    augment = lambda **how: augment_items(**how)({"image": image}, rng)["image"]
    assert (augment() == image).all()
    flips = [augment(flip=True) for _ in range(20)]
    assert {f.tobytes() for f in flips} == {image.tobytes(), image[:, ::-1].tobytes()}

    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
    windows = {padded[y : y + 32, x : x + 32].tobytes() for y in range(5) for x in range(5)}
    assert {augment(shift=2).tobytes() for _ in range(400)} == windows


def test_bad_augmentation(emoji):
    with pytest.raises(BadInput, match=r"shift=-1; expected at least 0\.$"):
        augment_items(shift=-1)


def test_symbols_and_flags_are_never_mirrored(emoji):
    source, rng = emoji["train"], np.random.default_rng(0)
    change = augment_items(flip=True)
    mirrored = dict.fromkeys(source.class_names, False)
    for i in range(len(source)):
        item = change(source.train_item(i, 0, rng), rng)
        assert item.keys() == {"image", "label"}
        same = (item["image"] == source.images[i]).all()
        mirrored[source.class_names[item["label"]]] |= not same
    assert [name for name, seen in mirrored.items() if not seen] == ["Symbols", "Flags"]
