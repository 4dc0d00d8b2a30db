"""Training code: settings, methods, models, augmentation, data. This package itself imports nothing."""
