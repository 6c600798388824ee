"""A graph network of PyTorch Geometric on Zachary's karate club, which ships with the library."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from watched import check_model, layers


class Graph(nn.Module):
    def __init__(self) -> None:
        from torch_geometric.nn import GCNConv

        super().__init__()
        self.first, self.second = GCNConv(34, 8), GCNConv(8, 4)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x, edges)), edges)


def test_gcn_trains_with_its_linear_maps_preconditioned() -> None:
    datasets = pytest.importorskip("torch_geometric.datasets")
    data = datasets.KarateClub()[0]

    def loss(model: nn.Module) -> Tensor:
        logits = model(data.x.to(model.first.bias), data.edge_index)
        return F.cross_entropy(logits[data.train_mask], data.y[data.train_mask])

    optimizer = check_model(Graph(), loss, 2)
    first, second = layers(optimizer)
    assert (first.name, second.name) == ("first.lin.weight", "second.lin.weight")
    assert type(first.sources[0][0]).__module__.startswith("torch_geometric")
