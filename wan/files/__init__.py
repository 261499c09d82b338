"""Files: written whole, plain data, videos."""
