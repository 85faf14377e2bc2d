"""Pages for a browser: reports of runs, galleries of pictures, and the local demo."""
