"""From prompts to pixels: the request, the jitted programs, and the pipeline that runs them."""
