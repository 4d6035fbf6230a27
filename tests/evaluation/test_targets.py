import json
import time
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import barlow
from barlow.data import open_source
from barlow.errors import UserError
from barlow.evaluation.labels import read_labels
from barlow.evaluation.metrics import mean_average_precision, r2
from barlow.evaluation.regression import ridge_probe, tag_probe
from barlow.evaluation.result import Result
from barlow.evaluation.task import LabelledImages, Task, open_task

IDS = ["a/1.png", "a/2.png", "b/3.png", "b/4.png"]


@pytest.fixture
def labels(tmp_path):
    def write(text):
        (tmp_path / "labels.csv").write_text(text, encoding="utf-8", newline="")
        return tmp_path / "labels.csv"

    return write


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An unlabelled folder of real digits, and what is in each of them."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = open_source("mnist5k", "train", in_chans=1, limit=400)
    for i in range(400):
        Image.fromarray(digits[i][0].numpy()).save(folder / f"{i:03}.png")
    ink = torch.stack([digits[i].float().mean() for i in range(400)])
    return str(folder), digits.labels, ink


def test_ridge_is_scikit_learns_with_every_image_left_out_once(digits):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, x_test, _ = digits
    x = x[:300]
    targets = torch.stack([y[:300].float(), (y[:300] % 3).float() * 100 - 7], 1)
    found, penalty = ridge_probe(x, targets)
    from barlow.evaluation.linear import standardisation
    from barlow.evaluation.regression import PENALTIES

    standardise = standardisation(x)
    z = (targets - targets.mean(0)) / targets.std(0, correction=0)
    reference = linear_model.RidgeCV([300 * p for p in PENALTIES]).fit(
        standardise(x).double().numpy(), z.double().numpy()
    )
    assert 300 * penalty == pytest.approx(reference.alpha_)
    expected = reference.predict(standardise(x_test).double().numpy())
    expected = expected * targets.std(0, correction=0).numpy() + targets.mean(0).numpy()
    np.testing.assert_allclose(found(x_test).numpy(), expected, rtol=1e-3, atol=2e-3)


def test_a_tag_is_scikit_learns_logistic_regression(digits):
    linear_model = pytest.importorskip("sklearn.linear_model")
    from barlow.evaluation.linear import standardisation

    x, y, x_test, _ = digits
    x, has = x[:400], (y[:400] < 3).float()
    found, (penalty,) = tag_probe(x, has[:, None])
    standardise = standardisation(x)
    # Two columns of weights share the one that binary regression has: half the penalty each.
    reference = linear_model.LogisticRegression(C=2 / (400 * penalty), tol=1e-8, max_iter=5000)
    reference.fit(standardise(x).double().numpy(), has.numpy())
    expected = reference.decision_function(standardise(x_test).double().numpy())
    np.testing.assert_allclose(found(x_test)[:, 0].numpy(), expected, atol=0.03, rtol=0.02)


def test_a_tag_that_all_have_or_none_needs_no_fit():
    torch.manual_seed(0)
    x = torch.randn(20, 3)
    y = torch.stack([torch.ones(20), torch.zeros(20), (x[:, 0] > 0).float()], 1)
    probe, penalties = tag_probe(x, y)
    assert penalties[:2] == [None, None]
    assert (probe(x)[:, 0] > 0).all()
    assert (probe(x)[:, 1] < 0).all()


def test_metrics_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, (80, 5)).astype(np.float32)  # with ties
    y = (rng.random((80, 5)) < 0.3).astype(np.float32)
    assert mean_average_precision(torch.tensor(scores), torch.tensor(y)) == pytest.approx(
        metrics.average_precision_score(y, scores)
    )
    numbers = rng.normal(size=(80, 5)).astype(np.float32)
    assert r2(torch.tensor(numbers), torch.tensor(scores)) == pytest.approx(
        metrics.r2_score(scores, numbers)
    )


@pytest.mark.parametrize(
    ("text", "kind", "names", "values"),
    [
        ("file,label\n1.png,cat\n4.png,dog\n", "classes", ["cat", "dog"], [0, 1]),
        ("label,file\n10,1.png\n9,4.png\n", "classes", ["9", "10"], [1, 0]),
        ("f,tags\na/1.png,sun | sea\n4.png,sea\n", "tags", ["sea", "sun"], [[1, 1], [1, 0]]),
        ("file,sun,sea\n1.png,1,0\n4.png,0,1\n", "tags", ["sun", "sea"], [[1, 0], [0, 1]]),
        ("file,age\n1.png,3.5\n4.png,-2\n", "numbers", ["age"], [[3.5], [-2]]),
        ("file,x,y\n4.png,3,5\n1.png,0,1\n", "numbers", ["x", "y"], [[0, 1], [3, 5]]),
        (",file,label\n0,1.png,cat\n1,4.png,dog\n", "classes", ["cat", "dog"], [0, 1]),
        (",name,label\n0,1.png,cat\n1,4.png,dog\n", "classes", ["cat", "dog"], [0, 1]),
        (",label\n1.png,cat\n4.png,dog\n", "classes", ["cat", "dog"], [0, 1]),
        ("file,age,\n1.png,3.5,\n4.png,-2,\n", "numbers", ["age"], [[3.5], [-2]]),
        ("\ufefffile;label\r\n1.png;cat\r\n4.png;dog\r\n", "classes", ["cat", "dog"], [0, 1]),
        ("file;a, b;c\n1.png;1.5;2\n4.png;3;4\n", "numbers", ["a, b", "c"], [[1.5, 2], [3, 4]]),
        ("file\ttag\n1.png\tx;y\n4.png\ty\n", "tags", ["x", "y"], [[1, 1], [0, 1]]),
        ("file,sign\n1.png,7\n4.png,a\n", "classes", ["7", "a"], [0, 1]),
        ("file,it\n1.png,NA\n4.png,a\n", "classes", ["NA", "a"], [0, 1]),
        ("Nr;Filename;Label\n1;1.png;a\n2;4.png;b\n", "classes", ["a", "b"], [0, 1]),
        ("x, File Name\n1.5,1.png\n2,4.png\n", "numbers", ["x"], [[1.5], [2]]),
        ("file,label\nC:\\img\\a\\1.png,x\nb\\4.png,y\n", "classes", ["x", "y"], [0, 1]),
        ("file,label\n.\\a\\1.png,x\nb\\4.png,y\n", "classes", ["x", "y"], [0, 1]),
        ("file,Label,note\n1.png,7,\n4.png,8,dim\n", "classes", ["7", "8"], [0, 1]),
        (
            "file,target,label\n1.png,1.5,2\n4.png,3,4\n",
            "numbers",
            ["target", "label"],
            [[1.5, 2], [3, 4]],
        ),
    ],
)
def test_a_file_says_what_it_holds(labels, text, kind, names, values):
    found = read_labels(labels(text), IDS, "auto")
    assert (found.kind, found.names, found.rows.tolist()) == (kind, names, [0, 3])
    assert found.values.tolist() == values


def test_lines_without_an_image_and_without_a_value_are_left_out_and_counted(labels, caplog):
    text = "file,label\n1.png,cat\n2.png,\n3.png,dog\nz.png,dog\n"
    found = read_labels(labels(text), IDS, "auto")
    assert found.rows.tolist() == [0, 2]
    assert "1 image(s) not found in the source, first: z.png" in caplog.text
    assert "1 image(s) with no value, first: 2.png" in caplog.text


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("", "auto", "is empty"),
        ("file\n1.png\n", "auto", "has one column"),
        ("file,label\n1.png,a,b\n", "auto", "line 2: 3 values, but the header has 2"),
        ("file,label\nz.png,a\n", "auto", "labels no image of the source: its first row names z"),
        ("file,label\n1.png,a\na/1.png,b\n", "auto", "labels a/1.png twice"),
        ("file,label\n1.png,a\n2.png,a\n", "auto", "has only one class, 'a'"),
        ("file,label\n1.png,a\n2.png,b\n", "numbers", "'a' in column label is not a number"),
        ("file,p,q\n1.png,a,b\n", "classes", "has 2 columns of values: classes need exactly one"),
        ("file,p,q\n1.png,2,1\n", "tags", "tag columns must be 0 or 1"),
        ("file,\n1.png,a\n", "auto", "has one column"),
        ("file,x\n1.png,1.5\n2.png,NA\n", "auto", "'NA' in column x is .* leave the cell empty"),
        ("file,x\n1.png,3\n2.png,#N/A\n", "auto", "'#N/A' in column x .*or give --kind classes"),
        ('file,x\n1.png,"3,5"\n2.png,4\n', "auto", "'3,5' in column x .*use a decimal point"),
        ("file;x\n1.png;3,5\n2.png;4,25\n", "auto", "'3,5' in column x .*use a decimal point"),
        ("file,x\n1.png,NA\n2.png,1.5\n", "numbers", "'NA' in column x .*leave the cell empty"),
        ("file,x,y\n1.png,a,b\n", "auto", "'a' in column x .*; or keep only one of x, y"),
        ("file,p,q\n1.png,a,b\n", "classes", "found p, q"),
        ("file,p,q\n1.png,2,1\n", "tags", "other values are in p, q"),
        ("file,p,q\n1.png,2,\n", "auto", r"no image has a value in every column \(p, q\)"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(labels, text, kind, message):
    with pytest.raises(UserError, match=message):
        read_labels(labels(text), IDS, kind)


def test_a_column_beside_the_label_is_left_out_and_named(labels, caplog):
    read_labels(labels("file,label,note\n1.png,x,\n4.png,y,dim\n"), IDS, "auto")
    assert "using column label, ignoring note" in caplog.text
    assert "no value" not in caplog.text


def test_a_table_in_excels_own_encoding_says_how_to_save_it(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_bytes("file;label\n1.png;Bär\n".encode("cp1252"))
    with pytest.raises(UserError, match=r'cannot read .*0xe4.* in Excel save it as "CSV UTF-8"'):
        read_labels(file, IDS, "auto")


def test_a_backslash_in_the_name_of_an_image_is_no_folder(labels):
    found = read_labels(
        labels("file,label\nf\\xe9.png,x\nxe9.png,y\n"), ["f\\xe9.png", "xe9.png"], "auto"
    )
    assert found.rows.tolist() == [0, 1]


def test_a_name_that_several_images_share_needs_its_folder(labels):
    ids = ["a/1.png", "b/1.png", "b/2.png"]
    with pytest.raises(UserError, match=r"several images are called 1\.png"):
        read_labels(labels("file,label\n1.png,x\n"), ids, "auto")
    found = read_labels(labels("file,label\na/1.png,x\nb/1.png,y\n"), ids, "auto")
    assert found.rows.tolist() == [0, 1]


@pytest.mark.parametrize("above", ["train/", "/old/place/train/", "./", ""])
def test_a_line_of_another_folder_labels_no_image(labels, above, caplog):
    file = labels(f"file,label\n{above}1.png,x\n{above}a/2.png,y\ntest/3.png,x\n")
    found = read_labels(file, ["1.png", "a/2.png", "3.png"], "auto", "train")
    assert found.rows.tolist() == [0, 1]
    assert "1 image(s) not found in the source, first: test/3.png" in caplog.text


def test_the_folder_of_a_source_tells_its_images_from_those_of_another(labels, tmp_path):
    for part in ("train", "test"):
        (tmp_path / "photos" / part).mkdir(parents=True)
        for i in range(4):
            pixels = np.full((8, 8), 20 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / part / f"{i}.png")
    names = [f"{part}/{i}.png" for part in ("test", "train") for i in range(4)]
    file = labels("\n".join(["file,label", *(f"{n},{'ab'[i % 2]}" for i, n in enumerate(names))]))
    task = open_task(
        f"{tmp_path}/photos/train/", str(tmp_path / "photos" / "test"), labels=str(file)
    )
    assert (len(task.train.rows), len(task.test.rows)) == (4, 4)
    with pytest.raises(UserError, match=r"labels 0\.png twice"):  # the folder is not known
        read_labels(file, ["0.png", "1.png"], "auto")


def _written(tmp_path, names, values):
    lines = [f"{i:03}.png,{value}" for i, value in enumerate(values)]
    (tmp_path / "labels.csv").write_text("\n".join([f"file,{names}", *lines]))
    return str(tmp_path / "labels.csv")


@pytest.mark.parametrize(("protocol", "row"), [("linear", ""), ("knn", ", k = 20, t = 0.07")])
def test_tags_and_numbers_of_real_images_are_found(encoder, pictures, tmp_path, protocol, row):
    folder, digits, ink = pictures
    tags = [f"{'even' if d % 2 == 0 else 'odd'}|{'low' if d < 5 else 'high'}" for d in digits]
    found = barlow.evaluate(
        encoder,
        folder,
        labels=_written(tmp_path, "tags", tags),
        protocol=protocol,
        baseline="random",
    )
    assert found.data["tags"] == ["even", "high", "low", "odd"]
    assert f"without pretraining{row}" in [r.name for r in found.rows]
    assert found[f"with pretraining{row}"].values["val_map"] > 0.65  # a coin reaches 0.5
    numbers = _written(tmp_path, "ink", [f"{v:.3f}" for v in ink])
    found = barlow.evaluate(encoder, folder, labels=numbers, protocol=protocol)
    assert found[f"with pretraining{row}"].values["val_r2"] > 0.5
    assert (found.data["train"]["images"], found.data["test"]["images"]) == (320, 80)


def test_labels_of_the_test_change_no_choice(encoder, pictures, tmp_path):
    folder, _, ink = pictures
    train = tmp_path / "train.csv"
    train.write_text("\n".join(["file,ink", *(f"{i:03}.png,{ink[i]}" for i in range(320))]))

    def of(values):
        test = tmp_path / "test.csv"
        lines = (f"{320 + i:03}.png,{value}" for i, value in enumerate(values))
        test.write_text("\n".join(["file,ink", *lines]))
        return barlow.evaluate(encoder, folder, labels=str(train), test_labels=str(test)).rows[0]

    honest, leaky = of(ink[320:]), of(ink[320:][torch.randperm(80)])
    assert honest.chosen == leaky.chosen
    assert honest.values["train_r2"] == leaky.values["train_r2"]
    assert leaky.values["val_r2"] < 0 < honest.values["val_r2"]


def test_classes_from_a_file_are_measured_as_any_and_kept_in_the_run(encoder, pictures, tmp_path):
    from barlow.share import save_encoder

    run = tmp_path / "run"
    save_encoder(encoder, run / "encoder")
    (run / "config.yaml").write_text("")
    folder, digits, _ = pictures
    file = _written(tmp_path, "label", digits.tolist())
    found = barlow.evaluate(run, folder, labels=file)
    assert list(found.rows[0].values) == [
        f"{part}_{number}" for part in ("train", "val") for number in ("loss", "top1", "top5")
    ]
    (kept,) = (run / "evaluation").iterdir()
    assert Result.load(kept) == found
    assert json.loads(found.to_json())["data"]["classes"] == 10


def test_a_test_source_of_its_own_is_aligned_by_name(pictures, tmp_path):
    folder, digits, _ = pictures
    train, few = tmp_path / "train.csv", tmp_path / "few.csv"
    named = (f"{i:03}.png,{'abcdefghij'[digits[i]]}" for i in range(300))
    train.write_text("\n".join(["file,label", *named]))
    few.write_text(
        "\n".join(["file,label", *(f"{i:03}.png,{'bj'[i % 2]}" for i in range(391, 400))])
    )
    task = open_task(folder, folder, labels=str(train), test_labels=str(few), in_chans=1)
    assert [task.names[c] for c in task.test.y] == [*"jbjbjbjbj"]
    few.write_text("file,label\n391.png,z\n392.png,a\n")
    with pytest.raises(UserError, match="has class 'z', which is not among the training labels"):
        open_task(folder, folder, labels=str(train), test_labels=str(few), in_chans=1)


def test_an_image_to_train_and_to_test_on_is_refused(pictures, tmp_path):
    folder, digits, _ = pictures
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    train.write_text("\n".join(["file,label", *(f"{i:03}.png,{digits[i]}" for i in range(300))]))
    test.write_text(
        "\n".join(["file,label", *(f"{i:03}.png,{digits[i]}" for i in range(299, 400))])
    )
    with pytest.raises(UserError, match=r"1 images that .* labels too, such as 299\.png"):
        open_task(folder, f"{folder}/", labels=str(train), test_labels=str(test), in_chans=1)


@pytest.mark.parametrize("written", ["pictures", "link", "link/", "./pictures"])
def test_a_source_written_in_another_way_is_the_same(pictures, tmp_path, monkeypatch, written):
    folder, digits, _ = pictures
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "link"):
        (tmp_path / name).symlink_to(folder)
    file = _written(tmp_path, "label", digits.tolist())
    with pytest.raises(UserError, match=r"400 images that .* labels too, such as 000\.png"):
        open_task(folder, written, labels=file, test_labels=file, in_chans=1)
    task = open_task(folder, written, labels=file, in_chans=1)
    assert not set(task.train.rows.tolist()) & set(task.test.rows.tolist())


def test_a_class_that_no_training_image_has_is_not_the_one_with_the_fewest():
    source = open_source("mnist5k", "test", in_chans=1, limit=5)
    images = LabelledImages(source, torch.arange(5), torch.tensor([1, 2, 1, 2, 2]))
    task = Task(images, images, ["zero", "one", "two"])
    assert task.with_few_labels(None, 2, 0).train.y.bincount().tolist() == [0, 2, 2]
    with pytest.raises(UserError, match="class 'one' of mnist5k has only 2: ask for 2 or"):
        task.with_few_labels(None, 3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "finetune"}, "fine-tuning needs class labels, and .* has tags"),
        ({"epochs": 3}, "SGD needs class labels, and these are tags"),
        ({"labels_per_class": 1}, "need class labels, and these are tags"),
        ({"labels": None, "kind": "tags"}, "give labels too"),
        ({"labels": "nowhere.csv"}, "cannot read nowhere.csv"),
    ],
)
def test_mistakes_are_named(encoder, pictures, tmp_path, options, message):
    file = _written(tmp_path, "tags", [f"{'ab'[i % 2]}|c" for i in range(400)])
    with pytest.raises(UserError, match=message):
        barlow.evaluate(encoder, pictures[0], **{"labels": file, **options})


def test_classes_among_numbers_are_read_where_the_kind_is_given(labels):
    found = read_labels(labels("file,x\n1.png,1.5\n4.png,NA\n"), IDS, "classes")
    assert found.names == ["1.5", "NA"]


def test_an_image_labelled_twice_is_found_among_many(labels):
    ids = [f"{i}.png" for i in range(30_000)]
    file = labels("\n".join(["file,label", *(f"{name},x" for name in [*ids, ids[-1]])]))
    start = time.process_time()
    with pytest.raises(UserError, match=r"labels 29999\.png twice"):
        read_labels(file, ids, "auto")
    assert time.process_time() - start < 4, "looking through all lines for each takes longer"


def test_tags_need_no_more_python_objects_than_an_image_has(labels):
    ids = [f"{i}.png" for i in range(2000)]
    text = "\n".join(["file,tags", *(f"{name},t{i}|all" for i, name in enumerate(ids))])
    file = labels(text)
    tracemalloc.start()
    try:
        found = read_labels(file, ids, "auto")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10e6, "a float for each of 2,000 images and 2,001 tags is 100 MB"
    assert found.values.shape == (2000, 2001)
    assert (found.values.sum(1) == 2).all()
    assert found.values[:, found.names.index("all")].all()
    nothing = read_labels(labels("file,tags\n1.png,|\n2.png,|\n"), ids, "auto")
    assert nothing.values.shape == (2, 0)


@pytest.mark.parametrize("again", ["1.png", "./1.png"])
def test_a_source_that_lists_an_image_twice_is_not_divided(tmp_path, again):
    names = [f"{i}.png" for i in range(10)]
    for name in names:
        Image.new("L", (8, 8)).save(tmp_path / name)
    lines = [f"{name}\t{'ab'[i % 2]}" for i, name in enumerate([*names, again])]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    (tmp_path / "once.txt").write_text("\n".join(lines[:-1]))
    source = str(tmp_path / "list.txt")
    with pytest.raises(UserError, match=r"list\.txt lists .*1\.png twice.* list each image once"):
        open_task(source, in_chans=1)
    assert len(open_task(str(tmp_path / "once.txt"), in_chans=1).test.rows) == 2
    open_task(source, str(tmp_path / "once.txt"), in_chans=1)  # nothing is divided


def test_test_images_of_a_class_without_a_training_image_are_warned_of(tmp_path, caplog):
    for folder in ("train/cat", "train/dog", "test/cat", "test/emu"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8)).save(tmp_path / folder / f"{i}.png")
    open_task(str(tmp_path), in_chans=1)
    warning = "2 of 4 test images belong to classes with no training images, such as emu"
    assert warning in caplog.text


def test_a_source_with_a_split_for_training_alone_is_divided(tmp_path):
    for folder in ("train/cat", "train/dog"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (8, 8)).save(tmp_path / folder / f"{i}.png")
    task = open_task(str(tmp_path), in_chans=1)
    assert (len(task.train.rows), task.test.y.tolist()) == (8, [0, 1])
    with pytest.raises(UserError, match="no split 'test'"):
        open_task("mnist5k", str(tmp_path), in_chans=1)


def test_r2_is_of_the_columns_that_vary():
    y = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    found = torch.tensor([[1.5, 0.0], [2.0, 0.0], [3.0, 0.0]])
    assert r2(found, y) == r2(found[:, :1], y[:, :1]) != 0
    with pytest.raises(UserError, match="the same for all test images"):
        r2(found[:, 1:], y[:, 1:])
