"""The heavy arithmetic on many rows: each row's best two clusters, by whatever the machine has for it.

The price of a cluster is folded in as one dimension more: the inner product of [x, 1] and [2c, -(|c|^2 + p)] is |x|^2
minus the priced distance |x - c|^2 + p. A search is a function from rows to the two largest inner products.
"""

from collections.abc import Callable

import numpy as np

# float32 (M, d + 1) -> inner products float32 (M, 2), descending, and clusters int64 (M, 2)
Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def search_for(centroids: np.ndarray, prices: np.ndarray, device: str = "cpu") -> Search:
    """The search of the clusters, (K, d) and (K,).

    Args:
        device: "cpu", or what `best_device` returned.
    """
    table = np.column_stack([2 * centroids, -(np.square(centroids).sum(1) + prices)]).astype(np.float32)
    return {"cpu": _faiss_cpu, "faiss-gpu": _faiss_gpu, "cuda": _torch_cuda}[device](table)


def best_device() -> str:
    """Returns "faiss-gpu" where FAISS has a GPU that works, else "cuda" where torch has one, else "cpu"."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    try:
        _faiss_gpu(np.eye(2, dtype=np.float32))(np.eye(2, dtype=np.float32))
    except (AttributeError, RuntimeError):  # a CPU build, or one without code for this GPU
        return "cuda"
    return "faiss-gpu"


def _faiss_cpu(table: np.ndarray) -> Search:
    import faiss  # here, because trainer and eval import the tree where FAISS may not be installed

    index = faiss.IndexFlatIP(table.shape[1])
    index.add(table)
    return lambda x: index.search(x, 2)


def _faiss_gpu(table: np.ndarray) -> Search:
    import faiss

    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), table.shape[1])
    index.add(table)
    return lambda x: index.search(x, 2)


def _torch_cuda(table: np.ndarray) -> Search:
    import torch

    columns = torch.from_numpy(table.T.copy()).cuda()

    def search(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        top = (torch.from_numpy(x).cuda() @ columns).topk(2, dim=1)
        return top.values.cpu().numpy(), top.indices.cpu().numpy()

    return search
