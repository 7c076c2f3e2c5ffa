"""How a snapshot reaches CPU memory or a file, and how much room it takes."""
