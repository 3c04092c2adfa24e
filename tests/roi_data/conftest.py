from tiny_data import golden_data_dir, tiny_dataset, tiny_files

__all__ = ["golden_data_dir", "tiny_dataset", "tiny_files"]
