"""Send weights from this process's GPU straight to the GPUs of a vLLM server over NCCL. Written for
vLLM 0.32; not yet run on a GPU.

vLLM's workers join a communicator whose unique id this process creates (vLLM's protocol for
trainers without a store) and take part in one small all-reduce; then rank 0 broadcasts every tensor
in the order announced to the server.
"""

import base64
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.cuda import nccl


class Link:
    """Rank 0 of a communicator with all workers of one server."""

    def __init__(self, workers: int, device: torch.device):
        self.size, self.device, self.id = 1 + workers, device, nccl.unique_id()

    def init_info(self) -> dict[str, object]:
        """Return the arguments for init_weight_transfer_engine."""
        unique = base64.b64encode(bytes(self.id)).decode()
        return {
            "nccl_unique_id_b64": unique,
            "rank_offset": 1,
            "world_size": self.size,
            "packed": False,
        }

    def join(self) -> None:
        """Join the workers' communicator; returns once all are present."""
        with torch.cuda.device(self.device):
            self.comm = nccl.init_rank(self.size, self.id, 0)
            nccl.all_reduce([torch.zeros(1, device=self.device)], comms=[self.comm])

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast each tensor to every worker."""
        with torch.cuda.device(self.device):
            for tensor in tensors:
                nccl.broadcast([tensor.to(self.device).contiguous()], root=0, comms=[self.comm])
            torch.cuda.synchronize()
