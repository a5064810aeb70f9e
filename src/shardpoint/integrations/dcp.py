"""What checkpoints of PyTorch's DCP can be turned from and into: import both functions from here."""

from shardpoint.integrations.dcp_export import ExportResult, export_dcp
from shardpoint.integrations.dcp_import import import_dcp
from shardpoint.integrations.dcp_metadata import Keys

__all__ = ["ExportResult", "Keys", "export_dcp", "import_dcp"]
