"""Command line of the mcmisp app: ``python -m apps.mcmisp VERB``."""

from __future__ import annotations

from apps.program.cli import program

app = program("mcmisp", "Pre-train BERT and ELECTRA encoders that learn where their mistakes looked.")


def _add_verbs() -> None:
    """The verbs that other modules bring."""
    from apps.mcmisp.verbs import cooccurrence, evaluate, finetune, pretrain, report
    from apps.mcmisp.verbs_compare import compare

    for verb in (pretrain, compare, evaluate, finetune, report, cooccurrence):
        app.verb(verb)


if __name__ == "__main__":
    _add_verbs()
    app.main()
