"""Image classification: folders, formats, augmentation, models, accuracy."""
