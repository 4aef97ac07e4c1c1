"""The figures of a report against independent oracles, and against students of which the truth is known."""

import hashlib
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import bootstrap
from torch import Tensor, nn

from mvmr.bundles.bundle import Bundle
from mvmr.bundles.preprocess import Preprocess
from mvmr.data import ImageSet, open_images
from mvmr.distillation.report.fidelity import dependence, interval, neighbours, predictions, spectrum
from mvmr.distillation.report.stages import build_untrained, split, stages_of
from mvmr.evaluation.neighbours import neighbour_overlap
from mvmr.evaluation.scores import linear_cka
from mvmr.models.student import Student
from mvmr.models.torchvision_resnet import Resnet
from mvmr.representations.cache import represent
from mvmr.training.pretraining import fit
from mvmr.training.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread", "no_fsync")


def cell(rows: dict[str, np.ndarray], columns: dict[str, np.ndarray], permutations: int = 99) -> dict[str, float]:
    (figures,) = dependence(rows, columns, permutations=permutations)
    return figures


def random_rows(n: int, *widths: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(n, width)).astype(np.float32) for width in widths]


# -- dependence


@pytest.mark.slow
@pytest.mark.parametrize("width", [6, 45, 20000])
def test_dependence_is_that_of_the_dcor_package_and_of_the_rows_as_they_are(dcor: ModuleType, width: int) -> None:
    x, noise = random_rows(50, 6, width)
    wide = np.tanh(x @ random_rows(6, width, seed=1)[0]) + 0.5 * noise + 30  # far from the origin, as pixels are
    figures = cell({"student": x}, {"pixels": wide})
    assert figures["dcor"] == pytest.approx(
        dcor.u_distance_correlation_sqr(x.astype(float), wide.astype(float)), abs=1e-6
    )
    assert figures["cka"] == pytest.approx(linear_cka(x, wide), abs=1e-9)
    assert figures["dcor"] > 0.3
    assert figures["p"] == 1 / 100


def test_of_unrelated_rows_p_is_uniform_and_the_null_covers() -> None:
    parts = random_rows(40, *[3] * 20)
    cells = dependence(
        {f"r{i}": entry for i, entry in enumerate(parts[:10])}, {f"c{i}": entry for i, entry in enumerate(parts[10:])},
        permutations=199,
    )  # fmt: skip
    p = np.array([entry["p"] for entry in cells])
    assert len(p) == 100
    assert 0.4 < p.mean() < 0.6
    assert 3 <= np.count_nonzero(p <= 0.1) <= 20
    inside = [entry["null_low"] <= entry["dcor"] <= entry["null_high"] for entry in cells]
    assert np.mean(inside) > 0.88
    assert all(abs(entry["null_mean"]) < 0.02 for entry in cells)


@pytest.mark.slow
def test_the_null_is_the_statistic_of_permuted_rows(dcor: ModuleType) -> None:
    x, y = random_rows(12, 2, 2)
    figures = cell({"a": x}, {"b": y}, permutations=4000)
    generator = np.random.default_rng(1)
    by_hand = [
        dcor.u_distance_correlation_sqr(x.astype(float), generator.permutation(y.astype(float))) for _ in range(2000)
    ]
    low, high = np.percentile(by_hand, [2.5, 97.5])
    assert figures["null_mean"] == pytest.approx(np.mean(by_hand), abs=0.02)
    assert figures["null_low"] == pytest.approx(low, abs=0.03)
    assert figures["null_high"] == pytest.approx(high, abs=0.06)
    assert figures["p"] == pytest.approx(np.mean(np.array(by_hand) >= figures["dcor"]), abs=0.04)


def test_features_that_have_collapsed_depend_on_nothing() -> None:
    x, wide = random_rows(30, 3, 500)
    for constant in (np.full((30, 3), 0.1, np.float32), np.full((30, 500), 0.1, np.float32)):
        figures = cell({"student": constant}, {"teacher": x})
        assert (figures["dcor"], figures["cka"], figures["p"]) == (0, 0, 1)
        assert (figures["null_low"], figures["null_high"]) == (0, 0)
        assert spectrum(constant)["values"] == [0] * min(constant.shape)
    assert cell({"student": wide}, {"teacher": x})["p"] > 0.01


def test_a_table_names_its_cells_and_is_the_same_twice() -> None:
    a, b, c = random_rows(20, 4, 5, 6)
    table = dependence({"student": a, "teacher": b}, {"teacher": b, "pixels": c}, permutations=20)
    assert [(entry["row"], entry["column"]) for entry in table] == [
        ("student", "teacher"), ("student", "pixels"), ("teacher", "teacher"), ("teacher", "pixels"),
    ]  # fmt: skip
    assert table == dependence({"student": a, "teacher": b}, {"teacher": b, "pixels": c}, permutations=20)
    reseeded = dependence({"student": a, "teacher": b}, {"teacher": b, "pixels": c}, permutations=20, seed=1)
    assert [entry["dcor"] for entry in reseeded] == [entry["dcor"] for entry in table]
    assert [entry["null_mean"] for entry in reseeded] != [entry["null_mean"] for entry in table]


# -- a student that is its teacher


def test_the_teacher_itself_is_wholly_faithful() -> None:
    x, reference = random_rows(60, 9, 9)
    labels = np.arange(60) % 3
    figures = cell({"student": x}, {"teacher": x})
    assert figures["dcor"] == pytest.approx(1)
    assert figures["cka"] == pytest.approx(1)
    near = neighbours(x, x, reference, 5, labels=labels, classes=["a", "b", "c"])
    assert near["overlap"] == {"mean": 100, "low": 100, "high": 100}
    assert all(entry["teacher"] == entry["student"] for entry in near["worst"])
    assert near["untrained"]["mean"] < 25
    guessed = predictions(labels, ["a", "b", "c"], labels, labels)
    assert guessed["agreement"] == 100
    assert all((entry["difference"], entry["low"], entry["high"]) == (0, 0, 0) for entry in guessed["classes"])


# -- neighbours


def test_neighbours_are_told_by_class_the_worst_first() -> None:
    teacher, replaced, reference = random_rows(80, 6, 6, 6)
    labels = np.arange(80) % 8
    labels[labels == 7] = 6
    labels[0] = 7  # a class of one image
    classes = [*"abcdefg", "alone", "absent"]
    student = teacher.copy()
    student[labels == 2] = replaced[labels == 2]
    figures = neighbours(teacher, student, reference, 4, labels=labels, classes=classes)
    overlap = 100 * neighbour_overlap(teacher, student, 4)
    assert figures["overlap"]["mean"] == pytest.approx(overlap.mean())
    assert figures["chance"] == 4 / 79
    assert figures["untrained"]["mean"] == pytest.approx(100 * neighbour_overlap(teacher, reference, 4).mean())
    means = [entry["mean"] for entry in figures["classes"]]
    assert means == sorted(means)
    assert figures["classes"][0]["name"] == "c"
    assert {entry["name"]: entry["images"] for entry in figures["classes"]} == dict.fromkeys("bcdef", 10) | {
        "a": 9, "g": 20, "alone": 1,
    }  # fmt: skip
    for entry in figures["classes"]:
        assert entry["mean"] == pytest.approx(overlap[labels == classes.index(entry["name"])].mean())
        assert entry["low"] <= entry["mean"] <= entry["high"]
    alone = next(entry for entry in figures["classes"] if entry["name"] == "alone")
    assert alone["low"] == alone["mean"] == alone["high"] == overlap[0]
    names = [entry["class"] for entry in figures["worst"]]
    assert names[:2] == ["c", "c"]
    assert len(names) == 12
    assert max(names.count(name) for name in names) == 2
    for entry in figures["worst"]:
        assert classes[labels[entry["image"]]] == entry["class"]
        assert entry["overlap"] == overlap[entry["image"]]
        assert len(set(entry["teacher"]) & set(entry["student"])) == entry["overlap"] / 100 * 4
        assert entry["image"] not in entry["teacher"] + entry["student"]
        cosines = (
            teacher[entry["teacher"]] @ teacher[entry["image"]] / np.linalg.norm(teacher[entry["teacher"]], axis=1)
        )
        assert (np.diff(cosines) <= 0).all()  # nearest first


def test_without_labels_the_worst_images_are_named() -> None:
    teacher, student, reference = random_rows(40, 5, 5, 5)
    figures = neighbours(teacher, student, reference, 6)
    overlap = 100 * neighbour_overlap(teacher, student, 6)
    assert figures["classes"] is None
    assert [entry["overlap"] for entry in figures["worst"]] == sorted(overlap)[:12]
    assert {entry["class"] for entry in figures["worst"]} == {None}


# -- intervals, the probe, the spectrum


def test_an_interval_is_scipys() -> None:
    (values,) = random_rows(6000, 1)
    expected = bootstrap(
        (values[:, 0],), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    bounds = interval(values[:, 0], seed=3)
    assert (bounds["low"], bounds["high"]) == pytest.approx((expected.low, expected.high), abs=1e-7)
    # of two values a resample is both, one twice or the other twice: the outer quarters reach past 2.5 %
    assert interval(np.array([0.0, 100.0])) == {"mean": 50, "low": 0, "high": 100}
    assert interval(np.array([37.5])) == {"mean": 37.5, "low": 37.5, "high": 37.5}
    equal = interval(np.full(20, 0.1))
    assert equal["low"] == equal["mean"] == equal["high"] == pytest.approx(0.1)


def test_an_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    samples = np.random.default_rng(0).exponential(size=(150, 40))
    intervals = [interval(sample) for sample in samples]
    assert 0.87 <= np.mean([bounds["low"] <= 1 <= bounds["high"] for bounds in intervals]) <= 0.99


def test_predictions_by_hand() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    teacher = np.array([0, 0, 0, 1, 1, 1, 0])
    student = np.array([0, 1, 1, 1, 1, 1, 2])
    figures = predictions(labels, ["x", "y", "z", "none"], student, teacher)
    assert figures["agreement"] == pytest.approx(100 * 4 / 7)
    assert figures["confusion"]["student"] == [[1, 3, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert figures["confusion"]["teacher"] == [[3, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    x, y, z = figures["classes"]
    assert (x["name"], x["images"], x["student"], x["teacher"], x["difference"]) == ("x", 4, 25, 75, -50)
    assert (x["low"], x["high"]) == (-100, 0)
    assert y == {"name": "y", "images": 2, "student": 100, "teacher": 100, "difference": 0, "low": 0, "high": 0}
    assert z == {"name": "z", "images": 1, "student": 100, "teacher": 0, "difference": 100, "low": 100, "high": 100}
    alone = predictions(labels, ["x", "y", "z", "none"], student, None)
    assert (alone["agreement"], alone["confusion"]["teacher"]) == (None, None)
    assert [(row["name"], row["difference"]) for row in alone["classes"]] == [("x", None), ("y", None), ("z", None)]


def test_a_spectrum_has_the_singular_values_of_the_centred_features() -> None:
    basis = np.linalg.qr(random_rows(50, 3)[0] - random_rows(50, 3)[0].mean(0))[0]
    figures = spectrum((basis * [4, 2, 1] + 7).astype(np.float32))
    assert figures["dim"] == 3
    assert figures["values"] == pytest.approx([1, 0.5, 0.25], abs=1e-5)
    share = np.array([4, 2, 1]) / 7
    assert figures["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=1e-4)
    assert len(spectrum(random_rows(600, 700)[0])["values"]) == 512


# -- stages


STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


def a_student(config: Resnet) -> Student:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = config.build()
        for module in encoder.modules():  # blocks that start as the identity would hide a mistake
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.2)
    return Student(encoder, Preprocess.for_size(16), dim=config.width, name="student", identity="s" * 32)


def state(module: nn.Module) -> str:
    total = hashlib.sha256()
    for key, value in module.state_dict().items():
        total.update(key.encode() + value.numpy().tobytes())
    return total.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("small_kernel", [False, True])
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_stages_are_what_leaves_the_modules_averaged_and_the_last_is_the_features(
    architecture: str, small_kernel: bool
) -> None:
    backbone = Resnet(name=architecture, small_kernel=small_kernel)
    student = a_student(backbone)
    before, batch = state(student.encoder), torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16)))
    batch = batch.to(torch.uint8)
    stages, widths = stages_of(backbone, student)
    parts = split(stages(batch).numpy(), widths)
    assert list(parts) == list(STAGES)
    np.testing.assert_array_equal(parts["layer4"], student(batch).numpy())

    outputs: dict[str, Tensor] = {}
    hooks = [
        student.encoder.get_submodule("maxpool" if name == "stem" else name).register_forward_hook(
            lambda _, __, output, name=name: outputs.update({name: output.clone()})
        )
        for name in STAGES
    ]
    student(batch)
    for hook in hooks:
        hook.remove()
    for name in STAGES:
        np.testing.assert_allclose(parts[name], outputs[name].mean((2, 3)).numpy(), rtol=1e-5, atol=1e-6)
    assert state(student.encoder) == before
    assert not any(module._forward_hooks for module in student.encoder.modules())
    assert stages.identity != student.identity


# -- students of which the truth is known


class Texture:
    """A teacher that sees texture only, of which an untrained encoder has little: energies of random filters."""

    name, weights, identity, dim = "texture", "none", "7" * 64, 32

    def prepare(self, image: Image.Image) -> Tensor:
        grey = torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32) / 255)
        return ((grey - grey.mean()) / (grey.std() + 0.02))[None]

    def __call__(self, batch: Tensor) -> Tensor:
        filters = torch.randn(self.dim, 1, 5, 5, generator=torch.Generator().manual_seed(0))
        filters -= filters.mean((2, 3), keepdim=True)
        return torch.nn.functional.conv2d(batch, filters).abs().mean((2, 3)).log1p()


class Shuffled:
    """A teacher whose embeddings have been dealt out to the wrong images."""

    name, weights, identity, dim = "shuffled", "none", "5" * 64, 32

    def __init__(self, images: ImageSet) -> None:
        rows = np.random.default_rng(0).permutation(represent(images, Texture()))
        self.rows = {images.load(i).tobytes(): torch.from_numpy(row) for i, row in enumerate(rows)}

    def prepare(self, image: Image.Image) -> Tensor:
        return self.rows[image.tobytes()]

    def __call__(self, batch: Tensor) -> Tensor:
        return batch


@pytest.fixture(scope="module")
def photographs() -> tuple[ImageSet, ImageSet]:
    """Every fourth image of both splits, so that each class is there."""
    return tuple(
        open_images("sample:patches", part).subset(range(0, n, 4)) for part, n in (("train", 1360), ("test", 680))
    )  # type: ignore[return-value, arg-type]


@pytest.fixture(scope="module")
def students(
    tmp_path_factory: pytest.TempPathFactory, photographs: tuple[ImageSet, ImageSet]
) -> Iterator[dict[str, Bundle]]:
    """A student of the teacher, and one of its shuffled embeddings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = load_recipe("quickstart", "mvmr.distillation", [
        "student.backbone=resnet18_025", "views.size=16", "train.epochs=16", "train.batch_size=85", "train.lr=2e-3",
        "train.precision=32-true", "objective.representations={teacher=1.0}", "objective.estimator=unbiased",
    ])  # fmt: skip
    folder, (train, _) = tmp_path_factory.mktemp("students"), photographs
    yield {
        name: fit(train, folder / name, recipe, teachers={"teacher": teacher}, device="cpu")
        for name, teacher in {"true": Texture(), "shuffled": Shuffled(train)}.items()
    }
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_true_student_is_told_from_one_of_shuffled_embeddings_and_from_an_untrained_one(
    students: dict[str, Bundle], photographs: tuple[ImageSet, ImageSet]
) -> None:
    """On images that neither was trained on; ``dealt`` are their embeddings, dealt out to the wrong images again."""
    _, test = photographs
    rows: dict[str, np.ndarray] = {name: represent(test, entry.student()) for name, entry in students.items()}
    rows["untrained"] = represent(test, build_untrained(students["true"], test))
    columns: dict[str, np.ndarray] = {"teacher": represent(test, Texture()), "dealt": represent(test, Shuffled(test))}
    cells = {(entry["row"], entry["column"]): entry for entry in dependence(rows, columns)}
    overlap = {key: interval(100 * neighbour_overlap(columns[key[1]], rows[key[0]], 10)) for key in cells}
    chance = 100 * 10 / (len(test) - 1)

    true, shuffled, random = (cells[name, "teacher"] for name in ("true", "shuffled", "untrained"))
    assert true["p"] == 1 / 201
    assert true["dcor"] > 4 * max(shuffled["dcor"], random["dcor"], true["null_high"])
    assert true["cka"] > 4 * max(shuffled["cka"], random["cka"])
    assert overlap["true", "teacher"]["low"] > 2 * chance
    assert overlap["true", "teacher"]["mean"] > overlap["untrained", "teacher"]["mean"] + 2

    # Who learned from shuffled embeddings knows of the teacher what an untrained encoder knows, and not a bit more:
    # above the permutations, for both see the same images.
    assert random["p"] == 1 / 201
    assert shuffled["dcor"] == pytest.approx(random["dcor"], abs=0.04)
    assert shuffled["cka"] == pytest.approx(random["cka"], abs=0.04)
    assert abs(overlap["shuffled", "teacher"]["mean"] - overlap["untrained", "teacher"]["mean"]) < 2

    dealt = cells["shuffled", "dealt"]
    assert dealt["null_low"] <= dealt["dcor"] <= dealt["null_high"]
    assert dealt["p"] > 0.05
    assert dealt["cka"] < 0.05
    assert overlap["shuffled", "dealt"]["low"] < chance < overlap["shuffled", "dealt"]["high"]


@pytest.mark.slow
def test_of_the_images_of_its_training_a_student_of_shuffled_embeddings_knows_little_by_heart(
    students: dict[str, Bundle], photographs: tuple[ImageSet, ImageSet]
) -> None:
    """Little, and not nothing: a report on the images of the training flatters, so a test split is taken."""
    train, _ = photographs
    figures = {
        name: cell({"student": represent(train, students[name].student())}, {"teacher": represent(train, teacher)})
        for name, teacher in {"true": Texture(), "shuffled": Shuffled(train)}.items()
    }
    assert figures["shuffled"]["dcor"] < 0.1 * figures["true"]["dcor"]
