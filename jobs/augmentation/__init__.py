"""Random views of images, in batch on the device."""
