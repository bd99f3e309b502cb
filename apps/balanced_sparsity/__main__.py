"""Command line of the balanced_sparsity app: train, prune, evaluate, export, sweep, sparsify, serve, report, demo."""

from __future__ import annotations

from apps.balanced_sparsity.cli import app

if __name__ == "__main__":
    app.main()
