"""Checkpoints on disk: diffusers folders, our native folders and the authors' .pth files.

`find` leads from a name to a folder and `load` opens that folder. Each format has its own file.
"""
