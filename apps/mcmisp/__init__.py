"""The mcmisp app: BERT and ELECTRA pre-training whose mis-predictions teach attention heads where to look (arXiv 2012.08789)."""
