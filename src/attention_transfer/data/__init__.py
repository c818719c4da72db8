"""Images by name: `open_data` decodes or streams them; `Augment` or `Stream` make batches."""
