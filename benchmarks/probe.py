"""The probes on the features of an encoder: how long each takes, what it finds, beside its peers.

    python benchmarks/probe.py CIFAR10_FOLDER ENCODER... [--epochs 100] [--scikit-learn]

ENCODER is a run or the name of a timm architecture, which is then left untrained. Features are
computed once and cached; everything else works on them. Prints a table per encoder and writes
`benchmarks/results/probe-DATE.json`.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import barlow
from barlow.data import Preprocess
from barlow.environment import environment
from barlow.evaluation.features import cache_folder, features_of
from barlow.evaluation.knn import knn_scores
from barlow.evaluation.linear import LinearClassifier, logistic_probe, standardisation
from barlow.evaluation.sgd import sgd_probe
from barlow.evaluation.task import open_task
from barlow.tables import text_table

Split = tuple[Tensor, Tensor]


def features(data: str, name: str) -> tuple[Split, Split, float]:
    """Training and test features with labels, and the seconds they took (0 if they were cached)."""
    if Path(name).exists():
        encoder = barlow.load_encoder(name)
    else:
        torch.manual_seed(0)
        # The standard stem makes a poor encoder of 32-pixel images, but runs twenty times as fast.
        encoder = barlow.create_encoder(name, image_size=32, stem="standard").eval()
        encoder.preprocess = Preprocess(32)
    task = open_task(data)
    cache = cache_folder()
    kept = len(list(cache.glob("*"))) if cache.exists() else 0
    start = time.perf_counter()
    found = []
    for part in (task.train, task.test):
        x, rows = features_of(encoder, part.source, part.rows, cache=cache)
        found.append((x, part.labels_for(rows)))
    seconds = time.perf_counter() - start
    return found[0], found[1], seconds if len(list(cache.glob("*"))) > kept else 0.0


def timed(action: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """The result of the action, and the seconds of its fastest run."""
    fastest, value = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        value = action()
        fastest = min(fastest, time.perf_counter() - start)
    return value, fastest


def accuracy(scores: Tensor, y: Tensor) -> float:
    return float((scores.argmax(1) == y).float().mean())


def scikit_learn(train: Split, penalty: float) -> LinearClassifier:
    """scikit-learn's minimum of the same objective, at the penalty that we chose: no search."""
    from sklearn.linear_model import LogisticRegression

    standardise = standardisation(train[0])
    model = LogisticRegression(C=1 / (len(train[0]) * penalty), max_iter=1000)
    model.fit(standardise(train[0]).numpy(), train[1].numpy())
    weight = torch.tensor(model.coef_.T, dtype=torch.float32) * standardise.scale[:, None]
    bias = torch.tensor(model.intercept_, dtype=torch.float32) - standardise.mean @ weight
    return LinearClassifier(weight, bias)


def with_data_loader(train: Split, test: Split, rate: float, epochs: int) -> Tensor:
    """The probe as it is usually written: nn.Linear, SGD, a DataLoader over cached features."""
    standardise = standardisation(train[0])
    data = torch.utils.data.TensorDataset(standardise(train[0]), train[1])
    loader = torch.utils.data.DataLoader(data, 256, shuffle=True, drop_last=True)
    layer = torch.nn.Linear(train[0].shape[1], int(train[1].max()) + 1)
    optimiser = torch.optim.SGD(layer.parameters(), rate, momentum=0.9, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(loader))
    for _ in range(epochs):
        for x, y in loader:
            optimiser.zero_grad()
            F.cross_entropy(layer(x), y).backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        return layer(standardise(test[0]))


def lightly_votes(train: Split, test: Split) -> Tensor:
    from lightly.utils.benchmarking import knn_predict

    bank = F.normalize(train[0]).T.contiguous()
    classes = int(train[1].max()) + 1
    batches = F.normalize(test[0]).split(256)  # lightly's own classifier takes the loader's batches
    ranked = [knn_predict(q, bank, train[1], classes, 200, 0.1) for q in batches]
    return F.one_hot(torch.cat(ranked)[:, 0], classes).float()


def _status(field: str) -> float:
    """A field of /proc/self/status in MiB; NaN on systems other than Linux."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) / 2**10 if found else float("nan")


def _memory_of_knn(file: str, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    (x, y), (queries, _) = torch.load(file)
    targets = F.one_hot(y).float()
    before = _status("VmRSS")
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # forget the peak of loading
    knn_scores(queries, x, targets)
    answer.put(_status("VmHWM") - before)


def memory_of_knn(train: Split, test: Split) -> float:
    """MiB that the search needs beyond the features, measured in a process of its own."""
    import tempfile

    context = multiprocessing.get_context("spawn")
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save((train, test), file.name)
        answer = context.Queue()
        process = context.Process(
            target=_memory_of_knn, args=(file.name, torch.get_num_threads(), answer)
        )
        process.start()
        mib = answer.get()
        process.join()
    return float(mib)


def measure(data: str, encoder: str, epochs: int, with_scikit_learn: bool) -> dict[str, Any]:
    """Run all probes on the features of one encoder and print a table."""
    load = os.getloadavg()[0]
    train, test, seconds_features = features(data, encoder)
    classes = int(train[1].max()) + 1
    y = test[1]
    rows: list[dict[str, Any]] = []

    def note(name: str, seconds: float, scores: Tensor, remark: str = "") -> None:
        rows.append(
            {"name": name, "seconds": seconds, "accuracy": accuracy(scores, y), "remark": remark}
        )

    (classifier, penalty), seconds = timed(lambda: logistic_probe(*train, classes), 3)
    note("linear: logistic regression", seconds, classifier(test[0]), f"penalty {penalty:g} chosen")
    (fixed, _), seconds = timed(lambda: logistic_probe(*train, classes, penalty), 3)
    note("  at that penalty", seconds, fixed(test[0]))
    if with_scikit_learn:  # takes minutes
        theirs, seconds = timed(lambda: scikit_learn(train, penalty))
        note("  scikit-learn at that penalty", seconds, theirs(test[0]))
    (by_sgd, rate), seconds = timed(lambda: sgd_probe(*train, classes, epochs))
    note(f"SGD, {epochs} epochs, 6 rates", seconds, by_sgd(test[0]), f"rate {rate:g} chosen")
    (by_sgd, _), seconds = timed(lambda: sgd_probe(*train, classes, epochs, rate))
    note("  at that rate", seconds, by_sgd(test[0]))
    few = max(1, epochs // 20)
    scores, seconds = timed(lambda: with_data_loader(train, test, rate, few))
    remark = f"{few} epochs took {seconds:.1f} s, scaled up; accuracy after those"
    note("  nn.Linear and DataLoader", seconds * epochs / few, scores, remark)
    targets = F.one_hot(train[1], classes).float()
    found, seconds = timed(lambda: knn_scores(test[0], train[0], targets), 3)
    mib = memory_of_knn(train, test)
    remark = f"{mib:.0f} MiB beyond the features"
    note("k-NN, all four settings", seconds, found[200, 0.1], remark)
    try:
        votes, seconds = timed(lambda: lightly_votes(train, test))
        note("  lightly's knn_predict, k = 200", seconds, votes)
    except ImportError:
        print("lightly is not installed: pip install '.[bench]'")
    lines = [[encoder, "seconds", "top-1", ""]]
    lines += [
        [row["name"], f"{row['seconds']:.2f}", f"{row['accuracy']:.2%}", row["remark"]]
        for row in rows
    ]
    print(text_table(lines))
    print(f"{len(train[0])} x {train[0].shape[1]} training, {len(test[0])} test features\n")
    return {
        "encoder": encoder,
        "training_features": list(train[0].shape),
        "test_features": list(test[0].shape),
        "seconds_of_features": seconds_features,
        "load_before": load,
        "knn_mib": mib,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", help="folder with CIFAR-10 as Parquet files")
    parser.add_argument(
        "encoder", nargs="*", default=["resnet18"], help="run, or timm architecture"
    )
    parser.add_argument("--epochs", type=int, default=100, help="of the SGD probe")
    parser.add_argument("--scikit-learn", action="store_true", help="time its regression too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not args.data:
        print("skipped: give a folder with CIFAR-10 as Parquet files")
        return
    if not Path(args.data).exists():
        sys.exit(f"skipped: no data at {args.data}")
    found = [measure(args.data, e, args.epochs, args.scikit_learn) for e in args.encoder]
    a, b = torch.randn(2, 2048, 2048)
    _, product = timed(lambda: a @ b, 10)
    record = {
        "command": " ".join(["python benchmarks/probe.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "environment": environment(),
        "matrix_product_gflops": 2 * 2048**3 / product / 1e9,
        "encoders": found,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"probe-{date.today().isoformat()}.json"
    file.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
