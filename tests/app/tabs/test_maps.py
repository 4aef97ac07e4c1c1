"""Maps of two embedding spaces: right by scipy's and scikit-learn's own, kept, and there for poor galleries too."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import procrustes
from scipy.stats import ortho_group
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from mvmr.app.tabs import maps
from mvmr.app.tabs.maps import Map, cached_map, map_json, pca_map, stored_map, umap_map
from mvmr.errors import MvmrError
from mvmr.serve.engine import Floats


def features(count: int, width: int, *, seed: int = 0, groups: int = 5) -> Floats:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(groups, width))
    return (centres[np.arange(count) % groups] + random.normal(size=(count, width))).astype(np.float32)


def unit(rows: Floats) -> np.ndarray:
    wide = rows.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def shape_of(points: np.ndarray) -> np.ndarray:
    """Points without their place and size."""
    centred = points.astype(np.float64) - points.mean(0)
    return centred / np.linalg.norm(centred)


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None].astype(np.float64) - points[None], axis=-1)


@dataclass
class Named:
    """As much of a gallery as a map's JSON takes."""

    keys: list[str]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None


@pytest.fixture(scope="module")
def pair() -> tuple[Floats, Floats]:
    """A teacher, and a student that knows half of it."""
    teacher = features(150, 24)
    noise = features(150, 10, seed=1, groups=3)
    return teacher, (teacher[:, :10] + noise).astype(np.float32)


@pytest.mark.parametrize(("count", "width"), [(40, 8), (300, 8), (40, 90), (300, 90), (90, 300)])
def test_pca_is_scikit_learns(count: int, width: int) -> None:
    teacher, student = features(count, width), features(count, 2 * width, seed=3)
    layout = pca_map(teacher, student)
    oracle = PCA(2, svd_solver="full")
    expected = oracle.fit_transform(unit(teacher))
    expected *= np.sign(expected[np.abs(expected).argmax(0), [0, 1]])
    np.testing.assert_allclose(layout.teacher, expected, atol=1e-5)
    assert layout.teacher.dtype == layout.student.dtype == np.float32
    assert layout.variance is not None
    assert layout.variance[0] == pytest.approx(100 * oracle.explained_variance_ratio_.sum(), rel=1e-5)
    oracle.fit(unit(student))
    assert layout.variance[1] == pytest.approx(100 * oracle.explained_variance_ratio_.sum(), rel=1e-5)


def test_the_student_is_laid_over_the_teacher_as_scipy_does_it(pair: tuple[Floats, Floats]) -> None:
    teacher, student = pair
    layout = pca_map(teacher, student)
    own = PCA(2, svd_solver="full").fit_transform(unit(student))
    fixed, moved, disparity = procrustes(layout.teacher.astype(np.float64), own)
    assert layout.disparity == pytest.approx(disparity, rel=1e-5)
    assert 0.05 < disparity < 0.95
    np.testing.assert_allclose(shape_of(layout.teacher), fixed, atol=1e-6)
    np.testing.assert_allclose(shape_of(layout.student), shape_of(moved), atol=1e-5)
    np.testing.assert_allclose(layout.student.mean(0), layout.teacher.mean(0), atol=1e-6)
    spread = [np.linalg.norm(points - points.mean(0)) for points in (layout.teacher, layout.student)]
    assert spread[0] == pytest.approx(spread[1], rel=1e-5)


def test_a_student_that_sees_the_same_in_another_basis_is_in_the_same_places(pair: tuple[Floats, Floats]) -> None:
    teacher, _ = pair
    turned = ortho_group.rvs(24, random_state=np.random.default_rng(5))
    layout = pca_map(teacher, (7 * teacher @ turned).astype(np.float32))
    assert layout.disparity == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(layout.student, layout.teacher, atol=1e-5)


def test_length_of_an_embedding_says_nothing(pair: tuple[Floats, Floats]) -> None:
    teacher, student = pair
    scale = np.random.default_rng(2).uniform(0.01, 100, (len(teacher), 1)).astype(np.float32)
    plain, scaled = pca_map(teacher, student), pca_map(teacher * scale, student / scale)
    np.testing.assert_allclose(scaled.teacher, plain.teacher, atol=1e-5)
    np.testing.assert_allclose(scaled.student, plain.student, atol=1e-5)


def test_a_flat_spectrum_has_its_largest_directions_too() -> None:
    """Here Lanczos takes longest; what it finds is held against all eigenvectors."""
    rows = np.random.default_rng(0).normal(size=(400, 120)).astype(np.float32)
    expected = PCA(2, svd_solver="full").fit_transform(unit(rows))
    expected *= np.sign(expected[np.abs(expected).argmax(0), [0, 1]])
    np.testing.assert_allclose(pca_map(rows, rows).teacher, expected, atol=1e-4)


def test_where_lanczos_gives_up_all_eigenvectors_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = features(200, 100)
    expected = pca_map(rows, rows)

    def never(*_: object, **__: object) -> None:
        raise maps.ArpackNoConvergence("no", np.empty(0), np.empty((0, 0)))

    monkeypatch.setattr(maps, "eigsh", never)
    np.testing.assert_allclose(pca_map(rows, rows).teacher, expected.teacher, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 16])
def test_two_images_are_two_places(width: int) -> None:
    teacher = np.eye(2, 16, dtype=np.float32)
    student = np.linspace(-1, 1, 2 * width, dtype=np.float32).reshape(2, width)
    layout = pca_map(teacher, student)
    assert distances(layout.teacher)[0, 1] == pytest.approx(np.sqrt(2), rel=1e-6)
    assert layout.teacher[:, 1].tolist() == [0, 0]
    np.testing.assert_allclose(layout.student, layout.teacher, atol=1e-6)
    assert layout.disparity == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e4])
@pytest.mark.parametrize("count", [2, 30, 200])
def test_identical_embeddings_are_one_place(count: int, value: float) -> None:
    same = np.full((count, 70), value, np.float32)
    points = features(count, 70)
    both = pca_map(same, same)
    assert not both.teacher.any()
    assert not both.student.any()
    assert both.disparity == 0
    collapsed = pca_map(points, same)
    assert collapsed.disparity == 1
    np.testing.assert_allclose(collapsed.student, 0, atol=1e-6)
    assert not np.ptp(collapsed.student, axis=0).any()
    np.testing.assert_array_equal(collapsed.teacher, pca_map(points, points).teacher)
    blind = pca_map(same, points)
    assert blind.disparity == 1
    assert np.isfinite(blind.student).all()
    assert blind.student.any()


def test_rows_that_differ_only_in_length_are_one_place() -> None:
    rows = np.outer(np.linspace(0.1, 900, 80), features(1, 33)[0]).astype(np.float32)
    assert not pca_map(rows, rows).teacher.any()


def test_a_row_of_zeros_has_a_place() -> None:
    rows = features(30, 8)
    rows[4] = 0
    assert np.isfinite(pca_map(rows, rows).teacher).all()


@pytest.mark.parametrize("make", [pca_map, umap_map])
def test_what_cannot_be_mapped_is_said(make: object, pair: tuple[Floats, Floats]) -> None:
    assert callable(make)
    teacher, student = pair
    broken = student.copy()
    broken[17, 3] = np.nan
    with pytest.raises(MvmrError, match="the student's embedding of image 17 holds NaN"):
        make(teacher, broken)
    with pytest.raises(ValueError, match="got 150 and 149"):
        make(teacher, student[:-1])


@pytest.mark.slow
def test_umap_keeps_neighbours_and_groups() -> None:
    teacher, student = features(400, 24, groups=4), features(400, 12, seed=9, groups=4)
    layout = umap_map(teacher, student)
    assert layout.method == "umap"
    assert layout.variance is None
    for rows, points in ((teacher, layout.teacher), (student, layout.student)):
        trust = trustworthiness(unit(rows), points, n_neighbors=15)
        flat = trustworthiness(unit(rows), PCA(2).fit_transform(unit(rows)), n_neighbors=15)
        assert trust > max(flat, 0.85)
        agree = [
            (np.arange(400) % 4 == (distances(space) + 1e9 * np.eye(400)).argmin(1) % 4).mean()
            for space in (points, unit(rows))
        ]
        assert agree[0] > agree[1] - 0.1
    second = umap_map(teacher, student)
    np.testing.assert_array_equal(layout.teacher, second.teacher)
    np.testing.assert_array_equal(layout.student, second.student)
    assert not np.array_equal(umap_map(teacher, student, seed=1).teacher, layout.teacher)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4, 5, 14, 15, 16])
def test_umap_of_fewer_images_than_neighbours(count: int) -> None:
    teacher, student = features(count, 12), features(count, 5, seed=2)
    layout = umap_map(teacher, student, neighbours=15)
    for points in (layout.teacher, layout.student):
        assert points.shape == (count, 2)
        assert np.isfinite(points).all()
        assert len(np.unique(points, axis=0)) == count
    assert 0 <= layout.disparity <= 1


@pytest.mark.slow
def test_umap_of_poor_embeddings() -> None:
    same = np.full((40, 6), 0.3, np.float32)
    assert not umap_map(same, same).teacher.any()
    two = np.repeat(np.eye(2, 6, dtype=np.float32), 20, axis=0)  # twenty copies of either
    line = np.stack([np.cos(np.linspace(0, 1, 40)), np.sin(np.linspace(0, 1, 40))], 1).astype(np.float32)
    zero = features(40, 6)
    zero[3] = 0
    for rows in (two, line, zero, features(40, 1)):
        layout = umap_map(rows, features(40, 6))
        assert np.isfinite(layout.teacher).all()
        assert np.isfinite(layout.student).all()


@pytest.mark.slow
def test_importing_the_module_imports_neither_numba_nor_torch() -> None:
    code = "import sys, mvmr.app.tabs.maps; print({'numba', 'umap', 'torch', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture
def computations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As many items as maps were made rather than read."""
    calls: list[int] = []

    def counting(teacher: Floats, student: Floats) -> Map:
        calls.append(1)
        return pca_map(teacher, student)

    monkeypatch.setattr(maps, "_MAKERS", {"pca": counting, "umap": counting})
    return calls


def test_a_map_is_made_once_and_read_after(
    pair: tuple[Floats, Floats], tmp_path: Path, computations: list[int]
) -> None:
    file = tmp_path / "new folder" / "pca.npz"
    assert stored_map("pca", *pair, file) is None
    first = cached_map("pca", *pair, file)
    second = cached_map("pca", pair[0].copy(), np.asfortranarray(pair[1]), file)
    assert len(computations) == 1
    np.testing.assert_array_equal(first.teacher, second.teacher)
    np.testing.assert_array_equal(first.student, second.student)
    assert (first.disparity, first.variance, first.method) == (second.disparity, second.variance, second.method)
    assert os.listdir(file.parent) == ["pca.npz"]


def test_other_embeddings_or_another_kind_are_made_again(
    pair: tuple[Floats, Floats], tmp_path: Path, computations: list[int]
) -> None:
    teacher, student = pair
    file = tmp_path / "map.npz"
    cached_map("pca", teacher, student, file)
    changed = student.copy()
    changed[0, 0] += 1e-3
    for number, (method, rows) in enumerate(
        [("pca", (teacher, changed)), ("umap", (teacher, changed)), ("umap", (teacher[:-1], changed[:-1]))], start=2
    ):
        assert stored_map(method, *rows, file) is None  # type: ignore[arg-type]
        layout = cached_map(method, *rows, file)  # type: ignore[arg-type]
        assert len(computations) == number
        assert len(layout.teacher) == len(rows[0])


def test_a_broken_file_is_made_again(pair: tuple[Floats, Floats], tmp_path: Path, computations: list[int]) -> None:
    file = tmp_path / "map.npz"
    cached_map("pca", *pair, file)
    original = file.read_bytes()
    middle = len(original) // 2
    torn = original[:middle] + b"\0" * 64 + original[middle + 64 :]
    broken = [b"", b"not a map", original[:middle], original[:-9], torn]
    for number, content in enumerate(broken, start=2):
        file.write_bytes(content)
        np.testing.assert_array_equal(cached_map("pca", *pair, file).student, pca_map(*pair).student)
        assert len(computations) == number
    np.save(tmp_path / "other.npy", np.zeros(3))
    (tmp_path / "other.npy").rename(file)
    assert stored_map("pca", *pair, file) is None


def test_a_map_that_cannot_be_written_is_said(pair: tuple[Floats, Floats], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MvmrError, match="cannot create folder"):
        cached_map("pca", *pair, tmp_path / "file" / "map.npz")


def test_json_is_what_the_page_draws(pair: tuple[Floats, Floats]) -> None:
    layout = pca_map(*pair)
    labels = np.arange(150) % 3
    gallery = Named([f"images/{i}.png" for i in range(150)], labels, ("a", "b", "c"))
    overlap, right = np.linspace(0, 100, 150), np.arange(150) % 4
    sent = json.loads(json.dumps(map_json(layout, gallery, overlap, right, k=7), allow_nan=False))
    assert set(sent) == {
        "method", "n", "teacher", "student", "keys", "classes", "labels", "overlap", "right", "k", "disparity",
        "variance",
    }  # fmt: skip
    assert (sent["method"], sent["n"], sent["k"]) == ("pca", 150, 7)
    for side in ("teacher", "student"):
        np.testing.assert_allclose(
            np.transpose(sent[side]), getattr(layout, side), atol=1e-4 * np.abs(layout.teacher).max()
        )
    assert sent["keys"] == gallery.keys
    assert sent["classes"] == ["a", "b", "c"]
    assert sent["labels"] == labels.tolist()
    assert sent["overlap"] == overlap.tolist()  # every digit: they are those of `mvmr report`
    assert sent["right"] == right.tolist()
    assert sent["disparity"] == layout.disparity


def test_json_without_labels_and_scores() -> None:
    layout = Map("umap", np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32), 0.0)
    for gallery in (Named(["a", "b"]), Named(["a", "b"], np.array([0, 1]), None), Named(["a", "b"], None, ("x",))):
        sent = map_json(layout, gallery, None, None)
        assert [sent[part] for part in ("classes", "labels", "overlap", "right", "variance")] == [None] * 5
        assert sent["teacher"] == [[0, 0], [0, 0]]


def test_names_that_are_no_text_can_be_sent() -> None:
    layout = Map("umap", np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32), 0.0)
    gallery = Named([os.fsdecode(b"caf\xe9.png"), "猫.png"], np.array([0, 0]), (os.fsdecode(b"\xff"),))
    sent = map_json(layout, gallery, None, None)
    json.dumps(sent, ensure_ascii=False).encode()
    assert sent["keys"] == ["caf\N{REPLACEMENT CHARACTER}.png", "猫.png"]
    assert sent["classes"] == ["\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("width", [1e-7, 1.0, 3e5])
def test_coordinates_are_rounded_to_what_is_seen(width: float) -> None:
    points = (np.random.default_rng(0).uniform(-width, width, (500, 2))).astype(np.float32)
    sent = map_json(Map("pca", points, points[::-1], 0.5), Named(["x"] * 500), None, None)
    np.testing.assert_allclose(np.transpose(sent["teacher"]), points, atol=1e-4 * width)
    assert len(json.dumps(sent["teacher"])) < 500 * 2 * 14
