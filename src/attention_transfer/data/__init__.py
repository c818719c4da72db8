"""Image data sets: `open_data` decodes or streams them; `Augment` or `Stream` makes batches."""
