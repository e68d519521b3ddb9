"""examples/recipes: pictures, batches, checkpoints and networks."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("accelerate")
pytest.importorskip("rich")

from recipes import batches, checkpoint, networks, pictures
from recipes.recipe import Recipe
from recipes.training import evaluate, train

import nmconv

# Checkpoints


def states(folder):
    """Two states, written one after the other."""
    path = folder / "checkpoint.pt"
    for step in (1, 2):
        checkpoint.write(path, {"step": step, "weights": torch.full((1000,), float(step))})
    return path


def test_a_checkpoint_and_the_one_before_it(tmp_path):
    path = states(tmp_path)
    assert checkpoint.read(path, torch.device("cpu"))["step"] == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]
    path.unlink()  # killed between the two renames
    assert checkpoint.read(path, torch.device("cpu"))["step"] == 1
    assert checkpoint.read(tmp_path / "none.pt", torch.device("cpu")) is None


@pytest.mark.parametrize("keep", [0, 10, 32, 33, 1000, -1])
def test_a_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, keep, capsys):
    path = states(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert checkpoint.read(path, torch.device("cpu"))["step"] == 1
    assert "damaged" in capsys.readouterr().out
    checkpoint.previous(path).write_bytes(whole[:keep])
    with pytest.raises(ValueError, match="to start again"):
        checkpoint.read(path, torch.device("cpu"))


def test_one_wrong_bit_is_noticed(tmp_path):
    path = states(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert checkpoint.read(path, torch.device("cpu"))["step"] == 1


def test_a_damaged_file_never_takes_the_place_of_a_whole_one(tmp_path):
    path = states(tmp_path)
    path.write_bytes(b"damaged")
    checkpoint.write(path, {"step": 3})
    assert checkpoint.read(path, torch.device("cpu"))["step"] == 3
    path.unlink()  # killed before the next one is in its place
    assert checkpoint.read(path, torch.device("cpu"))["step"] == 1


def test_weights_are_told_apart():
    torch.manual_seed(0)
    one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    other = {key: value.clone() for key, value in one.items()}
    assert checkpoint.digest(one) == checkpoint.digest(other)
    other["1.num_batches_tracked"] += 1
    assert checkpoint.digest(one) != checkpoint.digest(other)


# Pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An ImageFolder of three classes, whose pictures differ in size."""
    from PIL import Image

    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, each in (("train", 9), ("val", 3)):
        for label in ("ant", "bee", "cow"):
            (root / split / label).mkdir(parents=True)
            for i in range(each):
                pixels = draw.integers(0, 256, size=(40 + i, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


def test_pictures_held_back_are_no_others(folder):
    data = pictures.load_data(folder, 32, held_back=6)
    assert (len(data.train), len(data.valid), len(data.test)) == (21, 6, 9)
    both = torch.cat([data.train.images, data.valid.images])
    assert torch.equal(both, pictures.load_data(folder, 32).train.images)
    assert data.valid.labels.bincount().tolist() == [2, 2, 2]
    encoded = pictures.load_data(folder, 0, held_back=6, decode=False)
    for one, other in ((data.train, encoded.train), (data.valid, encoded.valid), (data.test, encoded.test)):
        assert torch.equal(one.labels, other.labels)
        assert [label for _, label in other.dataset] == one.labels.tolist()


@pytest.mark.parametrize("more, word", [({"held_back": 27}, "0 pictures"), ({"images": 25, "held_back": 3}, "of 27")])
def test_too_few_pictures(folder, more, word):
    with pytest.raises(ValueError, match=word):
        pictures.load_data(folder, 32, **more)


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="ImageFolder"):
        pictures.load_data(tmp_path)
    with pytest.raises(ValueError, match="Nothing"):
        pictures.load_data(tmp_path, dataset="Nothing")


def test_torchvisions_data_sets(tmp_path):
    """CIFAR10's own files, MNIST's grey ones, and a data set that has splits by name."""
    import pickle

    draw = np.random.default_rng(0)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {"data": draw.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
        (base / name).write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
        data = pictures.load_data(tmp_path, 32, 20, dataset="CIFAR10", held_back=10)
        raw = pickle.loads((base / "test_batch").read_bytes())["data"].reshape(10, 3, 32, 32).transpose(0, 2, 3, 1)
    assert data.classes == tuple("abcdefghij") and (len(data.train), len(data.valid)) == (20, 10)
    order = data.test.labels.argsort()
    assert np.array_equal(data.test.images[order].numpy(), raw)  # as they are: nothing is resized

    class Named(torch.utils.data.Dataset):
        def __init__(self, root, split):
            if split not in ("train", "val"):
                raise ValueError(f"no {split}")
            self._labels = [0, 1, 1] if split == "train" else [1]

        def __len__(self):
            return len(self._labels)

        def __getitem__(self, index):
            from PIL import Image

            return Image.new("L", (9, 7), 40 * index), self._labels[index]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.Named", Named, raising=False)
        data = pictures.load_data(tmp_path, 6, dataset="Named")
    assert data.classes == ("0", "1") and data.train.images.shape == (3, 6, 6, 1) and len(data.test) == 1
    assert data.train.images[:, 0, 0, 0].tolist() in ([0, 40, 80], [0, 80, 40])


# Batches

TIMM = Recipe(epochs=2, batch_size=4, seed=5, augment="timm", auto_augment="rand-m9-mstd0.5", erase=0.5)


def network(classes=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
    model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)])
    model.pretrained_cfg = {**batches.CIFAR, "input_size": (3, 24, 24), "interpolation": "bicubic", "crop_pct": 0.9}
    return model


def of(parts):
    return [(images.clone(), labels.clone()) for images, labels in parts]


def test_timms_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    model, train_split = network(), pictures.load_data(folder, 0, decode=False).train
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    whole = of(batches.batches(model, train_split, TIMM, 1, 0, batches.Share()))
    before = random.random(), np.random.rand(), torch.rand(())
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    rest = of(batches.batches(model, train_split, TIMM, 1, 4, batches.Share(workers=2)))
    halves = [of(batches.batches(model, train_split, TIMM, 1, 0, batches.Share(rank, 2))) for rank in (0, 1)]
    assert len(whole) == 6 and whole[0][0].shape == (4, 3, 24, 24)
    for (images, labels), (again, more) in zip(whole[4:], rest, strict=True):
        assert torch.equal(images, again) and torch.equal(labels, more)
    for (images, _), (one, _), (two, _) in zip(whole, *halves, strict=True):
        assert torch.equal(images, torch.cat([one, two]))
    other = of(batches.batches(model, train_split, TIMM, 0, 0, batches.Share()))
    assert not any(torch.equal(images, more) for (images, _), (more, _) in zip(whole, other, strict=True))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert before == (random.random(), np.random.rand(), torch.rand(()))  # nothing was drawn from the caller's


def test_a_picture_is_augmented_otherwise_in_every_epoch_and_at_every_seed():
    """Of equal pictures, so that their order makes no difference."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, size=(40, 40, 3), dtype=np.uint8)
    equal = pictures.Encoded([(Image.fromarray(pixels), 0)] * 8, torch.zeros(8, dtype=torch.int64))

    def seen(seed, epoch):
        parts = batches.batches(network(), equal, replace(TIMM, seed=seed), epoch, 0, batches.Share())
        return sorted(float(image.double().sum()) for images, _ in parts for image in images)

    assert seen(5, 0) == seen(5, 0)
    for other in (seen(5, 1), seen(6, 0)):
        assert not set(other) & set(seen(5, 0))


def test_validation_sees_every_picture_once_as_it_is(folder):
    model, data = network(), pictures.load_data(folder, 0, decode=False)
    for processes in (1, 2, 5):
        shares = [batches.Share(rank, processes) for rank in range(processes)]
        seen = [of(batches.in_order(model, data.test, 4, share)) for share in shares]
        labels = torch.cat([labels for parts in seen for _, labels in parts])
        assert labels.bincount().tolist() == [3, 3, 3]
    first, second = (of(batches.in_order(model, data.test, 4, batches.Share(workers=w))) for w in (0, 1))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def test_training_with_workers_ends_with_the_same_bits(folder):
    data = pictures.load_data(folder, 0, decode=False)
    one, other = network(), network()
    logs = [train(model, data, TIMM, workers=workers) for model, workers in ((one, 0), (other, 2))]
    assert logs[0]["losses"] == logs[1]["losses"]
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    assert evaluate(one, data.test) == evaluate(other, data.test, batch_size=2)


# The recipe


def test_the_weights_average_is_what_is_left(folder):
    data, steps = pictures.load_data(folder, 24), []
    recipe = Recipe(epochs=2, batch_size=9, ema=0.9)
    model = network()
    expected = {key: value.clone() for key, value in model.state_dict().items()}

    def average(step, model):
        steps.append(step)
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                expected[key].lerp_(value, 0.1 if step > 1 else 1.0)  # timm's average begins with the first

    train(model, data, recipe, after_step=average)
    assert steps == [1, 2, 3, 4, 5, 6]
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[key])


def test_a_gradual_network_is_finished_and_its_average_with_it(folder):
    data = pictures.load_data(folder, 24)
    net = nn.Sequential(network()[:3], nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nmconv.convert(net, "2:1", gradual=True, example_inputs=torch.zeros(1, 3, 24, 24))
    slopes = []
    seen = lambda step, model: slopes.append(next(iter(nmconv.get_slopes(model).values())))  # noqa: E731
    train(model, data, Recipe(epochs=2, batch_size=9, ema=0.5), gradual={"end": 0.5}, after_step=seen)
    assert slopes[-1] == 1 and slopes[0] < 0.3 and not nmconv.get_slopes(model)
    nmconv.fold_norms(model)  # refused for gradual models


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"batch_size": 5, "mixup": 0.2}, "even"),
        ({"accumulate": 3}, "divisible"),
        ({"batch_size": 64}, "do not fill"),
        ({"augment": "flip"}, "'flip'"),
        ({"erase": 0.1}, "timm"),
        ({"distill": 0.5}, "teacher"),
    ],
)
def test_a_recipe_that_cannot_be_followed(folder, wrong, word):
    model, data = network(), pictures.load_data(folder, 24)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=word):
        train(model, data, replace(Recipe(epochs=1, batch_size=4), **wrong))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_bfloat16_is_refused_where_the_cpu_has_none(folder, monkeypatch):
    monkeypatch.setattr("recipes.recipe.fast_bf16", lambda: False)
    with pytest.raises(ValueError, match="many times slower"):
        train(network(), pictures.load_data(folder, 24), Recipe(epochs=1, batch_size=4, precision="bf16"))


def test_a_run_of_another_network_is_not_continued(folder, tmp_path):
    data, recipe = pictures.load_data(folder, 24), Recipe(epochs=1, batch_size=9)
    x = torch.zeros(1, 3, 24, 24)
    net = nn.Sequential(network()[:3], nn.Conv2d(4, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    train(nmconv.convert(net, "2:1", example_inputs=x), data, recipe, out=tmp_path)
    with pytest.raises(ValueError, match="other plan"):
        train(nmconv.convert(net, "2:1", keep="boundary", example_inputs=x), data, recipe, out=tmp_path)
    with pytest.raises(ValueError, match="other plan"):
        train(net, data, recipe, out=tmp_path)
    torch.manual_seed(1)
    nn.init.normal_(net[1].weight)
    with pytest.raises(ValueError, match="other weights"):
        train(nmconv.convert(net, "2:1", example_inputs=x), data, recipe, out=tmp_path)


def test_grey_pictures_have_as_many_channels_as_the_network_takes():
    grey = torch.randint(0, 256, (2, 8, 8, 1), dtype=torch.uint8)
    for channels in (1, 3):
        given = batches.inputs(nn.Conv2d(channels, 4, 3), grey)
        assert given.shape == (2, channels, 8, 8) and torch.equal(given, given[:, :1].expand_as(given))


def test_networks_for_small_pictures_are_given_small_pictures_by_timm(folder):
    model, data = networks.build("cifar_resnet8", 3), pictures.load_data(folder, 0, decode=False)
    images, _ = next(batches.batches(model, data.train, TIMM, 0, 0, batches.Share()))
    assert images.shape == (4, 3, 32, 32)


def test_networks_with_auxiliary_heads(folder):
    data = pictures.load_data(folder, 32)
    model = networks.build("googlenet", 3, init_weights=False)
    log = train(model, data, Recipe(epochs=1, batch_size=27, lr=0.01))
    assert 0 < log["losses"][0] < 10


@pytest.mark.parametrize(
    "flags, word",
    [
        (["cifar_resnet8", "--plan", "none.json"], "none.json"),
        (["cifar_resnet8", "--weights", "none.pth"], "none.pth: no such file"),
        (["cifar_resnet8", "--dataset", "folder"], "'folder' is not a data set"),
        (["nope:f"], "nope"),
        (["cifar_resnet8", "--accumulate", "0"], "accumulate=0"),
        (["cifar_resnet8", "--epochs", "0"], "epochs=0"),
        (["cifar_resnet8", "--distill", "0.5"], "teacher"),
        (["cifar_resnet8", "--ratio", "1:2"], "1:2"),
    ],
)
def test_wrong_arguments_end_in_one_line(folder, tmp_path, monkeypatch, flags, word):
    from examples import train as script

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=word) as ended:
        script.main([*flags, "--data-dir", str(folder), "--out", str(tmp_path), "--batch-size", "9", "--device", "cpu"])
    assert len(str(ended.value).splitlines()) == 1


# Networks

PUBLISHED = {  # parameters, and what ours has more: 1x1 projections; the scales of norms
    "cifar_resnet8": (75_290, 2_752),
    "cifar_resnet14": (172_506, 2_752),
    "cifar_resnet20": (269_722, 2_752),
    "cifar_resnet32": (464_154, 2_752),
    "cifar_vgg11_bn": (9_231_114, 0),
    "cifar_alexnet": (2_472_266, 0),
    "cifar_densenet": (769_162, 0),
    "cifar_mobilenetv2": (2_236_682, 0),
    "cifar_inception": (1_649_402, 1_712),
}


@pytest.mark.parametrize("name", networks.CIFAR_NETWORKS)
def test_networks_are_the_published_ones(name):
    net = networks.build(name, 10)
    assert sum(parameter.numel() for parameter in net.parameters()) == sum(PUBLISHED[name])
    assert net.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_networks_of_timm_torchvision_and_anybody():
    assert networks.create("resnet10t", 7).get_classifier().out_features == 7
    assert networks.create("squeezenet1_1", 7).num_classes == 7
    assert networks.create("timm.models.resnet:resnet10t", 7).get_classifier().out_features == 7
    with pytest.raises(ValueError, match="resnet21"):
        networks.create("resnet21", 7)
