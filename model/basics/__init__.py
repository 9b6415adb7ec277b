"""Two programs to copy, in nothing but the public API of KServe, Ray Serve and torch."""
