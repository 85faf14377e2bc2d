"""Exchange formats: diffusers and native folders, and the authors' .pth files.

`find` leads from a name to a folder, `load` opens what is there; every format is a file.
"""
