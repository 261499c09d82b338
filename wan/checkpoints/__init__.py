"""Weight files: layouts, strict streaming, LoRA, single files, saving."""
