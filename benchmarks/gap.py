"""Where the errors of a frozen encoder's linear classifier come from.

    python benchmarks/gap.py CIFAR10 [--encoder cifar10-small]

Prints the top-1 of the linear classifier on its training images and on the test images, with the
labels of 50 training images a class and with all; the same if the representation of an image is the
mean of those of the image and its mirror; and for each class the share of its test images that is
classified rightly, with the class that most of the others are taken for. The difference of training
and test images shrinks with more labels; what is wrong on training images as well is missing in the
representation. CIFAR10 is `cifar10` or its images as another source; without it the benchmark is
skipped with a message.
"""

import argparse

import torch
from torch import Tensor, nn

import barlow
from barlow.evaluation.features import extract
from barlow.evaluation.knn import knn_scores
from barlow.evaluation.linear import logistic_probe
from barlow.evaluation.subsets import labels_per_class
from barlow.evaluation.task import open_task
from recipe import write_result


class Mirrored(nn.Module):
    """The mean of the representations of an image and of its mirror."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.preprocess = encoder, encoder.preprocess

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, F)`."""
        return (self.encoder(x) + self.encoder(x.flip(-1))) / 2


def confusion(scores: Tensor, y: Tensor) -> Tensor:
    """`(C, C)`: how many images of the row's class are taken for the column's."""
    classes = scores.shape[1]
    return torch.bincount(y * classes + scores.argmax(1), minlength=classes**2).view(classes, -1)


def top1(scores: Tensor, y: Tensor) -> float:
    return (scores.argmax(1) == y).float().mean().item()


def rows(encoder: nn.Module, name: str, data: str) -> list[dict[str, object]]:
    """A row for 50 labels a class and one for all; both are fitted to the same features."""
    task = open_task(data)
    parts = []
    for part in (task.train, task.test):
        x, at = extract(encoder, part.source)
        parts.append((x, part.labels_for(at)))
    (x, y), (x_test, y_test) = parts
    classes, found = task.names, []
    for images in (labels_per_class(y, 50), torch.arange(len(y))):
        fitted, of = x[images], y[images]
        classify, penalty = logistic_probe(fitted, of, len(classes))
        scores = classify(x_test)
        votes = knn_scores(x_test, fitted, of, (20,), (0.07,), len(classes))[20, 0.07]
        row = {"representation": name, "labels": len(of), "penalty": penalty}
        row |= {"train": top1(classify(fitted), of), "test": top1(scores, y_test)}
        row |= {"knn": top1(votes, y_test), "confusion": confusion(scores, y_test).tolist()}
        print(f"{name:<20}{len(of):>8,}{row['train']:>9.2%}{row['test']:>9.2%}", end="")
        print(f"{row['knn']:>9.2%}", flush=True)
        found.append(row)
    show_classes(confusion(scores, y_test), classes)
    return found


def show_classes(table: Tensor, classes: list[str]) -> None:
    """Each class with the share of its images that is right and its commonest confusion."""
    shares = table / table.sum(1, keepdim=True)
    for name, share, c in zip(classes, shares, range(len(classes)), strict=True):
        right, share[c] = float(share[c]), 0
        other = int(share.argmax())
        print(f"    {name:<12}{right:>7.1%}  taken for {classes[other]}: {share[other]:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="", help="CIFAR-10, as any source")
    parser.add_argument("--encoder", default="cifar10-small", help="as load_encoder takes it")
    options = parser.parse_args()
    if not options.data:
        print("skipped: give CIFAR-10: cifar10, or a folder of its Parquet files")
        return
    encoder = barlow.load_encoder(options.encoder)
    print(f"{options.encoder:<20}{'labels':>8}{'train':>9}{'test':>9}{'k-NN':>9}")
    found = rows(encoder, "an image", options.data)
    found += rows(Mirrored(encoder), "image and mirror", options.data)
    command = f"gap.py CIFAR10 --encoder {options.encoder}"
    write_result("gap", command, found, encoder=options.encoder)


if __name__ == "__main__":
    main()
