"""Data sets: image folders, and small real images to try things with."""
