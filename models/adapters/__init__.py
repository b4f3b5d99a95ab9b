"""LoRA adapters: the files of a directory, and those on a loaded pipeline."""
