"""One module a claim: ``python -m benchmarks.<name> [--quick] --out DIR`` runs it, prints a table and writes JSON."""
