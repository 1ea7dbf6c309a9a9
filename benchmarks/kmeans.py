"""How fast is k-means? This project's, in fp32 and bf16, beside scikit-learn's and faiss's, from the same centroids.

    python benchmarks/kmeans.py --points 50000 200000 --clusters 1000
    python benchmarks/kmeans.py --points 1000000 --clusters 10000 --only bf16      # on a GPU, if there is one

Points are drawn from a mixture of directions of uneven weight, as embeddings are. The ways are taken in turn, with as
many iterations, seeding left out. The objective is the mean squared distance.
faiss must be installed (pip install faiss-cpu), or left out by --only.
"""

import argparse
from collections.abc import Callable

import kit
import numpy as np
import torch

from dino import cli
from dino.curation.kmeans import kmeans
from dino.curation.points import Points

WAYS = ("sklearn", "faiss", "fp32", "bf16")


def main() -> None:
    arguments = parse()
    device = kit.begin(arguments)
    for count in arguments.points:
        data = mixture(count, arguments.width)
        initial = data[np.random.default_rng(1).choice(count, arguments.clusters, replace=False)]
        ways = {name: way(name, data, initial, arguments.iterations, device) for name in arguments.only}
        objectives = {name: mean_distance(data, cluster()) for name, cluster in ways.items()}  # and warms up
        seconds = kit.alternate(ways, arguments.rounds, device, warm_up=0)
        title = f"{count:,} × {arguments.width}, k = {arguments.clusters:,}, an iteration"
        kit.show(title, {name: taken / arguments.iterations for name, taken in seconds.items()})
        print("objective:", ", ".join(f"{name} {value:.5f}" for name, value in objectives.items()), "\n")


def way(name: str, data: np.ndarray, initial: np.ndarray, iterations: int, device: torch.device) -> Callable:
    """A function that clusters and gives the centroids (k, D)."""
    if name == "sklearn":
        from sklearn.cluster import KMeans

        readout = KMeans(len(initial), init=initial, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
        return lambda: readout.fit(data).cluster_centers_
    if name == "faiss":
        import faiss

        def by_faiss() -> np.ndarray:
            clustering = faiss.Kmeans(
                data.shape[1], len(initial), niter=iterations, max_points_per_centroid=len(data), seed=0
            )
            clustering.train(data, init_centroids=initial)
            return clustering.centroids

        return by_faiss
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    where = torch.from_numpy(data).to(device)

    def by_ours() -> np.ndarray:
        points = Points(where, device)
        return kmeans(points, len(initial), iterations, 0, precision, torch.from_numpy(initial)).centroids.cpu().numpy()

    return by_ours


def mixture(count: int, width: int) -> np.ndarray:
    """(count, width) fp32 of unit length: 2,000 directions, the n-th with a weight of 1/n."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(2000, width))
    weights = 1 / np.arange(1, 2001)
    chosen = generator.choice(2000, count, p=weights / weights.sum())
    points = centres[chosen] + 1.5 * generator.normal(size=(count, width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def mean_distance(data: np.ndarray, centroids: np.ndarray) -> float:
    """Mean squared distance to the nearest centroid."""
    total, half = 0.0, (centroids.astype(np.float32) ** 2).sum(axis=1)
    for block in np.array_split(data, max(1, len(data) // 4096)):
        total += float(((block**2).sum(axis=1) + (half - 2 * block @ centroids.T).min(axis=1)).sum())
    return total / len(data)


def parse() -> argparse.Namespace:
    parser = kit.parser(__doc__, rounds=3, official=False)
    parser.add_argument("--points", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
