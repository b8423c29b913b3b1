from dataclasses import replace
import functools
import socket

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from optax_mtl.experiments.evidence import _dense_report, _encoder_decoder, _scenes, dense

pytestmark = pytest.mark.usefixtures("promotion")
HALF_VIEW = np.tan(np.radians(30))


@pytest.fixture(scope="module")
def scenes():
    return _scenes.scenes(0, 12, 12)


def test_photographs_come_from_installed_packages_and_not_from_a_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    _scenes.photograph.cache_clear()
    for name in _scenes.PHOTOGRAPHS:
        image = _scenes.photograph(name)
        assert image.shape[2] == 3
        assert min(image.shape[:2]) >= 192  # the largest crop
        assert image.std() > 5  # a picture of something


def test_a_photograph_that_is_missing_is_named():
    with pytest.raises(FileNotFoundError, match=r"scikit-image|skimage has no unicorn\.png"):
        _scenes._read("skimage.data", "unicorn.png")


def test_no_photograph_is_in_training_and_test(monkeypatch):
    seen = []
    real = _scenes.photograph
    monkeypatch.setattr(_scenes, "photograph", lambda name: seen.append(name) or real(name))
    for seed in range(3):
        train, test = _scenes.split_photographs(seed)
        assert sorted(train + test) == sorted(_scenes.PHOTOGRAPHS)
        seen.clear()
        _scenes.scenes(seed, 4, 4)
        half = len(seen) // 2  # as many textures for each
        assert set(seen[:half]) <= set(train)
        assert set(seen[half:]) <= set(test)
    assert _scenes.split_photographs(0) != _scenes.split_photographs(1)


def points_of(depth):
    """Where pixels are in space."""
    across = HALF_VIEW * ((np.arange(_scenes.SIDE) + 0.5) / (_scenes.SIDE / 2) - 1)
    x, y = np.meshgrid(across, across)
    return depth[..., None].astype(float) * np.stack([x, y, np.ones_like(x)], axis=-1)


def test_normals_are_those_of_the_depth(scenes):
    """On planes, of three pixels of one plane: an independent way from depth to normal."""
    for split in scenes:
        assert split.images.shape == (12, 32, 32, 3)
        np.testing.assert_allclose(np.linalg.norm(split.normals, axis=-1), 1, rtol=1e-5)
        points = points_of(split.depth)
        here, right, below = points[:, :-1, :-1], points[:, :-1, 1:], points[:, 1:, :-1]
        computed = np.cross(below - here, right - here)
        computed /= np.linalg.norm(computed, axis=-1, keepdims=True)
        normals, kind = split.normals, split.classes
        same = [(a[:, :-1, :-1], a[:, :-1, 1:], a[:, 1:, :-1]) for a in (kind, *np.moveaxis(normals, -1, 0))]
        plane = np.all([(np.abs(a - b) < 1e-6) & (np.abs(a - c) < 1e-6) for a, b, c in same], axis=0)
        for c, name in enumerate(_scenes.CLASSES):
            if name != "ball":
                chosen = plane & (kind[:, :-1, :-1] == c)
                assert chosen.sum() > 100
                # Two boxes, or two sides of one, may be parallel: hence not all.
                assert np.mean(np.sum(computed * normals[:, :-1, :-1], axis=-1)[chosen] > 0.999) > 0.97
        assert np.all(np.sum(points * normals, axis=-1) < 0)  # they look at the camera


def test_balls_are_round(scenes):
    """From every pixel of a ball, one radius against its normal, lies one and the same centre."""
    train = scenes.train
    points = points_of(train.depth)
    found = 0
    for i in range(len(points)):
        ball = train.classes[i] == _scenes.CLASSES.index("ball")
        if ball.sum() < 20:
            continue
        p, n = points[i][ball], train.normals[i][ball].astype(float)
        # p = centre + radius * n, in least squares; two balls in a scene do not fit one.
        centred_p, centred_n = p - p.mean(axis=0), n - n.mean(axis=0)
        radius = np.sum(centred_p * centred_n) / np.sum(centred_n**2)
        found += np.abs(centred_p - radius * centred_n).max() < 1e-4 and 0.4 <= radius <= 0.8
    assert found >= 2


def test_a_seed_is_a_seed():
    one, same, other = (_scenes.scenes(seed, 3, 2) for seed in (5, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert np.any(one.train.images != other.train.images)


def test_normals_from_disparity_are_those_of_the_plane():
    normal = np.array([0.3, -0.5, -0.8]) / np.linalg.norm([0.3, -0.5, -0.8])
    rows, columns = np.indices((300, 400))
    x, y = (columns - _scenes._CENTRE[0]) / _scenes._FOCAL, (rows - _scenes._CENTRE[1]) / _scenes._FOCAL
    one_over_depth = -(x * normal[0] + y * normal[1] + normal[2]) / 2.0  # two metres from the camera
    normals, _ = _scenes.normals_of(_scenes._BASELINE * _scenes._FOCAL * one_over_depth)
    np.testing.assert_allclose(normals[20:-20, 20:-20], np.broadcast_to(normal, (260, 360, 3)), atol=3e-4)


def test_the_motorcycle_is_measured():
    train, test = _scenes.motorcycle(0, 5, 6)
    assert (len(train.images), len(test.images)) == (5, 6)
    whole = _scenes._motorcycle()
    assert whole.images.shape == (1, 125, 185, 3)
    known = whole.classes != _scenes.UNKNOWN
    assert 0.6 < known.mean() < 0.99
    assert 1.5 < whole.depth.min() < whole.depth.max() < 6.5  # a room
    np.testing.assert_allclose(np.bincount(whole.classes[known]) / known.sum(), 1 / 3, atol=0.01)
    nearest = [whole.depth[whole.classes == layer].max() for layer in range(3)]
    assert nearest == sorted(nearest)
    # A strip lies between what is trained on and what is the test.
    assert _scenes._TRAIN_COLUMNS.stop < _scenes._TEST_COLUMNS.start


def perfect(scenes):
    """Predictions like the truth."""
    logits = 50 * jax.nn.one_hot(scenes.classes, 4)
    return logits, jnp.asarray(scenes.depth), jnp.asarray(scenes.normals)


def test_what_is_right_gets_full_marks_and_what_is_unknown_none(scenes, monkeypatch):
    test = scenes.test
    monkeypatch.setattr(_encoder_decoder, "predict", lambda params, images: perfect(test))
    full = [100, 100, 0, 0, 0, 100, 100, 100]
    np.testing.assert_allclose(_encoder_decoder.metrics(None, test), full, atol=0.1)
    np.testing.assert_allclose(_encoder_decoder.losses(None, test), 0, atol=1e-5)
    # Half of the pixels are unknown and hold nonsense, the other half has truth that differs from the predictions.
    classes = test.classes.copy()
    classes[:, :16] = _scenes.UNKNOWN
    depth = test.depth.copy()
    depth[:, :16] = 1e3
    depth[:, 16:] /= 1.25
    changed = test._replace(classes=classes, depth=depth, normals=np.where(classes[..., None] < 0, 1, test.normals))
    full[2:4] = np.mean(test.depth[:, 16:] * 0.2), 25
    np.testing.assert_allclose(_encoder_decoder.metrics(None, changed), full, rtol=1e-4, atol=0.1)
    np.testing.assert_allclose(_encoder_decoder.losses(None, changed), [0, full[2], 0], rtol=1e-4, atol=1e-5)


def test_mean_intersection_over_union_counts_by_hand(monkeypatch):
    truth = np.array([[[0, 0], [1, _scenes.UNKNOWN]]])
    logits = jax.nn.one_hot(np.array([[[0, 1], [1, 0]]]), 2)
    image = _scenes.Scenes(np.zeros((1, 2, 2, 3)), truth, np.ones((1, 2, 2)), np.ones((1, 2, 2, 3)) / 3**0.5)
    monkeypatch.setattr(_encoder_decoder, "predict", lambda params, images: (logits, image.depth, image.normals))
    first, second = _encoder_decoder.metrics(None, image)[:2]
    np.testing.assert_allclose([first, second], [50, 100 * 2 / 3], rtol=1e-5)  # one half in both classes


def test_networks_side_by_side_do_not_touch_each_other():
    weights = [(0, 1, 0), (3, 1, 1)]
    one = dense._problem(dense.QUICK, "scenes")
    both = dense._side_by_side(one, weights)
    params, data, batch = jax.tree.map(lambda leaf: leaf[0], (both.params, one.data, one.batches[:, 0, 0]))
    grads = jax.jit(jax.grad(lambda p: both.losses(p, data, batch).sum()))(params)
    for k, row in enumerate(weights):
        own = jax.tree.map(lambda leaf, k=k: leaf[k], params)
        jax.tree.map(np.testing.assert_array_equal, own, jax.tree.map(lambda leaf: leaf[0], one.params))
        expected = jax.jit(jax.grad(lambda p, row=row: jnp.vdot(jnp.float32(row), one.losses(p, data, batch))))(own)
        found = jax.tree.map(lambda leaf, k=k: leaf[k], grads)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, expected)
        zero = {task: not np.any(found["heads"][task]["kernel"]) for task in _encoder_decoder.TASKS}
        assert zero == {task: not weight for task, weight in zip(_encoder_decoder.TASKS, row, strict=True)}


# -- The report ----------------------------------------------------------------

SINGLE = np.array([50.0, 80.0, 0.5, 10.0, 30.0, 20.0, 40.0, 60.0])


def finals(**shifts):
    """Metrics of ten seeds: those of the single-task networks, and runs that are better by so many percent."""
    rng = np.random.default_rng(0)
    noise = 1 + 0.01 * rng.standard_normal((10, 1))
    sign = np.where(_dense_report._MORE_IS_BETTER, 1, -1)
    runs = {f"only {task}": np.tile(SINGLE, (10, 1)) * noise for task in _encoder_decoder.TASKS}
    for i, (name, percent) in enumerate(shifts.items()):
        own = 0.05 * np.random.default_rng([i, 1]).standard_normal((10, 1))
        runs[name] = SINGLE * noise * (1 + sign * (percent + own) / 100)
    return runs


def test_more_is_better_or_less():
    of = _dense_report.outcome(finals(linear_scalarization=2.0), [])
    np.testing.assert_allclose(of.gains["linear_scalarization"], 2, atol=0.2)
    np.testing.assert_allclose(of.by_task["linear_scalarization"], 2, atol=0.2)


def test_single_task_networks_are_three():
    runs = finals(linear_scalarization=0.0)
    for k, task in enumerate(_encoder_decoder.TASKS):
        runs[f"only {task}"] = runs[f"only {task}"] * (k + 1)
    single = _dense_report.outcome(runs, []).metrics[_dense_report.SINGLE]
    np.testing.assert_allclose((single / runs["only segmentation"])[0], [1, 1, 2, 2, 3, 3, 3, 3])


def test_fixed_weights_are_chosen_on_other_seeds():
    gains = np.array([[9.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    np.testing.assert_array_equal(_dense_report.best_on_other_seeds(gains), [1, 0, 0])


def test_sentences_say_what_the_numbers_say():
    methods = ["mgda", "upgrad", "dwa"]
    runs = finals(linear_scalarization=1.0, mgda=3.0, upgrad=-2.0, dwa=1.0)
    of = _dense_report.outcome(runs, [])
    equal = next(f for f in _dense_report.findings(of, methods) if "against equal weighting" in f)
    assert "ahead: mgda +2.0" in equal
    assert "behind: upgrad -3.0" in equal
    assert "not distinguishable: dwa" in equal
    text = _dense_report.verdict(of, methods)
    assert text.startswith("Against equal weighting, 1 of 3 methods is ahead (mgda), 1 behind (upgrad), 1 not distingu")
    assert text.endswith("Best Δm: mgda, +3.0 ± 0.0 %.")
    assert "\n" not in text


def test_the_best_fixed_weights_may_win():
    of = _dense_report.outcome(finals(linear_scalarization=1.0, **{"3:1:1": 4.0}, mgda=3.0), ["3:1:1"])
    np.testing.assert_array_equal(of.gains[_dense_report.TUNED], of.gains["3:1:1"])
    told = _dense_report.verdict(of, ["mgda"])
    assert "against the best fixed weights, 1 of 1 methods is behind (mgda)" in told
    worse = _dense_report.outcome(finals(linear_scalarization=1.0, mgda=1.0), [])
    assert "not distinguishable" in _dense_report.verdict(worse, ["mgda"])


def test_every_run_has_a_cell_and_photographs_may_be_left_out():
    names = [cell.name for cell in dense.cells(dense.Config())]
    assert len(names) == len(set(names)) == 1 + 11 + 1 + 2
    assert {"scenes: fixed weights", "scenes: mao", "photograph: fixed weights", "photograph: upgrad"} <= set(names)
    assert all(name.startswith("scenes") for name in (cell.name for cell in dense.cells(dense.QUICK)))


def test_the_report_has_all_runs_of_both_sources():
    config = replace(dense.QUICK, seeds=3, fixed=((3, 1, 1),), photograph_methods=("linear_scalarization", "upgrad"))
    rng = np.random.default_rng(0)
    results = {}
    for cell in dense.cells(config):
        networks = () if "fixed" not in cell.name else (4,) if "scenes" in cell.name else (3,)
        results[cell.name] = {
            "metrics": SINGLE + rng.random((3, 1, *networks, 8)),
            "weights": rng.random((3, 1, 3)),
            "cosines": rng.random((3, 1, 3, 3)),
            "segmentation": rng.integers(3, size=(*networks, 32, 32)),
            "depth": 2 + 4 * rng.random((*networks, 32, 32)),
            "normals": rng.uniform(-1, 1, (*networks, 32, 32, 3)),
        }
    found = dense.report(config, results)
    assert {(row["images"], row["run"]) for row in found.rows} == {
        *(("scenes", run) for run in ("single-task networks", "3:1:1", "best fixed weights", *config.methods)),
        *(("photograph", run) for run in ("single-task networks", *config.photograph_methods)),
    }
    depth = results["scenes: fixed weights"]["metrics"][:, 0, 1, 2]  # of the network for depth alone
    told = [row["depth error, m"] for row in found.rows if row["run"] == "single-task networks"][:3]
    np.testing.assert_allclose(told, depth)
    assert [picture.name for picture in found.section.pictures] == ["dense.png", "dense-images.png"]
    assert any("real photograph" in finding for finding in found.section.findings)
