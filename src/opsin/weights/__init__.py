"""Floor 2: rules meet tensors. Find, account for every key, load, save, export.

Names are looked up on first use, so that importing this package does not import torch.
"""

from typing import TYPE_CHECKING

from opsin.lazy import lookup

if TYPE_CHECKING:
    from opsin.weights.adapted import load_adapter as load_adapter
    from opsin.weights.adapter_exporter import save_adapter as save_adapter
    from opsin.weights.config import describe as describe
    from opsin.weights.exporter import ExportReport as ExportReport
    from opsin.weights.exporter import export as export
    from opsin.weights.exporter import save_native as save_native
    from opsin.weights.hub import resolve as resolve
    from opsin.weights.init import build as build
    from opsin.weights.init import initialise as initialise
    from opsin.weights.loader import Model as Model
    from opsin.weights.loader import load as load
    from opsin.weights.loader import load_part as load_part
    from opsin.weights.retrieval import RetrievalModel as RetrievalModel
    from opsin.weights.retrieval import build_retriever as build_retriever
    from opsin.weights.retrieval import export_retriever as export_retriever
    from opsin.weights.retrieval import load_retriever as load_retriever

# Modules are named otherwise than the functions in them: importing `opsin.weights.load` would hide `weights.load`.
_HOMES = {
    "resolve": "hub",
    "describe": "config",
    "load_adapter": "adapted",
    "save_adapter": "adapter_exporter",
    "build": "init",
    "initialise": "init",
    "load": "loader",
    "load_part": "loader",
    "Model": "loader",
    "RetrievalModel": "retrieval",
    "build_retriever": "retrieval",
    "export_retriever": "retrieval",
    "load_retriever": "retrieval",
    "export": "exporter",
    "save_native": "exporter",
    "ExportReport": "exporter",
}

__getattr__ = lookup(__name__, _HOMES)
