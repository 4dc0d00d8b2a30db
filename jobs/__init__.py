"""Training code: settings, methods, models, augmentation, data. Import from the sub-packages; this one imports nothing."""
