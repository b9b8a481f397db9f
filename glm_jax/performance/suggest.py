"""Tries meshes, rows a device and remat policies, and keeps the fastest that fits."""
