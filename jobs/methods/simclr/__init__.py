"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., 2020)."""
