"""Backends: one file, one handler. Imported as ``cphandler.backends``; the folder is linked there."""

from __future__ import annotations

if __name__ != "cphandler.backends":
    raise ImportError("import cphandler.backends: under another name its classes would exist twice")
