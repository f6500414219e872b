"""Makes keyreel's model bundles from open_clip models. Needs the extra `export`; running a bundle does not."""

from keyreel.errors import import_extra

import_extra("torch", extra="export", purpose="exporting a model")

from keyreel_export.bundle import export_model  # noqa: E402 - torch must be known to be there

__all__ = ["export_model"]
