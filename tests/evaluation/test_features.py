import copy
import os

import pytest
import torch
from PIL import Image
from torch import nn

from barlow.data import Preprocess, Source, open_source
from barlow.data.fingerprints import content_hash
from barlow.data.source import Table
from barlow.encoders import create_encoder
from barlow.errors import UserError
from barlow.evaluation import feature_cache, features
from barlow.evaluation.features import evaluating, extract, features_of


@pytest.fixture(scope="module")
def source():
    return open_source("mnist5k", "test", in_chans=1, limit=60)


@pytest.mark.parametrize("mode", [True, False])
def test_the_encoder_is_left_as_it_was(encoder, source, mode):
    encoder = copy.deepcopy(encoder).train(mode)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    extract(encoder, source)
    after = encoder.state_dict()
    assert "bn1.running_mean" in before
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(module.training == mode for module in encoder.modules())


def test_every_module_is_in_the_mode_it_had_even_after_an_error():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    module[0].eval()

    def fail():
        with evaluating(module):
            assert not any(part.training for part in module.modules())
            raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        fail()
    assert [part.training for part in module.modules()] == [True, False, True]


def test_features_do_not_depend_on_the_batch(encoder, source):
    a, _ = extract(encoder, source, 60)
    b, _ = extract(encoder, source, 7)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_some_rows_have_the_features_they_have_among_all(encoder, source):
    everything, _ = extract(encoder, source)
    rows = torch.tensor([3, 11, 50])
    some, read = features_of(encoder, source, rows)
    assert torch.equal(read, rows)
    torch.testing.assert_close(some, everything[rows], atol=1e-5, rtol=1e-4)


def test_the_encoder_runs_once(encoder, source, tmp_path, monkeypatch):
    first, _ = features_of(encoder, source, cache=tmp_path)
    monkeypatch.setattr(features, "extract", None)
    again, rows = features_of(encoder, source, cache=tmp_path)
    assert torch.equal(first, again)
    assert torch.equal(rows, torch.arange(60))


def test_other_weights_images_or_preprocessing_are_other_features(encoder, source, tmp_path):
    features_of(encoder, source, cache=tmp_path)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.conv1[0].weight.view(-1)[0] += 1e-3
    features_of(other, source, cache=tmp_path)
    features_of(encoder, open_source("mnist5k", "test", in_chans=1, limit=59), cache=tmp_path)
    differently = copy.deepcopy(encoder)
    differently.preprocess = type(encoder.preprocess)(28, mean=[0.1], std=[0.3], in_chans=1)
    features_of(differently, source, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def _of_maps(pool):
    torch.manual_seed(0)
    small = {"channels": [8, 16, 24, 32], "layers": [1, 1, 1, 1]}
    encoder = create_encoder("resnet18", 28, in_chans=1, pool=pool, **small)
    encoder.preprocess = Preprocess(28, mean=[0.1], std=[0.3], in_chans=1)
    return encoder.eval()


def test_the_same_weights_read_otherwise_are_other_features(source, tmp_path):
    widths = [features_of(_of_maps(pool), source, cache=tmp_path)[0].shape[1] for pool in (1, 2)]
    assert widths == [32, 128]


def test_an_encoder_of_maps_goes_to_other_processes(source):
    two, _ = features_of(_of_maps(2), source, devices=2)
    one, _ = features_of(_of_maps(2), source)
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)


def test_a_damaged_cache_is_made_again(encoder, source, tmp_path):
    x, _ = features_of(encoder, source, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    again, _ = features_of(encoder, source, cache=tmp_path)
    assert torch.equal(x, again)


def test_files_that_are_missing_are_left_out_and_any_name_is_a_name(encoder, tmp_path):
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    files = [os.path.join(os.fsencode(tmp_path), name) for name in (b"a.png", b"\xff.png")]
    for file in files:
        with open(file, "wb") as binary:
            Image.new("L", (28, 28)).save(binary, "PNG")
    paths = [str(tmp_path / "none.png"), *map(os.fsdecode, files), str(tmp_path / "dangling.png")]
    source = Source("list", Table(paths, ["0", "1", "2", "3"]), 1, max_broken=0.5)
    _, rows = features_of(encoder, source, cache=tmp_path / "cache")
    assert rows.tolist() == [1, 2]
    before = content_hash(source)
    (tmp_path / "nowhere.png").write_bytes((tmp_path / "a.png").read_bytes())
    assert content_hash(source) != before, "an image that is there again is another"


def test_the_cache_stays_bounded(encoder, source, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_BYTES", 6_000)
    for limit in (10, 20, 30, 40):
        part = open_source("mnist5k", "test", in_chans=1, limit=limit)
        features_of(encoder, part, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_an_encoder_without_preprocessing_is_refused(source):
    with pytest.raises(UserError, match="has no preprocess"):
        features_of(nn.Flatten(), source)


def test_features_that_are_not_finite_are_refused(encoder, source):
    broken = nn.Flatten()
    broken.preprocess = encoder.preprocess
    broken.register_forward_hook(lambda *_: torch.full((60, 3), torch.nan))
    with pytest.raises(UserError, match="not finite"):
        features_of(broken, source)


def _on_a_rank(rank, world_size, encoder, folder):
    source = open_source("mnist5k", "test", in_chans=1, limit=31)
    seen = []
    handle = encoder.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    x, rows = features_of(encoder, source, cache=folder / str(rank))  # rank 1 keeps nothing
    again, _ = features_of(encoder, source, cache=folder / str(rank))
    handle.remove()
    return x, rows, sum(seen), bool(torch.equal(x, again))


def test_ranks_share_the_work_and_have_all_features(encoder, on_ranks, tmp_path):
    source = open_source("mnist5k", "test", in_chans=1, limit=31)
    expected, _ = extract(encoder, source)
    (a, rows, images, _), (b, _, others, _) = on_ranks(2, _on_a_rank, encoder, tmp_path)
    torch.testing.assert_close(a, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(a, b)
    assert torch.equal(rows, torch.arange(31))
    assert {images, others} == {2 * 16, 2 * 15}


def _digits(number, broken=()):
    source = open_source("mnist5k", "test", in_chans=1, limit=number)
    records = [b"" if i in broken else source[i][0].numpy() for i in range(number)]
    ids = [str(i) for i in range(number)]
    return Source("digits", Table(records, ids), 1, max_broken=0.2)


def test_processes_give_the_features_of_one_in_the_sources_order(encoder, tmp_path):
    rows = torch.tensor([9, 3, 7, 0, 11, 1, 2])
    source = _digits(12, broken=(3, 0))  # two of seven, but two of three for the second process
    source.max_broken = 0.3
    one, read = features_of(encoder, source, rows, cache=tmp_path / "one")
    two, also = features_of(encoder, source, rows, cache=tmp_path / "two", devices=2)
    assert read.tolist() == also.tolist() == [9, 7, 11, 1, 2]
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)
    kept = [[file.name for file in (tmp_path / n).iterdir()] for n in ("one", "two")]
    assert kept[0] == kept[1], "the same file keeps them"
    again, _ = features_of(encoder, source, rows, cache=tmp_path / "two", devices=2)
    assert torch.equal(again, two)


@pytest.mark.parametrize("devices", [1, 2])
def test_too_many_broken_images_are_too_many_for_any_number_of_processes(encoder, devices):
    with pytest.raises(UserError, match=r"digits: 3 of 12 images are broken.* first is 1 "):
        features_of(encoder, _digits(12, broken=(1, 5, 8)), devices=devices)


class _Intolerant(nn.Module):
    """Features that are not finite for a white image."""

    def __init__(self):
        super().__init__()
        self.preprocess = Preprocess(28, mean=[0.0], std=[1.0], in_chans=1)

    def forward(self, images):
        return 1 / (1 - images.mean((2, 3)))


def test_an_error_of_one_process_ends_all_in_one_line():
    source = _digits(7)
    source.records[3][:] = 255
    with pytest.raises(UserError, match=r"^the encoder's features are not finite[^\n]*$"):
        features_of(_Intolerant(), source, devices=2)


def test_an_image_that_can_be_read_again_is_no_longer_left_out(pixels, noise, tmp_path):
    source = open_source(str(noise), "test", in_chans=1)
    file = noise / "test" / "a" / "03.png"
    whole, time = file.read_bytes(), file.stat().st_mtime_ns
    file.write_bytes(bytes(len(whole)))  # as if it could not be opened: the size is the same
    os.utime(file, ns=(time, time))
    _, rows = features_of(pixels, source, cache=tmp_path / "kept")
    assert len(rows) == 39
    seen = []
    pixels.register_forward_hook(lambda *_: seen.append(1))
    features_of(pixels, source, cache=tmp_path / "kept")
    assert not seen, "what it lacks can still not be read"
    file.write_bytes(whole)
    os.utime(file, ns=(time, time))
    x, rows = features_of(pixels, source, cache=tmp_path / "kept")
    assert len(rows) == 40
    assert torch.equal(x, features_of(pixels, source)[0])


def test_features_that_somebody_else_kept_are_read(source, tmp_path, monkeypatch, caplog):
    path = tmp_path / "kept.safetensors"
    feature_cache.save(path, torch.eye(3), torch.arange(3))

    def refuse(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "utime", refuse)
    x, _ = feature_cache.load(path)
    assert torch.equal(x, torch.eye(3))
    assert not caplog.text
