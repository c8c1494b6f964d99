"""A copy is its base but for the weights that carry: same function, same bytes, same form."""

import re
import shutil
from pathlib import Path

import copies_of_ten as ten
import jax
import ml_dtypes
import numpy as np
import pytest
import reference

from smark_jax import carriers, codes, embedding, extraction, files, vault
from smark_jax.vault import crypto, customers, issuing, models, trials, verdicts

SECRET = "correct horse battery staple"
CHIPS = 64


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch):
    monkeypatch.setattr(crypto, "_N", 2**10)
    ten.from_the_start()


@pytest.fixture
def desk(tmp_path):
    vault.create(tmp_path / "vault", SECRET)
    with vault.opened(tmp_path / "vault", SECRET) as desk:
        yield desk


@pytest.fixture(scope="module")
def made():
    ten.from_the_start()
    return {name: model() for name, model in ten.MODELS.items()}


def add(desk, name, path, **options):
    weights = files.read(path)
    return models.add(desk, name, weights.leaves, num_chips=CHIPS, form=files.Form(path), **options)


def issued(desk, name, out, **options):
    return issuing.issue(models.get(desk, name), customers.resolve(desk, ["Ada"]), out, **options)


@pytest.mark.parametrize("name", ten.MODELS)
def test_only_carrying_weights_differ_between_a_copy_and_its_base(desk, made, tmp_path, name):
    model = made[name]
    ten.write(tmp_path / "base", model.leaves, model.notes)
    added = add(desk, name, tmp_path / "base")
    (path,) = issued(desk, name, tmp_path / "out").files
    base, copy = ten.read(tmp_path / "base"), ten.read(path)
    assert copy.header == base.header  # names, dtypes, shapes, order and metadata
    differing = {leaf for leaf in base.leaves if copy.leaves[leaf] != base.leaves[leaf]}
    may = {leaf for leaf in base.leaves if re.search(model.carries, leaf)}
    covered = carriers.coverage(added.settings.spec, CHIPS)
    tail = {leaf.path for leaf in added.settings.spec.leaves[covered.leaves :]}
    assert differing <= may - tail
    # All that may carry do, but for a fresh bias of zeros and what lies in the tail.
    assert may - differing <= tail | {leaf for leaf in may if not base.floats(leaf).any()}
    for leaf in differing:
        old, new = base.floats(leaf), copy.floats(leaf)
        moved = np.sqrt(np.square(new - old).mean() / np.square(old).mean())
        assert 0.01 < moved < 0.06 and np.isfinite(new).all()
    if name == "quantised":  # others are traced below
        found = verdicts.trace(models.get(desk, name), [path, tmp_path / "base"]).suspects
        assert [suspect.verdict for suspect in found] == ["traced", "nobody"]


def test_a_base_of_doubles_is_marked_in_double_precision(desk, made, tmp_path):
    """Against the carrier's dense matrix in float64: rounding to float32 on the way would show."""
    ten.write(tmp_path / "base", made["doubles"].leaves)
    model = add(desk, "net", tmp_path / "base", strength=1e-4)
    (path,) = issued(desk, "net", tmp_path / "out").files
    moved = ten.read(path).floats("dense/kernel") - ten.read(tmp_path / "base").floats("dense/kernel")
    carrier = model.mark.carrier
    arrays = (carrier.inner_signs, carrier.outer_signs, carrier.positions)
    matrix = reference.carrier_matrix(*map(np.asarray, arrays), carrier.num_weights)
    word = np.asarray(codes.codebook(models.code_key(desk, "net"), [0], CHIPS, version=1)[0], np.float64)
    delta = 1e-4 * np.sqrt(carrier.num_carrying / CHIPS) * (word @ matrix) * model.settings.spec.scales[0]
    np.testing.assert_allclose(moved, delta, atol=1e-6 * np.abs(delta).max())


def test_a_file_like_another_takes_its_form_and_refuses_other_leaves(tmp_path):
    leaves = {"b": ten.some(3), "a": np.array([-0.0, np.nan]), "empty": np.zeros((0, 2), np.uint8)}
    ten.write(tmp_path / "base", leaves, {"by": "us"})
    files.write(tmp_path / "copy", files.read(tmp_path / "base").leaves, like=tmp_path / "base")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "base").read_bytes()
    for other in ({**leaves, "b": ten.some(4)}, {**leaves, "c": ten.some(1)}, {"b": leaves["b"]}):
        with pytest.raises(ValueError, match="write: expected leaves as in"):
            files.write(tmp_path / "copy", other, like=tmp_path / "base")


@pytest.mark.parametrize("kind", ["msgpack", "npz", "orbax"])
def test_bases_of_other_formats_keep_every_dtype(desk, made, tmp_path, kind):
    import flax.serialization
    import orbax.checkpoint

    from smark_jax.cli._vault import _base

    leaves = made["doubles"].leaves | {"half": ten.some(20).astype(np.float16)}
    path = tmp_path / "base"
    if kind == "msgpack":
        path.write_bytes(flax.serialization.msgpack_serialize(files.nest(leaves)))
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, **leaves)
    else:
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, leaves)
    models.add(desk, "net", _base(path).leaves, num_chips=CHIPS)
    (file,) = issued(desk, "net", tmp_path / "out").files
    copy = ten.read(file)
    assert copy.leaves.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert copy.dtypes[name] == ten.KINDS[leaf.dtype]
        assert name in ("dense/kernel", "half") or copy.leaves[name] == leaf.tobytes()


def test_embedding_leaves_wide_leaves_of_a_tree_as_they_are(made, key):
    base = files.nest(made["doubles"].leaves)
    mark = carriers.mark(key, base, CHIPS)
    words = codes.codebook(key, range(2), CHIPS)
    one, both = embedding.embed(base, mark, words[1]), embedding.embed_batch(base, mark, words)
    for name, leaf in ten.flat(base).items():
        got, row = ten.flat(one)[name], ten.flat(both)[name][1]
        assert (got.dtype, got.shape, row.dtype, row.shape) == (leaf.dtype, leaf.shape) * 2
        assert (got.tobytes() == leaf.tobytes()) == (name != "dense/kernel")
        assert row.tobytes() == got.tobytes()
    np.testing.assert_array_equal(np.sign(extraction.extract(one, base, mark)), words[1])
    jitted = jax.jit(lambda word: embedding.embed(base, mark, word)["dense"]["kernel"])(words[1])
    np.testing.assert_allclose(jitted, one["dense"]["kernel"], atol=1e-6)


def test_a_tied_copy_stays_tied_and_is_traced_by_either_name(desk, made, tmp_path):
    leaves = made["tied_transformer"].leaves
    ten.write(tmp_path / "base", leaves)
    model = add(desk, "net", tmp_path / "base")
    first, second = "lm_head.weight", "transformer.wte.weight"
    carrying = {leaf.path for leaf in model.settings.spec.leaves}
    assert len(carrying & {first, second}) == 1  # carried once
    (path,) = issued(desk, "net", tmp_path / "out").files
    copy = ten.read(path)
    assert copy.leaves[first] == copy.leaves[second] != leaves[first].tobytes()
    for left_out in (first, second):
        found = files.read(path).leaves
        del found[left_out]
        files.write(tmp_path / "suspect", found)
        verdict = verdicts.trace(models.get(desk, "net"), [tmp_path / "suspect"]).suspects[0]
        assert [accused.customer for accused in verdict.accused] == ["Ada"]
    files.write(tmp_path / "renamed", {f"a{i}": leaf for i, leaf in enumerate(files.read(path).leaves.values())})
    verdict = verdicts.trace(models.get(desk, "net"), [tmp_path / "renamed"]).suspects[0]
    assert [accused.customer for accused in verdict.accused] == ["Ada"]
    assert not {first, second} & {left.leaf for left in verdict.left_out}


def test_trained_marks_keep_tied_weights_tied(made, key):
    import optax

    from smark_jax import losses

    base = {name: jax.numpy.asarray(leaf, "float32") for name, leaf in made["tied_transformer"].leaves.items()}
    mark, word = carriers.mark(key, base, CHIPS), codes.codebook(key, [0], CHIPS)[0]
    optimizer = optax.chain(embedding.add_fingerprint_gradient(losses.sign_hinge, mark, word), optax.sgd(0.02))
    nothing = {name: np.zeros_like(leaf) for name, leaf in base.items()}
    params = optax.apply_updates(base, optimizer.update(nothing, optimizer.init(base), base)[0])
    np.testing.assert_array_equal(params["lm_head.weight"], params["transformer.wte.weight"])
    assert (params["lm_head.weight"] != base["lm_head.weight"]).any()


def test_an_attack_keeps_the_dtypes_of_a_copy(made, tmp_path):
    """What a leaker does to some weights leaves counters and doubles alone."""
    from test_desk import Here

    ten.write(tmp_path / "copy", made["doubles"].leaves)
    Here(tmp_path).run("attack", "copy", "leaked", "--prune", 0.5)
    base, leaked = ten.read(tmp_path / "copy"), ten.read(tmp_path / "leaked")
    assert leaked.dtypes == base.dtypes
    changed = {name for name in base.leaves if leaked.leaves[name] != base.leaves[name]}
    assert changed == {"dense/kernel"}
    kept = leaked.floats("dense/kernel") != 0
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_array_equal(leaked.floats("dense/kernel")[kept], base.floats("dense/kernel")[kept])


# Copies that work


def test_a_quiet_channel_of_a_batch_norm_gives_finite_outputs_in_pytorch(desk, made, tmp_path):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    net = torch.nn.Sequential()
    net.add_module("features", torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.BatchNorm2d(32)))
    net.add_module("pool", torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()))
    net.add_module("head", torch.nn.Linear(32, 60))
    leaves = made["torch_batch_norm"].leaves | {"features.0.bias": ten.some(32)}
    ten.write(tmp_path / "base", leaves, {"format": "pt"})
    add(desk, "net", tmp_path / "base")
    everybody = customers.resolve(desk, [f"c{i}" for i in range(16)])
    for path in issuing.issue(models.get(desk, "net"), everybody, tmp_path / "out").files:
        net.load_state_dict(safetensors_torch.load_file(path))
        with torch.no_grad():
            assert torch.isfinite(net.eval()(torch.randn(64, 16, 8, 8))).all()


def batch_norm(params, images):
    """A network of one layer, as PyTorch's names have it."""
    hidden = images.reshape(len(images), -1) @ params["fc.weight"].T
    spread = jax.numpy.sqrt(params["bn.running_var"] + 1e-5)
    return (hidden - params["bn.running_mean"][None]) / spread[None] * params["bn.weight"][None]


def classifier() -> dict[str, np.ndarray]:
    gain, mean, var = 1 + ten.some(10), ten.some(10), ten.variance(10)
    leaves = {"fc.weight": ten.some(10, 400), "bn.weight": gain, "bn.running_mean": mean, "bn.running_var": var}
    return leaves


def as_before(leaves):
    """The choice of older versions: every floating-point leaf, in the order of a nested tree."""
    rms = {name: float(np.sqrt(np.square(leaf).mean())) for name, leaf in sorted(leaves.items())}
    return carriers.Spec(tuple(carriers.Leaf(name, leaves[name].shape) for name in rms), tuple(rms.values()))


def test_copies_that_would_answer_nan_get_no_name_and_others_say_what_they_cost(desk, tmp_path, monkeypatch):
    leaves, images = classifier(), np.random.default_rng(0).normal(size=(64, 400)).astype(np.float32)
    running = trials.Running(trials.Network(batch_norm, images, np.zeros(64, int)), leaves)
    models.add(desk, "new", leaves, num_chips=CHIPS)
    trial = issued(desk, "new", tmp_path / "new", trial=running).trial
    assert (trial.copies, trial.images) == (1, 64) and 0.9 < trial.least == trial.agreement <= 1
    assert abs(trial.accuracy - trial.base_accuracy) < 0.1
    with monkeypatch.context() as patch:  # a vault of before
        patch.setattr(carriers, "select", lambda tree, match=None: as_before(leaves))
        models.add(desk, "old", leaves, num_chips=CHIPS)
    assert models.unfit(models.get(desk, "old")).keys() == {"bn.running_mean", "bn.running_var"}
    everybody = customers.resolve(desk, [f"c{i}" for i in range(12)])
    with pytest.raises(ValueError, match=r"zero and above in leaf 'bn.running_var'.*(?s:.)*add the model again"):
        issuing.issue(models.get(desk, "old"), everybody, tmp_path / "old")
    assert list((tmp_path / "old").glob("[!.]*")) == []
    # A network that answers NaN for whatever reason: here the base's own weights alone answer well.
    broken = lambda params, x: batch_norm(params, x) / (params["fc.weight"][0, 0] == leaves["fc.weight"][0, 0])  # noqa: E731
    running = trials.Running(trials.Network(broken, images), leaves)
    with pytest.raises(ValueError, match="finite outputs, but got NaN or infinite ones from the copy of c0"):
        issuing.issue(models.get(desk, "new"), everybody, tmp_path / "nan", trial=running)
    assert list((tmp_path / "nan").glob("[!.]*")) == []


def test_copies_of_an_older_vault_are_still_written_and_traced(desk, tmp_path, monkeypatch):
    """With the same marks as then, where no statistic turned negative."""
    leaves = classifier() | {"bn.running_var": np.full(10, 2.0, np.float32), "steps": np.array(3_000_000_000)}
    leaves["bn.running_var"][3] = 2.5
    spec = as_before({name: leaf for name, leaf in leaves.items() if leaf.dtype == np.float32})
    with monkeypatch.context() as patch:
        patch.setattr(carriers, "select", lambda tree, match=None: spec)
        model = models.add(desk, "old", leaves, num_chips=CHIPS)
    found = issued(desk, "old", tmp_path / "out")
    assert found.unfit.keys() == {"bn.running_mean", "bn.running_var"}
    copy = ten.read(found.files[0])
    mark, word = model.mark, codes.codebook(models.code_key(desk, "old"), [0], CHIPS, version=1)[0]
    then = embedding.embed({leaf.path: leaves[leaf.path] for leaf in spec.leaves}, mark, word, 0.03)
    for name, leaf in then.items():
        np.testing.assert_allclose(copy.floats(name), np.ravel(leaf), atol=1e-6)
    assert copy.leaves["steps"] == leaves["steps"].tobytes()
    verdict = verdicts.trace(models.get(desk, "old"), found.files).suspects[0]
    assert [accused.customer for accused in verdict.accused] == ["Ada"]


def test_taught_copies_keep_statistics_and_counters(key):
    """Gradients of the network's answers would move a running variance too, below zero where a channel is quiet."""
    from smark_jax import blackbox

    base = {"net": classifier() | {"steps": np.array(5, np.int32)}}
    apply_fn = lambda params, x: batch_norm(params["net"], x.reshape(len(x), -1) / 255)  # noqa: E731
    images = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 1)).astype(np.uint8)
    words = codes.codebook(key, [0], 8)
    copies = jax.tree.map(lambda leaf: np.asarray(leaf)[None], base)
    taught = blackbox.train_copies(copies, base, apply_fn, images, images, words, 10, epochs=2, batch_size=8).params
    moved = {name for name, leaf in taught["net"].items() if (np.asarray(leaf)[0] != base["net"][name]).any()}
    assert moved == {"fc.weight", "bn.weight"}


ROLES = {
    "bn1.running_var": (ten.variance(9), "variance"),
    "norm/moving_variance:0": (ten.variance(9), "variance"),
    "batch_stats/norm/mean": (ten.some(9), "running mean"),
    "batch_stats/custom/anything": (ten.some(9), "running mean"),
    "batch_stats/custom/shape": (np.arange(3), "whole numbers"),
    "bn._mean": (ten.some(9), "running mean"),
    "state/scale": (ten.some(9), "running mean"),
    "module.num_batches_tracked": (np.array(4), "whole numbers"),
    "ticks": (np.array(4.0), "whole numbers"),
    "attention.bias": (np.tril(np.ones((5, 5), np.float32)), "whole numbers"),
    "grid": (np.linspace(-1, 1, 20, dtype=np.float32), "position table"),
    "rotary.inv_freq": (ten.some(4), "position table"),
    "pe": (ten.waves(50, 1000.0 ** -np.linspace(0, 1, 512)).astype(ml_dtypes.bfloat16), "position table"),
    "sines.kernel": (np.sin(np.arange(4000, dtype=np.float32)).reshape(50, 80), "kernel"),
    "observer.min_val": (ten.some(1), "scale of a quantiser"),
    "gate.bias": (np.abs(ten.some(40)), "values from zero up"),
    "head.kernel": (ten.some(5, 5), "kernel"),
    "norm.weight": (1 + ten.some(5), "kernel"),
    "norm/gamma": (np.ones(5, np.float32), "scale"),
    "pos_embed": (ten.some(1, 50, 16), "weight"),
    "relative_position_bias_table": (ten.some(49, 4), "weight"),
    "logit_scale": (np.array(4.6052, np.float32), "weight"),
}


def test_one_table_of_roles_tells_weights_from_what_must_stay():
    assert {name: str(role) for name, role in carriers.roles({n: leaf for n, (leaf, _) in ROLES.items()}).items()} == {
        name: role for name, (_, role) in ROLES.items()
    }


# Counts


def test_leaves_in_the_tail_are_not_said_to_carry(desk, key, tmp_path):
    """D mod L weights at the end carry nothing: here the whole last layer."""
    leaves = {"a/kernel": ten.some(70, 60), "b/kernel": ten.some(10, 10), "c/bias": ten.some(10)}
    mark = carriers.mark(key, files.nest(leaves), CHIPS)
    told = carriers.coverage(mark.spec, CHIPS)
    copy = embedding.embed(leaves, mark, codes.codebook(key, [0], CHIPS)[0])
    moved = {name: int((np.asarray(copy[name]) != leaf).sum()) for name, leaf in leaves.items()}
    assert told.leaves == sum(count > 0 for count in moved.values()) == 1
    assert told.weights == 4096 and 0.99 * 4096 < sum(moved.values()) <= 4096
    whole = carriers.select({"w": ten.some(1000), "b": ten.some(9)})
    assert carriers.coverage(whole, CHIPS) == (1009, 2)


# A leaker who has the base


def backbone_and_head():
    """A public backbone, of which training left alone all but the head; and a layer that it changed throughout."""
    public = {f"layer{i}.weight": ten.some(32, 32) for i in range(4)}
    head = {"head.weight": ten.some(10, 128), "head.bias": ten.some(10)}
    return public, {f"backbone.{name}": leaf for name, leaf in public.items()} | head


def test_whoever_has_the_public_backbone_subtracts_the_mark_unless_public_leaves_carry_nothing(desk, tmp_path):
    public, base = backbone_and_head()
    verdict = {}
    for name, known in (("old", None), ("new", public)):
        models.add(desk, name, base, num_chips=CHIPS, public=known)
        (path,) = issued(desk, name, tmp_path / name).files
        stolen = files.read(path).leaves
        mark = {f"backbone.{leaf}": stolen[f"backbone.{leaf}"] - public[leaf] for leaf in public}
        for leaf, difference in mark.items():
            stolen[leaf] = stolen[leaf] - difference
        files.write(tmp_path / "leaked", stolen)
        verdict[name] = verdicts.trace(models.get(desk, name), [tmp_path / "leaked"]).suspects[0].verdict
    assert verdict == {"old": "nobody", "new": "traced"}
    new = models.get(desk, "new").settings
    assert {leaf.path for leaf in new.spec.leaves} == {"head.weight", "head.bias"}
    assert new.public == files.content_hash(public) and models.get(desk, "old").settings.public is None
    # Who has the whole base takes the whole mark out: nothing that is marked can help.
    files.write(tmp_path / "leaked", base)
    assert verdicts.trace(models.get(desk, "new"), [tmp_path / "leaked"]).suspects[0].verdict == "nobody"


def test_what_is_public_is_told_by_name_and_content_through_casts_and_layouts():
    from smark_jax.vault import public as publicity

    public, _ = backbone_and_head()
    first, second, third, fourth = (public[f"layer{i}.weight"] for i in range(4))
    few, most = third.copy(), fourth.copy()
    few[:8] += 0.01
    most[:24] += 0.01
    ours = {
        "layer0.weight": first.astype(ten.BF16),
        "Dense_7/kernel": second.T.copy(),
        "layer2.weight": few,
        "layer3.weight": most,
        "head": ten.some(10, 32),
    }
    assert publicity.shares(ours, public) == {
        "layer0.weight": 1.0,
        "Dense_7/kernel": 1.0,
        "layer2.weight": 0.75,
        "layer3.weight": 0.25,
    }
    spec = models.choose(ours, None, public)
    assert {leaf.path for leaf in spec.leaves} == {"layer3.weight", "head"}
    with pytest.raises(ValueError, match="leaves that you trained yourself, but got public weights alone"):
        models.choose(public, None, public)
    with pytest.raises(ValueError, match="one that shares no weight with it"):
        models.choose({"w": ten.some(32, 32)}, None, public)


def test_add_model_and_issue_say_what_carries_what_does_not_and_what_it_costs(tmp_path, made):
    from test_desk import Here

    here = Here(tmp_path)
    ten.write(tmp_path / "base", made["torch_batch_norm"].leaves)
    ten.write(tmp_path / "public", {"features.0.weight": made["torch_batch_norm"].leaves["features.0.weight"]})
    (tmp_path / "running.py").write_text(
        "import numpy as np\n\n\ndef run():\n"
        "    apply_fn = lambda p, x: x @ p['head.weight'].T + p['head.bias'][None]\n"
        "    return apply_fn, np.random.default_rng(0).normal(size=(50, 32)).astype('f'), np.zeros(50, int)\n"
    )
    here.run("init", "vault")
    said = here.run("add-model", "vault", "net", "base", "--chips", CHIPS)
    assert "net: 4,732 of 6,717 weights in 4 of 8 leaves carry 64 chips" in said
    assert "Left as they are: whole numbers (1), running mean (1), variance (1)" in said
    assert "whoever has this base can take the mark out" in here.stderr
    known = here.json("add-model", "vault", "own", "base", "--chips", CHIPS, "--public", "public")
    assert (known["carrying_leaves"], known["carrying_weights"], len(known["public"])) == (4, 2044, 64)
    assert "whoever has this base" not in here.stderr
    said = here.run("issue", "vault", "net", "Ada", "--out", "out", "--network", "running:run")
    assert re.search(r"The new copies were run on 50 images: all outputs are finite, and [\d.]+% of the classes", said)
    shutil.rmtree(tmp_path / "out")
    assert "They were not run" in here.run("issue", "vault", "net", "Ada", "--out", "out")
    assert Path(tmp_path / "out").is_dir()


def test_add_model_says_that_copies_hold_what_is_no_weight_too(tmp_path):
    from test_desk import Here

    h5py = pytest.importorskip("h5py")
    here, rng = Here(tmp_path), np.random.default_rng(0)
    with h5py.File(tmp_path / "trained.weights.h5", "w") as file:
        for number in range(3):
            file[f"layers/dense_{number}/vars/0"] = rng.normal(size=(300, 300)).astype("f")
        for number in range(6):  # Adam's moments, of which one could be a mean of the weights themselves
            file[f"optimizer/vars/{number}"] = np.ones((300, 300), "f")
    form = files.Form(tmp_path / "trained.weights.h5")
    assert 0 <= form.other_bytes - 6 * 300 * 300 * 4 < 2**14
    here.run("init", "vault")
    here.run("add-model", "vault", "net", "trained.weights.h5", "--chips", CHIPS)
    flat = " ".join(here.stderr.split())
    assert f"{form.other_bytes:,} of the base's {form.num_bytes:,} bytes are no weights" in flat
    with h5py.File(tmp_path / "trained.weights.h5", "a") as file:
        leaves = {path: file[path][()] for path in [f"layers/dense_{number}/vars/0" for number in range(3)]}
    with h5py.File(tmp_path / "alone.weights.h5", "w") as file:
        for path, leaf in leaves.items():
            file[path] = leaf
    here.run("add-model", "vault", "alone", "alone.weights.h5", "--chips", CHIPS)
    assert "no weights" not in here.stderr
