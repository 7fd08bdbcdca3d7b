"""Names that transformers knows us by."""

ATTENTION = "roberta_kernels"  # attn_implementation
