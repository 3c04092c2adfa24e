from tiny_data import tiny_dataset, tiny_files

__all__ = ["tiny_dataset", "tiny_files"]
